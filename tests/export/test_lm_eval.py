"""lm-evaluation-harness on what cola exports gives cola's numbers. Run: pytest tests/export/test_lm_eval.py"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SKY, run_once
from runs import cola
from test_eval import foreign_adapter
from test_export import exported, reported, rows_of, with_adapter
from transformers import AutoTokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SPLITS = ("train", "validation", "test")

# ---------------------------------------------------------------------------------------------------------
# Tasks of lm-eval on the test rows of a run


def write_task(folder: Path, run: Path, name: str, **settings: Any) -> Path:
    """A task file and its rows, as docs/export.md has them: the run's test rows, in the order of its scores."""
    rows, scores = rows_of(run), reported(run, "chain3")
    chosen = [rows[int(score["id"].rpartition(":")[2]) - 1] for score in scores]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}?",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": list(SKY.values()),
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<|endoftext|>", "\n"], "do_sample": False},
    "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match"}],
}


def by_lm_eval(folder: Path, name: str, **model: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `lm_eval run --model hf` finds: the task's numbers and its rows."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    done = lm_eval.simple_evaluate(
        HFLM(**{key: str(value) for key, value in model.items()}, dtype="float32", device="cpu", batch_size=4),
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
    return done["results"][name], samples


def nats_of(sample: dict[str, Any]) -> list[float]:
    """-log p of each choice."""
    answers = [answer[0] for answer in sample["resps"]]
    return [-float(answer[0] if isinstance(answer, list | tuple) else answer) for answer in answers]


@pytest.fixture(scope="module")
def choices_run(tmp_path_factory: pytest.TempPathFactory, warm_folder: Path, colours: Path) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    return run_once(
        folder,
        f"""
name: choices
model: {{name_or_path: {warm_folder}}}
data:
  files: {colours}
  rows: {{train: 24, validation: 8, test: 24}}
  task: multiple_choice
  prompt: "{{question}}?"
  choices: [{", ".join(SKY.values())}]
  label: label
training: {{epochs: 3, batch_size: 4, learning_rate: 1e-2}}
arms:
  chain3: {{links: 3}}
seeds: [0]
tracking: {{wandb: off}}
output: {folder}
""",
    )


FORMS = ["adapter", "merged"]


def model_of(form: str, run: Path, base: Path) -> dict[str, Path]:
    folder = exported(run, "chain3", form)
    return {"pretrained": folder} if form == "merged" else {"pretrained": base, "peft": folder}


@pytest.mark.parametrize("form", FORMS)
def test_a_multiple_choice_has_the_same_accuracy_and_likelihoods(
    choices_run: Path, warm_folder: Path, tmp_path: Path, form: str
) -> None:
    write_task(tmp_path, choices_run, "colours_choice", **CHOICE)
    numbers, samples = by_lm_eval(tmp_path, "colours_choice", **model_of(form, choices_run, warm_folder))
    scores = reported(choices_run, "chain3")
    evaluation = json.loads((choices_run / "arms/chain3/seed-0/result.json").read_text())["evaluation"]["test"]
    assert numbers["acc,none"] == pytest.approx(evaluation["score"], abs=1e-12)
    assert 0 < evaluation["score"] < 1
    assert len(samples) == len(scores) == 24
    for sample, score in zip(samples, scores, strict=True):
        nats = nats_of(sample)
        assert nats[int(sample["target"])] == pytest.approx(score["nats"], rel=1e-4)
        assert nats.index(min(nats)) == score["prediction"]
        assert sample["acc"] == score["score"]


def test_lm_eval_cuts_a_padded_head_when_it_loads_an_adapter_and_not_a_merged_checkpoint(
    choices_run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    write_task(tmp_path, choices_run, "colours_choice", **CHOICE)
    adapter = foreign_adapter(tmp_path / "adapter", tiny_folder, target_modules=["q_proj", "up_proj"])
    merged: Any = with_adapter(tiny_folder, adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "merged")
    assert cola("eval", adapter, "--data", choices_run, "--split", "test", "--out", tmp_path / "out").exit_code == 0
    ours = [json.loads(line)["nats"] for line in (tmp_path / "out/scores/test.jsonl").read_text().splitlines()]
    found = {}
    for form, model in {
        "adapter": {"pretrained": tiny_folder, "peft": adapter},
        "merged": {"pretrained": tmp_path / "merged"},
    }.items():
        _, samples = by_lm_eval(tmp_path, "colours_choice", **model)
        found[form] = [nats_of(sample)[int(sample["target"])] for sample in samples]
    assert found["merged"] == pytest.approx(ours, rel=1e-4)
    # Fewer tokens to share the probability among: each of the others is likelier.
    assert all(cut < whole * 0.999 for cut, whole in zip(found["adapter"], ours, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_decoded_alike_and_has_the_same_exact_match(
    many_arms: Path, warm_folder: Path, tmp_path: Path, form: str
) -> None:
    # cola stops four tokens after the longest right answer.
    longest = max(score["tokens"] for split in SPLITS for score in reported(many_arms, "chain3", split=split))
    ANSWER["generation_kwargs"]["max_gen_toks"] = longest + 4
    write_task(tmp_path, many_arms, "colours_answer", **ANSWER)
    numbers, samples = by_lm_eval(tmp_path, "colours_answer", **model_of(form, many_arms, warm_folder))
    scores = reported(many_arms, "chain3")
    evaluation = json.loads((many_arms / "arms/chain3/seed-0/result.json").read_text())["evaluation"]["test"]
    assert numbers["exact_match,stripped"] == pytest.approx(evaluation["score"], abs=1e-12)
    assert 0 < evaluation["score"] < 1
    for sample, score in zip(samples, scores, strict=True):
        assert sample["exact_match"] == score["score"]
        if score["score"] == 0:  # cola does not decode an answer that it knows to be right
            assert sample["filtered_resps"][0].split() == score["prediction"].split()
