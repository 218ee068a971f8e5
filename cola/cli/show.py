"""What the commands say at the end: tables, what the numbers allow to be said, the page, and what W&B was sent."""

import contextlib
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola.errors import RunFolderError

if TYPE_CHECKING:
    from cola.compare.ablation import AblationFolder
    from cola.compare.records import Ablation, Summary
    from cola.recipe.recipe import Recipe
    from cola.recipe.schema import Tracking
    from cola.report.group_report import Comparison
    from cola.report.terminal import Terminal
    from cola.tree.run_folder import RunFolder

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again later


def print_results(folder: "RunFolder", summary: "Summary", terminal: "Terminal") -> None:
    """Write a run's page; print its tables and notes, and where all of it is."""
    from cola.report.numbers import size
    from cola.report.page import write_report
    from cola.report.tables import knots_table, result_tables
    from cola.report.verdict import verdict

    # Ctrl-C while the last files are written would leave them behind the results: it takes a second.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        page = write_report(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    for table in [*result_tables(summary), knots_table(summary, short=True)]:
        if table.rows:
            terminal.table(table)
    parts = (summary.meta.data, summary.meta.selfcheck) if summary.meta else ()
    told = [note for part in parts if part for note in part.notes]  # before the run
    for line in [*verdict(summary), *(note for note in summary.notes if note not in told)]:
        terminal.say(line)
    terminal.say(f"report   {page}")
    terminal.say(f"results  {folder.path / 'summary.json'}")
    if store := summary.store:
        terminal.say(f"store    {store.path}, {size(store.bytes)} on disk (cola store ls)")


def exit_code(summary: "Summary", command: str, terminal: "Terminal") -> int:
    """A run's exit code; says by which command it goes on."""
    if summary.interrupted:
        terminal.say(f"interrupted; all that was trained is kept. Go on with the same command, or: {command}")
        return RESUMABLE
    if any(arm.errors for arm in summary.arms.values()):
        terminal.say(f"some arms failed; try them again with the same command, or: {command}")
        return 1
    return 1 if summary.same_outputs else 0  # said among the results


def report_run(path: Path, later: list[tuple[str, str]], wandb: bool) -> None:
    """Summarize a run anew, with contrasts that no recipe names, and print and send what that gives."""
    from cola.compare.records import Wandb
    from cola.compare.summary import summarize
    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal
    from cola.report.tracking import sync_command
    from cola.tree.run_folder import RunFolder

    folder = RunFolder.open(path)
    recipe = read_recipe(folder.recipe_file)
    folder.check_results()
    uploaded_by = Wandb(mode=None, sync=sync_command(folder.path))
    summary = summarize(recipe, folder, later).model_copy(update={"wandb": uploaded_by})
    folder.write("summary.json", summary)
    terminal = Terminal()
    print_results(folder, summary, terminal)
    if wandb:
        track_run(recipe, folder, summary, terminal, publish=True)
    else:
        say_sync(folder.path, terminal)


def report_tasks(paths: list[Path], to: Path | None, later: list[tuple[str, str]]) -> None:
    """Make one report of several runs in a new folder, and print it."""
    from cola.compare.tasks import summarize_tasks
    from cola.files import make_new
    from cola.report.page import write_tasks
    from cola.report.tables import task_tables
    from cola.report.terminal import Terminal
    from cola.report.verdict import OF_P, contrast_sentence

    if to is not None and to.exists():
        raise RunFolderError(f"{to} exists and is kept as it is; name another folder by --to")
    summary = summarize_tasks(paths, later)
    if to is None:
        to = make_new(paths[0].resolve().parent, f"report-{datetime.now():%Y%m%d-%H%M%S}")
    terminal = Terminal()
    page = write_tasks(to, summary)
    for table in task_tables(summary):
        terminal.table(table)
    for contrast in summary.contrasts if summary.averaged else ():
        terminal.say(contrast_sentence(contrast, summary.metric))
    if summary.contrasts:
        terminal.say(OF_P)
    for note in summary.notes:
        terminal.say(note)
    terminal.say(f"report   {page}")
    terminal.say(f"results  {to / 'summary.json'}")


