"""Leases: what one process at a time may do, held in files that many machines may share. No torch, no `flock`.

FOLDER/7        a lease, the seventh here: who holds it, and a count that its holder raises
FOLDER/7.free   the same, given back

Taking one is creating the next number exclusively (O_CREAT and O_EXCL), which on a disk, and on NFS since version 3,
one of many can; giving it back is renaming it. A lease whose file has not changed for EXPIRY seconds is over, and the
next number may be created. Those seconds are of the looker's own clock, from one of his looks to another: no two
machines' clocks are compared. The lease of a process that has died on this machine is over at once. A holder that was
stopped for so long finds a higher number when it wakes, and publishes nothing (`check_held`).

No number comes twice, so removing a file can only end the one lease; and who has created a number that was used before,
since it saw an old list of the folder, finds the higher one in the new list, and gives way.

STORE/leases/KEY/      one holder at a time
STORE/leases/in-use/   runs, any number of them (`run-...`), or one pruning (`pruning-...`)
"""

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from cola.errors import LeaseLost, StoreError
from cola.files import remove_all
from cola.tree.process import Process, this_process

BEAT = 10.0  # seconds between two signs of life
EXPIRY = 120.0  # seconds without one; twice the 60 for which NFS may show an old state of a file
WAIT_SECONDS = 0.2  # between two looks at what another one holds, at most
IN_USE = "in-use"  # what every run holds, together with all others
CHANGES = "changes"  # putting, changing and removing segments, for the moment it takes
L = TypeVar("L", bound="Lease | None")
GONE = (errno.ENOENT, errno.ESTALE)  # how a disk, and NFS, say that a file was removed


@dataclass(eq=False)
class Lease:
    """A file that this process has created, and keeps saying in that it lives."""

    place: Path  # its folder, as it was called when the lease was taken
    folder: int  # the folder, open: it may be renamed meanwhile
    name: str
    _beats: int = 0
    _one: threading.Lock = field(default_factory=threading.Lock)
    _open: bool = True

    def create(self) -> None:
        """A FileExistsError where another process was first."""
        self._write(os.O_CREAT | os.O_EXCL)

    def beat(self) -> None:
        """Say that this process lives."""
        # One that was taken over is found to be lost before anything is published; a disk that does not answer may do
        # so next time.
        with self._one, suppress(OSError):
            if self._open:
                self._beats += 1
                self._write(0)

    def is_held(self) -> bool:
        """Whether it is this process's still: its file is there, and no later one."""
        try:
            names = _names(self.folder)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return self.name in names and (not self.name.isdecimal() or _newest(names) == (int(self.name), False))

    def leave(self) -> None:
        """Give it back, so that the next number follows it."""
        self._end(lambda: os.rename(self.name, f"{self.name}.free", src_dir_fd=self.folder, dst_dir_fd=self.folder))

    def remove(self) -> None:
        """Take the file away."""
        self._end(lambda: os.unlink(self.name, dir_fd=self.folder))

    def _end(self, end: Callable[[], None]) -> None:
        with self._one:
            self._open = False
            try:
                end()
            except OSError as error:
                if error.errno not in GONE:  # it was taken over, or its folder removed
                    raise
            finally:
                os.close(self.folder)

    def _write(self, flags: int) -> None:
        # As long each time, so that there is no moment at which it is shorter.
        record = {**asdict(this_process()), "expires_after": EXPIRY, "beat": f"{self._beats:012}"}
        file = os.open(self.name, os.O_WRONLY | flags, 0o666, dir_fd=self.folder)
        try:
            os.write(file, json.dumps(record).encode())
            if not flags:
                os.fsync(file)  # others on a network file system see it from then on
        finally:
            os.close(file)


_held: set[Lease] = set()
_seen: dict[tuple[Path, str], tuple[bytes, float]] = {}  # others' leases: the content, and since when it is that
_heart: list[threading.Thread] = []


