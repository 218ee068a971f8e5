"""trackio and MLflow for real, on this machine: what they hold of a run. Run: pytest tests/report/test_trackers.py"""

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from children import KILLED, end, start
from runs import CHOICE, LORA_ONLY, SHORT, assert_one_line, cola, read_jsonl, result, write_recipe

from cola.compare.records import Summary
from cola.files import pip_install
from cola.report.tracking import comparison_numbers
from cola.tree.run_folder import RunFolder

pytestmark = [pytest.mark.drawn, pytest.mark.usefixtures("one_thread")]


@dataclass
class Sent:
    """What a tracker holds of one of its runs."""

    name: str
    group: str
    config: dict[str, Any]
    points: dict[str, list[tuple[int, float]]]  # steps and values of each curve
    final: dict[str, Any]
    files: set[str]
    ended: bool


def of_trackio(folder: Path, project: str = "cola") -> list[Sent]:
    """From its database, whose place trackio fixes when it is imported."""
    where = Path(os.environ["TRACKIO_DIR"])
    database = sqlite3.connect(where / f"{project}.db")
    configs = {run: json.loads(text) for run, text in database.execute("SELECT run_id, config FROM configs")}
    found = {}
    for run, name, step, text in database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id"):
        config = configs[run]
        sent = found.setdefault(run, Sent(name, config["_Group"], config, {}, {}, set(), False))
        for key, value in json.loads(text).items():
            sent.points.setdefault(key, []).append((step, value))
            sent.final[key] = value
            sent.ended |= key.startswith(("gap/", "contrast/"))
    for run, manifest in database.execute(
        "SELECT run_id, manifest FROM run_artifact_links l JOIN artifact_versions v ON v.id = l.artifact_version_id"
    ):
        found[run].files = {one["path"] for one in json.loads(manifest)}
    return list(found.values())


def of_mlflow(folder: Path, project: str = "cola") -> list[Sent]:
    """By its own client."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(project)
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.user_id in (None, "", "unknown")
        points = {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        files, open_folders = set(), [None]
        while open_folders:
            listed = client.list_artifacts(run.info.run_id, open_folders.pop())
            open_folders += [one.path for one in listed if one.is_dir]
            files |= {one.path for one in listed if not one.is_dir}
        config = json.loads((folder / "mlflow/artifacts" / run.info.run_id / "artifacts/config.json").read_text())
        config["job_type"] = run.data.tags["job_type"]
        final = {**run.data.metrics, **run.data.tags}
        found.append(
            Sent(run.info.run_name, run.data.tags["group"], config, points, final, files, run.info.status == "FINISHED")
        )
    return found


READ = {"trackio": of_trackio, "mlflow": of_mlflow}


# MLflow takes seconds to be imported, and to make its tables.
@pytest.fixture(params=["trackio", pytest.param("mlflow", marks=pytest.mark.slow)])
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip(request.param, reason=f"needs pip install 'chain-of-lora[{request.param}]'")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return request.param


def check_sent(tracker: str, folder: Path, arms: list[str]) -> None:
    """One run of the group per arm, and one for their comparison: each step once, and the run folder's numbers."""
    sent = READ[tracker](folder)
    assert sorted(one.name for one in sent) == sorted(["comparison", *(f"{arm}-seed0" for arm in arms)])
    assert {one.group for one in sent} == {folder.name}
    assert all(one.ended for one in sent)
    runs = {one.name: one for one in sent}
    for arm in arms:
        mine = runs[f"{arm}-seed0"]
        assert mine.config["arm"] == mine.config["job_type"] == arm
        assert mine.config["recipe"]["arms"][arm]
        rows = read_jsonl(folder / f"arms/{arm}/seed-0/metrics.jsonl")
        for kind, name, key in (
            ("step", "train/loss", "loss"),
            ("validation", "validation/loss", "loss"),
            ("knot", "knot/drift_relative", "drift_relative"),
        ):
            wanted = [(row["step"], pytest.approx(row[key])) for row in rows if row["kind"] == kind]
            assert sorted(mine.points.get(name, [])) == wanted, name
        evaluation = result(RunFolder(folder), arm)["evaluation"]
        assert mine.final["gap/loss"] == evaluation["gap_loss"]
        assert mine.final["final/test_score"] == evaluation["test"]["score"]
    summary = RunFolder(folder).read("summary.json", Summary)
    assert summary is not None
    compared = runs["comparison"]
    for name, value in comparison_numbers(summary).items():
        assert compared.final[name] == value, name
    files = {"report.html", "recipe.yaml", "summary.json", "figures/curves.svg", "tables/arms.csv"}
    assert files <= compared.files


SMALL = ["arms.full=null", "evaluation.every=4", *CHOICE]


