"""cola new | plan | run | ablate | data | report | compare | verify | export | eval | inspect | store | doctor.

What a command needs is imported as it is called: `cola --help` loads typer alone.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from cola.cli.imports import no_garbage
from cola.cli.models import Split, evaluate, export, inspect, ls, prune, verify
from cola.cli.said import of_all_ranks, one_line_errors
from cola.errors import ColaError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before tokenizers is loaded

app = typer.Typer(
    no_args_is_help=True,
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
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print cola's version and exit.")
    ] = False,
) -> None:
    """Chain of LoRA, compared honestly."""


def _shipped() -> list[str]:
    from cola.cli.new import shipped

    return list(shipped())


def new(
    recipe: Annotated[
        Path | None, Argument(help="The new file (YAML). Without one: the recipes that there are.")
    ] = None,
    source: Annotated[
        str | None,
        Option("--from", metavar="NAME", help="Which recipe to copy. Default: quickstart.", autocompletion=_shipped),
    ] = None,
    data: Annotated[Path | None, Option(help="Rows of your own, for which a recipe is proposed.")] = None,
    model: Annotated[
        str | None,
        Option(help="With --data: a Hugging Face folder, a .gguf file or a hub id. Default: the quickstart's."),
    ] = None,
) -> None:
    """List the recipes that come with cola, or write one: a copy to change, or one proposed for rows of your own.

    For example: cola new mine.yaml --data rows.csv --model ./my-model
    It looks at the fields of the rows (JSONL, JSON, CSV, TSV, Parquet or text), proposes task, prompt, answer or
    choices, says what was guessed, and prints a row as the model reads it. No file is overwritten.
    """
    from cola.cli import new as recipes
    from cola.report.terminal import Terminal

    if recipe is None:
        if source or data or model:
            raise ColaError("name the file to write, for example: cola new mine.yaml --from quickstart")
        recipes.show(Terminal())
    elif data is None and model is not None:
        raise ColaError("--model goes with --data; of a copied recipe change model.name_or_path")
    elif data is None:
        recipes.copy(recipe, source or recipes.FIRST, Terminal())
    elif source is not None:
        raise ColaError("--from copies a recipe as it is and --data proposes one: give one of them")
    else:
        recipes.propose(recipe, data, recipes.BUNDLED if model is None else model, Terminal())


AllowCode = Annotated[
    bool,
    Option("--allow-code", help="Let Python code of your own run that the recipe names (init: ./my_idea.py:name)."),
]

Number = Annotated[
    str | None,
    Option(
        "--workers",
        metavar="N",
        help="How many processes share the work, this machine's threads and cards divided among them; auto: as many "
        "as a measurement finds fastest. Default: 1; with --on as many as there is room for.",
    ),
]

On = Annotated[
    str | None,
    Option(
        metavar="ray",
        help="Where the workers are, if not on this machine alone: ray, the Ray cluster that it is part of, else one "
        "begun here; ray://HOST:PORT, one that it is not part of.",
    ),
]


PlanAs = StrEnum("PlanAs", ["table", "json"])


def plan(
    recipe: Annotated[Path | None, Argument(help="Recipe (YAML).")] = None,
    overrides: Annotated[list[str] | None, Argument(help="dotted.key=value, for example link.rank=16")] = None,
    device: Annotated[
        str | None, Option(help="here, cpu, or a card by name, such as h100 or rtx4090. Default: here.")
    ] = None,
    device_memory: Annotated[
        str | None, Option(metavar="SIZE", help="Memory that there is, such as 24GB. Default: the device's.")
    ] = None,
    calibrate: Annotated[
        bool, Option("--calibrate", help="Measure this machine first, a minute or less: times are known then.")
    ] = False,
    table: Annotated[
        str | None, Option(metavar="FAMILY", help="qwen: what Qwen1.5 takes at each size and precision. No recipe.")
    ] = None,
    form: Annotated[PlanAs, Option("--as", help="table, or json: one object with every number.")] = PlanAs.table,
) -> None:
    """Say what a recipe will take before anything runs: parameters, memory by part, FLOPs, time, disk; what is shared,
    and whether it fits.

    No weights are loaded or fetched: a config is enough, on this disk, built in (Qwen1.5), or the hub's.

    Exit code: 0 all arms fit, 1 one does not, 2 the recipe, model or device cannot be used.
    """
    from cola.report.terminal import Terminal

    if table is not None and (recipe is not None or calibrate or device or device_memory):
        raise ColaError("--table is about a family of models: it takes no recipe and no device")
    if table is None and recipe is None:
        raise ColaError("name a recipe, for example: cola plan recipes/quickstart.yaml; or: cola plan --table qwen")
    with no_garbage():
        from cola.cli import plan as plans
        from cola.plan.devices import device_of
    if table is not None:
        plans.plan_table(table, form == PlanAs.json, Terminal())
    elif recipe is not None:
        where = device_of(device, device_memory)
        if calibrate and not where.here:
            raise ColaError(f"--calibrate measures this machine, and --device {device} is another: give one of them")
        raise typer.Exit(plans.plan_recipe(recipe, overrides, where, calibrate, form == PlanAs.json, Terminal()))


def run(
    recipe: Annotated[Path | None, Argument(help="Recipe (YAML).")] = None,
    overrides: Annotated[list[str] | None, Argument(help="dotted.key=value, for example arms.chain3.links=4")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check and show the plan; load no weights, use no network.")
    ] = False,
    run_folder: Annotated[
        Path | None, Option(help="The run's own folder. Default: a new one under the recipe's output.")
    ] = None,
    resume: Annotated[
        Path | None, Option(help="Go on with the run in this folder: what it holds is not trained again.")
    ] = None,
    allow_code: AllowCode = False,
    workers: Number = None,
    on: On = None,
) -> None:
    """Train and compare every arm of a recipe, and report.

    The same command goes on with a run that was stopped, and trains nothing that was trained before; of one that came
    to its end it tells the results, unless something that it was given has changed.

    Exit code: 0 all arms are there, 1 some failed (the same command tries them again) or two gave the same outputs
    where they should differ, 2 the recipe, data or model cannot be used, 75 interrupted, at whatever
    moment (the same command goes on).
    """
    with no_garbage():
        from cola.cli import train
        from cola.run.start import Workers

    who = Workers(workers, on)
    if resume is not None:
        if recipe is not None or run_folder is not None or dry_run:
            raise ColaError("--resume takes everything from the run's folder and stands alone")
        code = train.resume(resume, allow_code, who)
    elif recipe is None:
        raise ColaError("name a recipe, for example one that cola new has written: cola run mine.yaml")
    else:
        code = train.run(recipe, overrides, run_folder, dry_run, allow_code, who)
    raise typer.Exit(code)


def ablate(
    recipe: Annotated[Path, Argument(help="Recipe (YAML).")],
    keys: Annotated[
        list[str],
        Argument(
            help="dotted.key=value,value,... for what is ablated; several make a grid. A key with one value is an "
            "override of all points; where none has several, the first is ablated, at one point."
        ),
    ],
    paired: Annotated[bool, Option("--paired", help="The n-th values of all keys belong together: no grid.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check and show the plan of every point; train nothing.")
    ] = False,
    allow_code: AllowCode = False,
    workers: Number = None,
    on: On = None,
) -> None:
    """Run a recipe at several values of some keys: one table and one figure of score, gap and cost.

    For example: cola ablate recipes/quickstart.yaml arms.chain3.links=1,2,3,4 training.protocol=grow
    What the points share is trained once, and so is what an earlier run has trained. Exit codes as of `cola run`.
    """
    from cola.cli import train
    from cola.run.start import Workers

    raise typer.Exit(train.ablate(recipe, keys, paired, dry_run, allow_code, Workers(workers, on)))


def show_data(
    recipe: Annotated[Path, Argument(help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, Argument(help="dotted.key=value, for example data.files=mine.jsonl")] = None,
    rows: Annotated[int, Option(min=0, help="How many rows to show, token by token.")] = 3,
    split: Annotated[Split, Option(help="Of which part.")] = Split.train,
) -> None:
    """Show what a recipe trains and scores on: rows of each file, what is left out and why, and some rows as tokens.

    No weights are loaded: the tokenizer is enough.
    """
    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal

    opened = read_recipe(recipe, overrides)  # a mistake in it is said before all else is imported
    from cola.cli.data_view import show

    show(opened, Terminal(), split, rows)


def report(
    run_folders: Annotated[list[Path], Argument(metavar="RUN...", help="Folders of runs, or of an ablation.")],
    to: Annotated[
        Path | None, Option(help="Of several runs: the report's new folder. Default: report-DATE beside the first.")
    ] = None,
    contrast: Annotated[
        list[str] | None,
        Option(
            metavar="FIRST,SECOND",
            help="Two arms to compare too, though no recipe names them; may be repeated. Shown, never claimed.",
        ),
    ] = None,
    track: Annotated[
        bool,
        Option(
            "--track",
            help="Send the comparison to the recipe's tracker, and where that is W&B, online, create a W&B Report of "
            "the group.",
        ),
    ] = False,
) -> None:
    """Print the tables of a run or an ablation, and build its page anew: a run's from its results, an ablation's
    from its ablation.json.

    Several runs make one report: each data set is a task, and runs on the same data are more seeds of it.
    """
    pairs = [_pair(words) for words in contrast or ()]
    with no_garbage():
        from cola.cli.show import report_ablation, report_run, report_tasks

    if len(run_folders) > 1:
        if track:
            raise ColaError("--track is for one run or ablation: a tracker has a group for each")
        report_tasks(run_folders, to, pairs)
    elif to is not None:
        raise ColaError("--to is for the report of several runs; that of one is in its folder")
    elif not (run_folders[0] / "ablation.json").is_file():
        report_run(run_folders[0], pairs, track)
    elif pairs:
        raise ColaError("--contrast is for runs; name a point of the ablation, or several")
    else:
        report_ablation(run_folders[0], track)


def compare(
    first: Annotated[Path, Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, Argument(metavar="B", help="Folder of another.")],
) -> None:
    """Show what differs between two runs: their recipes, how they were made, and their arms' numbers."""
    from cola.cli.show import print_all
    from cola.report.differences import compare_runs
    from cola.report.terminal import Terminal

    print_all(*compare_runs(first, second), Terminal())


