"""A base is what its files hold, whatever their names, sizes and times say. Run: pytest tests/test_fingerprint.py"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import tiny_model
from test_run import go, result
from test_store import LORA_ONLY, SHORT
from transformers import PreTrainedTokenizerFast

from cola import model as model_file
from cola.errors import ModelError
from cola.job import JobRun
from cola.model import Source

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


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had lain there for a while, so that digests are remembered at once."""
    monkeypatch.setattr(model_file, "SETTLED_SECONDS", -1e9)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_model_of_the_same_size_and_times_in_the_same_folder_is_another_base(
    recipe_file: Path, tmp_path: Path, twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(monkeypatch)
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
def test_a_digest_is_that_of_the_content_whatever_the_times_are_set_to(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(monkeypatch)
    path, other = tmp_path / "weights", tmp_path / "other"
    for content in (b"one", b"two", b"six"):
        if how == "moved over it":
            other.write_bytes(content)
            other.rename(path)
        else:
            time.sleep(0.02)  # more than a tick of the file system's clock
            path.write_bytes(content)
        os.utime(path, EPOCH)
        assert model_file._file_digest(path) == sha256(path)


def test_what_has_just_changed_is_read_again_and_what_has_lain_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = tmp_path / "weights", Path(os.environ["COLA_CACHE"]) / "digests"
    path.write_bytes(b"one")
    assert model_file._file_digest(path) == sha256(path)
    assert not notes.exists()
    monkeypatch.setattr(model_file, "time", lambda: time.time() + 10)
    assert model_file._file_digest(path) == sha256(path)
    [note] = notes.iterdir()
    note.write_text(json.dumps({"sha256": "remembered"}))
    assert model_file._file_digest(path) == "remembered"


def test_a_base_that_changes_while_a_run_is_at_work_is_refused_and_nothing_is_made_of_it(
    recipe_file: Path, tmp_path: Path, twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, hand_out = tmp_path / "model", JobRun._hand_out
    put(twins[0], place)

    def changes(self: JobRun, step: int) -> None:
        hand_out(self, step)
        put(twins[1], place)

    with monkeypatch.context() as patch:
        patch.setattr(JobRun, "_hand_out", changes)
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
