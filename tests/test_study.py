"""The recipes of the studies in experiments/. Run: pytest tests/test_study.py"""

import json
import runpy
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import trim_mean
from test_cli import cola
from test_store import one_line

from cola.recipe_file import read_recipe
from cola.record import RunFolder
from cola.summary import summarize

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"
TASKS = sorted(path.stem for path in STUDY.glob("*.yaml"))


def without_task(name: str) -> dict[str, Any]:
    """A recipe of the study without what makes it that task's."""
    values = yaml.safe_load((STUDY / f"{name}.yaml").read_text())
    assert values.pop("name") == f"001-{name}"
    values["data"] = {"task": values["data"]["task"]}
    for part in [values["training"], *values["arms"].values()]:
        if "learning_rate" in part:
            part["learning_rate"].pop("search")
    return values


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_of_a_study_searches_equally_many_learning_rates_on_the_same_seeds(task: str) -> None:
    values = yaml.safe_load((STUDY / f"{task}.yaml").read_text())
    parts = [values["training"], *values["arms"].values()]
    searches = [part["learning_rate"] for part in parts if "learning_rate" in part]
    assert len({(len(one["search"]), *one["seeds"]) for one in searches}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_recipes_of_the_study_differ_in_name_data_and_learning_rate_grids_alone(task: str) -> None:
    assert without_task(task) == without_task(TASKS[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_of_the_study_names_a_contrast_for_every_trained_arm_and_spares_the_seeds_of_the_scout(
    task: str,
) -> None:
    recipe = read_recipe(STUDY / f"{task}.yaml")
    named = {arm for pair in recipe.comparison.secondary for arm in pair}
    assert named == {name for name, arm in recipe.arms.items() if arm.links != 0}
    assert not {100, 101} & set(recipe.seeds)


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Every number and word in a record, by where it is."""
    if not isinstance(value, dict | list):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, one in items for path, leaf in leaves(one, f"{at}/{key}").items()}


def unpacked(name: str, to: Path) -> Path:
    """The folder of a run or ablation that the study keeps."""
    with tarfile.open(STUDY / "results" / name / "run.tar.xz") as archive:
        archive.extractall(to, filter="data")
    return to


@pytest.mark.parametrize("name", sorted(path.parent.name for path in STUDY.glob("results/*/run.tar.xz")))
def test_the_committed_numbers_come_from_the_scores_that_are_packed_beside_them(name: str, tmp_path: Path) -> None:
    kept = STUDY / "results" / name
    folder = unpacked(name, tmp_path)
    for file in ("summary.json", "ablation.json"):
        if (kept / file).exists():
            assert (kept / file).read_bytes() == (folder / file).read_bytes()
    for run in sorted(path.parent for path in folder.rglob("recipe.yaml")):
        opened, recipe = RunFolder.open(run)
        made = json.loads(json.dumps(summarize(recipe, opened, np.random.default_rng(0))))
        committed = json.loads((run / "summary.json").read_text())
        for key in ("arms", "contrasts", "spectra", "trials", "rows", "seeds"):
            ours, theirs = leaves(made[key]), leaves(committed[key])
            numbers = [at for at, value in theirs.items() if isinstance(value, float)]
            # Sums over threads differ in their last bits, and then an interval may end at the neighbouring resample.
            assert [ours.pop(at) for at in numbers] == pytest.approx([theirs.pop(at) for at in numbers], abs=2e-4), key
            assert ours == theirs, key


def test_every_difference_over_the_tasks_is_the_interquartile_mean_of_the_runs_as_scipy_takes_it() -> None:
    tasks = [json.loads((STUDY / "results" / task / "summary.json").read_text())["arms"] for task in TASKS]
    for contrast in json.loads((STUDY / "results/over-tasks/summary.json").read_text())["contrasts"]:
        first, second = (
            [seed["test_score"] for arms in tasks for seed in arms[contrast[one]]["seeds"]]
            for one in ("first", "second")
        )
        assert len(first) == len(second) == 3 * 6
        assert contrast["value"] == pytest.approx(trim_mean(np.subtract(first, second), 0.25))


def test_the_rows_of_the_ablation_are_those_of_its_points(tmp_path: Path) -> None:
    folder = unpacked("length", tmp_path)
    record = json.loads((folder / "ablation.json").read_text())
    summaries = {
        point["label"]: json.loads((folder / "points" / point["folder"] / "summary.json").read_text())
        for point in record["points"]
    }
    for row in record["rows"]:
        arm = summaries[row["label"]]["arms"][row["arm"]]
        assert {key: row[key] for key in arm if key != "seeds"} == {key: arm[key] for key in arm if key != "seeds"}
        assert [seed["test_score"] for seed in row["seeds"]] == [seed["test_score"] for seed in arm["seeds"]]


def test_a_report_of_a_folder_whose_results_have_gone_leaves_what_is_there(tmp_path: Path) -> None:
    kept = next(STUDY.glob("results/*/run.tar.xz")).parent
    folder = shutil.copytree(kept, tmp_path / "kept")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for runs in ([folder], [folder, kept]):
        told = cola("report", *map(str, runs))
        one_line(told)
        assert "tells of results that have gone" in told.output.replace("\n", " ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_cell_that_was_trained_again_is_held_against_every_number_but_those_of_the_occasion(tmp_path: Path) -> None:
    cell = runpy.run_path(str(STUDY / "cell.py"))
    kept, made = tmp_path / "kept", tmp_path / "made"
    run = unpacked("trec", tmp_path / "run")
    for folder in (kept, made):
        shutil.copytree(run / "arms/chain3/seed-3", folder)
    result = json.loads((made / "result.json").read_text())
    result["train_info"]["train_seconds"] += 1
    result["meta_info"]["machine"]["cpu"] = "another"
    (made / "result.json").write_text(json.dumps(result))
    seen, differ = cell["compared"](kept, made)
    assert not differ
    assert {".train_info.segments.0", ".evaluation.test.loss", "scores/test.jsonl"} <= set(seen)
    result["evaluation"]["test"]["loss"] += 1e-9
    (made / "result.json").write_text(json.dumps(result))
    (made / "scores/train.jsonl").write_text("")
    assert cell["compared"](kept, made)[1] == [".evaluation.test.loss", "scores/train.jsonl"]
