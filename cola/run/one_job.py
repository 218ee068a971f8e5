"""One job done and recorded, whatever becomes of it: one failure takes no other along."""

import contextlib
import errno
import traceback
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Literal

from cola.errors import ColaError, FolderGone, LeaseLost, ModelError, RanksLost, RunFolderError
from cola.files import digest, without_home
from cola.link import wires
from cola.link.ideas.door import place_of
from cola.recipe.plan import Job
from cola.run.assignment import Bench
from cola.run.interrupt import Interrupted
from cola.run.job import do_job
from cola.run.search import with_choice
from cola.tree.records import Ended, RunInfo
from cola.tree.run_folder import FORMAT


def key_of(bench: Bench, job: Job) -> str:
    """The key that a process holds while it is at a job: the state in which the job ends, tried or scored in full."""
    with contextlib.suppress(ColaError):  # said when its turn comes
        job = with_choice(bench, job)
    return digest({"job": bench.tree.lineage(job).names[-1], "trial": job.trial})


def do(bench: Bench, job: Job) -> None:
    """Train and record one job, unless its result is there."""
    n_steps, started = bench.tree.lineage(job).n_steps, perf_counter()
    if bench.folder.status(job) == "ok":
        bench.progress.skip(n_steps)
        return
    try:
        bench.progress.job(job.label, n_steps)
        do_job(bench, with_choice(bench, job))
    except (KeyboardInterrupt, Interrupted, RanksLost):
        if bench.recipe.model.shard:
            wires.fall_silent()
        record_end(bench, job, "interrupted", started)
        raise
    except (ModelError, LeaseLost, FolderGone):
        raise  # a base that does not load fails every arm alike; what was taken over is another process's
    # An arm that diverges, runs out of memory or meets a defect must not take the others with it.
    except Exception as error:
        if bench.recipe.model.shard and not isinstance(error, ColaError | OSError):
            record_end(bench, job, "interrupted", started)
            raise wires.lost_in_a_pass(error) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(_disk_full(bench, Path(error.filename or bench.folder.path))) from error
        reason = _reason(error)
        record_end(bench, job, "failed", started, without_home(reason))
        trace = bench.folder.job(job).relative_to(bench.folder.path) / "traceback.txt"
        bench.folder.write_text(trace, without_home("".join(traceback.format_exception(error))))
        bench.progress.terminal.warn(f"{job.label} failed, the others go on: {reason}")


def _reason(error: Exception) -> str:
    """Why an arm failed, in one line."""
    if isinstance(error, ColaError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"{error.filename or 'a file'}: larger than a file may be here; raise the limit (`ulimit -f`)"
    # As Python says it, and as torch does of a CPU.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"no memory is left; smaller passes need less, or raise the limit (`ulimit -v`){_in_own_code(error)}"
    return f"{type(error).__name__}: {error}{_in_own_code(error)}"


def _disk_full(bench: Bench, path: Path) -> str:
    """What is said where there is no room for a file; pruning helps on the store's own disk alone."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    freed = " (`cola store prune`)" if there.stat().st_dev == bench.store.path.stat().st_dev else ""
    again = f"cola run --resume {bench.folder.path}"
    return f"{path}: its disk is full; what is finished is kept: make room there{freed}, then `{again}`"


def _in_own_code(error: Exception) -> str:
    """Where in the user's own code an error was raised, in words; nothing where it was not."""
    place = place_of(error)
    return f" ({Path(place[0]).name}:{place[1]})" if place else ""


def record_end(
    bench: Bench, job: Job, status: Literal["failed", "interrupted"], started: float, error: str | None = None
) -> None:
    """The result of a job that did not come to its end; one that did is left as it is."""
    if bench.folder.status(job) == "ok":
        return
    info = RunInfo(**asdict(job), seconds=perf_counter() - started, error=error)
    bench.folder.end_job(job, Ended(format=FORMAT, status=status, run_info=info), {})
    bench.tracker.finish({}, status)
