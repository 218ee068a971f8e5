"""A group's comparison at W&B, read back from real offline runs. Run: pytest tests/report/test_wandb.py"""

import importlib.util
import json
import math
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from offline import records
from runs import cola
from typer.testing import Result

from cola.compare.records import Spread, Summary
from cola.files import pip_install
from cola.recipe.schema import Tracking
from cola.report import to_wandb
from cola.report.group_report import KNOT_PANELS, Comparison, group_report
from cola.report.numbers import number, small, spread
from cola.report.page import comparison_of
from cola.report.table import NONE, Shown, Table, typed_rows
from cola.report.tracking import Tracker, comparison_numbers
from cola.tree.run_folder import RunFolder

pytestmark = [pytest.mark.drawn, pytest.mark.usefixtures("one_thread")]

SUMMARY = {
    "arms": {
        "base": {"n_seeds": 2, "states": {}, "errors": {}, "test_loss": {"mean": 2.5, "sd": 0.0}, "test_score": None},
        "lora": {
            "n_seeds": 2,
            "states": {},
            "errors": {},
            "test_loss": {"mean": 1.5, "sd": 0.1},
            "test_score": {"mean": 0.5, "sd": 0.01},
            "gap_loss": {"mean": 0.25, "sd": 0.1},
            "gap_acc": {"mean": 0.125, "sd": None},
            "forgetting": {"mean": 0.03, "sd": None},
            "ft_gap": {"value": 0.1, "low": None, "high": None},
            "closed": "no gap",
        },
        "chain3": {
            "n_seeds": 2,
            "states": {},
            "errors": {},
            "forgetting": None,
            "ft_gap": {"value": 0.02, "low": -0.01, "high": 0.05},
            "closed": {"value": 0.8, "low": 0.2, "high": 1.4},
        },
        "full": {"n_seeds": 0, "states": {"0": "failed"}, "errors": {"0": "out of memory"}},
    },
    "contrasts": [
        {
            "first": "chain3",
            "second": "lora",
            "role": "primary",
            "metric": "score",
            "value": 0.08,
            "low": 0.01,
            "high": 0.15,
            "p": 0.5,
            "p_holm": None,
            "p_rows": 0.5,
            "p_rows_smallest": 0.5,
            "p_rows_error": None,
            "minimum_detectable": 0.04,
            "n_seeds": 2,
            "n_examples": 200,
            "n_groups": 200,
            "claim": False,
        }
    ],
    "metric": "accuracy",
    "unpaired": [],
    "seeds": [0, 1],
    "checkpoint": "last",
    "select_by": "loss",
    "rows": None,
    "same_outputs": [],
    "matched": {"by": "steps", "per_link": False},
    "meta": None,
    "interrupted": False,
    "notes": [],
    "spectra": {},
    "trials": {},
    "intervals": {"seeds": 2, "redraw": "none", "train_rows": 240, "by_validation": False, "search": None},
}


def test_the_numbers_of_a_summary_have_fixed_names_and_what_is_unknown_has_none() -> None:
    numbers = comparison_numbers(Summary.model_validate(SUMMARY))
    said = numbers.pop("verdict")
    assert isinstance(said, str)
    assert said.startswith("chain3 − lora = +0.080 test accuracy (2 seeds)")
    assert "full seed 0 failed: out of memory" in said
    assert numbers == {
        "arm/base/test_loss": 2.5,
        "arm/lora/test_score": 0.5,
        "arm/lora/test_loss": 1.5,
        "arm/lora/gap_loss": 0.25,
        "arm/lora/gap_acc": 0.125,
        "arm/lora/forgetting": 0.03,
        "arm/lora/ft_gap": 0.1,
        "arm/lora/closed": "no gap",
        "arm/chain3/ft_gap": 0.02,
        "arm/chain3/ft_gap_low": -0.01,
        "arm/chain3/ft_gap_high": 0.05,
        "arm/chain3/closed": 0.8,
        "arm/chain3/closed_low": 0.2,
        "arm/chain3/closed_high": 1.4,
        "contrast/chain3-lora/value": 0.08,
        "contrast/chain3-lora/low": 0.01,
        "contrast/chain3-lora/high": 0.15,
        "contrast/chain3-lora/p": 0.5,
        "contrast/chain3-lora/p_rows": 0.5,
        "contrast/chain3-lora/minimum_detectable": 0.04,
        "contrast/chain3-lora/n_seeds": 2,
        "contrast/chain3-lora/claim": False,
    }


