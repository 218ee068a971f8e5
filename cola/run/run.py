"""A recipe from end to end: every arm and seed is trained, scored and recorded; one failure takes no other along."""

import contextlib
import errno
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter, sleep
from typing import Literal

from cola.compare.records import StoreUse, Summary, Tracked
from cola.compare.summary import summarize
from cola.errors import ColaError, ModelError, RunFolderError
from cola.files import digest, store_path
from cola.link.ideas.door import place_of
from cola.measure.evaluate import Ways
from cola.recipe.plan import Job, jobs_of, trials_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.report.tracking import NoTracker, Tracker, command_after, mode_of, need_tracker
from cola.run.announce import say_cautions, say_plan
from cola.run.assignment import Bench
from cola.run.code import admit_code
from cola.run.ended import SpectrumFiles, let_full_weights_go, want_weights
from cola.run.foresee import foresee
from cola.run.interrupt import Interrupted, Signals
from cola.run.job import do_job
from cola.run.materials import check_bases, check_folder, gather, heeding
from cola.plan.tree import Planner
from cola.run.search import chosen_jobs, known_jobs, with_choice
from cola.tree.locks import WAIT_SECONDS, claim, in_use
from cola.tree.prune import register, size_of
from cola.tree.records import Ended, RunInfo
from cola.tree.run_folder import FORMAT, RunFolder
from cola.tree.store import Store


def run(
    recipe: Recipe,
    folder: RunFolder,
    terminal: Terminal,
    signals: Signals | None = None,
    group: str | None = None,
    tracked: set[tuple[str, int, str]] | None = None,
    siblings: Sequence[Recipe] = (),
) -> Summary:
    """Train and score everything the recipe asks for that neither the folder nor the store holds yet; returns what
    summary.json holds, `interrupted` where the user stopped it.

    Args:
        recipe: The resolved recipe.
        folder: The run's, locked by the caller.
        terminal: Told of the plan, progress and warnings.
        signals: Installed by the caller; None: for the time of this call.
        group: At the tracker, where the run is a point of an ablation. Default: the run folder's name.
        tracked: Arms, seeds and final states that the tracker has been sent, by other points of the ablation; added to.
        siblings: The recipes of the ablation's other points: states are kept where those part from this one.

    Raises:
        ColaError: model, data or disk cannot serve the recipe; nothing has been trained then.
    """
    need_tracker(recipe.tracking)
    code = admit_code(recipe, folder)
    materials = replace(gather(recipe, terminal), code=code)
    store = Store(store_path(recipe.store), terminal.warn)
    meta, used = check_folder(materials, folder, store, terminal), folder.references()
    selfcheck, ready = check_bases(materials, store, used, terminal)
    began, meta = (made.model_copy(update={"selfcheck": selfcheck}) for made in (folder.provenance() or meta, meta))
    folder.write("provenance.json", began)
    ways = Ways(**dict(selfcheck.ways))
    recipe, siblings = heeding(ways, recipe), [heeding(ways, sibling) for sibling in siblings]
    materials = replace(materials, recipe=recipe, evaluator=materials.evaluator.asking(ways))
    planner = Planner(materials.source, materials.skeleton, materials.splits, materials.device.type, code)
    meter, jobs = planner.meter(recipe), jobs_of(recipe)
    tree = planner.tree(recipe, meter, siblings)
    say_cautions(recipe, tree, jobs, meter, terminal, of_ablation=bool(siblings))
    folder.write("plan.json", foresee(materials, meter, tree, store, terminal))
    off = mode_of(recipe.tracking) == "off"
    tracker = NoTracker() if off else Tracker(recipe.tracking, group, folder.path, terminal.warn)
    sent = set() if tracked is None else tracked
    with (
        in_use(store.path, store.warn),
        contextlib.nullcontext(signals) if signals else Signals().installed() as signals,
        terminal.progress(len(jobs), sum(tree.lineage(job).n_steps for job in jobs)) as progress,
    ):
        bench = Bench(
            materials, folder, store, planner, meter, tree, meta, used, ready, tracker, sent, signals, progress
        )
        interrupted = _stopped(bench, jobs)
    summary = summarize(recipe, folder).model_copy(
        update={
            "interrupted": interrupted,
            "tracking": _tracked(recipe, tracker, group, folder),
            "store": StoreUse(path=str(store.path), bytes=size_of(store.path)),
        }
    )
    folder.write("summary.json", summary)
    return summary


