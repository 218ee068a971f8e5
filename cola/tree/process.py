"""Which process holds a lease, without a name of a user or a machine, and whether it is dead for certain. No torch.

Linux tells all of it in /proc; elsewhere nothing is certain, and a lease ends by its expiry.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, as a lease names it."""

    owner: str  # drawn at random
    machine: str | None  # digest of this boot's random id, the process namespace and the host's name
    pid: int
    started: int | None  # clock ticks after the boot; a later process of the same id has another

    def is_dead(self) -> bool:
        """Whether it ran on this machine and has ended; False where that is not certain."""
        if self.machine is None or self.machine != _machine() or self.started is None:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's, which /proc may hide
            return False
        state, started = _stat(self.pid)
        return state in ("Z", "X") or (started is not None and started != self.started)

    def is_alive(self) -> bool:
        """Whether it runs, or stands still, on this machine; False where that is not certain."""
        return self.machine is not None and self.machine == _machine() and not self.is_dead()


def this_process() -> Process:
    """The one that asks."""
    return _this(os.getpid())  # one that was forked is another


@cache
def _this(pid: int) -> Process:
    return Process(secrets.token_hex(8), _machine(), pid, _stat(pid)[1])


@cache
def _machine() -> str | None:
    """Two containers of one machine have one boot, and each its own processes: the namespace tells them apart."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text()
        spaces = [str(place.readlink()) for place in (PROC / "self/ns/pid", PROC / "self/ns/time") if place.exists()]
    except OSError:
        return None
    return hashlib.sha256("\n".join([boot, *spaces, os.uname().nodename]).encode()).hexdigest()[:16]


def _stat(pid: int) -> tuple[str | None, int | None]:
    """State and start of a process; None each where it cannot be read."""
    try:
        # The name before the last bracket is the program's, and may hold spaces and brackets.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None, None
