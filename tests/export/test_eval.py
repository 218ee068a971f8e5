"""cola eval: runs, exports and foreign models by one evaluator. Run: pytest tests/export/test_eval.py"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SKY, tiny_model
from peft import LoraConfig, get_peft_model
from runs import cola, unsealed
from safetensors.torch import load_file, save_file
from test_export import exported, plain, refused, reported, rows_of, with_adapter
from transformers import AutoTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ("train", "validation", "test")


def evaluated(tmp_path: Path, *words: object) -> tuple[dict[str, Any], str]:
    """What `cola eval` wrote and printed."""
    done = cola("eval", *words, "--out", tmp_path / "scores")
    assert done.exit_code == 0, done.output
    return json.loads((tmp_path / "scores/eval.json").read_text()), done.output


def result(run: Path, arm: str) -> dict[str, Any]:
    """What the run found on the recipe's data; the general text is the run's alone."""
    evaluation = json.loads((run / f"arms/{arm}/seed-0/result.json").read_text())["evaluation"]
    return {key: value for key, value in evaluation.items() if key != "general"}


@pytest.mark.slow
def test_a_run_is_scored_again_to_the_bit_arm_by_arm(many_arms: Path, tmp_path: Path) -> None:
    evaluation, said = evaluated(tmp_path, many_arms, "--data", many_arms)
    arms = sorted(path.name for path in (many_arms / "arms").iterdir())
    assert sorted(evaluation) == [f"{arm} seed 0" for arm in arms]
    for arm in arms:
        assert evaluation[f"{arm} seed 0"] == result(many_arms, arm)
        for split in SPLITS:
            lines = (tmp_path / f"scores/scores/{arm}-seed-0/{split}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == reported(many_arms, arm, split=split)
    assert "in the run" in said
    numbers = result(many_arms, "chain3")["test"]
    cells = f"{numbers['loss']:.4f}  {numbers['score']:.4f}"
    line = next(line for line in said.splitlines() if line.split()[:4] == ["chain3", "seed", "0", "test"])
    assert " ".join(line.split()).count(cells.replace("  ", " ")) == 2


@pytest.mark.parametrize(
    ("arm", "form", "close"),
    [
        ("chain3", "adapter", 1e-5),
        ("prefix", "adapter", 0.0),
        ("nf4", "adapter", 1e-5),
        ("int8", "adapter", 1e-5),
        ("dora", "adapter", 1e-5),
        ("full", "merged", 0.0),
        ("stepdown", "merged", 1e-5),
        ("bf16", "merged", 0.0),
    ],
)
def test_an_export_scores_as_the_run_did_and_the_table_shows_both(
    many_arms: Path, tmp_path: Path, arm: str, form: str, close: float
) -> None:
    folder = exported(many_arms, arm, form)
    # The data may as well be named by the recipe.
    evaluation, said = evaluated(tmp_path, folder, "--data", many_arms / "recipe.yaml")
    assert list(evaluation) == [folder.name]
    for split in SPLITS:
        expected = result(many_arms, arm)[split]
        assert evaluation[folder.name][split]["loss"] == pytest.approx(expected["loss"], rel=close, abs=0)
        assert evaluation[folder.name][split]["score"] == expected["score"]
        [line] = [line.split() for line in said.splitlines() if line.split()[1:2] == [split]]
        assert line[-2:] == [f"{expected['loss']:.4f}", f"{expected['score']:.4f}"]
        lines = (tmp_path / f"scores/scores/{split}.jsonl").read_text().splitlines()
        assert len(lines) == expected["n"]


def test_one_split_alone_loads_all_and_scores_that(many_arms: Path, tmp_path: Path) -> None:
    folder = exported(many_arms, "chain3", "merged")
    evaluation, said = evaluated(tmp_path, folder, "--data", many_arms, "--split", "test", "--split", "validation")
    assert list(evaluation[folder.name]) == ["test", "validation"]
    assert "scoring train" not in said
    assert sorted(path.name for path in (tmp_path / "scores/scores").iterdir()) == ["test.jsonl", "validation.jsonl"]


def test_a_sample_of_train_is_scored_as_the_data_says_and_not_set_beside_what_a_run_found_of_all(
    many_arms: Path, tmp_path: Path
) -> None:
    data = tmp_path / "sample.yaml"
    text = (many_arms / "recipe.yaml").read_text()
    assert text.count("evaluation:\n") == 1
    data.write_text(text.replace("evaluation:\n", "evaluation:\n  train_rows: 5\n"))
    evaluation, said = evaluated(tmp_path, many_arms, "--arm", "lora", "--data", data)
    [found] = evaluation.values()
    assert found["train"]["n"] == 5
    rows = [json.loads(line) for line in (tmp_path / "scores/scores/train.jsonl").read_text().splitlines()]
    known = {row["id"]: row["nats"] for row in reported(many_arms, "lora", split="train")}
    assert [row["nats"] for row in rows] == pytest.approx([known[row["id"]] for row in rows], rel=1e-4)
    lines = {line.split()[3]: line.split() for line in said.splitlines() if line.split()[:3] == ["lora", "seed", "0"]}
    assert lines["train"][-2:] == ["–", "–"]
    assert lines["test"][-2:] == lines["test"][-4:-2]


def test_a_model_from_elsewhere_is_scored_as_the_base_arm_is(
    many_arms: Path, warm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, said = evaluated(tmp_path, warm_folder, "--data", many_arms)
    assert evaluation[warm_folder.name] == result(many_arms, "base")
    assert "in the run" not in said  # it is not known where it came from
    monkeypatch.chdir(warm_folder)
    done = cola("eval", ".", "--data", many_arms, "--split", "test")
    assert done.exit_code == 0, done.output
    assert f"{warm_folder.name}: scoring test" in done.output


def foreign_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """By PEFT alone, its weights drawn at random."""
    torch.manual_seed(3)
    model = get_peft_model(plain(base), LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_loss(model: Any, base: Path, run: Path, arm: str) -> float:
    """Nats per token of the test rows' answers, by plain code."""
    from test_export import losses

    tokens = [score["tokens"] for score in reported(run, arm)]
    return sum(losses(model, base, run, arm)) / sum(tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "the head", "the embeddings", "the head whole"],
)
def test_an_adapter_of_plain_peft_is_scored_on_the_base_that_is_named(
    many_arms: Path, warm_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = foreign_adapter(tmp_path / "foreign", warm_folder, **settings)
    evaluation, _ = evaluated(tmp_path, folder, "--base", warm_folder, "--data", many_arms, "--split", "test")
    expected = plain_loss(with_adapter(warm_folder, folder), warm_folder, many_arms, "base")
    assert evaluation["foreign"]["test"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluation["foreign"]["test"]["loss"] != pytest.approx(result(many_arms, "base")["test"]["loss"], rel=1e-3)


def test_an_adapter_names_its_base_itself(many_arms: Path, warm_folder: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(tmp_path / "foreign", warm_folder, target_modules=["q_proj"])
    named, _ = evaluated(tmp_path, folder, "--data", many_arms, "--split", "test")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "does not say which base it is for; name it by --base" in refused("eval", folder, "--data", many_arms)
    moved, _ = evaluated(tmp_path / "b", folder, "--data", many_arms, "--split", "test", "--base", warm_folder)
    assert moved == named


@pytest.mark.slow
def test_quantization_and_dtype_may_be_asked_for(many_arms: Path, warm_folder: Path, tmp_path: Path) -> None:
    evaluation, _ = evaluated(tmp_path, warm_folder, "--data", many_arms, "--quantization", "nf4", "--split", "test")
    expected = plain_loss(plain(warm_folder, "nf4"), warm_folder, many_arms, "base")
    assert evaluation[warm_folder.name]["test"]["loss"] == pytest.approx(expected, rel=1e-5)
    half, _ = evaluated(tmp_path / "b", warm_folder, "--data", many_arms, "--dtype", "bfloat16", "--split", "test")
    loss, whole = half[warm_folder.name]["test"]["loss"], result(many_arms, "base")["test"]["loss"]
    assert loss != whole
    assert loss == pytest.approx(whole, rel=0.02)


OTHER_DATA = """
name: other
model: {{name_or_path: nothing-is-read-of-it}}
data:
  files: {colours}
  rows: {{train: 4, validation: 4, test: 12}}
  seed: 5
{task}
training: {{epochs: 1, batch_size: 4}}
arms:
  lora: {{links: 1}}
seeds: [0]
"""
TASKS = {
    "multiple_choice": """
  task: multiple_choice
  prompt: "{question}?"
  choices: [blue, green, yellow, red]
  label: label
""",
    "text": """
  task: text
  text: "{question} {answer}"
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_other_data_and_another_task_give_what_a_plain_pass_gives(
    many_arms: Path, colours: Path, tmp_path: Path, task: str
) -> None:
    (tmp_path / "other.yaml").write_text(OTHER_DATA.format(colours=colours, task=TASKS[task]))
    folder = exported(many_arms, "chain3")
    evaluation, said = evaluated(tmp_path, folder, "--data", tmp_path / "other.yaml", "--split", "test")
    assert "–" in said or "in the run" not in said  # the run scored other rows
    model = plain(exported(many_arms, "chain3", "merged"))
    tokenizer, rows = AutoTokenizer.from_pretrained(exported(many_arms, "chain3", "merged")), rows_of(many_arms)

    @torch.no_grad()
    def nats(prompt: str, text: str) -> float:
        ids = tokenizer(prompt + text).input_ids
        first = len(tokenizer(prompt).input_ids) if prompt else 1
        log_p = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return -sum(log_p[t - 1, ids[t]].item() for t in range(first, len(ids)))

    for line in (tmp_path / "scores/scores/test.jsonl").read_text().splitlines():
        score = json.loads(line)
        row = rows[int(score["id"].rpartition(":")[2]) - 1]
        if task == "text":
            assert score["nats"] == pytest.approx(nats("", f"{row['question']} {row['answer']}"), rel=1e-4)
            continue
        all_nats = [nats(f"{row['question']}?", f" {answer}") for answer in SKY.values()]
        assert score["prediction"] == all_nats.index(min(all_nats))
        assert score["nats"] == pytest.approx(all_nats[row["label"]], rel=1e-4)
        assert score["score"] == float(score["prediction"] == row["label"])
    assert evaluation[folder.name]["test"]["n"] == 12
    assert {"multiple_choice": "accuracy", "text": "perplexity"}[task] in said


def test_an_arm_that_cannot_be_loaded_does_not_keep_the_others_from_being_scored(
    many_arms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(many_arms, run, ignore=shutil.ignore_patterns("exports"))
    shutil.rmtree(run / "arms/full/seed-0/model")
    for arm in ("base", "bf16", "naive", "prefix", "bottleneck", "nf4", "int8", "dora", "dora2", "pissa2", "kept"):
        shutil.rmtree(run / f"arms/{arm}")
    done = cola("eval", run, "--data", run, "--split", "test", "--out", tmp_path / "scores")
    assert done.exit_code == 1, done.output
    said = " ".join(done.output.split())
    assert "warning: full seed 0 is not scored: " in said
    assert "is damaged (it has gone)" in said
    evaluation = json.loads((tmp_path / "scores/eval.json").read_text())
    assert set(evaluation) == {f"{arm} seed 0" for arm in ("lora", "chain3", "stepdown", "part3")}
    line = refused("eval", unsealed(run), "--arm", "full", "--data", run)
    assert "were not kept; run the recipe with keep_full_weights: true" in line


# ---------------------------------------------------------------------------------------------------------
# Bad input


def changed(folder: Path, to: Path, **tensors: torch.Tensor | None) -> Path:
    """An adapter with some of its tensors exchanged, by a part of their names; None: taken out."""
    shutil.copytree(folder, to)
    stored = load_file(to / "adapter_model.safetensors")
    for key in list(stored):
        for part, tensor in tensors.items():
            if part in key:
                stored.pop(key)
                if tensor is not None:
                    stored[key] = tensor
    save_file(stored, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


def test_an_adapter_that_does_not_fit_is_refused(many_arms: Path, warm_folder: Path, tmp_path: Path) -> None:
    adapter = exported(many_arms, "lora")
    other = tmp_path / "other-base"
    tiny_model(seed=5).save_pretrained(other)
    shutil.copy(warm_folder / "tokenizer.json", other)
    shutil.copy(warm_folder / "tokenizer_config.json", other)
    line = refused("eval", adapter, "--base", other, "--data", many_arms)
    assert "is for another base: it was trained on the fingerprint" in line
    missing = changed(adapter, tmp_path / "missing", q_proj=None)
    assert "4 of its weights and the base's modules do not match" in refused("eval", missing, "--data", many_arms)
    shape = changed(adapter, tmp_path / "shape", **{"0.self_attn.q_proj.lora_A": torch.zeros(4, 48)})
    assert "the adapter does not fit this base" in refused("eval", shape, "--data", many_arms)
    extra = foreign_adapter(tmp_path / "extra", warm_folder, target_modules=["q_proj"])
    config = json.loads((extra / "adapter_config.json").read_text())
    (extra / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nosuch"]}))
    assert "the adapter does not fit this base" in refused("eval", extra, "--data", many_arms)
    small = tmp_path / "small"
    tiny_model(num_hidden_layers=1).save_pretrained(small)
    shutil.copy(warm_folder / "tokenizer.json", small)
    shutil.copy(warm_folder / "tokenizer_config.json", small)
    (extra / "adapter_config.json").write_text(json.dumps(config))
    line = refused("eval", extra, "--base", small, "--data", many_arms)
    assert "the adapter is for another base: 2 of its weights and the base's modules do not match" in line


def test_pickled_adapter_weights_are_not_read(many_arms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(exported(many_arms, "lora"), folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "pickled weights (.bin) can run code and are not read" in refused("eval", folder, "--data", many_arms)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("cola.json", "{", "cola.json is damaged (JSONDecodeError"),
        ("cola.json", "[]", "cola.json is damaged (TypeError"),
        ("cola.json", '{"form": "adapter", "run": {"evaluation": {"train": 3}}}', "cola.json is damaged (KeyError"),
        ("cola.json", "{}", "cola.json is damaged (KeyError: 'run'); export it again"),
        ("adapter_config.json", "{", "adapter_config.json is damaged ("),
        ("adapter_config.json", "[]", "adapter_config.json is damaged ("),
        ("adapter_config.json", "{}", "the adapter does not fit this base"),
        ("adapter_config.json", '{"peft_type": "NOSUCH"}', "the adapter does not fit this base"),
        ("adapter_model.safetensors", "cut off", "the adapter does not fit this base"),
    ],
)
def test_damage_is_named(many_arms: Path, tmp_path: Path, file: str, text: str, says: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported(many_arms, "lora"), folder)
    (folder / file).write_text(text)
    assert says in refused("eval", folder, "--data", many_arms)


def test_options_that_do_not_fit_the_target_are_refused(many_arms: Path, warm_folder: Path, tmp_path: Path) -> None:
    merged = exported(many_arms, "chain3", "merged")
    adapter, knots = exported(many_arms, "chain3"), exported(many_arms, "chain3", "knots")
    codes = exported(many_arms, "chain3", "merged", "--quantization", "nf4", to=tmp_path / "codes")
    for words, says in (
        ([merged, "--arm", "chain3"], "is no run folder; --arm and --seed belong to a run"),
        ([adapter, "--seed", 0], "is no run folder; --arm and --seed belong to a run"),
        ([merged, "--base", warm_folder], "is no PEFT adapter: it has no adapter_config.json"),
        ([many_arms, "--base", warm_folder], "is a run, which says itself what its base is; leave out --base"),
        ([many_arms, "--dtype", "bfloat16"], "is a run, which says itself what its base is"),
        ([many_arms, "--arm", "stepdwn"], "has no arm 'stepdwn'; did you mean stepdown?"),
        ([many_arms, "--seed", 7], "has no seed 7; it has 0"),
        ([codes, "--quantization", "int8"], "is quantized already; leave out --quantization"),
        ([knots], "holds a chain's links one by one"),
        ([adapter, "--base", tmp_path / "gone"], f"{tmp_path / 'gone'}: no such folder"),
        ([tmp_path / "gone"], f"error: {tmp_path / 'gone'}: no such folder"),
        ([tmp_path], f"error: {tmp_path} is no Hugging Face model folder: it has no config.json"),
        (["some/model"], "error: some/model: no such folder here, and the hub did not give it"),
        ([adapter, "--out", tmp_path], f"{tmp_path} exists and is kept as it is; name another folder by --out"),
    ):
        assert says in refused("eval", *words, "--data", many_arms), words
    assert "no such" in refused("eval", merged, "--data", tmp_path / "nothing.yaml")
    assert "recipe.yaml" in refused("eval", merged, "--data", tmp_path)


def test_an_adapter_whose_base_is_gone_says_so(many_arms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(exported(many_arms, "lora"), folder)
    note = json.loads((folder / "cola.json").read_text())
    note["base"]["name"] = str(tmp_path / "gone")
    (folder / "cola.json").write_text(json.dumps(note))
    line = refused("eval", folder, "--data", many_arms)
    assert f"the base of {folder} cannot be had; name it by --base ({tmp_path / 'gone'}: no such folder)" in line