def test_a_column_of_plain_numbers_is_one_of_numbers_and_any_other_keeps_its_text() -> None:
    rows: list[list[Shown]] = [
        ["1", number(0.2911, "+.3f"), small(4e-7), spread(Spread(mean=0.1, sd=0.2)), number(0.0744, ".2%")],
        ["2", NONE, small(0.0), NONE, number(math.nan, ".2f")],
    ]
    assert typed_rows(Table("", ["arm", "a", "b", "c", "d"], rows)) == [
        ["1", 0.291, 4e-07, "0.100 ± 0.200", "7.44%"],
        ["2", None, 0.0, "–", "nan"],
    ]


# ---------------------------------------------------------------------------------------------------------
# Offline, for real


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, colours: Path, prose: Path
) -> tuple[Path, Result]:
    """A run of `cola run`, offline, and what it said."""
    folder = tmp_path_factory.mktemp("wandb")
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
name: tiny
model: {{name_or_path: {tiny_folder}}}
data:
  files: {colours}
  rows: {{train: 24, validation: 8, test: 16}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{epochs: 2, batch_size: 8, learning_rate: 1e-2}}
arms:
  lora: {{links: 1}}
  full: {{method: full, learning_rate: 1e-3}}
comparison: {{primary: [lora, full]}}
evaluation: {{general_text: {prose}}}
seeds: [0, 1]
tracking: {{wandb: auto}}
output: {folder}
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLA_CACHE", str(folder / "cache"))
        patch.setenv("NETRC", "/nonexistent")
        patch.setenv("HOME", str(folder / "home"))
        patch.delenv("XDG_DATA_HOME", raising=False)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        result = cola("run", recipe, "--run-folder", folder / "run")
    return folder / "run", result