def _tracked(recipe: Recipe, tracker: Tracker | NoTracker, group: str | None, folder: RunFolder) -> Tracked:
    """What became of the sending; a tracker that failed may have nothing to look at, but what W&B kept can be sent."""
    settings = recipe.tracking
    failed = tracker.mode == "off" and settings.tracker != "wandb"
    command = None if failed else command_after(settings, group, folder.path)
    return Tracked(tracker=settings.tracker, mode=tracker.mode, command=command)


def _stopped(bench: Bench, jobs: list[Job]) -> bool:
    """Do every job; returns whether the user stopped it."""
    register(bench.store, bench.folder.path)
    try:
        _do_all(bench, jobs)
        stopped = False
    except (KeyboardInterrupt, Interrupted):
        stopped = True
    bench.progress.close()
    bench.write_references()
    return stopped


def _do_all(bench: Bench, jobs: list[Job]) -> None:
    """Every job, in order; what another process is at comes later, so that one command given twice shares the work."""
    left, known, files = list(jobs), known_jobs(bench, jobs), SpectrumFiles(bench)
    want_weights(bench, jobs, files)
    say_plan(bench, known, left)
    searching, waits = len(known) < len(left), False
    while left:
        open_trials = {job for job in left if job.trial}
        for job in left:
            if not job.trial and open_trials.intersection(trials_of(bench.recipe, job.arm, job.seed)):
                continue
            with claim(bench.store.path, _claim(bench, job)) as mine:
                if not mine:
                    continue
                if searching and not job.trial:
                    known = known_jobs(bench, jobs)
                    if not open_trials:
                        say_plan(bench, known, known)
                        searching = False
                want_weights(bench, jobs, files)
                _do(bench, job)
                files.update(
                    chosen_jobs(bench, [other for other in jobs if other.seed == job.seed and not other.trial])
                )
                want_weights(bench, jobs, files)
                let_full_weights_go(bench, job.seed)
            left.remove(job)
            waits = False
            break
        else:
            if not waits:
                bench.progress.wait(left[0].label, "another process is at it, and at all that is left; waiting")
            waits = True
            sleep(WAIT_SECONDS)


def _claim(bench: Bench, job: Job) -> str:
    """The key that a process holds while it is at a job: the state in which the job ends, tried or scored in full."""
    with contextlib.suppress(ColaError):  # said when its turn comes
        job = with_choice(bench, job)
    return digest({"job": bench.tree.lineage(job).names[-1], "trial": job.trial})


def _do(bench: Bench, job: Job) -> None:
    """Train and record one job, unless its result is there."""
    n_steps, started = bench.tree.lineage(job).n_steps, perf_counter()
    if bench.folder.status(job) == "ok":
        bench.progress.skip(n_steps)
        return
    try:
        bench.progress.job(job.label, n_steps)
        do_job(bench, with_choice(bench, job))
    except (KeyboardInterrupt, Interrupted):
        _record_end(bench, job, "interrupted", started)
        raise
    except ModelError:
        raise  # a base that does not load fails every arm alike
    # An arm that diverges, runs out of memory or meets a defect must not take the others with it.
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunFolderError(
                f"{error.filename or bench.folder.path}: the disk is full; what is finished is kept: make room "
                f"(`cola store prune`), then `cola run --resume {bench.folder.path}`"
            ) from error
        reason = str(error) if isinstance(error, ColaError) else f"{type(error).__name__}: {error}{_in_own_code(error)}"
        _record_end(bench, job, "failed", started, reason)
        trace = bench.folder.job(job).relative_to(bench.folder.path) / "traceback.txt"
        bench.folder.write_text(trace, "".join(traceback.format_exception(error)))
        bench.progress.terminal.warn(f"{job.label} failed, the others go on: {reason}")


def _in_own_code(error: Exception) -> str:
    """Where in the user's own code an error was raised, in words; nothing where it was not."""
    place = place_of(error)
    return f" ({Path(place[0]).name}:{place[1]})" if place else ""


def _record_end(
    bench: Bench, job: Job, status: Literal["failed", "interrupted"], started: float, error: str | None = None
) -> None:
    """The result of a job that did not come to its end; one that did is left as it is."""
    if bench.folder.status(job) == "ok":
        return
    info = RunInfo(**asdict(job), seconds=perf_counter() - started, error=error)
    where = bench.folder.job(job).relative_to(bench.folder.path) / "result.json"
    bench.folder.write(where, Ended(format=FORMAT, status=status, run_info=info))
    bench.tracker.finish({}, status)
