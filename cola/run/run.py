"""A recipe from end to end: every arm and seed is trained, scored and recorded; one failure takes no other along."""

import contextlib
from collections.abc import Sequence
from time import sleep

from cola.compare.records import StoreUse, Summary, Tracked
from cola.compare.summary import summarize
from cola.errors import LeaseLost, ModelError
from cola.recipe.plan import Job, jobs_of, trials_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.report.tracking import NoTracker, Tracker, command_after
from cola.run.announce import say_plan
from cola.run.assignment import Bench
from cola.run.ended import SpectrumFiles, let_full_weights_go, want_weights
from cola.run.interrupt import Interrupted, Signals
from cola.run.one_job import do, key_of
from cola.run.prepare import prepared
from cola.run.search import chosen_jobs, known_jobs
from cola.run.worker import Place, Point
from cola.run.workers import Asked, do_runs
from cola.tree.leases import WAIT_SECONDS, check_held, claim
from cola.tree.mend import mend
from cola.tree.prune import size_of
from cola.tree.run_folder import RunFolder


def run(
    recipe: Recipe,
    folder: RunFolder,
    terminal: Terminal,
    signals: Signals | None = None,
    group: str | None = None,
    tracked: set[tuple[str, int, str]] | None = None,
    siblings: Sequence[Recipe] = (),
    places: Sequence[Place] = (),
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
        places: Of workers that do the jobs, each in a process of its own; without any this process does them.

    Raises:
        ColaError: model, data or disk cannot serve the recipe; nothing has been trained then.
    """
    mend(folder, terminal.warn)
    with (
        contextlib.nullcontext(signals) if signals else Signals().installed() as signals,
        terminal.progress() as progress,
        prepared(recipe, folder, signals, progress, group, tracked, siblings) as bench,
    ):
        if places:
            interrupted = _stopped_workers(
                Asked(Point(recipe, folder.path.resolve(), group, tuple(siblings)), bench), places
            )
        else:
            interrupted = _stopped(bench, jobs_of(bench.recipe))
    return conclude(bench, group, interrupted)


def _stopped_workers(asked: Asked, places: Sequence[Place]) -> bool:
    """Have workers do every job; returns whether the user stopped it. A ModelError where none of them can."""
    interrupted = do_runs([asked], places, asked.point.folder, asked.bench.progress)
    if asked.error is not None:
        raise ModelError(asked.error)
    return interrupted


def conclude(bench: Bench, group: str | None, interrupted: bool) -> Summary:
    """What a run has come to, in summary.json."""
    recipe, folder, store = bench.recipe, bench.folder, bench.store
    summary = summarize(recipe, folder).model_copy(
        update={
            "interrupted": interrupted,
            "tracking": _tracked(recipe, bench.tracker, group, folder),
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
            try:
                with claim(bench.store.path, key_of(bench, job)) as mine:
                    if not mine:
                        continue
                    if searching and not job.trial:
                        known = known_jobs(bench, jobs)
                        if not open_trials:
                            say_plan(bench, known, known)
                            searching = False
                    _do_claimed(bench, job, jobs, files)
                left.remove(job)
            except LeaseLost as lost:
                bench.folder.need_there()
                check_held()  # the run's folder and the store are another matter: without those nothing goes on
                bench.progress.terminal.warn(f"{job.label}: {lost}")
            waits = False
            break
        else:
            if not waits:
                bench.progress.wait(left[0].label, "another process is at it, and at all that is left; waiting")
            waits = True
            sleep(WAIT_SECONDS)


def _do_claimed(bench: Bench, job: Job, jobs: list[Job], files: SpectrumFiles) -> None:
    """Do a job, and what follows from its end."""
    want_weights(bench, jobs, files)
    do(bench, job)
    files.update(chosen_jobs(bench, [other for other in jobs if other.seed == job.seed and not other.trial]))
    want_weights(bench, jobs, files)
    let_full_weights_go(bench, job.seed)
