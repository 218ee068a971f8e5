"""How long something took: wall clock, in which is all else that the machine did meanwhile, and the CPU time of this
process beside it, in which that is not."""

from collections.abc import Iterable, Mapping
from time import perf_counter, process_time
from typing import Any, NamedTuple


class Took(NamedTuple):
    """A duration by both clocks."""

    seconds: float  # wall clock
    cpu_seconds: float  # of this process, all its threads together; what a GPU did is not in it


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = perf_counter(), process_time()

    def read(self) -> Took:
        """How long it has run."""
        return Took(perf_counter() - self._wall, process_time() - self._cpu)


def cpu_total(parts: Iterable[Mapping[str, Any]]) -> float | None:
    """The CPU time of some records together; None where one is from a version that did not note it."""
    every = [part.get("cpu_seconds") for part in parts]
    known = [seconds for seconds in every if seconds is not None]
    return sum(known) if len(known) == len(every) else None