def verify_run(
    run_folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run, or of an ablation.")],
) -> None:
    """Check every file of a run against its SHA-256, wherever the folder was copied, packed or moved to.

    Says what is not as it was written, and what brings it back. The store is not looked into: cola store verify does.

    Exit code: 0 all is whole; 1 something is not, or the run is of a version that wrote nothing to check against.
    """
    from cola.cli.verify import verify as check
    from cola.report.terminal import Terminal

    raise typer.Exit(check(run_folder, Terminal()))


def doctor() -> None:
    """Say what cola finds here: versions, devices, threads, cache and store, trackers and the hub; and what is missing,
    with the command that brings it.

    Exit code: 0, or 1 where something that cola needs is missing or too old. No key, user's or host's name is shown.
    """
    from cola.cli.doctor import check
    from cola.report.terminal import Terminal

    raise typer.Exit(check(Terminal()))


def _pair(words: str) -> tuple[str, str]:
    first, comma, second = (word.strip() for word in words.partition(","))
    if not (first and comma and second) or "," in second:
        raise ColaError(f"--contrast {words}: name two arms with a comma between them, such as chain3,lora")
    return first, second


app.command("new")(one_line_errors(new, unsaid="model.name_or_path: "))
for name, command in {"run": run, "ablate": ablate}.items():
    app.command(name)(one_line_errors(of_all_ranks(command)))
for name, command in {"plan": plan, "data": show_data, "report": report, "compare": compare}.items():
    app.command(name)(one_line_errors(command))
for name, command in {"export": export, "eval": evaluate, "inspect": inspect}.items():
    app.command(name)(one_line_errors(command, unsaid="model.name_or_path: "))
app.command("verify")(one_line_errors(verify_run))
app.command("doctor")(one_line_errors(doctor))
for command in (ls, verify, prune):
    store_app.command(command.__name__)(one_line_errors(command))
