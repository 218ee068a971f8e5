"""A worker as the command sees it: begun, given orders, heard, stopped and ended; here a process of this machine."""

import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from cola.report.terminal import RunProgress
from cola.run.asked import Task
from cola.run.worker import Order, Place, work


@dataclass(frozen=True)
class End:
    """How a worker has ended."""

    said: str
    by_its_job: bool = True  # whether what it was at may be why


class Hand:
    """A worker, begun as this is made."""

    def __init__(self, place: Place, log: Path, progress: RunProgress) -> None:
        self.place, self.log, self.progress = place, log, progress
        self.task: Task | None = None
        self.ready = False
        self.spare = False  # whether it was told to end, since nothing is left for it
        self.began = perf_counter()
        self.pipe = self._begin()  # what it tells; its end is the worker's

    def _begin(self) -> Connection:
        mine, theirs = connection.Pipe()
        arguments = (self.place, self.log, theirs)
        self._process = context_of(self.place).Process(target=work, args=arguments, name=f"worker-{self.place.number}")
        self._process.start()
        theirs.close()  # so that its death is the pipe's end
        return mine

    def order(self, task: Task, tracked: frozenset[tuple[str, int, str]]) -> None:
        """Have it do a job."""
        self.task = task
        self._send(Order(task.run.point, task.job, tracked))

    def _send(self, order: Order) -> None:
        with contextlib.suppress(OSError):  # it has died, which is found when it is next listened to
            self.pipe.send(order)

    def stop(self, at_once: bool = False) -> None:
        """Have it keep a checkpoint and end, or end as it is."""
        if self._process.pid and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def end(self) -> End:
        """How it has ended, when its pipe has come to an end."""
        self.pipe.close()
        self._process.join(60)
        return End(said_of(self._process.exitcode))

    def wait(self) -> None:
        """Until it has ended, which it was told to; for a minute."""
        self._process.join(60)


def context_of(place: Place) -> Any:
    """Forked from a server that has imported all and computed nothing; with cards each is begun anew, since a process
    that was forked cannot use what its parent has asked of CUDA."""
    return multiprocessing.get_context("spawn" if place.card is not None else "forkserver")


def said_of(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (for memory, perhaps)" if name == "SIGKILL" else "")
    return f"with exit code {code}" if code is not None else "for no reason that can be told"
