"""Workers begin fast: they are forked from a server that has imported what they need. No torch in this process."""

import multiprocessing
import os
from multiprocessing import forkserver

from cola import environment
from cola.errors import RecipeError, plain

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(workers: str) -> None:
    """Raise RecipeError where `--workers` says neither `auto` nor a number of processes that this machine has cores
    for."""
    if environment.launched():
        raise RecipeError(
            f"--workers {plain(workers)}: a launcher has started several processes for one training; "
            "take one of the two"
        )
    if workers == "auto":
        return
    if not (workers.isascii() and workers.isdecimal() and len(workers) < 5 and int(workers)):
        raise RecipeError(f"--workers {plain(workers)}: a number from 1, or auto")
    if int(workers) > CORES:
        raise RecipeError(f"--workers {workers}: this process may use {CORES} cores; at most so many workers")


def warm_up() -> None:
    """Begin the server, which imports while this process does the same. It computes nothing, so that it has no threads
    when it is forked."""
    multiprocessing.set_forkserver_preload(["cola.run.worker"])
    forkserver.ensure_running()
