"""A number says what it was made with, and numbers that were not made alike say so.

Run: pytest tests/tree/test_made.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import summaries
import torch
from runs import LORA_ONLY, SHORT, cola, go, result

from cola.compare.summary import made_differently
from cola.report.page import write_report
from cola.tree.records import Result

ONE, TWO = "cpu, threads: 1", "cpu, threads: 2"
ARMS = [*SHORT, "arms.base=null", "arms.full=null", "arms.chain3.links=2"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def devices(info: dict[str, Any], what: str) -> list[str]:
    return [made["device"] for made in info[what]]


def test_scores_knots_and_spectra_say_with_what_they_were_made_in_whatever_session(recipe_file: Path) -> None:
    go(recipe_file, *SHORT, *LORA_ONLY)
    torch.set_num_threads(2)
    folder, _ = go(recipe_file, *ARMS)
    lora, chain = (result(folder, arm) for arm in ("lora", "chain3"))
    assert lora["meta_info"]["device"] == chain["meta_info"]["device"] == TWO  # of this session
    assert devices(lora["train_info"], "segments_made") == devices(lora["train_info"], "measured_made") == [ONE]
    # But for the general text by the untouched base, which both share.
    assert TWO in devices(chain["train_info"], "measured_made")
    for arm, device in (("lora", ONE), ("chain3", TWO)):
        made = json.loads((folder.path / f"arms/{arm}/seed-0/spectrum.json").read_text())["made"]
        assert made["device"] == device
        assert made["packages"]["torch"] == torch.__version__
    # A new question to trained weights: its answer has another maker than they.
    text = recipe_file.with_name("another.txt")
    text.write_text("The rain had stopped by noon.")
    asked, _ = go(recipe_file, *SHORT, *LORA_ONLY, f"evaluation.general_text={text}")
    info = result(asked, "lora")["train_info"]
    assert devices(info, "segments_made") == [ONE]
    assert set(devices(info, "measured_made")) == {ONE, TWO}


@pytest.mark.slow
def test_arms_that_were_not_made_alike_are_told_apart_wherever_they_are_compared(
    recipe_file: Path, tmp_path: Path
) -> None:
    alone, summary = go(recipe_file, *SHORT, *LORA_ONLY)
    assert not any("Not all was made" in note for note in summary.notes)
    torch.set_num_threads(2)
    off = "evaluation.general_text=null"  # else the general text by the base is of both
    both, summary = go(recipe_file, *ARMS, off)
    said = f"Not all was made with one device: {ONE} (lora); {TWO} (chain3). A difference between these may be"
    assert [note for note in summary.notes if note.startswith(said)]
    assert said in write_report(both).read_text()
    again = cola("report", both.path)
    assert said in " ".join(again.output.split())
    other, _ = go(recipe_file, *SHORT, *LORA_ONLY, off, "training.learning_rate=2e-3")
    for command in (["compare", alone.path, other.path], ["report", alone.path, other.path, "--to", tmp_path / "of"]):
        told = cola(*command)
        assert told.exit_code == 0, told.output
        names = [run.path.name for run in (alone, other)]
        if command[0] == "report":  # a seed that both have counts once, as the first run's
            assert "is in an earlier run" in " ".join(told.output.split())
        else:
            whole = f"{ONE} ({names[0]}: lora); {TWO} ({names[1]}: lora)"
            assert whole in " ".join(told.output.split())


@pytest.mark.slow
def test_seeds_of_one_arm_that_were_not_made_alike_are_told_apart_in_a_report_of_two_runs(
    recipe_file: Path, tmp_path: Path
) -> None:
    first, _ = go(recipe_file, *SHORT, *LORA_ONLY)
    torch.set_num_threads(2)
    second, _ = go(recipe_file, *SHORT, *LORA_ONLY, "seeds=[1]")
    told = cola("report", first.path, second.path, "--to", tmp_path / "of")
    assert told.exit_code == 0, told.output
    notes = json.loads((tmp_path / "of/summary.json").read_text())["notes"]
    [note] = [note for note in notes if note.startswith("Not all was made with one device: ")]
    assert f"{first.path.name}: lora" in note
    assert f"{second.path.name}: lora" in note


def test_arms_of_two_dtypes_are_told_apart(recipe_file: Path) -> None:
    _, summary = go(recipe_file, *ARMS, "arms.chain3.dtype=bfloat16")
    assert [note for note in summary.notes if note.startswith("Not all was made")] == [
        "Not all was made with one dtype: bfloat16 (chain3); float32 (lora). "
        "A difference between these may be due to that."
    ]


def made(**differs: Any) -> dict[str, Any]:
    return summaries.made() | differs


def of(*makers: dict[str, Any]) -> Result:
    scored = {"loss": 1.0, "score": None, "n": 1}
    evaluation = {**dict.fromkeys(("train", "validation", "test"), scored), "gap_loss": 0.0, "gap_acc": None}
    made = {"segments_made": [makers[0]], "measured_made": list(makers)}
    return Result.model_validate(summaries.result("lora", 0, evaluation, **made))


def test_what_differs_is_named_with_the_arms_and_seeds_that_have_it() -> None:
    newer = made(packages={"torch": "2.14", "wandb": "0.1"}, commit={"hash": "b" * 40, "dirty": True, "changed": ["x"]})
    results = {("lora", 0): of(made()), ("lora", 1): of(made(), newer), ("full", 0): of(newer), ("full", 1): of(newer)}
    end = ". A difference between these may be due to that."
    assert made_differently(results) == [
        f"Not all was made with one commit: aaaaaaaaaa (lora); bbbbbbbbbb with changes (lora seed 1, full){end}",
        f"Not all was made with one version of torch: 2.13 (lora); 2.14 (lora seed 1, full){end}",
    ]
    # What moves no number, and what has no number, is not told.
    alike = {("lora", 0): of(made()), ("full", 0): of(made(packages={"torch": "2.13", "wandb": "0.2"}))}
    assert made_differently(alike) == []
