"""Who has a run folder: one process, from its making to its end. Run: pytest tests/tree/test_run_folder.py"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from children import command, end, processes, start
from runs import LORA_ONLY, SHORT, go, unsealed

from cola.cli.app import app
from cola.errors import RunFolderError
from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe
from cola.tree import run_holder
from cola.tree.run_holder import lock_run, take_run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [*SHORT, *LORA_ONLY]


def together_with(others: Any, words: list[str], said: Path, cache: str) -> None:
    """The command, begun when all the others are there too."""
    others.wait(60)
    command(words, said, cache)


def at_once(words: list[str], folder: Path, n_processes: int = 3) -> tuple[list[int], list[str]]:
    """One command by several processes that start together; the exit codes, and what each said, in their order."""
    all_there = processes.Barrier(n_processes)
    said = [folder / f"said-{number}.txt" for number in range(n_processes)]
    running = [
        processes.Process(target=together_with, args=(all_there, words, path, os.environ["COLA_CACHE"]))
        for path in said
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    found = sorted(zip([process.exitcode for process in running], [path.read_text() for path in said], strict=True))
    for path in said:
        path.unlink()
    return [code for code, _ in found], [text for _, text in found]


def is_whole(folder: Path) -> bool:
    """Whether a run of the one arm is there from the recipe to the page."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["arms"]["lora"]["states"] == {"0": "ok"}
    names = ["recipe.yaml", "provenance.json", "segments.json", "report.html", "arms/lora/seed-0/result.json"]
    names += ["arms/lora/seed-0/scores/test.jsonl", "arms/lora/seed-0/knots/link-1/adapter_model.safetensors"]
    return all((folder / name).is_file() for name in names)


def test_of_processes_that_ask_for_one_new_folder_at_once_one_works_and_the_others_wait_for_it(
    recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new/run"
    codes, said = at_once(["run", str(recipe_file), *SMALL, "--run-folder", str(folder)], tmp_path)
    assert codes == [0, 0, 0], said
    assert sum("0 to be trained" in text for text in said) >= 2
    assert is_whole(folder)


@pytest.mark.slow
def test_of_processes_that_go_on_with_one_run_the_others_say_who_has_it_wait_and_train_nothing(
    recipe_file: Path, tmp_path: Path
) -> None:
    folder, said = tmp_path / "run", tmp_path / "said.txt"
    words = ["run", str(recipe_file), *SMALL, "--run-folder", str(folder)]
    assert end(start(words, said, "AdamW, stopped", 2)) == 75
    again, told = ["run", "--resume", str(folder)], f"{folder}: process {os.getpid()} is at work in this run; waiting"
    with lock_run(folder):  # until all of them have said that they wait
        logs = [tmp_path / f"{number}.txt" for number in range(2)]
        waiting = [start(again, log) for log in logs]
        stopped = subprocess.Popen([sys.executable, "-m", "cola", *again], stderr=subprocess.PIPE, text=True)
        assert stopped.stderr is not None
        assert told in stopped.stderr.readline()
        stopped.send_signal(signal.SIGTERM)
        assert stopped.communicate(timeout=60)[1] == "interrupted; the same command goes on\n"
        assert stopped.returncode == 75
        for process, log in zip(waiting, logs, strict=True):
            while not log.exists() or told not in log.read_text():
                assert process.is_alive()
                time.sleep(0.05)
    assert [end(process) for process in waiting] == [0, 0]
    assert sorted("0 to be trained" in log.read_text() for log in logs) == [False, True]
    assert is_whole(folder)


def test_a_folder_has_no_name_before_its_maker_holds_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock, there = tmp_path / "new/run", run_holder.lock_run, []
    monkeypatch.setattr(run_holder, "lock_run", lambda folder: there.append(path.exists()) or lock(folder))
    with take_run(dump_recipe(read_recipe(recipe_file)), path) as (folder, fresh):
        assert (folder.path, fresh) == (path, True)
    assert there == [False]  # else a second process holds what this one made, and neither takes it away
    assert [left.name for left in path.parent.iterdir()] == ["run"]


@pytest.mark.slow
def test_of_processes_whose_recipe_cannot_be_used_none_leaves_anything(recipe_file: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe_file), *SMALL, "data.files=nowhere.jsonl", "--run-folder", str(tmp_path / "new/run")]
    codes, said = at_once(words, tmp_path)
    assert codes == [2, 2, 2], said
    for line in said:
        assert "Traceback" not in line
        assert line.count("error: ") == 1, line
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.slow
def test_one_command_given_several_times_at_once_has_a_folder_for_each(recipe_file: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe_file), *SMALL, f"output={tmp_path / 'out'}"]
    for n_before, n_processes in ((0, 2), (2, 1)):
        codes, said = at_once(words, tmp_path, n_processes)
        assert codes == [0] * n_processes, said
        folders = list((tmp_path / "out").iterdir())
        assert len(folders) == n_before + n_processes
        assert all(map(is_whole, folders))


