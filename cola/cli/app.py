"""cola run | ablate | data | report | compare | export | eval | inspect | store.

Nothing heavy is imported before it is needed: `cola --help` loads neither torch nor wandb.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cola.errors import ColaError, RunChanged, RunFolderError, plain
from cola.run.interrupt import Interrupted, Signals

if TYPE_CHECKING:
    from cola.compare.ablation import AblationFolder, Point
    from cola.recipe.recipe import Recipe
    from cola.recipe.schema import Tracking
    from cola.report.group_report import Comparison
    from cola.report.terminal import Terminal
    from cola.tree.run_folder import RunFolder
    from cola.tree.store import Store


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Chain of LoRA, compared honestly: a chain of LoRAs, a single LoRA and full fine-tuning "
    "on the same data, order and seeds.",
)
store_app = typer.Typer(no_args_is_help=True, help="What runs share: trained segments and what was measured of them.")
app.add_typer(store_app, name="store")

# What the system says of a user's disk or path.
USERS_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP}
INTERRUPTED = 130
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again later


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


@app.command()
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
    with _one_line_errors():
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


@app.command()
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
    with _one_line_errors():
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


class Split(StrEnum):
    """The parts of a recipe's data."""

    train = "train"
    validation = "validation"
    test = "test"


@app.command("data")
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
    with _one_line_errors():
        from cola.recipe.read import read_recipe
        from cola.report.terminal import Terminal

        opened = read_recipe(recipe, overrides or [])
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from cola.cli.data_view import show

        show(opened, Terminal(), split, rows)


@app.command()
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
    with _one_line_errors():
        pairs = [_pair(words) for words in contrast or ()]
        if wandb:
            from cola.report.group_report import need_reports

            need_reports()
        if len(run_folders) > 1:
            if wandb:
                raise ColaError("--wandb is for one run or ablation: W&B has a group for each")
            _report_tasks(run_folders, to, pairs)
            return
        if to is not None:
            raise ColaError("--to is for the report of several runs; that of one is in its folder")
        run_folder = run_folders[0]
        if (run_folder / "ablation.json").is_file():
            if pairs:
                raise ColaError("--contrast is for runs; name a point of the ablation, or several")
            _report_ablation(run_folder, wandb)
            return
        from cola.compare.summary import summarize
        from cola.report.terminal import Terminal
        from cola.report.tracking import sync_command
        from cola.tree.run_folder import RunFolder

        folder, recipe = RunFolder.open(run_folder)
        folder.check_results()
        summary = summarize(recipe, folder, pairs)
        summary["wandb"] = {"mode": None, "sync": sync_command(folder.path)}
        folder.write_json("summary.json", summary)
        terminal = Terminal()
        _print_results(folder, summary, terminal)
        if wandb:
            _track_run(recipe, folder, summary, terminal, publish=True)
        else:
            _say_sync(folder.path, terminal)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
) -> None:
    """Show what differs between two runs: their recipes, how they were made, and their arms' numbers."""
    with _one_line_errors():
        from cola.report.differences import compare_runs
        from cola.report.terminal import Terminal

        tables, notes = compare_runs(first, second)
        terminal = Terminal()
        for table in tables:
            terminal.table(table)
        for note in notes:
            terminal.say(note)


class Form(StrEnum):
    """What an arm can be exported as."""

    adapter = "adapter"
    merged = "merged"
    knots = "knots"


