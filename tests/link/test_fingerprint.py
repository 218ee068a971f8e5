"""A base is what its files hold, whatever their names, sizes and times say.

Run: pytest tests/link/test_fingerprint.py
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import tiny_model
from runs import LORA_ONLY, SHORT, go, result
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cola.data.encode import tokenizer_fingerprint
from cola.errors import ModelError
from cola.link import checkpoint
from cola.link.model import Source
from cola.run import job as cola_job
from cola.run.assignment import Assignment

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCH = (0, 0)  # the times that reproducible archives and images give every file


@pytest.fixture
def twins(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """Two models of one size whose files have the same times."""
    folders = tmp_path / "a", tmp_path / "b"
    for seed, folder in enumerate(folders):
        tiny_model(seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            os.utime(path, EPOCH)
    return folders


def put(model: Path, place: Path) -> None:
    """A model in another one's place, as `rm -rf` and `cp -rp` leave it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place, copy_function=shutil.copy2)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_another_model_of_the_same_size_and_times_in_the_same_folder_is_another_base(
    recipe_file: Path, tmp_path: Path, twins: tuple[Path, Path]
) -> None:
    place, found = tmp_path / "model", []
    stats = []
    for twin in twins:
        put(twin, place)
        stats.append([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(place.iterdir())])
        folder, _ = go(recipe_file, *SHORT, *LORA_ONLY, f"model.name_or_path={place}")
        alone, _ = go(recipe_file, *SHORT, *LORA_ONLY, f"model.name_or_path={twin}", f"store={tmp_path / 'own'}")
        assert folder.scores("lora", 0, "test") == alone.scores("lora", 0, "test")
        sums = [json.loads((run.path / "provenance.json").read_text())["model"]["sha256"] for run in (folder, alone)]
        assert sums[0] == sums[1]
        found.append((sums[0], result(folder, "lora")["evaluation"]["test"]["loss"]))
    assert stats[0] == stats[1]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("how", ["moved over it", "written in place"])
def test_a_digest_is_that_of_the_content_whatever_the_times_are_set_to(tmp_path: Path, how: str) -> None:
    path, other = tmp_path / "weights", tmp_path / "other"
    for content in (b"one", b"two", b"six"):
        if how == "moved over it":
            other.write_bytes(content)
            other.rename(path)
        else:
            path.write_bytes(content)
        os.utime(path, EPOCH)
        assert checkpoint.content_digest(path) == sha256(path)