@pytest.mark.slow
def test_runs_that_were_stopped_are_gone_on_with_by_one_process_each(recipe_file: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe_file), *SMALL, f"output={tmp_path / 'out'}"]
    assert at_once(words, tmp_path, 2)[0] == [0, 0]
    folders = sorted((tmp_path / "out").iterdir())
    for folder in folders:
        (folder / "summary.json").unlink()  # as a kill before the end leaves it
    assert at_once(words, tmp_path, 2)[0] == [0, 0]
    assert sorted((tmp_path / "out").iterdir()) == folders
    assert all(map(is_whole, folders))


@pytest.mark.slow
def test_one_ablation_given_several_times_at_once_has_a_folder_for_each(recipe_file: Path, tmp_path: Path) -> None:
    words = ["ablate", str(recipe_file), *SMALL, "arms.lora.rank=1,2", f"output={tmp_path / 'out'}"]
    codes, said = at_once(words, tmp_path, 2)
    assert codes == [0, 0], said
    folders = list((tmp_path / "out").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert json.loads((folder / "ablation.json").read_text())["finished"]
        assert all(map(is_whole, folder.glob("points/*")))


@pytest.mark.slow
def test_a_point_that_another_process_goes_on_with_is_left_to_it(recipe_file: Path, tmp_path: Path) -> None:
    words = ["ablate", str(recipe_file), *SMALL, "arms.lora.rank=1,2", f"output={tmp_path / 'out'}"]
    assert at_once(words, tmp_path, 1)[0] == [0]
    [folder] = (tmp_path / "out").iterdir()
    unsealed(folder)
    first = sorted(folder.glob("points/*"))[0]
    record = json.loads((folder / "ablation.json").read_text())
    (folder / "ablation.json").write_text(json.dumps({**record, "finished": False}))
    for path in (first / "arms", first / "summary.json"):  # it has only just begun
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with lock_run(first):
        codes, said = at_once(words, tmp_path, 1)
        assert codes == [1]
        assert f"process {os.getpid()} is at work in this run; wait for it to end" in said[0]
        assert (first / "recipe.yaml").is_file()


def killed_before_the_recipe(words: list[str], cache: str, when: str) -> None:
    """The command, killed when it has made its folder, or holds it, and before its recipe is there."""
    os.environ["COLA_CACHE"] = cache
    replace, lock = Path.replace, run_holder.lock_run

    def dies(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "made":
        run_holder.lock_run = dies
    elif when == "recipe written aside":
        Path.replace = dies
    assert (replace, lock) != (Path.replace, run_holder.lock_run)
    app(words)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["made", "recipe written aside"])
def test_the_same_command_goes_on_from_what_a_kill_left_of_making_the_folder(
    recipe_file: Path, tmp_path: Path, when: str
) -> None:
    folder = tmp_path / "new"
    words = ["run", str(recipe_file), *SMALL, "--run-folder", str(folder)]
    dying = processes.Process(target=killed_before_the_recipe, args=(words, os.environ["COLA_CACHE"], when))
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL
    assert not (folder / "recipe.yaml").exists()
    assert at_once(words, tmp_path, 1)[0] == [0]
    assert is_whole(folder)
    assert not list(tmp_path.glob(".new*"))


def test_a_folder_that_was_there_before_is_emptied_and_stays(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    words = ["run", str(recipe_file), *SMALL, "data.files=nowhere.jsonl", "--run-folder", str(tmp_path / "mine")]
    assert at_once(words, tmp_path, 1)[0] == [2]
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_run_that_fails_to_begin_takes_no_folder_with_it_that_has_results(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *SMALL)

    def fail() -> None:
        with take_run(folder.recipe_file.read_text(), folder.path) as (again, fresh):
            assert (again.path, fresh) == (folder.path, False)
            raise RunFolderError("stop")

    with pytest.raises(RunFolderError, match="stop"):
        fail()
    assert (folder.path / "arms/lora/seed-0/result.json").is_file()


def test_a_run_whose_folder_is_named_from_where_one_works_is_read_as_any_other(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["arms.chain3=null", "arms.full=null", "arms.lora=null", "comparison.primary=null", "output=here"]
    folder, summary = go(recipe_file, *words)
    assert not folder.path.is_absolute()
    assert summary.arms["base"].states == {0: "ok"}
