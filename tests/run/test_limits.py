"""What a user's limits and a full or a foreign disk do to a run: one clear line, and nothing is lost.

Run: pytest tests/run/test_limits.py
"""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import LORA_ONLY, SHORT, assert_one_line, cola, fresh, outcome, wide_cola, write_recipe

from cola.link import train

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ["arms.base=null", "arms.chain3=null", "comparison.primary=null"]


def limited(
    *words: object, limits: dict[int, int] | None = None, umask: int = -1, unset: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command line of cola as a process of its own, under a user's limits."""

    def settle() -> None:
        for limit, most in (limits or {}).items():
            resource.setrlimit(limit, (most, most))

    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000", **environment}
    variables.pop(unset, None)
    return subprocess.run(
        [sys.executable, "-m", "cola", *map(str, words)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != unset}
        | {"OMP_NUM_THREADS": "1", "COLUMNS": "1000", **environment},
        preexec_fn=settle,
        umask=umask,
        timeout=300,
    )


def errors(said: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in said.stderr + said.stdout, said.stderr
    return [line for line in (said.stdout + said.stderr).splitlines() if line.startswith(("error: ", "warning: "))]


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which takes 60 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Leave so many bytes free."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        room = os.statvfs(disk)
        file.write(bytes(room.f_bavail * room.f_frsize - leave))
    return filler


@pytest.mark.slow
def test_an_arm_whose_files_are_larger_than_they_may_be_fails_and_goes_on_without_the_limit(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, recipe_text), tmp_path / "run"
    own = [*TWO, f"store={tmp_path / 'own'}"]
    most = {resource.RLIMIT_FSIZE: 100_000}  # all weights take 168 kB, a pair much less
    said = limited("run", recipe, *own, "--run-folder", run, limits=most)
    assert said.returncode == 1, said.stdout + said.stderr
    [line] = errors(said)
    assert f"full seed 0 failed, the others go on: {tmp_path}/own: larger than a file may be here" in line
    assert cola("run", "--resume", run).exit_code == 0
    assert outcome(run).differences(fresh(recipe, TWO, tmp_path)) == []


def test_what_finds_no_memory_at_its_beginning_says_so(recipe_file: Path, tmp_path: Path) -> None:
    said = limited("run", recipe_file, "--run-folder", tmp_path / "run", limits={resource.RLIMIT_AS: 512_000_000})
    assert said.returncode == 2
    assert errors(said) == ["error: no memory is left; make some free, or raise the limit (`ulimit -v`)"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_an_arm_that_finds_no_memory_fails_in_one_line(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train, "logits_at", none_left)
    told = wide_cola("run", recipe_file, *LORA_ONLY, *SHORT, "--run-folder", tmp_path / "run")
    assert told.exit_code == 1
    assert "lora seed 0 failed, the others go on: no memory is left; smaller passes need less" in told.output


@pytest.mark.slow
@pytest.mark.parametrize("place", ["store", "run"])
def test_a_disk_that_fills_up_is_named_and_its_run_goes_on_when_there_is_room(
    recipe_text: str, tmp_path: Path, little_disk: Path, place: str
) -> None:
    recipe, lora = write_recipe(tmp_path, recipe_text), ["arms.full=null", *TWO]
    run, store = [little_disk / name if name == place else tmp_path / name for name in ("run", "store")]
    words = ["run", recipe, *lora, f"store={store}", "--run-folder", run]
    if place == "store":
        filler = fill(little_disk, 20_000_000)  # less than a run is ever thought to take
        said = limited(*words)
        assert said.returncode == 2
        assert f"error: {store}: the disk has 0.02 GB free" in errors(said)[-1]
        assert "make room, or set store to another disk" in errors(said)[-1]
    else:
        filler = fill(little_disk, 40_000)
        said = limited(*words)
        assert said.returncode == 2
        assert f"error: {run}" in errors(said)[-1]
        assert (
            f"its disk is full; what is finished is kept: make room there, then `cola run --resume {run}`"
            in (errors(said)[-1])
        )
    filler.unlink()
    assert limited(*words).returncode == 0
    assert outcome(run).differences(fresh(recipe, lora, tmp_path)) == []


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_one_line(recipe_file: Path, tmp_path: Path, little_disk: Path) -> None:
    words = ["run", recipe_file, *LORA_ONLY, *SHORT, f"store={little_disk / 'store'}"]
    assert cola(*words).exit_code == 0
    subprocess.run(["mount", "-o", "remount,ro", little_disk], check=True)
    told = cola(*words, "--run-folder", tmp_path / "run")
    assert told.exit_code == 2
    assert f"store: {little_disk / 'store'} cannot be written: Read-only file system" in told.stderr
    assert_one_line(cola("store", "prune", "--yes", "--store", little_disk / "store"))


@pytest.mark.slow
def test_few_open_files_no_home_and_no_folder_for_temporary_files_are_enough(recipe_text: str, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, recipe_text), tmp_path / "run"
    words = ["run", recipe, *TWO, f"store={tmp_path / 'store'}", "--run-folder", run]
    said = limited(*words, limits={resource.RLIMIT_NOFILE: 64}, umask=0o077, unset="HOME", TMPDIR="/nonexistent")
    assert (said.returncode, errors(said)) == (0, [])
    made = [path for folder in (run, tmp_path / "store") for path in folder.rglob("*")]
    assert [path for path in made if path.stat().st_mode & 0o077] == []  # the user's alone, as was asked
