"""Times of a plan from steps that the store has records of. Run: pytest tests/plan/test_remembered.py"""

import json
from pathlib import Path
from statistics import median

import pytest
from runs import cola, go

from cola.files import store_path

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["arms.base=null", "training.epochs=null", "training.steps=4", "training.batch_size=4"]


def planned(recipe_file: Path, *overrides: str) -> dict:
    told = cola("plan", recipe_file, *SMALL, *overrides, "--as", "json")
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout)


def test_steps_like_those_in_the_store_take_as_long_as_they_took(recipe_file: Path, colours: Path) -> None:
    assert planned(recipe_file)["times"] is None  # this machine was never calibrated
    go(recipe_file, *SMALL, "arms.full=null", "arms.chain3=null", "comparison.primary=null")
    (steps,) = store_path().glob("segments/*/*/steps.jsonl")
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    rate = median(row["seconds"] / row["tokens"] for row in rows[1:])  # the first one of a link is another matter
    plan = planned(recipe_file, "arms.other={links: 1, rank: 4}")
    arms = plan["arms"]
    assert plan["times"] == "chain3, lora: like steps in the store"
    # Four rows of 24 a step, whose mean length the plan takes.
    mean = sum(row["tokens"] for row in rows) / len(rows)
    assert arms["lora"]["training_seconds"] == pytest.approx(4 * rate * mean, rel=0.15)
    assert arms["chain3"]["training_seconds"] == pytest.approx(arms["lora"]["training_seconds"])
    for unlike in ("other", "full"):
        assert arms[unlike]["training_seconds"] is None


def test_steps_of_another_length_or_machine_say_nothing(recipe_file: Path) -> None:
    go(recipe_file, *SMALL, "arms.full=null", "arms.chain3=null", "comparison.primary=null")
    assert planned(recipe_file, "training.batch_size=24")["times"] is None
    (record,) = store_path().glob("segments/*/*/segment.json")
    record.chmod(0o644)
    record.write_text(
        record.read_text().replace('"threads: 1', '"threads: 64').replace("cpu, threads: 1", "cpu, threads: 64")
    )
    assert planned(recipe_file)["times"] is None