@pytest.fixture
def run_folder(finished: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run", symlinks=True))


def parts(folder: Path) -> list[Path]:
    """The offline parts of the group's comparison."""
    return parts_of(folder / "wandb.json", folder)


def parts_of(note: Path, folder: Path) -> list[Path]:
    identity = json.loads(note.read_text())["id"]
    return sorted(folder.glob(f"wandb/offline-run-*-{identity}"))


def summary_of(found: list[dict]) -> dict[str, Any]:
    final: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            final |= record["summary"]["update"]
    return final


@pytest.mark.slow
def test_a_finished_run_leaves_its_comparison_as_a_run_of_the_group(finished: tuple[Path, Result]) -> None:
    folder, said = finished
    assert said.exit_code == 0, said.output
    assert f"W&B      offline; upload with: wandb sync {folder}/wandb/offline-run-*" in said.output.splitlines()[-1]
    [part] = parts(folder)
    found = records(part)
    [run] = [record["run"] for record in found if record["type"] == "run"]
    assert (run["display_name"], run["job_type"], run["run_group"]) == ("comparison", "comparison", "run")
    assert "host" not in run
    final = summary_of(found)
    summary = Summary.model_validate_json((folder / "summary.json").read_text())
    numbers = comparison_numbers(summary)
    assert final["arm/lora/gap_loss"] == summary.arms["lora"].gap_loss.mean
    assert final["contrast/lora-full/value"] == summary.contrasts[0].value
    assert {name: final[name] for name in numbers} == numbers
    for name, table in comparison_of(RunFolder(folder), summary).tables.items():
        written = json.loads((part / "files" / final[f"table/{name}.path"]).read_text())
        assert written["columns"] == table.columns
        assert written["data"] == typed_rows(table)
    assert {"arms", "loss", "cost", "contrasts", "knots"} <= {
        name.split("/")[1].removesuffix(".path") for name in final if name.startswith("table/") and ".path" in name
    }
    assert "<svg" in (part / "files" / final["figure/curves.path"]).read_text()


@pytest.mark.slow
def test_the_page_is_an_artifact_whose_copies_lie_in_the_run_folder(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    [part] = parts(folder)
    [artifact] = [r["artifact"] for r in records(part) if r["type"] == "artifact" and r["artifact"]["type"] == "report"]
    files = {one["path"]: Path(one["local_path"]) for one in artifact["manifest"]["contents"]}
    drawn = {str(path.relative_to(folder)) for path in folder.glob("*/*") if path.parent.name in ("figures", "tables")}
    assert {"figures/curves.svg", "figures/curves.pdf", "tables/arms.csv", "tables/arms.tex"} <= drawn
    assert files.keys() == {"report.html", "recipe.yaml", "summary.json"} | drawn
    assert all(part in path.parents for path in files.values())
    assert files["report.html"].read_text() == (folder / "report.html").read_text()
    told, summary = (json.loads(path.read_text()) for path in (files["summary.json"], folder / "summary.json"))
    assert told == {key: value for key, value in summary.items() if key not in ("store", "tracking")}
    assert not list((folder.parent / "home").rglob("staging"))


@pytest.mark.slow
def test_sent_again_it_is_the_same_run_and_takes_the_place_of_what_was_not_uploaded(run_folder: Path) -> None:
    [before] = parts(run_folder)
    said = cola("report", run_folder, "--track")
    assert said.exit_code == 0, said.output
    assert "a Report needs the runs online: upload them" in said.output
    [after] = parts(run_folder)
    assert after != before
    next(after.glob("*.wandb")).with_suffix(".wandb.synced").touch()  # as `wandb sync` does
    time.sleep(1.1)  # W&B names a part by the second
    assert cola("report", run_folder, "--track").exit_code == 0
    both = parts(run_folder)
    assert both[0] == after
    steps = [[r["history"]["item"]["_step"] for r in records(part) if r["type"] == "history"] for part in both]
    assert steps == [[1], [2]]  # W&B takes no step twice


ALONE = ("arms.base=null", "arms.full=null", "training.epochs=1", "tracking.wandb=offline")


@pytest.mark.slow
def test_an_ablation_has_one_comparison_and_a_point_its_own_when_asked(recipe_file: Path) -> None:
    said = cola("ablate", recipe_file, "arms.chain3.links=1,2", *ALONE)
    assert said.exit_code == 0, said.output
    [folder] = (recipe_file.parent / "runs").glob("tiny-ablation-*")
    offline = "wandb/offline-run-*"
    assert said.output.splitlines()[-1].endswith(f"wandb sync {folder}/{offline} {folder}/points/*/{offline}")
    [part] = parts(folder)
    found = records(part)
    [run] = [record["run"] for record in found if record["type"] == "run"]
    assert run["run_group"] == folder.name
    final = summary_of(found)
    assert final["table/ablation.nrows"] > 1
    assert "<svg" in (part / "files" / final["figure/ablation.path"]).read_text()
    assert not list(folder.glob("points/*/wandb.json"))
    point = next(folder.glob("points/*"))
    assert cola("report", point, "--track").exit_code == 0
    [run] = [record["run"] for record in records(parts(point)[0]) if record["type"] == "run"]
    assert (run["run_group"], run["display_name"]) == (folder.name, f"{point.name} comparison")


# ---------------------------------------------------------------------------------------------------------
# A W&B that is not there


@pytest.fixture
def comparison(finished: tuple[Path, Result]) -> Comparison:
    folder = finished[0]
    return comparison_of(RunFolder(folder), Summary.model_validate_json((folder / "summary.json").read_text()))


@pytest.fixture(params=["closed", "silent"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A W&B at a port where nobody listens, or that takes connections and never answers."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")  # of what is still waiting when the tests end
    monkeypatch.setattr(to_wandb, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(to_wandb, "FINISH_SECONDS", 2.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen(50)  # the kernel accepts
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield


@pytest.mark.slow
def test_a_server_that_is_down_or_silent_costs_a_bounded_wait_and_one_warning(server: None, run_folder: Path) -> None:
    began = time.monotonic()
    said = cola("report", run_folder, "--track")
    assert time.monotonic() - began < 60  # what it would wait of itself, to begin alone; here twice 2 s are waited
    assert said.exit_code == 0, said.output
    assert said.output.count("warning:") == 1
    assert "W&B failed and is off" in said.output
    assert "Report:" not in said.output


def test_a_report_that_cannot_be_saved_is_one_warning(server: None, comparison: Comparison, tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(Tracking(wandb="online"), None, tmp_path, warnings.append)
    tracker.sink.entity = "me"
    assert tracker.publish(comparison) is None
    [warning] = warnings
    assert warning.startswith("W&B failed and is off for the rest of this run (")


@pytest.mark.slow
def test_ctrl_c_leaves_wandb_and_nothing_else(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tracker, "compare", pressed)
    said = cola("report", run_folder, "--track")
    assert said.exit_code == 0, said.output
    assert "warning: interrupted while W&B was being sent the comparison" in said.output


@pytest.mark.slow
def test_without_the_extra_a_report_names_it(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    said = cola("report", run_folder, "--track")
    assert said.exit_code == 2
    command = pip_install("'chain-of-lora[report]'")
    assert said.output.strip() == f"error: a W&B Report needs the package wandb_workspaces: {command}"


def test_where_tracking_is_off_nothing_is_sent_and_that_is_said(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    before = parts(run_folder)
    said = cola("report", run_folder, "--track")
    assert said.exit_code == 0
    assert "warning: W&B is off" in said.output
    assert parts(run_folder) == before


# ---------------------------------------------------------------------------------------------------------
# The Report


def spec_of(comparison: Comparison, group: str = "run") -> list[dict[str, Any]]:
    """The blocks of a Report as W&B is sent them, without the empty lines at its ends."""
    report = group_report(comparison, group, group, "cola", "me")
    spec = report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    return json.loads(spec)["blocks"][1:-1]


def panels(grid: dict[str, Any]) -> list[dict[str, Any]]:
    return grid["metadata"]["panelBankSectionConfig"]["panels"]


def test_a_report_has_the_verdict_the_live_panels_of_the_group_and_the_comparisons_tables(
    comparison: Comparison,
) -> None:
    group = 'it\'s a "run"'
    blocks = spec_of(comparison, group)
    lines = [item["children"][0]["children"][0]["text"] for item in blocks[0]["children"]]
    assert lines == comparison.lines
    curves, knots, gaps, compared = [block for block in blocks if block["type"] == "panel-grid"]
    assert [p["config"]["metrics"] for p in panels(curves)] == [
        ["train/loss"],
        ["validation/loss"],
        ["validation/score"],
    ]
    assert {p["config"]["xAxis"] for p in [*panels(curves), *panels(knots)]} == {"step"}
    assert all(p["config"]["metrics"][0].startswith("knot/") for p in panels(knots))
    assert [p["config"]["metrics"][0] for p in panels(gaps)] == [
        "final/test_loss",
        "gap/loss",
        "final/test_score",
        "gap/acc",
        "gap/ft",
        "general/forgetting",
    ]
    text = json.dumps(panels(compared))
    assert all(f"table/{name}" in text for name in comparison.tables)
    assert panels(compared)[-1]["config"]["mediaKeys"] == [f"figure/{name}" for name in comparison.figures]
    for grid, op in ((curves, "!="), (knots, "!="), (gaps, "!="), (compared, "=")):
        [runs] = grid["metadata"]["runSets"]
        conditions = [(c["key"]["name"], c["op"], c["value"]) for c in runs["filters"]["filters"]]
        assert conditions == [("group", "=", group), ("jobType", op, "comparison")]
    assert curves["metadata"]["runSets"][0]["grouping"] == [{"section": "config", "name": "arm.value"}]


def test_a_text_has_no_panels_of_scores_and_an_ablation_no_means_over_points(comparison: Comparison) -> None:
    numbers = {name: n for name, n in comparison.numbers.items() if not name.endswith("/test_score")}
    text = json.dumps(spec_of(replace(comparison, numbers=numbers, lines_by=None)))
    assert not any(name in text for name in ("validation/score", "gap/acc", "arm.value"))


@pytest.mark.slow
def test_every_knot_panel_shows_a_number_that_is_sent(finished: tuple[Path, Result]) -> None:
    [part] = parts_of(finished[0] / "arms/lora/seed-0/wandb.json", finished[0])
    sent = {name for r in records(part) if r["type"] == "history" for name in r["history"]["item"]}
    assert {f"knot/{name}" for name in KNOT_PANELS} <= sent
