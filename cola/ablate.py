"""`cola ablate`: the runs of an ablation's points, one after the other; what they share is trained once."""

from typing import Any

from cola.ablation import AblationFolder, Point, summarize_ablation
from cola.errors import ColaError
from cola.interrupt import Interrupted, Signals
from cola.report import write_report
from cola.run import run
from cola.terminal import Terminal


def ablate(
    points: list[Point], folder: AblationFolder, terminal: Terminal, signals: Signals | None = None
) -> dict[str, Any]:
    """Run every point that is not finished; returns the summary, which is also written to ablation.json.

    A point that cannot be run (a model that is not there, target_modules that match nothing) does not keep the
    others from it.
    """
    tracked: set[str] = set()
    recipes = [point.recipe for point in points]
    errors: dict[str, str] = {}
    for number, point in enumerate(points, 1):
        run_folder, fresh = folder.run_folder(point)
        if run_folder.finished:
            terminal.say(f"point {number} of {len(points)}: {point.label}: finished before")
            continue
        terminal.say(f"point {number} of {len(points)}: {point.label} → {run_folder.path}")
        try:
            with run_folder.lock():
                group = folder.path.name
                summary = run(point.recipe, run_folder, terminal, signals, group, tracked, siblings=recipes)
            write_report(run_folder)
        except Interrupted:  # while data or model were being loaded
            break
        except ColaError as error:
            errors[point.folder] = str(error)
            terminal.warn(f"{point.label} cannot be run, the others go on: {error}")
            if fresh:
                run_folder.remove_if_untrained()
            continue
        if summary["interrupted"]:
            break
    summary = summarize_ablation(folder, points, errors)
    folder.write(summary)
    return summary
