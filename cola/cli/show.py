"""What the commands say at the end: tables, what the numbers allow to be said, the page, what a tracker was sent."""

import signal
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from cola.compare.ablation import read_ablation
from cola.compare.ablation_records import Ablation
from cola.compare.records import Summary, Tracked
from cola.compare.summary import summarize
from cola.compare.tasks import summarize_tasks
from cola.errors import RunFolderError
from cola.files import make_new, need_package
from cola.plan.beside import beside_table
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.schema import Tracking
from cola.recipe.write import recorded
from cola.report.group_report import Comparison
from cola.report.numbers import size
from cola.report.page import comparison_of, comparison_of_ablation, write_ablation, write_report, write_tasks
from cola.report.table import Table
from cola.report.tables import ablation_notes, ablation_table, knots_table, named_tables, task_tables
from cola.report.terminal import Terminal
from cola.report.to_mlflow import URI
from cola.report.tracking import TITLES, Tracker, command_after, need_tracker
from cola.report.verdict import OF_P, contrast_sentence, verdict
from cola.tree.links import need_inside
from cola.tree.records import Result
from cola.tree.run_folder import RunFolder


def need_new(path: Path | None, option: str) -> None:
    """Before anything is made that is to be kept in a folder: raises RunFolderError if it exists."""
    if path is not None and path.exists():
        raise RunFolderError(f"{path} exists and is kept as it is; name another folder by {option}")


def write_results(folder: RunFolder, summary: Summary, terminal: Terminal) -> None:
    """Write a run's page, then as `print_results`."""
    # Ctrl-C while the last files are written would leave them behind the results: it takes a second.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        write_report(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    print_results(folder, summary, terminal)


def print_results(folder: RunFolder, summary: Summary, terminal: Terminal) -> None:
    """Print a run's tables and notes, and where all of it is."""
    parts = (summary.meta.data, summary.meta.selfcheck) if summary.meta else ()
    told = [note for part in parts if part for note in part.notes]  # before the run
    lines = [*verdict(summary), *(note for note in summary.notes if note not in told)]
    lines += [f"report   {folder.page}", f"results  {folder.path / 'summary.json'}"]
    if store := summary.store:
        lines.append(f"store    {store.path}, {size(store.bytes)} on disk (cola store ls)")
    tables = [*named_tables(summary).values(), knots_table(summary, short=True)]
    if summary.foreseen is not None:
        done = [result for result in folder.results([]) if isinstance(result, Result)]
        tables.append(beside_table(summary.foreseen, done))
    print_all(tables, lines, terminal)


def print_all(tables: Iterable[Table], lines: Iterable[str], terminal: Terminal) -> None:
    """Print the tables that have rows, then the lines."""
    for table in tables:
        if table.rows:
            terminal.table(table)
    for line in lines:
        terminal.say(line)


def report_run(path: Path, later: list[tuple[str, str]], track: bool) -> None:
    """Summarize a run anew, with contrasts that no recipe names, and print and send what that gives."""
    folder = RunFolder.open(path)
    recipe = read_recipe(folder.recipe_file)
    if track:
        _need_to_send(recipe.tracking)
    folder.check_results()
    command = command_after(recipe.tracking, _group_of(folder.path), folder.path)
    kept = Tracked(tracker=recipe.tracking.tracker, mode=None, command=command)
    summary = summarize(recipe, folder, later).model_copy(update={"tracking": kept})
    folder.write("summary.json", summary)
    terminal = Terminal()
    write_results(folder, summary, terminal)
    if track:
        track_run(recipe, folder, summary, terminal, publish=True)
    else:
        say_tracking(kept, terminal)


def report_tasks(paths: list[Path], to: Path | None, later: list[tuple[str, str]]) -> None:
    """Make one report of several runs in a new folder, and print it."""
    need_new(to, "--to")
    summary = summarize_tasks(paths, later)
    to = to or make_new(paths[0].resolve().parent, f"report-{datetime.now():%Y%m%d-%H%M%S}")
    page = write_tasks(to, summary)
    lines = [contrast_sentence(contrast, summary.metric) for contrast in summary.contrasts if summary.averaged]
    lines += [*([OF_P] if summary.contrasts else []), *summary.holds, *summary.notes]
    lines += [f"report   {page}", f"results  {to / 'summary.json'}"]
    print_all(task_tables(summary).values(), lines, Terminal())


