"""Several processes at one run: the same bits, one display, one end. Run: pytest tests/run/test_workers.py"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from children import processes
from rich.console import Console
from runs import FULL_ONLY, LORA_ONLY, SHORT, assert_one_line, cola, create_run, go

from cola.compare.ablation import points_of
from cola.compare.records import Summary
from cola.recipe.read import read_recipe
from cola.report.terminal import Terminal
from cola.run.ablate import ablate
from cola.run.run import run
from cola.run.worker import Place
from cola.tree.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = [Place(1, 1, None), Place(2, 1, None)]
LONG = ["training.steps=60", "training.batch_size=4", "checkpoint_seconds=0", "keep_full_weights=false"]


@pytest.fixture(autouse=True)
def preloaded() -> None:
    """Workers are forked from the server that the tests' own processes are."""
    first = processes.Process(target=int)
    first.start()
    first.join(60)


def spoken() -> tuple[Terminal, StringIO]:
    text = StringIO()
    return Terminal(Console(file=text, width=200, soft_wrap=True, force_terminal=False)), text


def go_with_workers(recipe_file: Path, *overrides: str, folder: Path | None = None) -> tuple[RunFolder, Summary, str]:
    """A new run by two workers, with a store of its own; what it said."""
    recipe = read_recipe(recipe_file, [*overrides, f"store={recipe_file.parent / 'own'}"])
    run_folder = RunFolder(folder) if folder else create_run(recipe)
    terminal, text = spoken()
    return run_folder, run(recipe, run_folder, terminal, places=TWO), text.getvalue()


def told(folder: RunFolder) -> dict[str, Any]:
    """All that a run's results say but for when, in what time and with whose help they were made."""
    found = {}
    for path in sorted(folder.path.glob("*/**/result.json")):
        record = json.loads(path.read_text())
        info = record["train_info"]
        found[str(path.relative_to(folder.path))] = {
            **{key: record[key] for key in ("status", "evaluation")},
            **{key: info[key] for key in ("choice", "final_state", "scored_state", "segments", "steps")},
            "scores": [file.read_text() for file in sorted(path.parent.glob("scores/*.jsonl"))],
            "weights": [file.read_bytes() for file in sorted(path.parent.rglob("*.safetensors"))],
        }
    return found


SEARCHED = [f"arms.{arm}.learning_rate={{search: [1e-2, 1e-3]}}" for arm in ("lora", "chain3", "full")]


@pytest.mark.parametrize("asked", [[], SEARCHED], ids=["plain", "searched"])
def test_two_workers_end_with_the_bits_of_one_process(recipe_file: Path, asked: list[str]) -> None:
    alone, _ = go(recipe_file, *SHORT, "seeds=[0,1]", *asked)
    shared, summary, text = go_with_workers(recipe_file, *SHORT, "seeds=[0,1]", *asked)
    assert told(shared) == told(alone)
    assert not any(arm.errors for arm in summary.arms.values())
    assert shared.references()["segments"] == alone.references()["segments"]
    for number in (1, 2):
        assert f"worker {number}: " in text
        assert "seed" in (shared.path / f"workers/{number}/log.txt").read_text()
        assert not (shared.path / f"workers/{number}/segments.json").exists()
    assert "in no manifest" not in cola("verify", shared.path).output


@pytest.mark.slow
def test_workers_find_what_is_there_and_do_the_rest(recipe_file: Path) -> None:
    shared, _, _ = go_with_workers(recipe_file, *SHORT)
    before = {path: path.stat().st_mtime_ns for path in shared.path.rglob("result.json")}
    (shared.path / "arms/chain3/seed-0/result.json").unlink()
    _, summary, _ = go_with_workers(recipe_file, *SHORT, folder=shared.path)
    after = {path: path.stat().st_mtime_ns for path in shared.path.rglob("result.json")}
    changed = [str(path.relative_to(shared.path)) for path in before if before[path] != after[path]]
    assert changed == ["arms/chain3/seed-0/result.json"]
    assert summary.arms["chain3"].states == {0: "ok"}


@pytest.mark.slow
def test_an_arm_that_fails_fails_alone_and_once(recipe_file: Path) -> None:
    shared, summary, text = go_with_workers(recipe_file, *SHORT, "arms.lora.learning_rate=1e30")
    assert {name: arm.states for name, arm in summary.arms.items()} == {
        "base": {0: "ok"},
        "lora": {0: "failed"},
        "chain3": {0: "ok"},
        "full": {0: "ok"},
    }
    assert text.count("lora seed 0 failed") == 1
    assert (shared.path / "arms/lora/seed-0/traceback.txt").exists()


@pytest.mark.slow
def test_the_points_of_an_ablation_are_shared_too(recipe_file: Path, tmp_path: Path) -> None:
    keys = ["arms.chain3.links=1,2", *SHORT, "arms.full=null", "arms.base=null", f"store={tmp_path / 'own'}"]
    points = points_of(recipe_file, keys, False)
    results = []
    for places, name in (([], "alone"), (TWO, "shared")):
        (tmp_path / name).mkdir()
        terminal, _ = spoken()
        ablation = ablate(points, tmp_path / name, terminal, places=places)
        assert not ablation.failed
        results.append([told(RunFolder(path)) for path in sorted((tmp_path / name / "points").iterdir())])
        if name == "alone":
            (tmp_path / "own").rename(tmp_path / "first")
    assert results[0] == results[1]
    assert len(results[0]) == 2


# ---------------------------------------------------------------------------------------------------------
# Ends


