"""What a folder says of itself is honoured or refused: the files of its weights, the tokens that end an answer.

Run: pytest tests/link/test_checkpoint.py
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_data import data_of, refusal, write_rows
from transformers import AutoModelForCausalLM, GenerationConfig

from cola.data.encode import Example
from cola.data.splits import load_splits
from cola.errors import ModelError
from cola.link import find
from cola.link.base import Base
from cola.link.find import find_model
from cola.link.model import Source
from cola.measure.evaluate import Evaluator
from cola.recipe.data_section import Rows
from cola.recipe.schema import Model

CPU = torch.device("cpu")
ENDS = [0, 2]  # <|endoftext|>, which the tokenizer names, and <|im_end|>, which its chat template writes


def change(folder: Path, file: str, **said: Any) -> None:
    path = folder / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | said))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def found(folder: Path) -> Source:
    return find_model(Model(name_or_path=str(folder)))


def sharded(folder: Path, names: tuple[str, str] = ("pytorch_model-1.safetensors", "rest.safetensors")) -> None:
    """The weights in two files, without the note of their format that transformers writes."""
    weights = load_file(folder / "model.safetensors")
    keys = sorted(weights)
    parts = dict.fromkeys(keys[: len(keys) // 2], names[0]) | dict.fromkeys(keys[len(keys) // 2 :], names[1])
    for name in names:
        save_file({key: weights[key] for key in keys if parts[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    (folder / "model.safetensors").unlink()


def test_weights_are_read_from_the_files_that_the_index_names(folder: Path) -> None:
    sharded(folder)
    source = found(folder)
    assert [file.name for file in source.files] == ["pytorch_model-1.safetensors", "rest.safetensors"]
    model, plain = source.load("float32", CPU), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    base = Base(model, source.files)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        assert torch.equal(base.stored(name), plain.get_submodule(name).weight)
    before = source.fingerprint()
    weights = load_file(folder / "rest.safetensors")
    save_file({key: tensor + 1 for key, tensor in weights.items()}, folder / "rest.safetensors")
    assert found(folder).fingerprint() != before


def test_an_old_shard_beside_the_weights_is_not_read(folder: Path) -> None:
    before = found(folder).fingerprint()
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "model-00001-of-00002.safetensors")
    assert [file.name for file in found(folder).files] == ["model.safetensors"]
    assert found(folder).fingerprint() == before


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "only safetensors files inside the folder are read"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "only safetensors files inside the folder are read"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks 1 of the 1 files of its weights, the first is gone"),
        ({"weight_map": {}}, "has no weight_map that names a file for each weight"),
        ({"weight_map": [1]}, "has no weight_map that names a file for each weight"),
        ([], "is no JSON object"),
    ],
)
def test_an_index_that_cannot_be_followed_is_one_line(folder: Path, index: object, said: str) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said) as refused:
        found(folder)
    assert "\n" not in str(refused.value)


def test_shards_without_an_index_are_refused_by_what_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(ModelError, match=r"has weights.safetensors, and neither model.safetensors nor .*index.json"):
        found(folder)


def test_the_hub_is_asked_for_the_files_that_the_index_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(folder)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for name in whole:
        (folder / name).unlink()
    asked: list[list[str]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        for file in set(allow_patterns) & set(whole):
            (folder / file).write_bytes(whole[file])
        return str(folder)

    monkeypatch.setattr(find, "snapshot_download", snapshot_download)
    source = find_model(Model(name_or_path="some/model"))
    assert asked[1:] == [sorted(whole)]
    assert len(source.files) == 2


def test_a_model_whose_class_cannot_be_built_is_one_line(folder: Path) -> None:
    change(folder, "config.json", rope_parameters={"rope_type": "no-such-type", "rope_theta": 1.0})
    with pytest.raises(ModelError, match="transformers cannot build the model") as told:
        found(folder).skeleton()
    assert "\n" not in str(told.value)


def test_end_tokens_are_those_of_both_configs(folder: Path) -> None:
    change(folder, "config.json", eos_token_id=[0, 5])
    change(folder, "generation_config.json", eos_token_id=[2, 0])
    assert found(folder).ends() == [2, 0, 5]
    change(folder, "config.json", eos_token_id=None, text_config={"eos_token_id": 7})
    (folder / "generation_config.json").unlink()
    assert Source("x", folder, False).ends() == [7]
    change(folder, "generation_config.json", eos_token_id="<|im_end|>")
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id: '<|im_end|>' is no token's number"):
        Source("x", folder, False).ends()


ROWS = [{"q": f"{n} is it", "a": "yes no"} for n in range(24)]
COUNTS = Rows(train=8, validation=8, test=8)


def answers(path: Path, ends: list[int], **settings: Any) -> list[list[int]]:
    data = data_of(path, rows=COUNTS, answer="{a}", prompt="{q}", **settings)
    return [example.answers[0] for example in load_splits(data, tiny_tokenizer(), ends=ends).train]


def test_a_training_target_ends_with_the_token_that_fits(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    # As the template writes it after an assistant's message, where the model stops there.
    assert {answer[-1] for answer in answers(path, ENDS, chat=True)} == {2}
    assert {answer[-1] for answer in answers(path, [0], chat=True)} == {0}
    assert {answer[-1] for answer in answers(path, ENDS)} == {0}
    assert answers(path, []) == answers(path, [0]) == answers(path, ENDS)
    endless = tiny_tokenizer()
    endless.eos_token = None
    data = data_of(path, rows=COUNTS, answer="{a}", prompt="{q}")
    assert load_splits(data, endless, ends=[2]).train[0].answers[0][-1] == 2


def test_an_answer_that_holds_an_end_token_is_refused_by_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:-1], {"q": "23 is it", "a": "yes<|im_end|>no"}])
    data = data_of(path, rows=COUNTS, answer="{a}", prompt="{q}")
    assert load_splits(data, tiny_tokenizer())  # no end token of this model
    said = refusal(load_splits, data, tiny_tokenizer(), (), ENDS)
    assert "rows.jsonl:24: the right answer holds token 2, '<|im_end|>'" in said


def test_decoding_ends_at_every_end_token() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    yes, more = tokenizer(" yes").input_ids[0], tokenizer(" no").input_ids[0]
    follows = {5: yes, yes: 2, 2: more, more: more}  # said where a prompt ends in token 5

    prompts = [[7, 5], [7, 7, 7, 5]]
    rows = [Example(f"r{n}", prompt, [[yes, 0]], 0, [" yes"], None) for n, prompt in enumerate(prompts)]
    # With the weights of such a table: attention and MLP write nothing, the head maps a token to the one that follows.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(403, 32))
        for place, (token, follower) in enumerate(follows.items()):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[follower, place] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0)
    plain = model.generate(torch.tensor([[7, 5]]), max_new_tokens=6)
    assert tokenizer.decode(plain[0, 2:], skip_special_tokens=True) == " yes"
    model.generation_config = GenerationConfig()

    def said(ends: list[int]) -> list[tuple[object, float | None]]:
        evaluator = Evaluator("answer", tokenizer, [], 4096, nullcontext, 3, (), ends)
        return [(score.prediction, score.score) for score in evaluator(model, rows)]

    assert said(ENDS) == [(" yes", 1.0)] * 2
    assert said([])[0][1] == 0.0  # it ran on, and the answer was wrong
    one, both = (Evaluator("answer", tokenizer, [], 9, nullcontext, 3, (), ends).causes() for ends in ([0], ENDS))
    assert "ends" not in one  # what was scored before with one end token keeps its name
    assert both == one | {"ends": ENDS}
