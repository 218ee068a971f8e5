"""Locks of the kernel (flock): each of one process at a time, and gone with it, however it ends. No torch.

Those of a store lie in STORE/locks/, one file for each key.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cola.errors import StoreError
from cola.files import remove_all

WAIT_SECONDS = 0.2
IN_USE = "in-use"  # the lock that every run holds
CHANGES = "changes"  # the lock on putting, changing and removing segments, for the moment it takes


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock file, made where it is missing, unless another process does; whether it is held now. A
    FileNotFoundError where its folder has gone."""
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Its last holder may have removed it in between: a lock on a file without a name keeps nobody out.
            if _is_at(file.fileno(), path):
                yield True
                return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def claim(store: Path, key: str) -> AbstractContextManager[bool]:
    """Hold a store's key for this process unless another one does; whether it is held now."""
    return claimed(store / "locks" / key)


@contextmanager
def lock(store: Path, key: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a store's key for this process; `on_wait` is called once if another one holds it."""
    while True:
        with claim(store, key) as mine:
            if mine:
                yield
                return
        if on_wait is not None:
            on_wait()
            on_wait = None
        time.sleep(WAIT_SECONDS)


@contextmanager
def in_use(store: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Held by every run, so that pruning waits for it; the first one clears what dead ones left. `warn` is told if
    pruning has to be waited for."""
    with (store / "locks" / IN_USE).open("a") as file:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_all((store / "writing").iterdir())
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            warn(f"store: {store} is being pruned; waiting for that to end")
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """No run uses the store; a StoreError where one does."""
    with (store / "locks" / IN_USE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"store: a run is at work in {store}; prune when it has ended") from None
        yield
