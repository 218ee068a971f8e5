"""W&B for real: an offline run read back with wandb's own reader. Run: pytest tests/report/test_tracking.py"""

from pathlib import Path

import pytest
from offline import records
from runs import go, result

from cola.recipe.schema import Tracking
from cola.report.tracking import Tracker, mode_of

pytestmark = [pytest.mark.drawn, pytest.mark.usefixtures("one_thread")]


@pytest.mark.slow
def test_an_offline_run_holds_config_curves_and_final_gaps(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, "tracking.wandb=offline")
    assert summary.tracking.mode == "offline"
    assert summary.tracking.command == f"wandb sync {folder.path}/wandb/offline-run-*"
    runs = {}
    for path in folder.path.glob("wandb/offline-run-*"):
        mine = records(path)
        [run] = [r["run"] for r in mine if r["type"] == "run"]
        runs[run["display_name"]] = (run, mine)
    assert sorted(runs) == ["base-seed0", "chain3-seed0", "full-seed0", "lora-seed0"]
    run, mine = runs["chain3-seed0"]
    assert run["run_group"] == folder.path.name
    assert run["project"] == "cola"
    config = run["config"]["update"]
    assert config["arm"] == "chain3"
    assert config["recipe"]["arms"]["chain3"]["rank"] == 8
    history = [r["history"]["item"] for r in mine if r["type"] == "history"]
    steps = [row for row in history if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in history if "knot/drift_relative" in row] == [2, 4, 6]
    assert [row["step"] for row in history if "validation/loss" in row] == [3, 6]
    final: dict = {}
    for record in mine:
        if record["type"] == "summary":
            final |= record["summary"]["update"]
    evaluation = result(folder, "chain3")["evaluation"]
    full = result(folder, "full")["evaluation"]
    assert final["gap/loss"] == pytest.approx(evaluation["gap_loss"])
    assert final["gap/acc"] == pytest.approx(evaluation["gap_acc"])
    assert final["gap/ft"] == pytest.approx(full["test"]["score"] - evaluation["test"]["score"])
    assert final["general/loss"] == pytest.approx(evaluation["general"]["loss"])
    assert final["general/forgetting"] == pytest.approx(evaluation["general"]["forgetting"])
    assert final["final/test_loss"] == pytest.approx(evaluation["test"]["loss"])


@pytest.mark.slow
def test_a_server_that_is_down_costs_a_warning_and_no_result(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr("cola.report.to_wandb.INIT_SECONDS", 3.0)
    _, summary = go(recipe_file, "tracking.wandb=auto", "arms.full=null")
    assert summary.tracking.mode == "off"
    assert all(arm.states == {0: "ok"} for arm in summary.arms.values())


def test_a_failure_is_said_once_and_ends_the_tracking(tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "file"
    file.write_text("")
    tracker = Tracker(Tracking(wandb="offline"), None, file, said.append)  # a file where a folder must be
    tracker.start("lora", 0, tmp_path, {"a": {1, 2}})
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({"gap/loss": 0.1})
    tracker.start("full", 0, tmp_path, {})
    assert len(said) <= 1
    assert tracker.mode == "off" or tracker.opens is not None


def test_a_first_step_waits_for_no_wandb_and_what_is_stopped_there_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(Tracking(wandb="offline"), None, tmp_path, said.append)
    for status in ("interrupted", "ok"):
        tracker.start("lora", 0, tmp_path, {"arm": "lora"})
        tracker.log(1, {"train/loss": 1.0})
        assert not tracker.is_open
        assert not any(tmp_path.iterdir())
        if status == "ok":
            tracker.log(2, {"train/loss": 0.5})
            assert tracker.is_open
        tracker.finish({"gap/loss": 0.1}, status)
    assert not said
    [part] = tmp_path.glob("wandb/offline-run-*")
    assert [r["history"]["item"]["step"] for r in records(part) if r["type"] == "history"] == [1, 2]


@pytest.mark.parametrize(
    ("recipe", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("off", {"WANDB_API_KEY": "x"}, "off"),
        ("offline", {"WANDB_API_KEY": "x"}, "offline"),
    ],
)
def test_online_needs_a_key_and_the_recipe_has_the_last_word(
    recipe: str, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode_of(Tracking.model_validate({"wandb": recipe})) == mode


def test_a_key_in_the_netrc_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai\n login user\n password " + "0" * 40 + "\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    assert mode_of(Tracking()) == "online"