def print_ablation(folder: Path, summary: Ablation, terminal: Terminal) -> None:
    """Write an ablation's page; print its table and notes, and where all of it is."""
    page = write_ablation(folder, summary)
    lines = [*ablation_notes(summary), f"report   {page}", f"results  {folder / 'ablation.json'}"]
    print_all([ablation_table(summary)], lines, terminal)


def report_ablation(path: Path, track: bool) -> None:
    """Print an ablation from its ablation.json, build its page anew, and send it. Raises RunFolderError if it holds no
    results yet, or something in it leads elsewhere."""
    need_inside(path)
    summary = read_ablation(path, Ablation)
    if summary is None:
        raise RunFolderError(f"{path} holds no results yet; go on with it by the command that began it")
    if track and (settings := _tracking_of(path)) is not None:
        _need_to_send(settings)
    terminal = Terminal()
    print_ablation(path, summary, terminal)
    if track:
        track_ablation(path, summary, terminal, publish=True)


def track_run(recipe: Recipe, folder: RunFolder, summary: Summary, terminal: Terminal, publish: bool = False) -> None:
    """Send a run's comparison to its tracker; a point of an ablation is in the ablation's group."""
    config, group = {"recipe": recorded(recipe, exclude_none=True)}, _group_of(folder.path)
    _send(recipe.tracking, group, folder.path, lambda: comparison_of(folder, summary), config, terminal, publish)


def _group_of(run: Path) -> str | None:
    """The name of the ablation that a run is a point of."""
    above = run.resolve().parent.parent  # ABLATION/points/POINT
    return above.name if (above / "ablation.json").is_file() else None


def track_ablation(folder: Path, summary: Ablation, terminal: Terminal, publish: bool) -> None:
    """Send an ablation's comparison to the tracker, as its points' recipe says."""
    if (settings := _tracking_of(folder)) is not None:
        _send(settings, None, folder, lambda: comparison_of_ablation(folder, summary), {}, terminal, publish)


def _tracking_of(ablation: Path) -> Tracking | None:
    """Where the runs of an ablation's points are sent; None where it has none yet."""
    recipes = sorted(ablation.glob("points/*/recipe.yaml"))
    return read_recipe(recipes[0]).tracking if recipes else None


def _need_to_send(settings: Tracking) -> None:
    """Raises ModelError where what sends a comparison is not installed, of W&B what makes its Report too."""
    need_tracker(settings)
    if settings.tracker == "wandb":
        need_package("wandb_workspaces", "a W&B Report", "report")


def _send(
    settings: Tracking,
    group: str | None,
    path: Path,
    drawn: Callable[[], Comparison],
    config: dict[str, Any],
    terminal: Terminal,
    publish: bool,
) -> None:
    title = TITLES[settings.tracker]
    try:
        tracker, comparison = Tracker(settings, group, path, terminal.warn), drawn()
        if publish and tracker.mode == "off":
            terminal.warn("W&B is off, by tracking.wandb in the recipe or by WANDB_MODE: nothing was sent")
        tracker.compare(comparison, config)
        if tracker.mode == "online":
            terminal.say(f"{title:<9}online, group {tracker.group}")
            if publish and (url := tracker.publish(comparison)) is not None:
                terminal.say(f"{title:<9}Report: {url}")
        elif tracker.mode == URI:
            terminal.say(f"{title:<9}at {URI}, group {tracker.group}")
        else:
            command = command_after(settings, group, path)
            say_tracking(Tracked(tracker=settings.tracker, mode=tracker.mode, command=command), terminal)
            if publish and tracker.mode == "offline":
                terminal.say("W&B      a Report needs the runs online: upload them, then the same command with a key")
    except KeyboardInterrupt:  # leaves the tracker, and nothing else: the results are written and said
        terminal.warn(
            f"interrupted while {title} was being sent the comparison; cola report RUN --track sends it again"
        )


def say_tracking(tracked: Tracked | None, terminal: Terminal) -> None:
    """How to upload what W&B kept offline, or to look at what another tracker keeps, where there is something."""
    if tracked is not None and tracked.command is not None:
        what = "offline; upload with" if tracked.tracker == "wandb" else "look at it with"
        terminal.say(f"{TITLES[tracked.tracker]:<9}{what}: {tracked.command}")