def check_held() -> None:
    """Before anything is published: raise LeaseLost where this process has lost a lease that it took."""
    for lease in list(_held):
        if not lease.is_held():
            raise LeaseLost(
                f"{lease.place}: this process stood still for longer than {EXPIRY:g} s, and what it was at was taken "
                "over or ended; all that was published before is kept: the same command goes on"
            )


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lease of a folder, made where it is missing, unless another process does; whether it is held now. A
    FileNotFoundError where what the folder lies in has gone."""
    lease = _take(path)
    if lease is None:
        yield False
        return
    with _beating(lease, lease.leave):
        yield True


def holder_of(path: Path) -> str:
    """Who holds the lease of a folder, in words; for who was not given it."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            content = _read(folder, str(_newest(_names(folder))[0]))
        finally:
            os.close(folder)
        who = content and _told(content)[0]
        if who and who.is_alive():
            return f"process {who.pid}"
    return "another process, perhaps of another machine,"


def claim(store: Path, key: str) -> AbstractContextManager[bool]:
    """Hold a store's key for this process unless another one does; whether it is held now."""
    return claimed(store / "leases" / key)


@contextmanager
def lock(store: Path, key: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a store's key for this process; `on_wait` is called once if another one holds it."""
    began = time.monotonic()
    while True:
        with claim(store, key) as mine:
            if mine:
                yield
                return
        if on_wait is not None:
            on_wait()
            on_wait = None
        # Most locks are held for milliseconds, and some for as long as a training.
        time.sleep(min(max(0.1 * (time.monotonic() - began), WAIT_SECONDS / 64), WAIT_SECONDS))


@contextmanager
def in_use(store: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Held by every run, so that pruning waits for it; what dead ones were writing is cleared. `warn` is told if
    pruning has to be waited for. A StoreError where the store cannot be written, or its disk cannot create a file
    exclusively."""
    path, told = store / "leases" / IN_USE, False
    _need_exclusive(store)
    while True:
        # Each creates its own file first and looks second: of a run and a pruning begun at once one sees the other.
        lease = _enter(path, "run")
        others = [name for name in _names(lease.folder) if name != lease.name]
        dead = [name for name in others if _look(path, lease.folder, name) == "over"]
        for name in dead:
            remove_all((store / "writing").glob(f"{name.split('-')[1]}.*"))
            _unlink(lease.folder, name)
        if not any(name.startswith("pruning-") for name in others if name not in dead):
            break
        lease.remove()
        if not told:
            warn(f"store: {store} is being pruned; waiting for that to end")
        told = True
        time.sleep(WAIT_SECONDS)
    with _beating(lease, lease.remove):
        yield


@contextmanager
def alone(store: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """No run uses the store; a StoreError where one does. `say` is told where that takes a while to be known: a run on
    another machine that is not at its end may be dead."""
    path, told = store / "leases" / IN_USE, False
    lease = _enter(path, "pruning")
    with _beating(lease, lease.remove):
        while others := [name for name in _names(lease.folder) if name != lease.name]:
            for name in others:
                state = _look(path, lease.folder, name)
                if state == "over":
                    _unlink(lease.folder, name)
                elif state == "alive":
                    raise StoreError(f"store: a run is at work in {store}; prune when it has ended")
            if not told and _names(lease.folder) != [lease.name]:
                say(f"store: looking whether a run on another machine is still at work: at most {EXPIRY:g} s")
                told = True
            time.sleep(WAIT_SECONDS)
        yield


def sees(path: Path, owner: str) -> bool:
    """Whether a folder has a lease that this process has taken, perhaps on another machine: then it is the same one."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        contents = [_read(folder, name) for name in _names(folder)]
    finally:
        os.close(folder)
    holders = [_told(content)[0] for content in contents if content is not None]
    return any(holder is not None and holder.owner == owner for holder in holders)


def forget_free(store: Path) -> None:
    """Remove the folders of all keys that nobody holds; for who is alone."""
    for path in (store / "leases").iterdir():
        if path.name != IN_USE and path.is_dir():
            with claimed(path) as mine:
                remove_all([path] if mine else [])


@contextmanager
def _beating(lease: Lease, end: Callable[[], None]) -> Iterator[None]:
    """While a lease is held."""
    _held.add(lease)
    if not _heart or not _heart[-1].is_alive():  # one that was forked has no threads
        _heart.append(threading.Thread(target=_beat, name="leases", daemon=True))
        _heart[-1].start()
    try:
        yield
    finally:
        _held.discard(lease)
        end()


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        for lease in list(_held):
            lease.beat()


def _take(path: Path) -> Lease | None:
    """The next lease of a folder; None where another process holds the last."""
    return _made_in(path, lambda folder: _next(path, folder))


def _enter(path: Path, kind: str) -> Lease:
    """A lease beside all others of a folder."""

    def enter(folder: int) -> Lease:
        lease = Lease(path, folder, f"{kind}-{this_process().owner}-{secrets.token_hex(2)}")
        lease.create()
        return lease

    return _made_in(path, enter)


def _made_in(path: Path, make: Callable[[int], L]) -> L:
    """What is made in a folder that is open, and made where it is missing."""
    while True:
        path.mkdir(exist_ok=True)
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                made = make(folder)
            except BaseException:
                os.close(folder)
                raise
            if made is None:
                os.close(folder)
            return made
        except OSError as error:
            if error.errno not in GONE:
                raise  # else who prunes has removed the folder


def _next(path: Path, folder: int) -> Lease | None:
    number, free = _newest(_names(folder))
    if number and not free and _look(path, folder, str(number)) != "over":
        return None
    lease = Lease(path, folder, str(number + 1))
    try:
        lease.create()
    except FileExistsError:
        return None
    names = _names(folder)
    if _newest(names) != (number + 1, False):  # the first list was an old one
        _unlink(folder, lease.name)
        return None
    for name in names:
        if name != lease.name:
            _unlink(folder, name)
    return lease


def _names(folder: int) -> list[str]:
    return os.listdir(folder)


def _newest(names: list[str]) -> tuple[int, bool]:
    """The last number of a folder's list, 0 where there is none, and whether it was given back."""
    number = max((int(name.removesuffix(".free")) for name in names), default=0)
    return number, f"{number}.free" in names


def _look(path: Path, folder: int, name: str) -> Literal["gone", "over", "alive", "unknown"]:
    """What is known of a lease's holder: dead, or without a sign of life for as long as the lease says; alive, on this
    machine or since it has said so between two looks; or neither yet."""
    if (content := _read(folder, name)) is None:
        return "gone"
    who, expires_after = _told(content)
    if who is not None and who.is_dead():
        return "over"
    now = time.monotonic()
    before, since = _seen.setdefault((path, name), (content, now))
    if content != before:
        _seen[path, name] = content, now
        return "alive"
    if now - since >= expires_after:
        return "over"
    return "alive" if who is not None and who.is_alive() else "unknown"


def _told(content: bytes) -> tuple[Process | None, float]:
    """What a lease says: its holder, and after how many seconds it ends; of one that was cut off, None and EXPIRY."""
    try:
        record = json.loads(content)
        expires_after = float(record.pop("expires_after"))
        del record["beat"]
        return Process(**record), expires_after
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, EXPIRY


def _read(folder: int, name: str) -> bytes | None:
    """A lease's content; None where it has gone."""
    try:
        file = os.open(name, os.O_RDONLY, dir_fd=folder)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)


def _unlink(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _need_exclusive(store: Path) -> None:
    """Raise StoreError where a file can be created twice: there no process could keep another one out."""
    probe = store / "writing" / f".{secrets.token_hex(4)}"
    try:
        for _ in range(2):
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        probe.unlink(missing_ok=True)
        return
    except OSError as error:
        raise StoreError(f"store: {store} cannot be written: {error.strerror}; set store to another folder") from None
    probe.unlink(missing_ok=True)
    raise StoreError(
        f"store: the disk of {store} creates one file twice, so runs cannot share it; set store to another"
    )
