"""cola run | ablate: begin, or go on; in the end the results, and the exit code."""

import sys
from pathlib import Path

from cola.cli.imports import no_garbage
from cola.compare.ablation import points_of, take_ablation
from cola.compare.records import Summary
from cola.environment import launched
from cola.errors import RunChanged, RunFolderError
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.write import dump_recipe
from cola.report.terminal import Terminal
from cola.run.inputs import inputs_of
from cola.run.interrupt import RESUMABLE, Signals, stand_down
from cola.run.start import HERE, Workers, begin
from cola.tree.mend import said
from cola.tree.run_folder import RunFolder
from cola.tree.run_holder import finished_run, lock_run, take_run, unfinished_run


def run(
    path: Path,
    overrides: list[str] | None,
    run_folder: Path | None,
    dry_run: bool,
    allow_code: bool = False,
    workers: Workers = HERE,
) -> int:
    """Train a recipe, or show its plan; returns the exit code."""
    recipe = read_recipe(path, overrides)
    if dry_run:
        with no_garbage():  # it does little more than to import what it asks
            from cola.plan.checks import check

            check(recipe, Terminal())
        return 0
    return train(recipe, run_folder, allow_code, workers)[0]


def _told_again(recipe: Recipe) -> tuple[int, Path] | None:
    """Print the results of the last run of the recipe, and return what `train` does, where that came to its end and all
    that it was given is as it was; else None. No torch: it is a matter of a second."""
    if launched():
        return None
    folder = finished_run(dump_recipe(recipe), _named(recipe))
    if folder is None:
        return None
    terminal = Terminal()
    try:
        meta, summary = folder.provenance(), folder.read("summary.json", Summary)
        if meta is None or summary is None or meta.inputs is None or meta.inputs != inputs_of(recipe):
            return None
        with no_garbage():
            from cola.cli.show import print_results, say_tracking
        terminal.say(
            f"{recipe.name}: {folder.path} is the run of this recipe, and nothing that it was given has changed: "
            "there is nothing to train (one in a new folder: --run-folder NEW)"
        )
        print_results(folder, summary, terminal)
    except RunFolderError as error:
        terminal.warn(f"{said(error)}: a new run is started")
        return None
    say_tracking(summary.tracking, terminal)
    return int(bool(summary.same_outputs)), folder.path


def train(
    recipe: Recipe, run_folder: Path | None, allow_code: bool = False, workers: Workers = HERE
) -> tuple[int, Path]:
    """Go on with the last run of the recipe, where it did not come to its end, tell its results, where it did and
    nothing has changed since, or begin one; returns the exit code and the run's folder. `run_folder`: where a run is
    begun, whatever there is elsewhere; `allow_code`: the user's own that the recipe names may run; `workers`: who
    trains."""
    if run_folder is None and (told := _told_again(recipe)) is not None:
        return told
    _need_leave(recipe, allow_code)
    begin(workers)
    text, named = dump_recipe(recipe), _named(recipe)
    if run_folder is None:
        with unfinished_run(text, named) as before:
            if before is not None:
                try:
                    return _train(recipe, before, False, workers), before.path
                except RunChanged as changed:
                    print(f"{changed}: a new run is started", file=sys.stderr)
    with take_run(text, run_folder or named, run_folder is None, _say_waiting) as (folder, fresh):
        return _train(recipe, folder, fresh, workers), folder.path


def _named(recipe: Recipe) -> Path:
    """Where the runs of a recipe lie, but for the time in their folders' names."""
    return Path(recipe.output).expanduser() / recipe.name


def _need_leave(recipe: Recipe, allow_code: bool) -> None:
    if recipe.own_code:
        from cola.run.code import need_leave

        need_leave(recipe, allow_code)


def resume(path: Path, allow_code: bool = False, workers: Workers = HERE) -> int:
    """Go on with the run in a folder; returns the exit code."""
    folder = RunFolder.open(path, to_mend=True)
    recipe = read_recipe(folder.recipe_file)
    _need_leave(recipe, allow_code)
    begin(workers)
    with lock_run(path, _say_waiting):
        return _train(recipe, folder, False, workers)


def _say_waiting(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _train(recipe: Recipe, folder: RunFolder, fresh: bool, workers: Workers) -> int:
    """Run a recipe in a folder that this process holds; returns the exit code."""
    terminal = Terminal()
    begun = "" if fresh else "going on with "
    terminal.say(
        f"{begun}{recipe.name}: {', '.join(recipe.arms)}; seeds {', '.join(map(str, recipe.seeds))} → {folder.path}"
    )
    with no_garbage():
        from cola.run.places import places_for
        from cola.run.run import run as run_recipe

    with Signals().installed() as signals:
        places = places_for(workers, recipe, terminal)
        summary = run_recipe(recipe, folder, terminal, signals, places=places)
    # With what draws, for which no first step has to wait.
    from cola.cli.show import say_tracking, track_run, write_results

    write_results(folder, summary, terminal)
    stand_down()
    # One that stopped goes on later, and is compared then; a tracker that failed once would only be waited for again.
    if not summary.interrupted and summary.tracking and summary.tracking.mode != "off":
        track_run(recipe, folder, summary, terminal)
    else:
        say_tracking(summary.tracking, terminal)
    command = f"the same command, or: cola run --resume {folder.path}"
    if summary.interrupted:
        terminal.say(f"interrupted; all that was trained is kept. Go on with {command}")
        return RESUMABLE
    if any(arm.errors for arm in summary.arms.values()):
        terminal.say(f"some arms failed; try them again with {command}")
        return 1
    return 1 if summary.same_outputs else 0  # said among the results


def ablate(
    path: Path, keys: list[str], paired: bool, dry_run: bool, allow_code: bool = False, workers: Workers = HERE
) -> int:
    """Go on with the last ablation of these points, where it did not come to its end, or begin one; returns the exit
    code."""
    terminal, points = Terminal(), points_of(path, keys, paired)
    if dry_run:
        from cola.plan.checks import check

        for point in points:
            terminal.say(point.label)
            check(point.recipe, terminal)
        return 0
    for point in points:
        _need_leave(point.recipe, allow_code)
    begin(workers)
    with take_ablation(points) as folder:
        terminal.say(f"{len(points)} {'points' if len(points) > 1 else 'point'} → {folder}")
        with no_garbage():
            from cola.run.ablate import ablate as run_all
            from cola.run.places import places_for

        with Signals().installed() as signals:
            places = places_for(workers, points[0].recipe, terminal)
            summary = run_all(points, folder, terminal, signals, places)
        from cola.cli.show import print_ablation, track_ablation

        print_ablation(folder, summary, terminal)
        stand_down()
        if not summary.interrupted:
            track_ablation(folder, summary, terminal, publish=False)
    if summary.interrupted:
        terminal.say("interrupted; all that was trained is kept. Go on with the same command")
        return RESUMABLE
    return 1 if summary.failed else 0