def test_two_processes_never_take_each_others_word_for_what_a_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two read-only images of one layout mounted at one place, or a write through a map that stays open on tmpfs: size,
    times, inode and device are the same, and the content is not."""
    path, seen = tmp_path / "weights", []
    path.write_bytes(b"one")
    image = path.stat()
    monkeypatch.setattr(checkpoint, "time", lambda: time.time() + 1e6)
    monkeypatch.setattr(type(path), "stat", lambda self, **_: image)
    for content in (b"one", b"two"):
        path.write_bytes(content)
        monkeypatch.setattr(checkpoint, "_digests", {})  # as another process begins
        seen.append(checkpoint.content_digest(path))
    assert seen == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]


def test_a_file_that_lies_still_is_read_once_by_a_process_and_one_that_has_just_changed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "weights", []
    path.write_bytes(b"one")
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: read.append(args) or digest(*args))
    for _ in range(2):
        assert checkpoint.content_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 2
    monkeypatch.setattr(checkpoint, "time", lambda: time.time() + 10)
    for _ in range(3):
        assert checkpoint.content_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 3


def test_a_base_that_changes_while_a_run_is_at_work_is_refused_and_nothing_is_made_of_it(
    recipe_file: Path, tmp_path: Path, twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, hand_out = tmp_path / "model", cola_job.hand_out
    put(twins[0], place)

    def changes(given: Assignment, step: int) -> None:
        hand_out(given, step)
        put(twins[1], place)

    with monkeypatch.context() as patch:
        patch.setattr(cola_job, "hand_out", changes)
        arms = [*SHORT, "arms.base=null", "arms.full=null", f"model.name_or_path={place}"]
        with pytest.raises(ModelError, match="has changed since this run began"):
            go(recipe_file, *arms)
    [folder] = (recipe_file.parent / "runs").iterdir()
    done = [path.parent.parent.name for path in folder.glob("arms/*/*/result.json")]
    assert done == ["lora"]


def test_a_fingerprint_is_over_the_config_and_the_weights(twins: tuple[Path, Path]) -> None:
    whole = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        whole.update(sha256(twins[0] / name).encode())
    assert Source("a", twins[0], trust_remote_code=False).fingerprint() == whole.hexdigest()


def test_code_in_subfolders_and_of_another_repository_is_in_the_fingerprint_where_it_may_run(
    tmp_path: Path, twins: tuple[Path, Path]
) -> None:
    place, code = tmp_path / "model", tmp_path / "code"
    put(twins[0], place)
    plain = Source("a", place, trust_remote_code=False).fingerprint()
    assert Source("a", place, trust_remote_code=True).fingerprint() == plain
    (place / "parts").mkdir()
    (place / "parts" / "attention.py").write_text("SCALE = 1\n")
    assert Source("a", place, trust_remote_code=False).fingerprint() == plain
    inside = [Source("a", place, trust_remote_code=True).fingerprint()]
    (place / "parts" / "attention.py").write_text("SCALE = 2\n")
    inside.append(Source("a", place, trust_remote_code=True).fingerprint())

    code.mkdir()
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "tiny_own", "auto_map": {"AutoConfig": f"{code}--own.OwnConfig"}}
    config["auto_map"]["AutoModelForCausalLM"] = f"{code}--own.Own"
    (place / "config.json").write_text(json.dumps(config))
    for scale in (1, 2):
        (code / "own.py").write_text(
            "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
            f"SCALE = {scale}\n"
            "class OwnConfig(Qwen2Config):\n    model_type = 'tiny_own'\n"
            "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
        )
        os.utime(code / "own.py", EPOCH)
        inside.append(Source("a", place, trust_remote_code=True).fingerprint())
    assert len({plain, *inside}) == 5


def test_what_a_tokenizers_files_say_beside_its_vocabulary_is_in_its_fingerprint_where_it_does_something(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    plain = tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))
    told = "\n".join([tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.special_tokens_map, sort_keys=True)])
    # As it was when the stores that there are were filled.
    assert plain == hashlib.sha256(f"{told}\n{tokenizer.chat_template}".encode()).hexdigest()
    text = "red<|im_end|> blue ."
    tokens = tokenizer(text).input_ids
    seen = {plain: [tokens, tokenizer.decode(tokens)]}
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    for change in ({"split_special_tokens": True}, {"clean_up_tokenization_spaces": True, forced: True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
        other = AutoTokenizer.from_pretrained(tmp_path)
        found = [other(text).input_ids, other.decode(tokens)]
        assert found != seen[plain]
        seen[tokenizer_fingerprint(other)] = found
    assert len(seen) == 3


def test_a_tokenizer_in_python_is_known_by_its_files_and_the_models_own_code_by_its_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    code = (
        "from transformers import PreTrainedTokenizer\n"
        "class Own(PreTrainedTokenizer):\n"
        "    vocab_files_names = {'rules_file': 'rules.txt'}\n"
        "    def get_vocab(self): return {'a': 0}\n"
        "    vocab_size = 1\n"
        "    def _tokenize(self, text, **_): return list(text)\n"
        "    def _convert_token_to_id(self, token): return 0\n"
        "    def _convert_id_to_token(self, index): return 'a'\n"
    )
    auto = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    seen = set()
    for rules, comment in (("one", ""), ("two", ""), ("two", "# another\n")):
        (tmp_path / "rules.txt").write_text(rules)
        (tmp_path / "own.py").write_text(code + comment)
        for path in tmp_path.iterdir():
            os.utime(path, EPOCH)
        seen.add(tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)))
    assert len(seen) == 3
