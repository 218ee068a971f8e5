"""`cola ablate`: the runs of an ablation's points, one after the other or all by workers; what they share is trained
once."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from cola.compare.ablation import Point, summarize_ablation
from cola.compare.ablation_records import Ablation
from cola.errors import ColaError
from cola.recipe.write import dump_recipe
from cola.report.numbers import duration
from cola.report.page import write_report
from cola.report.terminal import RunProgress, Terminal
from cola.run import worker
from cola.run.interrupt import Interrupted, Signals
from cola.run.prepare import prepared
from cola.run.run import conclude, run
from cola.run.worker import Place
from cola.run.workers import Asked, do_runs
from cola.tree.mend import mend
from cola.tree.records import Result
from cola.tree.run_folder import RunFolder
from cola.tree.run_holder import take_run


def ablate(
    points: list[Point],
    folder: Path,
    terminal: Terminal,
    signals: Signals | None = None,
    places: Sequence[Place] = (),
) -> Ablation:
    """Run every point that is not finished; returns the summary, which is also written to ablation.json. The caller
    holds the folder. A point that cannot be run (a model that is not there, target_modules that match nothing) does not
    keep the others from it. `places`: as of `run`; the workers do the jobs of all points."""
    errors: dict[str, str] = {}
    if places:
        interrupted = _all_at_once(points, folder, terminal, signals or Signals(), places, errors)
    else:
        interrupted = _one_by_one(points, folder, terminal, signals, errors)
    ablation = summarize_ablation(folder, points, errors, interrupted)
    RunFolder(folder).write("ablation.json", ablation)
    return ablation


def _one_by_one(
    points: list[Point], folder: Path, terminal: Terminal, signals: Signals | None, errors: dict[str, str]
) -> bool:
    tracked: set[tuple[str, int, str]] = set()
    ran: list[float] = []  # seconds of each point that was run in this session
    for number, point in enumerate(points, 1):
        left = f", about {duration(sum(ran) / len(ran) * (len(points) - number + 1))} left" if ran else ""
        place = f"point {number} of {len(points)}{left}: {point.label}"
        try:
            with take_run(dump_recipe(point.recipe), folder / "points" / point.folder) as (run_folder, _):
                if run_folder.finished:
                    terminal.say(f"{place}: finished before")
                    tracked |= _sent(run_folder)
                    continue
                terminal.say(f"{place} → {run_folder.path}")
                siblings, started = [other.recipe for other in points], monotonic()
                summary = run(point.recipe, run_folder, terminal, signals, folder.name, tracked, siblings)
                write_report(run_folder)
                ran.append(monotonic() - started)
                if summary.interrupted:
                    return True
        except Interrupted:  # while data or model were being loaded
            return True
        except ColaError as error:
            errors[point.folder] = str(error)
            terminal.warn(f"{point.label} cannot be run, the others go on: {error}")
    return False


def _all_at_once(
    points: list[Point],
    folder: Path,
    terminal: Terminal,
    signals: Signals,
    places: Sequence[Place],
    errors: dict[str, str],
) -> bool:
    asked: dict[str, Asked] = {}
    with ExitStack() as held:
        progress = held.enter_context(terminal.progress())
        for number, point in enumerate(points, 1):
            try:
                with ExitStack() as own:
                    run_folder, _ = own.enter_context(
                        take_run(dump_recipe(point.recipe), folder / "points" / point.folder)
                    )
                    finished = run_folder.finished
                    how = ": finished before" if finished else f" → {run_folder.path}"
                    terminal.say(f"point {number} of {len(points)}: {point.label}{how}")
                    if not finished:
                        asked[point.folder] = _prepared(point, points, run_folder, folder.name, signals, progress, own)
                        held.enter_context(own.pop_all())
            except Interrupted:
                return True
            except ColaError as error:
                errors[point.folder] = str(error)
                terminal.warn(f"{point.label} cannot be run, the others go on: {error}")
        interrupted = bool(asked) and do_runs(list(asked.values()), places, folder, progress)
        for name, one in asked.items():
            if one.error is not None:
                errors[name] = one.error
                terminal.warn(f"{name} cannot be run: {one.error}")
            else:
                conclude(one.bench, folder.name, interrupted and bool(one.left))
                write_report(one.bench.folder)
    return interrupted


def _prepared(
    point: Point,
    points: list[Point],
    run_folder: RunFolder,
    group: str,
    signals: Signals,
    progress: RunProgress,
    own: ExitStack,
) -> Asked:
    mend(run_folder, progress.terminal.warn)
    siblings = [other.recipe for other in points]
    bench = own.enter_context(prepared(point.recipe, run_folder, signals, progress, group, siblings=siblings))
    return Asked(worker.Point(point.recipe, run_folder.path.resolve(), group, tuple(siblings)), bench)


def _sent(run_folder: RunFolder) -> set[tuple[str, int, str]]:
    """What a finished point has sent to the tracker."""
    done = [result for result in run_folder.results() if isinstance(result, Result)]
    return {(r.run_info.arm, r.run_info.seed, r.train_info.final_state) for r in done}
