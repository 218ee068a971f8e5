"""cola run | ablate | data | report | compare | export | eval | inspect | store.

Nothing heavy is imported before it is needed: `cola --help` loads neither torch nor wandb.
"""

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cola.cli import store
from cola.cli.models import Split, evaluate, export, inspect
from cola.cli.show import (
    RESUMABLE,
    exit_code,
    print_ablation,
    print_results,
    report_ablation,
    report_run,
    report_tasks,
    say_sync,
    track_ablation,
    track_run,
)
from cola.errors import ColaError, RunChanged, plain
from cola.run.interrupt import Interrupted, Signals

if TYPE_CHECKING:
    from cola.compare.ablation import Point
    from cola.recipe.recipe import Recipe
    from cola.report.terminal import Terminal
    from cola.tree.run_folder import RunFolder

# What the system says of a user's disk or path.
USERS_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP}
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Chain of LoRA, compared honestly: a chain of LoRAs, a single LoRA and full fine-tuning "
    "on the same data, order and seeds.",
)
store_app = typer.Typer(no_args_is_help=True, help="What runs share: trained segments and what was measured of them.")
app.add_typer(store_app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"cola {version('chain-of-lora')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print cola's version and exit."),
    ] = False,
) -> None:
    """Chain of LoRA, compared honestly."""


def run(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value, for example arms.chain3.links=4", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan; load no weights, use no network.")
    ] = False,
    run_folder: Annotated[
        Path | None, typer.Option(help="The run's own folder. Default: a new one under the recipe's output.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder: what it holds is not trained again.")
    ] = None,
) -> None:
    """Train and compare every arm of a recipe, and report.

    The same command goes on with a run that was stopped, and trains nothing that was trained before.

    Exit code: 0 all arms are there, 1 some failed (the same command tries them again) or two gave the same outputs
    where they should differ, 2 the recipe, data or model cannot be used, 75 interrupted (the same command goes on),
    130 interrupted before anything had begun.
    """
    if resume is not None:
        if recipe is not None or run_folder is not None or dry_run:
            raise ColaError("--resume takes everything from the run's folder and stands alone")
        code = _resume(resume)
    elif recipe is None:
        raise ColaError("name a recipe, for example: cola run recipes/quickstart.yaml")
    elif dry_run:
        code = _dry_run(recipe, overrides or [])
    else:
        code = _run(recipe, overrides or [], run_folder)
    raise typer.Exit(code)


def ablate(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    keys: Annotated[
        list[str],
        typer.Argument(
            help="dotted.key=value,value,... for what is ablated; several make a grid. One value is an override.",
            show_default=False,
        ),
    ],
    paired: Annotated[
        bool, typer.Option("--paired", help="The n-th values of all keys belong together: no grid.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan of every point; train nothing.")
    ] = False,
) -> None:
    """Run a recipe at several values of some keys: one table and one figure of score, gap and cost.

    For example: cola ablate recipes/quickstart.yaml arms.chain3.links=1,2,3,4 training.protocol=grow
    What the points share is trained once, and so is what an earlier run has trained. Exit codes as of `cola run`.
    """
    from cola.compare.ablation import points_of
    from cola.report.terminal import Terminal

    terminal = Terminal()
    points = points_of(recipe, keys, paired)
    if dry_run:
        from cola.run.preview import preview

        for point in points:
            terminal.say(point.label)
            preview(point.recipe, terminal)
        code = 0
    else:
        code = _ablate(points, terminal)
    raise typer.Exit(code)


def show_data(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value, for example data.files=mine.jsonl", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show, token by token.")] = 3,
    split: Annotated[Split, typer.Option(help="Of which part.")] = Split.train,
) -> None:
    """Show what a recipe trains and scores on: rows of each file, what is left out and why, and some rows as tokens.

    No weights are loaded: the tokenizer is enough.
    """
    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal

    opened = read_recipe(recipe, overrides or [])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cola.cli.data_view import show

    show(opened, Terminal(), split, rows)


def report(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of an ablation.")],
    to: Annotated[
        Path | None,
        typer.Option(help="Of several runs: the report's new folder. Default: report-DATE beside the first."),
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIRST,SECOND",
            help="Two arms to compare too, though no recipe names them; may be repeated. Shown, never claimed.",
        ),
    ] = None,
    wandb: Annotated[
        bool,
        typer.Option(
            "--wandb", help="Send the comparison to W&B, and where W&B is online, create a W&B Report of the group."
        ),
    ] = False,
) -> None:
    """Print the tables of a run or an ablation, and build its page anew: a run's from its results, an ablation's
    from its ablation.json.

    Several runs make one report: each data set is a task, and runs on the same data are more seeds of it.
    """
    pairs = [_pair(words) for words in contrast or ()]
    if wandb:
        from cola.report.group_report import need_reports

        need_reports()
    if len(run_folders) > 1:
        if wandb:
            raise ColaError("--wandb is for one run or ablation: W&B has a group for each")
        report_tasks(run_folders, to, pairs)
        return
    if to is not None:
        raise ColaError("--to is for the report of several runs; that of one is in its folder")
    run_folder = run_folders[0]
    if (run_folder / "ablation.json").is_file():
        if pairs:
            raise ColaError("--contrast is for runs; name a point of the ablation, or several")
        report_ablation(run_folder, wandb)
    else:
        report_run(run_folder, pairs, wandb)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
) -> None:
    """Show what differs between two runs: their recipes, how they were made, and their arms' numbers."""
    from cola.report.differences import compare_runs
    from cola.report.terminal import Terminal

    tables, notes = compare_runs(first, second)
    terminal = Terminal()
    for table in tables:
        terminal.table(table)
    for note in notes:
        terminal.say(note)


