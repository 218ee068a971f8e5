"""A recipe from end to end: every arm and seed is trained, scored and recorded; one failure takes no other along."""

import contextlib
import errno
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter, sleep
from typing import Any

from cola.compare.summary import summarize
from cola.errors import ColaError, ModelError, RunFolderError
from cola.files import digest, store_path
from cola.measure.evaluate import Ways
from cola.recipe.plan import Job, jobs_of, trials_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.report.tracking import Tracker, sync_command
from cola.run.announce import say_cautions, say_plan
from cola.run.base_check import check_bases
from cola.run.bench import Bench
from cola.run.folder_check import check_folder
from cola.run.full_weights import let_full_weights_go, wanted_weights
from cola.run.interrupt import Interrupted, Signals
from cola.run.job import do_job
from cola.run.materials import gather, heeding
from cola.run.plan_tree import Planner
from cola.run.search import chosen_jobs, known_jobs, with_choice
from cola.run.spectrum_files import SpectrumFiles
from cola.tree.locks import WAIT_SECONDS, claim, in_use
from cola.tree.prune import register, size_of
from cola.tree.run_folder import FORMAT, RunFolder
from cola.tree.store import Store


def run(
    recipe: Recipe,
    folder: RunFolder,
    terminal: Terminal,
    signals: Signals | None = None,
    group: str | None = None,
    tracked: set[str] | None = None,
    siblings: Sequence[Recipe] = (),
) -> dict[str, Any]:
    """Train and score everything the recipe asks for that neither the folder nor the store holds yet.

    Args:
        recipe: The resolved recipe.
        folder: The run's, locked by the caller.
        terminal: Told of the plan, progress and warnings.
        signals: Installed by the caller; None: for the time of this call.
        group: W&B group, where the run is a point of an ablation. Default: the run folder's name.
        tracked: Arms, seeds and final states that W&B has been sent, by other points of the ablation; added to.
        siblings: The recipes of the ablation's other points: states are kept where those part from this one.

    Returns:
        The summary, as in summary.json; `interrupted` is true where the user stopped it.

    Raises:
        ColaError: model, data or disk cannot serve the recipe; nothing has been trained then.
    """
    materials = gather(recipe, terminal)
    store = Store(store_path(recipe.store), terminal.warn)
    meta, used = check_folder(materials, folder, store, terminal), folder.references()
    meta["selfcheck"], ready = check_bases(materials, store, used, terminal)
    folder.write_json("provenance.json", (folder.provenance() or meta) | {"selfcheck": meta["selfcheck"]})
    materials = materials.asking(ways := Ways(**meta["selfcheck"]["ways"]))
    recipe, siblings = materials.recipe, [heeding(ways, sibling) for sibling in siblings]
    planner = Planner(materials.source, materials.skeleton, materials.splits, materials.device.type)
    meter, jobs = planner.meter(recipe), jobs_of(recipe)
    tree = planner.tree(recipe, meter, siblings)
    say_cautions(recipe, tree, jobs, meter, terminal, of_ablation=bool(siblings))
    tracker = Tracker(recipe.tracking, group, folder.path, terminal.warn)
    steps = {job: tree.lineage(job).n_steps for job in jobs}
    with (
        in_use(store.path, store.warn),
        contextlib.nullcontext(signals) if signals else Signals().installed() as signals,
        terminal.progress(sum(steps.values())) as progress,
    ):
        sent = set() if tracked is None else tracked
        bench = Bench(
            materials, folder, store, planner, meter, tree, meta, used, ready, tracker, sent, signals, progress
        )
        interrupted = _stopped(bench, steps, terminal)
    summary = summarize(recipe, folder) | {"interrupted": interrupted}
    summary["wandb"] = {"mode": tracker.mode, "sync": sync_command(folder.path)}
    summary["store"] = {"path": str(store.path), "bytes": size_of(store.path)}
    folder.write_json("summary.json", summary)
    return summary


def _stopped(bench: Bench, steps: dict[Job, int], terminal: Terminal) -> bool:
    """Do every job; returns whether the user stopped it."""
    register(bench.store, bench.folder.path)
    stopped = False
    try:
        _do_all(bench, steps, terminal)
    except (KeyboardInterrupt, Interrupted):
        stopped = True
    bench.progress.close()
    bench.write_references()
    return stopped


def _do_all(bench: Bench, steps: dict[Job, int], terminal: Terminal) -> None:
    """Every job, in order; what another process is at comes later, so that one command given twice shares the work.

    Args:
        bench: What they share.
        steps: Optimizer steps of each job.
        terminal: Told of the plan and of failures.
    """
    left, known, files = list(steps), known_jobs(bench, steps), SpectrumFiles(bench)
    bench.want_weights(wanted_weights(bench, known, files))
    say_plan(bench, known, left, terminal)
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
                    known = known_jobs(bench, steps)
                    if not open_trials:
                        say_plan(bench, known, known, terminal)
                        searching = False
                bench.want_weights(wanted_weights(bench, steps, files))
                _do(bench, job, steps[job], terminal)
                files.update(
                    chosen_jobs(bench, [other for other in steps if other.seed == job.seed and not other.trial])
                )
                bench.want_weights(wanted_weights(bench, steps, files))
                let_full_weights_go(bench, job.seed)
            left.remove(job)
            waits = False
            break
        else:
            if not waits:
                bench.progress.job(left[0].label, steps[left[0]])
                bench.progress.stage("another process is at it, and at all that is left; waiting")
            waits = True
            sleep(WAIT_SECONDS)


def _claim(bench: Bench, job: Job) -> str:
    """The key that a process holds while it is at a job: the state in which the job ends, tried or scored in full."""
    with contextlib.suppress(ColaError):  # said when its turn comes
        job = with_choice(bench, job)
    return digest({"job": bench.tree.lineage(job).names[-1], "trial": job.trial})


def _do(bench: Bench, job: Job, n_steps: int, terminal: Terminal) -> None:
    """Train and record one job, unless its result is there."""
    before = bench.folder.result(job)
    if before is not None and before["status"] == "ok":
        bench.progress.skip(n_steps)
        return
    started = perf_counter()
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
        reason = str(error) if isinstance(error, ColaError) else f"{type(error).__name__}: {error}"
        _record_end(bench, job, "failed", started, reason)
        trace = bench.folder.job(job).relative_to(bench.folder.path) / "traceback.txt"
        bench.folder.write_text(trace, "".join(traceback.format_exception(error)))
        terminal.warn(f"{job.label} failed, the others go on: {reason}")


def _record_end(bench: Bench, job: Job, status: str, started: float, error: str | None = None) -> None:
    """The result of a job that did not come to its end; one that did is left as it is."""
    written = bench.folder.result(job)
    if written is not None and written["status"] == "ok":
        return
    info = {**asdict(job), "seconds": perf_counter() - started, "error": error}
    where = bench.folder.job(job).relative_to(bench.folder.path) / "result.json"
    bench.folder.write_json(where, {"format": FORMAT, "status": status, "run_info": info})
    bench.tracker.finish({}, status)
