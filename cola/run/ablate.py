"""`cola ablate`: the runs of an ablation's points, one after the other; what they share is trained once."""

from pathlib import Path
from time import monotonic

from cola.compare.ablation import Point, summarize_ablation
from cola.compare.records import Ablation
from cola.errors import ColaError
from cola.recipe.write import dump_recipe
from cola.report.numbers import duration
from cola.report.page import write_report
from cola.report.terminal import Terminal
from cola.run.interrupt import Interrupted, Signals
from cola.run.run import run
from cola.tree.records import Result
from cola.tree.run_folder import RunFolder
from cola.tree.run_holder import take_run


def ablate(points: list[Point], folder: Path, terminal: Terminal, signals: Signals | None = None) -> Ablation:
    """Run every point that is not finished; returns the summary, which is also written to ablation.json. The caller
    holds the folder. A point that cannot be run (a model that is not there, target_modules that match nothing) does not
    keep the others from it."""
    tracked: set[tuple[str, int, str]] = set()
    errors: dict[str, str] = {}
    interrupted = False
    ran: list[float] = []  # seconds of each point that was run in this session
    for number, point in enumerate(points, 1):
        left = f", about {duration(sum(ran) / len(ran) * (len(points) - number + 1))} left" if ran else ""
        place = f"point {number} of {len(points)}{left}: {point.label}"
        try:
            with take_run(dump_recipe(point.recipe), folder / "points" / point.folder) as (run_folder, _):
                if run_folder.finished:
                    terminal.say(f"{place}: finished before")
                    done = [result for result in run_folder.results() if isinstance(result, Result)]
                    tracked |= {(r.run_info.arm, r.run_info.seed, r.train_info.final_state) for r in done}
                    continue
                terminal.say(f"{place} → {run_folder.path}")
                siblings, started = [other.recipe for other in points], monotonic()
                summary = run(point.recipe, run_folder, terminal, signals, folder.name, tracked, siblings)
                write_report(run_folder)
                ran.append(monotonic() - started)
                interrupted = summary.interrupted
        except Interrupted:  # while data or model were being loaded
            interrupted = True
        except ColaError as error:
            errors[point.folder] = str(error)
            terminal.warn(f"{point.label} cannot be run, the others go on: {error}")
        if interrupted:
            break
    ablation = summarize_ablation(folder, points, errors, interrupted)
    RunFolder(folder).write("ablation.json", ablation)
    return ablation