def _run(recipe_path: Path, overrides: list[str], run_folder: Path | None) -> int:
    from cola.recipe.read import read_recipe
    from cola.recipe.write import dump_recipe
    from cola.tree.run_holder import take_run, unfinished_run

    recipe = read_recipe(recipe_path, overrides)
    text, named = dump_recipe(recipe), Path(recipe.output).expanduser() / recipe.name
    if run_folder is None:
        with unfinished_run(text, named) as before:
            if before is not None:
                try:
                    return _train(recipe, before, fresh=False)
                except RunChanged as changed:
                    print(f"{changed}: a new run is started", file=sys.stderr)
    with take_run(text, run_folder or named, dated=run_folder is None) as (folder, fresh):
        return _train(recipe, folder, fresh)


def _ablate(points: "list[Point]", terminal: "Terminal") -> int:
    from cola.compare.ablation import AblationFolder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with AblationFolder.take(points) as folder:
        terminal.say(f"{len(points)} points → {folder.path}")
        from cola.run.ablate import ablate as run_all

        with Signals().installed() as signals:
            summary = run_all(points, folder, terminal, signals)
        print_ablation(folder, summary, terminal)
        if not summary.interrupted:
            track_ablation(folder, summary, terminal, publish=False)
    if summary.interrupted:
        terminal.say("interrupted; all that was trained is kept. Go on with the same command")
        return RESUMABLE
    return 1 if summary.failed else 0


def _pair(words: str) -> tuple[str, str]:
    first, comma, second = (word.strip() for word in words.partition(","))
    if not (first and comma and second) or "," in second:
        raise ColaError(f"--contrast {words}: name two arms with a comma between them, such as chain3,lora")
    return first, second


def _resume(path: Path) -> int:
    from cola.recipe.read import read_recipe
    from cola.tree.run_folder import RunFolder
    from cola.tree.run_holder import lock_run

    folder = RunFolder.open(path)
    recipe = read_recipe(folder.recipe_file)
    with lock_run(path):
        return _train(recipe, folder, fresh=False)


def _train(recipe: "Recipe", folder: "RunFolder", fresh: bool) -> int:
    """Run a recipe in a folder that this process holds."""
    from cola.report.terminal import Terminal

    terminal = Terminal()
    begun = "" if fresh else "going on with "
    terminal.say(
        f"{begun}{recipe.name}: {', '.join(recipe.arms)}; seeds {', '.join(map(str, recipe.seeds))} → {folder.path}"
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cola.run.run import run as run_recipe

    with Signals().installed() as signals:
        summary = run_recipe(recipe, folder, terminal, signals)
    print_results(folder, summary, terminal)
    # One that stopped goes on later, and is compared then; a W&B that failed once would only be waited for again.
    if not summary.interrupted and summary.wandb and summary.wandb.mode != "off":
        track_run(recipe, folder, summary, terminal)
    else:
        say_sync(folder.path, terminal)
    return exit_code(summary, f"cola run --resume {folder.path}", terminal)


def _dry_run(recipe_path: Path, overrides: list[str]) -> int:
    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal
    from cola.run.preview import preview

    preview(read_recipe(recipe_path, overrides), Terminal())
    return 0


def _one_line_errors(command: Callable[..., None], unsaid: str = "") -> Callable[..., None]:
    """A command that says the user's mistakes in a line and without a traceback; defects of cola keep theirs.

    `unsaid`: a recipe's key that messages name and that means nothing to whom names a model on the command line.
    """

    @wraps(command)
    def run(*words: Any, **options: Any) -> None:
        try:
            command(*words, **options)
        except ColaError as error:
            for line in str(error).replace(unsaid, "").splitlines():
                print(f"error: {line}", file=sys.stderr)
            code = 2
        except OSError as error:
            if error.errno not in USERS_ERRORS:
                raise
            print(f"error: {plain(error.filename or 'a file', 300)}: {os.strerror(error.errno)}", file=sys.stderr)
            code = 2
        except Interrupted:
            print("interrupted; the same command goes on", file=sys.stderr)
            code = RESUMABLE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = INTERRUPTED
        else:
            return
        raise typer.Exit(code)

    return run


for name, command, unsaid in (
    ("run", run, ""),
    ("ablate", ablate, ""),
    ("data", show_data, ""),
    ("report", report, ""),
    ("compare", compare, ""),
    ("export", export, ""),
    ("eval", evaluate, "model.name_or_path: "),
    ("inspect", inspect, "model.name_or_path: "),
):
    app.command(name)(_one_line_errors(command, unsaid))
for name, command in (("ls", store.ls), ("verify", store.verify), ("prune", store.prune)):
    store_app.command(name)(_one_line_errors(command))