class Dtype(StrEnum):
    """Number formats."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Codes(StrEnum):
    """Codes of bitsandbytes."""

    nf4 = "nf4"
    int8 = "int8"


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    arm: Annotated[str, typer.Option(help="The arm to export.", show_default=False)],
    seed: Annotated[int | None, typer.Option(help="The seed; may be left out where there is one.")] = None,
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="adapter: one PEFT LoRA for the whole chain; merged: a Hugging Face checkpoint; knots: the links one "
            "by one.",
        ),
    ] = Form.adapter,
    to: Annotated[
        Path | None, typer.Option(help="The new folder. Default: RUN/exports/ARM-seedS-FORM.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of a merged checkpoint. Default: the arm's.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress the chain to this rank by SVD; says what that keeps and loses.")
    ] = None,
    quantization: Annotated[
        Codes | None, typer.Option(help="Of a merged checkpoint; says what that loses.", show_default=False)
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload to the Hugging Face hub.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a private repository.")] = False,
) -> None:
    """Write what an arm has learned as files that other tools load.

    For example: cola export runs/quickstart-... --arm chain3 --as adapter
    """
    with _one_line_errors():
        from cola.export.outcome import outcomes

        found = outcomes(run_folder, arm, seed)
        if len(found) > 1:
            seeds = ", ".join(str(outcome.job.seed) for outcome in found)
            raise ColaError(f"{run_folder} has the seeds {seeds}; name one by --seed")
        from cola.export.export import Request, push_to_hub
        from cola.export.export import export as write
        from cola.report.terminal import Terminal

        terminal = Terminal()
        outcome = found[0]
        to = to or run_folder / "exports" / f"{arm}-seed{outcome.job.seed}-{form}"
        write(outcome, Request(form, dtype, rank, quantization), to, terminal, push)
        terminal.say(f"export   {to}")
        if form != Form.knots:
            terminal.say(f"check it with: cola eval {to} --data {run_folder}")
        if push is not None:
            terminal.say(f"hub      {push_to_hub(to, push, private)}")


@app.command("eval")
def evaluate(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_RUN", help="Folder of a run, an adapter or a model; a hub id; a GGUF file."),
    ],
    data: Annotated[
        Path, typer.Option(help="Recipe, or folder of a run, whose data and prompts are taken.", show_default=False)
    ],
    split: Annotated[list[Split] | None, typer.Option(help="May be given again. Default: all three.")] = None,
    arm: Annotated[str | None, typer.Option(help="Of a run. Default: all.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of a run. Default: all.", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option(help="What an adapter is put on. Default: what it names.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the export's own, else the recipe's.")] = None,
    quantization: Annotated[Codes | None, typer.Option(help="Of the frozen weights.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for eval.json and every example's score.", show_default=False)
    ] = None,
) -> None:
    """Score a run, an adapter or any model on a recipe's data, by the evaluator that scores arms.

    For example: cola eval runs/quickstart-.../exports/chain3-seed0-merged --data recipes/quickstart.yaml

    Exit code: 0 all is scored, 1 some arms of a run could not be, 2 nothing could be.
    """
    with _one_line_errors(unsaid="model.name_or_path: "):
        from cola.compare.contrasts import METRICS
        from cola.recipe.read import read_recipe
        from cola.report.tables import scored_table
        from cola.report.terminal import Terminal

        recipe = read_recipe(data / "recipe.yaml" if data.is_dir() else data)
        terminal = Terminal()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from cola.export.score import Loading, check_new, score, targets_of, write_scores

        check_new(out)
        targets = targets_of(target, recipe, Loading(base, dtype, quantization, trust_remote_code), arm, seed)
        scored = score(targets, recipe, split or list(Split), terminal)
        table = scored_table([(one.label, one.evaluation, one.reported) for one in scored], METRICS[recipe.data.task])
        terminal.table(table)
        if out is not None:
            write_scores(scored, out)
            terminal.say(f"results  {out / 'eval.json'}")
    raise typer.Exit(1 if len(scored) < len(targets) else 0)


StoreOption = Annotated[
    Path | None, typer.Option("--store", help="The store. Default: $COLA_STORE, else `store` in the cache.")
]


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_SEGMENT", help="Folder of a run; or name of a segment, or how it begins.")
    ],
    arm: Annotated[str | None, typer.Option(help="Of a run. Default: all.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of a run. Default: all.", show_default=False)] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count a run's intruder dimensions too, which takes minutes.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Of a run: what its links, chains and full fine-tuning learned, as spectra. Of a segment: where it came from.

    A run's spectra are ranks, sizes and singular values of each update, and which directions the links share with each
    other and with full fine-tuning; what its folder lacks of them is computed and kept there. A segment is followed
    back to the base: every link, knot, learning rate and batch, names and checksums verified.
    """
    with _one_line_errors(unsaid="model.name_or_path: "):
        from cola.report.terminal import Terminal

        if target and Path(target).is_dir():
            if store is not None:
                raise ColaError("--store is for a segment; a run is inspected from its own folder")
            from cola.cli.run_view import inspect_run

            inspect_run(Path(target), Terminal(), arm, seed, intruders)
            return
        if arm is not None or seed is not None or intruders:
            raise ColaError(f"{target} is no run folder; --arm, --seed and --intruders belong to a run")
        from cola.cli.store_view import inspect as show

        show(_open_store(store), target, Terminal())


