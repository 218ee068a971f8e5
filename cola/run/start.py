"""Workers begin fast: they are forked from a server that has imported what they need. No torch in this process."""

import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing import forkserver

from cola import environment
from cola.errors import RecipeError, plain
from cola.files import need_package

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """Who does a run's jobs, as the user has said it."""

    number: str | None = None  # of processes, or `auto`; None: one, and on a cluster as many as there is room for
    on: str | None = None  # `ray`, or a cluster's address; None: this machine

    @property
    def single(self) -> bool:
        """Whether this process does all itself."""
        return self.on is None and self.number in (None, "1")


HERE = Workers()


def begin(workers: Workers) -> None:
    """Check what is asked for, connect to the cluster, and begin to import what workers need while this process does
    the same; a RecipeError where it cannot be."""
    if workers.single:
        return
    option = "--on" if workers.on is not None else "--workers"
    if environment.launched():
        raise RecipeError(
            f"{option} gives each process a job of its own, and torchrun and accelerate launch share one among all of "
            "theirs: take one of the two"
        )
    _check_number(workers)
    if workers.on is None:
        warm_up()
        return
    if workers.on != "ray" and not workers.on.startswith("ray://"):
        raise RecipeError(f"--on {plain(workers.on)}: ray, or a cluster's address, such as ray://node1:10001")
    need_package("ray", "--on ray", "ray")
    from cola.run.on_ray import join

    join(workers.on, CORES)


def _check_number(workers: Workers) -> None:
    """Raise RecipeError where `--workers` says neither `auto` nor a number of processes that this machine has cores
    for."""
    number = workers.number
    if number is None:
        return
    if number == "auto":
        if workers.on is not None:
            raise RecipeError("--workers auto measures this machine; with --on say a number, or nothing")
        return
    if not (number.isascii() and number.isdecimal() and len(number) < 5 and int(number)):
        raise RecipeError(f"--workers {plain(number)}: a number from 1, or auto")
    if workers.on is None and int(number) > CORES:
        raise RecipeError(f"--workers {number}: this process may use {CORES} cores; at most so many workers")


def warm_up() -> None:
    """Begin the server, which imports while this process does the same. It computes nothing, so that it has no threads
    when it is forked."""
    multiprocessing.set_forkserver_preload(["cola.run.worker"])
    forkserver.ensure_running()
