"""One holder at a time, on one machine and on several, whatever stands still, dies or is seen late.

Run: pytest tests/tree/test_leases.py; a hundred times over: pytest tests/tree/test_leases.py --times 100
"""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import command, processes
from runs import LORA_ONLY, SHORT, result
from test_store import causes_of, keep, opened

from cola.errors import LeaseLost, StoreError
from cola.tree import leases, process
from cola.tree.leases import alone, check_held, claimed, in_use, lock
from cola.tree.run_folder import RunFolder
from cola.tree.segments import state_name
from cola.tree.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

SOON = 0.6  # seconds of a lease without a sign of life, here
Patch = Callable[[], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test so many times."""
    if (times := metafunc.config.getoption("--times")) > 1:
        metafunc.fixturenames.append("_time")
        metafunc.parametrize("_time", range(times))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRY", SOON)
    monkeypatch.setattr(leases, "BEAT", SOON / 12)


@pytest.fixture
def place() -> Path:
    """The store of this test."""
    return Path(os.environ["COLA_CACHE"]) / "store"


# ---------------------------------------------------------------------------------------------------------
# What another machine, or a poor file system, is like


def as_ever() -> None:
    """This machine and a disk of its own."""


def no_flock() -> None:
    fcntl.flock = lambda *_: None  # as on some mounts of Lustre, GPFS and NFS


def flock_is_refused() -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    assert errno.ENOSYS == 38
    fcntl.flock = refuse


def another_machine() -> None:
    """Its own name, and a clock of its own: minutes off, and running since another day."""
    named, now, running = list(os.uname()), time.time, time.monotonic
    named[1] = f"node-{os.getpid()}"
    os.uname = lambda: os.uname_result(named)
    socket.gethostname = lambda: named[1]
    off = 600.0 if os.getpid() % 2 else -600.0
    time.time = lambda: now() + off
    time.monotonic = lambda: running() + 1e6 * (os.getpid() % 7)


def late_lists() -> None:
    """As NFS: a folder's list is as old as 0.2 s, unless this process has made something in the folder since."""
    old: dict[Any, tuple[float, list[str]]] = {}
    true_list, true_open = os.listdir, os.open

    def place_of(folder: Any) -> Any:
        return os.fstat(folder).st_ino if isinstance(folder, int) else folder

    def list_late(folder: Any = ".") -> list[str]:
        at, names = old.get(place_of(folder), (0.0, []))
        if time.monotonic() - at > 0.2:
            names = true_list(folder)
            old[place_of(folder)] = time.monotonic(), names
        return names

    def open_and_forget(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        file = true_open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT and dir_fd is not None:
            old.pop(place_of(dir_fd), None)
        return file

    os.listdir, os.open = list_late, open_and_forget


SURROUNDINGS = [as_ever, no_flock, flock_is_refused, another_machine, late_lists]


def soon_in_child(patch: Patch) -> None:
    leases.EXPIRY, leases.BEAT = SOON, SOON / 12
    patch()


def count_up(patch: Patch, place: Path, rounds: int) -> None:
    """Raise the number in a file, so that two who do it at once lose one."""
    soon_in_child(patch)
    number = place / "number"
    for _ in range(rounds):
        with lock(place, "key"):
            before = int(number.read_text())
            time.sleep(0.002)
            number.write_text(str(before + 1))


@pytest.mark.parametrize("patch", SURROUNDINGS)
def test_of_several_processes_one_at_a_time_holds_a_lease(place: Path, patch: Patch) -> None:
    opened(place)
    (place / "number").write_text("0")
    running = [processes.Process(target=count_up, args=(patch, place, 8)) for _ in range(3)]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
    assert [one.exitcode for one in running] == [0, 0, 0]
    assert (place / "number").read_text() == "24"
    assert len(list((place / "leases/key").iterdir())) == 1  # and nothing is left of the others


def hold(patch: Patch, place: Path, told: Any, seconds: float) -> None:
    soon_in_child(patch)
    with claimed(place) as mine:
        told.put(mine)
        time.sleep(seconds)


def held_by_child(patch: Patch, place: Path, seconds: float = 60) -> Any:
    """A process that holds a lease now."""
    told = processes.Queue()
    holder = processes.Process(target=hold, args=(patch, place, told, seconds))
    holder.start()
    assert told.get(timeout=60)
    return holder


def seconds_until_free(path: Path) -> float:
    started = time.monotonic()
    while True:
        with claimed(path) as mine:
            if mine:
                return time.monotonic() - started
        assert time.monotonic() - started < 30
        time.sleep(0.01)


@pytest.mark.parametrize("patch", [as_ever, another_machine])
def test_a_lease_whose_holder_lives_is_kept_for_as_long_as_it_lives(tmp_path: Path, patch: Patch) -> None:
    holder = held_by_child(patch, tmp_path / "lease", 3 * SOON)
    for age in (-3600.0, 3600.0):  # whatever the disk's own clock says of the file
        os.utime(next((tmp_path / "lease").iterdir()), (time.time() + age,) * 2)
    assert seconds_until_free(tmp_path / "lease") > SOON
    holder.join(60)
    assert holder.exitcode == 0


def test_the_lease_of_a_process_that_has_died_here_is_free_at_once(tmp_path: Path) -> None:
    holder = held_by_child(as_ever, tmp_path / "lease")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    with claimed(tmp_path / "lease") as mine:  # at the first look: how long it says nothing more is not waited for
        assert mine


def test_the_lease_of_a_process_that_has_died_elsewhere_is_free_when_it_has_not_changed_for_long(
    tmp_path: Path,
) -> None:
    holder = held_by_child(another_machine, tmp_path / "lease")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert seconds_until_free(tmp_path / "lease") >= SOON


def test_a_lease_that_was_cut_off_as_it_was_written_is_free_when_it_has_not_changed_for_long(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease/1").write_text("")
    assert seconds_until_free(tmp_path / "lease") >= SOON


def test_a_process_with_the_id_of_a_dead_one_is_another(tmp_path: Path) -> None:
    mine = process.this_process()
    assert mine.is_alive()
    assert not mine.is_dead()
    later = process.Process(mine.owner, mine.machine, mine.pid, (mine.started or 0) - 1)
    assert later.is_dead()
    for elsewhere in (None, "another"):
        unknown = process.Process(mine.owner, elsewhere, 2**22 + 1, mine.started)
        assert not unknown.is_dead()
        assert not unknown.is_alive()


def test_a_lease_names_no_user_and_no_machine(tmp_path: Path) -> None:
    with claimed(tmp_path / "lease") as mine:
        assert mine
        text = next((tmp_path / "lease").iterdir()).read_text()
    assert set(json.loads(text)) == {"owner", "machine", "pid", "started", "expires_after", "beat"}
    for name in (os.uname().nodename, os.environ.get("USER") or "root"):
        assert name not in text


def put_after_standing_still(patch: Patch, place: Path, told: Any, go_on: Any) -> None:
    """Hold a lease while a segment is written, and publish it when its holder is woken."""
    soon_in_child(patch)
    store = Store(place, print)

    def write(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"of who stood still")
        told.put(True)
        assert go_on.wait(60)

    try:
        with in_use(place, print), lock(place, "key"):
            keep(store, 1, write=write)
        told.put("published")
    except LeaseLost as error:
        told.put(str(error))


@pytest.mark.parametrize("patch", [as_ever, another_machine])
def test_who_stood_still_for_too_long_finds_its_lease_lost_and_publishes_nothing(place: Path, patch: Patch) -> None:
    store, _ = opened(place)
    told, go_on = processes.Queue(), processes.Event()
    frozen = processes.Process(target=put_after_standing_still, args=(patch, place, told, go_on))
    frozen.start()
    assert told.get(timeout=60)
    os.kill(frozen.pid, signal.SIGSTOP)
    assert seconds_until_free(place / "leases/key") >= SOON
    os.kill(frozen.pid, signal.SIGCONT)
    go_on.set()
    assert "stood still" in told.get(timeout=60)
    frozen.join(60)
    assert frozen.exitcode == 0
    assert not list(store.segments())
    assert not list((place / "writing").iterdir())
    with claimed(place / "leases/key") as mine:  # what it took for its own is nobody's
        assert mine


def test_who_stood_still_and_was_missed_by_nobody_goes_on(place: Path) -> None:
    store, _ = opened(place)
    told, go_on = processes.Queue(), processes.Event()
    frozen = processes.Process(target=put_after_standing_still, args=(as_ever, place, told, go_on))
    frozen.start()
    assert told.get(timeout=60)
    os.kill(frozen.pid, signal.SIGSTOP)
    time.sleep(1.5 * SOON)
    os.kill(frozen.pid, signal.SIGCONT)
    go_on.set()
    assert told.get(timeout=60) == "published"
    frozen.join(60)
    assert store.get(state_name(causes_of(1))) is not None


def test_a_lease_outlives_the_renaming_of_its_folder_and_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    with claimed(tmp_path / "aside/lease") as mine:
        assert mine
        (tmp_path / "aside").rename(tmp_path / "run")
        time.sleep(2 * leases.BEAT)
        check_held()
        with claimed(tmp_path / "run/lease") as other:
            assert not other
        for file in (tmp_path / "run/lease").iterdir():
            file.unlink()
        with pytest.raises(LeaseLost):
            check_held()


@pytest.mark.slow
def test_the_benchmark_of_a_shared_store_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/scale.py"
    asked = ["--jobs", "4", "--sleep", "0.05", "--segments", "20", "--runs", "4", "--to"]
    done = subprocess.run([sys.executable, script, *asked, tmp_path / "scale.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "scale.json").read_text())
    assert set(record["workers"]) == {"1", "2", "4", "8"}
    assert set(record["many"]) == {"put", "references", "records", "verify", "garbage", "find one"}


# ---------------------------------------------------------------------------------------------------------
# What is published


@pytest.mark.parametrize("content", [b"the same", b"another"])
def test_two_who_have_made_one_state_both_end_well_and_what_differs_is_said(place: Path, content: bytes) -> None:
    store, said = opened(place)

    def first(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"the same")

    def second(folder: Path) -> None:
        keep(store, 1, write=first)  # another process is faster
        (folder / "adapter_model.safetensors").write_bytes(content)

    name = keep(store, 1, write=second)
    kept = store.get(name)
    assert kept is not None
    assert (kept.folder / "adapter_model.safetensors").read_bytes() == b"the same"
    assert not list((place / "writing").iterdir())
    if content == b"the same":
        assert not said
    else:
        [line] = said
        assert "was made twice" in line
        assert "adapter_model.safetensors is not the same" in line


def test_a_state_that_is_seen_late_is_not_put_over(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = opened(place)
    name = keep(store, 1)
    is_dir, late = Path.is_dir, [True, True]
    monkeypatch.setattr(Path, "is_dir", lambda path: not (path.name == name and late and late.pop()) and is_dir(path))
    assert keep(store, 1) == name
    monkeypatch.undo()
    assert store.get(name) is not None
    assert not said


def test_where_one_file_can_be_created_twice_no_run_begins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(place)
    true_open = os.open

    def without_excl(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        return true_open(path, flags & ~os.O_EXCL, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without_excl)
    with pytest.raises(StoreError, match="creates one file twice"), in_use(place, print):
        pass


def test_a_store_of_an_earlier_version_is_taken_over_and_that_version_keeps_out(place: Path) -> None:
    store, _ = opened(place)
    name = keep(store, 1)
    (place / "format.json").write_text('{"format": 1}')
    assert opened(place)[0].get(name) is not None
    assert json.loads((place / "format.json").read_text()) == {"format": 2}


# ---------------------------------------------------------------------------------------------------------
# Runs and pruning


def run_and_die(patch: Patch, place: Path) -> None:
    soon_in_child(patch)

    def dies(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    with in_use(place, print):
        keep(Store(place, print), 1, write=dies)


@pytest.mark.parametrize("patch", [as_ever, another_machine])
def test_pruning_waits_until_it_is_sure_that_a_run_is_dead(place: Path, patch: Patch) -> None:
    opened(place)
    dying = processes.Process(target=run_and_die, args=(patch, place))
    dying.start()
    dying.join(60)
    said: list[str] = []
    with alone(place, said.append):
        assert not [name for name in (place / "leases/in-use").iterdir() if name.name.startswith("run-")]
    assert bool(said) is (patch is another_machine)


def use(patch: Patch, place: Path, told: Any, go_on: Any) -> None:
    soon_in_child(patch)
    with in_use(place, print):
        told.put(True)
        assert go_on.wait(60)


@pytest.mark.parametrize("patch", [as_ever, another_machine])
def test_nothing_is_pruned_and_nothing_cleared_under_a_run_that_lives(place: Path, patch: Patch) -> None:
    opened(place)
    told, go_on = processes.Queue(), processes.Event()
    user = processes.Process(target=use, args=(patch, place, told, go_on))
    user.start()
    assert told.get(timeout=60)
    with pytest.raises(StoreError, match="a run is at work"), alone(place):
        pass
    with in_use(place, print):
        pass
    assert len(list((place / "leases/in-use").iterdir())) == 1
    go_on.set()
    user.join(60)
    assert user.exitcode == 0
    with alone(place):
        pass


def run_command(patch: Patch, words: list[str], said: Path, cache: str, stop_at: int) -> None:
    """A command that stands still before a step of the optimizer."""
    import torch

    soon_in_child(patch)
    step, calls = torch.optim.AdamW.step, 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(*args, **kwargs)

    torch.optim.AdamW.step = stopping
    command(words, said, cache)


@pytest.mark.slow
@pytest.mark.parametrize("patch", [flock_is_refused, another_machine])
def test_a_run_that_stood_still_and_the_one_that_took_its_work_over_end_with_the_same(
    recipe_file: Path, place: Path, patch: Patch
) -> None:
    said, folders = recipe_file.parent / "said.txt", [recipe_file.parent / name for name in ("frozen", "other")]

    def start(folder: Path, stop_at: int) -> Any:
        words = ["run", str(recipe_file), *SHORT, *LORA_ONLY, "checkpoint_seconds=0", "--run-folder", str(folder)]
        one = processes.Process(target=run_command, args=(patch, words, said, os.environ["COLA_CACHE"], stop_at))
        one.start()
        return one

    frozen = start(folders[0], 3)
    while Path(f"/proc/{frozen.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert frozen.is_alive(), said.read_text()
        time.sleep(0.02)
    other = start(folders[1], 0)
    other.join(120)
    assert other.exitcode == 0, said.read_text()
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.join(120)
    assert frozen.exitcode == 0, said.read_text()
    assert "stood still" in said.read_text()
    ended = [result(RunFolder(folder), "lora") for folder in folders]
    assert ended[0]["evaluation"] == ended[1]["evaluation"]
    assert not list((place / "damaged").iterdir())
    assert not list((place / "writing").iterdir())