@store_app.command("ls")
def store_ls(store: StoreOption = None) -> None:
    """List the segments and the disk they take."""
    with _one_line_errors():
        from cola.cli.store_view import show_all
        from cola.report.terminal import Terminal

        show_all(_open_store(store), Terminal())


@store_app.command("verify")
def store_verify(store: StoreOption = None) -> None:
    """Check every name and checksum; what is damaged is set aside and trained again when it is needed.

    Exit code: 0 all is whole, 1 something was damaged.
    """
    with _one_line_errors():
        from cola.cli.store_view import verify
        from cola.report.terminal import Terminal

        whole = verify(_open_store(store), Terminal())
    raise typer.Exit(0 if whole else 1)


@store_app.command("prune")
def store_prune(
    store: StoreOption = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Free what no run folder that still exists refers to. Says what that is, then asks."""
    with _one_line_errors():
        from cola.cli.store_view import say_garbage
        from cola.report.terminal import Terminal
        from cola.tree.locks import alone
        from cola.tree.prune import prune

        opened = _open_store(store)
        with alone(opened.path):
            garbage = say_garbage(opened, Terminal())
            if not garbage:
                return
            if not yes and not sys.stdin.isatty():
                raise ColaError("nothing was removed: there is no terminal to ask at; say --yes")
            if yes or typer.confirm("Remove these?"):
                prune(opened, garbage)


def _open_store(path: Path | None) -> "Store":
    from cola.files import store_path
    from cola.report.terminal import Terminal
    from cola.tree.store import Store

    path = store_path(str(path) if path else None)
    if not (path / "format.json").is_file():
        raise ColaError(f"there is no store at {path}; `cola run` makes one, and --store or $COLA_STORE names another")
    return Store(path, Terminal().warn)


def _run(recipe_path: Path, overrides: list[str], run_folder: Path | None) -> int:
    from cola.recipe.read import read_recipe
    from cola.tree.run_holder import take_run, unfinished_run

    recipe = read_recipe(recipe_path, overrides)
    if run_folder is None:
        with unfinished_run(recipe) as before:
            if before is not None:
                try:
                    return _train(recipe, before, fresh=False)
                except RunChanged as changed:
                    print(f"{changed}: a new run is started", file=sys.stderr)
    with take_run(recipe, run_folder) as (folder, fresh):
        return _train(recipe, folder, fresh)


def _ablate(points: "list[Point]", terminal: "Terminal") -> int:
    from cola.compare.ablation import AblationFolder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with AblationFolder.take(points) as folder:
        terminal.say(f"{len(points)} points → {folder.path}")
        from cola.run.ablate import ablate as run_all

        with Signals().installed() as signals:
            summary = run_all(points, folder, terminal, signals)
        _print_ablation(folder, summary, terminal)
        if not summary["interrupted"]:
            _track_ablation(folder, summary, terminal, publish=False)
    if summary["interrupted"]:
        terminal.say("interrupted; all that was trained is kept. Go on with the same command")
        return RESUMABLE
    return 1 if summary["failed"] else 0


def _report_ablation(path: Path, wandb: bool) -> None:
    from cola.compare.ablation import AblationFolder
    from cola.report.terminal import Terminal

    folder = AblationFolder(path)
    summary = folder.read()
    if "rows" not in summary:
        raise RunFolderError(f"{path} holds no results yet; go on with it by the command that began it")
    terminal = Terminal()
    _print_ablation(folder, summary, terminal)
    if wandb:
        _track_ablation(folder, summary, terminal, publish=True)


def _pair(words: str) -> tuple[str, str]:
    first, comma, second = (word.strip() for word in words.partition(","))
    if not (first and comma and second) or "," in second:
        raise ColaError(f"--contrast {words}: name two arms with a comma between them, such as chain3,lora")
    return first, second


def _report_tasks(paths: list[Path], to: Path | None, later: list[tuple[str, str]]) -> None:
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
    for one in summary["contrasts"] if summary["averaged"] else ():
        terminal.say(contrast_sentence(one, summary["metric"]))
    if summary["contrasts"]:
        terminal.say(OF_P)
    for note in summary["notes"]:
        terminal.say(note)
    terminal.say(f"report   {page}")
    terminal.say(f"results  {to / 'summary.json'}")


def _print_ablation(folder: "AblationFolder", summary: dict[str, Any], terminal: "Terminal") -> None:
    from cola.report.page import write_ablation
    from cola.report.tables import ablation_notes, ablation_table

    page = write_ablation(folder, summary)
    table = ablation_table(summary)
    terminal.table(table)
    for line in ablation_notes(summary):
        terminal.say(line)
    terminal.say(f"report   {page}")
    terminal.say(f"results  {folder.path / 'ablation.json'}")


def _resume(path: Path) -> int:
    from cola.tree.run_folder import RunFolder
    from cola.tree.run_holder import lock_run

    folder, recipe = RunFolder.open(path)
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
    _print_results(folder, summary, terminal)
    # One that stopped goes on later, and is compared then; a W&B that failed once would only be waited for again.
    if not summary["interrupted"] and summary["wandb"]["mode"] != "off":
        _track_run(recipe, folder, summary, terminal)
    else:
        _say_sync(folder.path, terminal)
    return _exit_code(summary, f"cola run --resume {folder.path}", terminal)


def _exit_code(summary: dict[str, Any], command: str, terminal: "Terminal") -> int:
    if summary["interrupted"]:
        terminal.say(f"interrupted; all that was trained is kept. Go on with the same command, or: {command}")
        return RESUMABLE
    if any(arm["errors"] for arm in summary["arms"].values()):
        terminal.say(f"some arms failed; try them again with the same command, or: {command}")
        return 1
    return 1 if summary["same_outputs"] else 0  # said among the results


def _print_results(folder: "RunFolder", summary: dict[str, Any], terminal: "Terminal") -> None:
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
    meta = summary["meta"] or {}
    told = [note for part in ("data", "selfcheck") for note in meta.get(part, {}).get("notes", ())]  # before the run
    for line in [*verdict(summary), *(note for note in summary["notes"] if note not in told)]:
        terminal.say(line)
    terminal.say(f"report   {page}")
    terminal.say(f"results  {folder.path / 'summary.json'}")
    if summary.get("store"):
        store = summary["store"]
        terminal.say(f"store    {store['path']}, {size(store['bytes'])} on disk (cola store ls)")


def _track_run(
    recipe: "Recipe", folder: "RunFolder", summary: dict[str, Any], terminal: "Terminal", publish: bool = False
) -> None:
    """Send a run's comparison to W&B; a point of an ablation is in the ablation's group."""
    from cola.report.page import comparison_of

    above = folder.path.resolve().parent.parent  # ABLATION/points/POINT
    group = above.name if (above / "ablation.json").is_file() else None
    with _tracking(terminal):
        config = {"recipe": recipe.model_dump(mode="json", exclude_none=True)}
        _send(recipe.tracking, group, folder.path, comparison_of(folder, summary), config, terminal, publish)


def _track_ablation(folder: "AblationFolder", summary: dict[str, Any], terminal: "Terminal", publish: bool) -> None:
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
        _say_sync(path, terminal)
        if publish and tracker.mode == "offline":
            terminal.say("W&B      a Report needs the runs online: upload them, then the same command with a key")


def _say_sync(path: Path, terminal: "Terminal") -> None:
    from cola.report.tracking import sync_command

    if (sync := sync_command(path)) is not None:
        terminal.say(f"W&B      offline; upload with: {sync}")


def _dry_run(recipe_path: Path, overrides: list[str]) -> int:
    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal
    from cola.run.preview import preview

    preview(read_recipe(recipe_path, overrides), Terminal())
    return 0


@contextlib.contextmanager
def _one_line_errors(unsaid: str = "") -> Iterator[None]:
    """The user's mistakes without a traceback; defects of cola keep theirs. `unsaid`: a recipe's key that messages name
    and that means nothing to whom names a model on the command line."""
    try:
        yield
    except ColaError as error:
        for line in str(error).replace(unsaid, "").splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(2) from None
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            raise
        print(f"error: {plain(error.filename or 'a file', 300)}: {os.strerror(error.errno)}", file=sys.stderr)
        raise typer.Exit(2) from None
    except Interrupted:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(RESUMABLE) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