class Meanwhile(threading.Thread):
    """Does something when a worker has kept a state of its training in a store."""

    def __init__(self, store: Path, then: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.store, self.then, self.done = store, then, False
        self.start()

    def run(self) -> None:
        while not has_states(self.store):
            time.sleep(0.01)
        self.then()
        self.done = True


def has_states(store: Path) -> bool:
    return any(store.glob("segments/*/*/segment.json"))


def worker_pid(number: int) -> int:
    [one] = [child for child in multiprocessing.active_children() if child.name == f"worker-{number}"]
    assert one.pid is not None
    return one.pid


def test_a_worker_that_dies_is_said_and_its_work_is_taken_over(recipe_file: Path) -> None:
    alone, _ = go(recipe_file, *LONG, *LORA_ONLY)
    recipe = read_recipe(recipe_file, [*LONG, *LORA_ONLY, f"store={recipe_file.parent / 'own'}"])
    folder = create_run(recipe)
    killing = Meanwhile(recipe_file.parent / "own", lambda: os.kill(worker_pid(1), signal.SIGKILL))
    terminal, text = spoken()
    summary = run(recipe, folder, terminal, places=TWO[:1])
    assert killing.done
    assert "worker 1 has ended, killed by SIGKILL" in text.getvalue()
    assert "its work (lora seed 0) is taken over" in text.getvalue()
    assert summary.arms["lora"].states == {0: "ok"}
    assert told(folder) == told(alone)


def test_a_job_at_which_workers_die_again_and_again_fails(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file, [*LONG, *LORA_ONLY, f"store={recipe_file.parent / 'own'}"])
    folder = create_run(recipe)

    def kill_twice() -> None:
        log = folder.path / "workers/1/log.txt"
        os.kill(worker_pid(1), signal.SIGKILL)
        while log.read_text().count("lora seed 0: loading the model") < 2:
            time.sleep(0.02)
        os.kill(worker_pid(1), signal.SIGKILL)

    killing = Meanwhile(recipe_file.parent / "own", kill_twice)
    terminal, text = spoken()
    summary = run(recipe, folder, terminal, places=TWO[:1])
    assert killing.done
    assert summary.arms["lora"].states == {0: "failed"}
    assert "2 workers have ended at it" in text.getvalue()


@pytest.mark.slow
def test_weights_that_a_worker_wanted_that_has_died_are_let_go_all_the_same(recipe_file: Path) -> None:
    asked = [*SHORT, *FULL_ONLY, "keep_full_weights=false"]
    alone, _ = go(recipe_file, *asked)
    state = json.loads((alone.path / "arms/full/seed-0/result.json").read_text())["train_info"]["final_state"]
    recipe = read_recipe(recipe_file, [*asked, f"store={recipe_file.parent / 'own'}"])
    folder = create_run(recipe)
    wanted = {"segments": [], "measured": [], "weights": [state]}
    wanting = Meanwhile(recipe_file.parent / "own", lambda: folder.write_references(wanted, "workers/9/segments.json"))
    run(recipe, folder, spoken()[0], places=TWO[:1])
    assert wanting.done
    assert not list((recipe_file.parent / "own").glob("segments/*/*/model.safetensors"))


@pytest.mark.slow
def test_ctrl_c_reaches_all_workers_and_the_same_command_goes_on_to_the_same_bits(recipe_file: Path) -> None:
    asked = [*LONG, "arms.base=null", "arms.chain3=null", "comparison.primary=null"]
    alone, _ = go(recipe_file, *asked)
    recipe = read_recipe(recipe_file, [*asked, f"store={recipe_file.parent / 'own'}"])
    folder = create_run(recipe)
    stopping = Meanwhile(recipe_file.parent / "own", lambda: os.kill(os.getpid(), signal.SIGINT))
    terminal, _ = spoken()
    summary = run(recipe, folder, terminal, places=TWO)
    assert stopping.done
    assert summary.interrupted
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("worker")]
    terminal, _ = spoken()
    assert not run(recipe, folder, terminal, places=TWO).interrupted
    assert told(folder) == told(alone)
    infos = [json.loads(path.read_text())["train_info"] for path in folder.path.rglob("result.json")]
    assert any(info["reused_steps"] >= 1 for info in infos)


@pytest.mark.slow
def test_workers_end_with_a_command_that_is_killed(recipe_file: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cola", "run", str(recipe_file), *LONG, *LORA_ONLY, "--workers", "2"]
    words += ["--run-folder", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    store = Path(os.environ["COLA_CACHE"]) / "store"
    with (tmp_path / "said.txt").open("w") as said:
        command = subprocess.Popen(words, stdout=said, stderr=said, env=environment)
        while not has_states(store):
            assert command.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.05)
        command.kill()
        command.wait()
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    info = json.loads((tmp_path / "run/arms/lora/seed-0/result.json").read_text())["train_info"]
    assert info["reused_steps"] >= 1


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", "", "4096"])
def test_a_number_of_workers_that_cannot_be_is_one_line(recipe_file: Path, number: str) -> None:
    said = cola("run", recipe_file, "--workers", number)
    assert_one_line(said)
    assert "--workers" in said.output


def test_a_model_that_is_not_there_is_one_line_with_workers_too(recipe_file: Path) -> None:
    said = cola("run", recipe_file, "model.name_or_path=./nowhere", "--workers", "2")
    assert said.exit_code == 2
    assert [line for line in said.output.splitlines() if "error" in line] == [said.output.splitlines()[-1]]


def test_this_process_has_one_thread_where_its_workers_have(recipe_file: Path) -> None:
    shared, _, _ = go_with_workers(recipe_file, *SHORT, *LORA_ONLY)
    made = json.loads((shared.path / "provenance.json").read_text())
    result = json.loads((shared.path / "arms/lora/seed-0/result.json").read_text())
    assert made["device"] == result["meta_info"]["device"] == f"cpu, threads: {torch.get_num_threads()}"