@pytest.mark.slow
def test_after_kills_a_tracker_has_one_run_per_arm_and_seed_and_each_step_once(
    tracker: str, recipe_text: str, tmp_path: Path
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    command = ["run", str(recipe), *SMALL, f"tracking.tracker={tracker}", f"output={tmp_path / 'killed'}"]
    for number in (6, 7):
        assert end(start(command, said, "AdamW", number, drawn=True)) == KILLED, said.read_text()
    assert end(start(command, said, "AdamW, stopped", 2, drawn=True)) == 75, said.read_text()
    assert end(start(command, said, drawn=True)) == 0, said.read_text()
    assert "warning" not in said.read_text()
    [folder] = (tmp_path / "killed").iterdir()
    check_sent(tracker, folder, ["base", "lora", "chain3"])


@pytest.mark.slow
def test_a_comparison_that_is_sent_again_takes_the_place_of_the_first_and_an_ablation_is_one_group(
    tracker: str, recipe_file: Path, tmp_path: Path
) -> None:
    said = tmp_path / "said.txt"
    words = ["arms.base=null", "arms.full=null", "training.epochs=1", f"tracking.tracker={tracker}"]
    assert end(start(["ablate", str(recipe_file), "arms.chain3.links=1,2", *words], said)) == 0, said.read_text()
    [folder] = (recipe_file.parent / "runs").glob("tiny-ablation-*")
    points = [point.name for point in sorted(folder.glob("points/*"))]
    expected = {"comparison", *(f"{point} chain3-seed0" for point in points), f"{points[0]} lora-seed0"}
    for _ in range(2):
        sent = {one.name: one for one in READ[tracker](folder)}
        assert sent.keys() == expected
        assert {one.group for one in sent.values()} == {folder.name}
        assert "ablation.html" in sent["comparison"].files
        assert end(start(["report", str(folder), "--track"], said)) == 0, said.read_text()
    assert len(READ[tracker](folder)) == len(expected)
    assert end(start(["report", str(folder / "points" / points[0]), "--track"], said)) == 0, said.read_text()
    assert {one.name for one in READ[tracker](folder)} == expected | {f"{points[0]} comparison"}
    assert "warning" not in said.read_text()


@pytest.mark.slow
def test_a_tracker_that_fails_costs_one_warning_and_no_result(
    tracker: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio").write_text("where a folder must be")
    said = tmp_path / "said.txt"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p@5ecret@127.0.0.1:9")  # the discard port: nobody listens
    words = [*SHORT, *LORA_ONLY, f"tracking.tracker={tracker}"]
    assert end(start(["run", str(recipe_file), *words], said)) == 0, said.read_text()
    text = said.read_text()
    assert text.count("warning:") == text.count("failed and is off for the rest of this run") == 1, text
    assert "5ecret" not in text
    [folder] = (recipe_file.parent / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tracking"] == {"tracker": tracker, "mode": "off", "command": None}


ALONE = """
import os, signal, socket, sys, time
from pathlib import Path

def lookup(host, *_, **__):
    print("asked for", host)
    raise OSError("no network in this test")

socket.getaddrinfo = lookup
from cola.recipe.schema import Tracking
from cola.report.tracking import Tracker, command_after

settings, folder, said = Tracking(tracker=sys.argv[1]), Path(sys.argv[2]), []
for n_steps, status in ((int(n), status) for n, status in (word.split(":") for word in sys.argv[3:])):
    tracker = Tracker(settings, None, folder, said.append)
    tracker.start("lora", 0, folder, {"arm": "lora", "seed": 0})
    for step in range(1, n_steps + 1):
        tracker.log(step, {"train/loss": 1.0 / step, "train/grad_norm": None})
        if status == "killed" and step in (3, 4):
            time.sleep(1.2)  # longer than rows are kept back
    if status == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.finish({"gap/loss": 0.25}, status)
print(said, os.environ.get("MLFLOW_DISABLE_TELEMETRY"), command_after(settings, None, folder))
"""


@pytest.mark.slow
def test_a_killed_session_goes_on_in_its_run_and_asks_for_nothing_on_the_network_though_a_token_is_there(
    tracker: str, tmp_path: Path
) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "TRACKIO_DIR")}  # not what tells MLflow that this is a test
    kept |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_TOKEN": "hf_" + "x" * 34, "HOME": str(tmp_path)}

    def sessions(*words: str) -> subprocess.CompletedProcess[str]:
        told = [sys.executable, "-c", ALONE, tracker, str(tmp_path), *words]
        return subprocess.run(told, env=kept, capture_output=True, text=True)

    done = sessions("5:killed")
    assert (done.returncode, done.stdout) == (KILLED, ""), done.stderr
    [sent] = READ[tracker](tmp_path)
    assert not sent.ended
    assert {1, 2, 3} <= {step for step, _ in sent.points["train/loss"]}
    done = sessions("5:interrupted", "6:ok")
    assert done.returncode == 0, done.stderr
    shown = {
        "trackio": "trackio show --project cola",
        "mlflow": f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow/mlflow.db",
    }
    assert done.stdout == f"[] {'true' if tracker == 'mlflow' else None} {shown[tracker]}\n", done.stdout
    [sent] = READ[tracker](tmp_path)
    assert (sent.name, sent.group, sent.config["arm"]) == ("lora-seed0", tmp_path.name, "lora")
    assert [step for step, _ in sent.points["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert sent.ended
    assert sent.final["gap/loss"] == 0.25


def test_a_setting_of_wandb_beside_another_tracker_is_one_clear_line(recipe_file: Path) -> None:
    for key, said in (("wandb=online", "wandb: online"), ("entity=us", "entity")):
        told = cola("run", recipe_file, "--dry-run", "tracking.tracker=mlflow", f"tracking.{key}")
        assert_one_line(told)
        assert f"{said} is about W&B and has no effect with tracker: mlflow" in told.output


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_trained(
    name: str, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for words in (["--dry-run"], []):
        told = cola("run", recipe_file, *words, f"tracking.tracker={name}")
        assert told.exit_code == 2
        remedy = pip_install(f"'chain-of-lora[{name}]'")
        said = f"error: tracking.tracker: {name} needs the package {name}: {remedy}"
        assert told.output.splitlines()[-1] == said