def print_ablation(folder: "AblationFolder", summary: "Ablation", terminal: "Terminal") -> None:
    """Write an ablation's page; print its table and notes, and where all of it is."""
    from cola.report.page import write_ablation
    from cola.report.tables import ablation_notes, ablation_table

    page = write_ablation(folder, summary)
    terminal.table(ablation_table(summary))
    for line in ablation_notes(summary):
        terminal.say(line)
    terminal.say(f"report   {page}")
    terminal.say(f"results  {folder.path / 'ablation.json'}")


def report_ablation(path: Path, wandb: bool) -> None:
    """Print an ablation from its ablation.json, build its page anew, and send it.

    Raises:
        RunFolderError: it holds no results yet.
    """
    from cola.compare.ablation import AblationFolder
    from cola.report.terminal import Terminal

    folder = AblationFolder(path)
    summary = folder.summary()
    if summary is None:
        raise RunFolderError(f"{path} holds no results yet; go on with it by the command that began it")
    terminal = Terminal()
    print_ablation(folder, summary, terminal)
    if wandb:
        track_ablation(folder, summary, terminal, publish=True)


def track_run(
    recipe: "Recipe", folder: "RunFolder", summary: "Summary", terminal: "Terminal", publish: bool = False
) -> None:
    """Send a run's comparison to W&B; a point of an ablation is in the ablation's group."""
    from cola.report.page import comparison_of

    above = folder.path.resolve().parent.parent  # ABLATION/points/POINT
    group = above.name if (above / "ablation.json").is_file() else None
    with _tracking(terminal):
        config = {"recipe": recipe.model_dump(mode="json", exclude_none=True)}
        _send(recipe.tracking, group, folder.path, comparison_of(folder, summary), config, terminal, publish)


def track_ablation(folder: "AblationFolder", summary: "Ablation", terminal: "Terminal", publish: bool) -> None:
    """Send an ablation's comparison to W&B, as its points' recipe says."""
    from cola.recipe.read import read_recipe
    from cola.report.page import comparison_of_ablation

    recipes = sorted(folder.path.glob("points/*/recipe.yaml"))
    if not recipes:
        return
    with _tracking(terminal):
        settings = read_recipe(recipes[0]).tracking
        _send(settings, None, folder.path, comparison_of_ablation(folder, summary), {}, terminal, publish)


@contextlib.contextmanager
def _tracking(terminal: "Terminal") -> Iterator[None]:
    """Ctrl-C leaves W&B, and nothing else: the results are written and said."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.warn("interrupted while W&B was being sent the comparison; cola report RUN --wandb sends it again")


def _send(
    settings: "Tracking",
    group: str | None,
    path: Path,
    comparison: "Comparison",
    config: dict[str, Any],
    terminal: "Terminal",
    publish: bool,
) -> None:
    from cola.report.tracking import Tracker

    tracker = Tracker(settings, group, path, terminal.warn)
    if publish and tracker.mode == "off":
        terminal.warn("W&B is off, by tracking.wandb in the recipe or by WANDB_MODE: nothing was sent")
    tracker.compare(comparison, config)
    if tracker.mode == "online":
        terminal.say(f"W&B      online, group {tracker.group}")
        if publish and (url := tracker.publish(comparison)) is not None:
            terminal.say(f"W&B      Report: {url}")
    else:
        say_sync(path, terminal)
        if publish and tracker.mode == "offline":
            terminal.say("W&B      a Report needs the runs online: upload them, then the same command with a key")


def say_sync(path: Path, terminal: "Terminal") -> None:
    """How to upload what W&B kept offline, where there is something."""
    from cola.report.tracking import sync_command

    if (sync := sync_command(path)) is not None:
        terminal.say(f"W&B      offline; upload with: {sync}")
