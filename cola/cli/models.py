"""cola export | eval | inspect | store: what was trained, out of a run, scored, looked into and kept."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from cola.errors import ColaError

# What an option's word may be.
Split = StrEnum("Split", ["train", "validation", "test"])
Form = StrEnum("Form", ["adapter", "merged", "knots", "results"])
Dtype = StrEnum("Dtype", ["float32", "bfloat16", "float16"])
Codes = StrEnum("Codes", ["nf4", "int8"])
StoreOption = Annotated[
    Path | None, Option("--store", help="The store. Default: $COLA_STORE, else `store` in the cache.")
]


def export(
    run_folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run.")],
    arm: Annotated[str | None, Option(help="The arm to export. As results: may be left out, for all.")] = None,
    seed: Annotated[int | None, Option(help="The seed; may be left out where there is one, or as results.")] = None,
    form: Annotated[
        Form,
        Option(
            "--as",
            help="adapter: one PEFT LoRA for the whole chain; merged: a Hugging Face checkpoint; knots: the links one "
            "by one; results: the numbers, in the schema of PEFT's method_comparison.",
        ),
    ] = Form.adapter,
    to: Annotated[Path | None, Option(help="The new folder. Default: RUN/exports/ARM-seedS-FORM, or results.")] = None,
    dtype: Annotated[Dtype | None, Option(help="Of a merged checkpoint. Default: the arm's.")] = None,
    rank: Annotated[
        int | None, Option(min=1, help="Compress the chain to this rank by SVD; says what that keeps and loses.")
    ] = None,
    quantization: Annotated[Codes | None, Option(help="Of a merged checkpoint; says what that loses.")] = None,
    push: Annotated[str | None, Option(metavar="OWNER/NAME", help="Upload to the Hugging Face hub.")] = None,
    private: Annotated[bool, Option("--private", help="With --push: a private repository.")] = False,
    benchmark: Annotated[
        str | None,
        Option(
            metavar="TASK",
            help="The recipe's hub data set is a benchmark of the hub, and this a task of its eval.yaml: write the "
            "test score into .eval_results/.",
        ),
    ] = None,
) -> None:
    """Write what an arm has learned as files that other tools load, or the numbers of all arms.

    For example: cola export runs/quickstart-... --arm chain3 --as adapter
    """
    from cola.cli.show import need_new
    from cola.export.export import Request, push_to_hub
    from cola.export.export import export as write
    from cola.export.outcome import outcomes
    from cola.report.terminal import Terminal

    terminal = Terminal()
    if form == Form.results:
        about = {"--dtype": dtype, "--rank": rank, "--quantization": quantization, "--push": push}
        _export_results(run_folder, arm, seed, to, about | {"--private": private or None, "--benchmark": benchmark})
        return
    if arm is None:
        raise ColaError("an arm must be named by --arm; only --as results takes all of them")
    outcome, *others = outcomes(run_folder, arm, seed)
    if others:
        seeds = ", ".join(str(other.job.seed) for other in (outcome, *others))
        raise ColaError(f"{run_folder} has the seeds {seeds}; name one by --seed")
    to = to or run_folder / "exports" / f"{arm}-seed{outcome.job.seed}-{form}"
    need_new(to, "--to")
    write(outcome, Request(form, dtype, rank, quantization, benchmark), to, terminal, push)
    terminal.say(f"export   {to}")
    if form != Form.knots:
        terminal.say(f"check it with: cola eval {to} --data {run_folder}")
    if push is not None:
        terminal.say(f"hub      {push_to_hub(to, push, private)}")


def _export_results(
    run_folder: Path, arm: str | None, seed: int | None, to: Path | None, about_a_model: dict[str, object]
) -> None:
    from cola.cli.show import need_new
    from cola.export.method_comparison import write_results
    from cola.export.outcome import outcomes
    from cola.report.terminal import Terminal

    if idle := [option for option, value in about_a_model.items() if value is not None]:
        raise ColaError(f"{idle[0]} is about a model; it has no effect with --as results: leave it out")
    named = [arm, None if seed is None else f"seed{seed}", "results"]
    to = to or run_folder / "exports" / "-".join(filter(None, named))
    need_new(to, "--to")
    missing: list[str] = []
    write_results(outcomes(run_folder, arm, seed, missing), missing, to, Terminal())


def evaluate(
    target: Annotated[
        str, Argument(metavar="MODEL_OR_RUN", help="Folder of a run, an adapter or a model; a hub id; a GGUF file.")
    ],
    data: Annotated[Path, Option(help="Recipe, or folder of a run, whose data and prompts are taken.")],
    split: Annotated[list[Split] | None, Option(help="May be given again. Default: all three.")] = None,
    arm: Annotated[str | None, Option(help="Of a run. Default: all.")] = None,
    seed: Annotated[int | None, Option(help="Of a run. Default: all.")] = None,
    base: Annotated[str | None, Option(help="What an adapter is put on. Default: what it names.")] = None,
    dtype: Annotated[Dtype | None, Option(help="Default: the export's own, else the recipe's.")] = None,
    quantization: Annotated[Codes | None, Option(help="Of the frozen weights.")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    out: Annotated[Path | None, Option(help="A new folder for eval.json and every example's score.")] = None,
) -> None:
    """Score a run, an adapter or any model on a recipe's data, by the evaluator that scores arms.

    For example: cola eval runs/quickstart-.../exports/chain3-seed0-merged --data recipes/quickstart.yaml

    Exit code: 0 all is scored, 1 some arms of a run could not be, 2 nothing could be.
    """
    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal
    from cola.tree.links import need_inside

    if data.is_dir():
        need_inside(data)
        data /= "recipe.yaml"
    recipe = read_recipe(data)  # a mistake in it is said before all else
    terminal = Terminal()
    from cola.cli.show import need_new
    from cola.compare.contrasts import METRICS
    from cola.export.score import Loading, score, targets_of, write_scores
    from cola.report.tables import scored_table

    need_new(out, "--out")
    targets = targets_of(target, recipe, Loading(base, dtype, quantization, trust_remote_code), arm, seed)
    scored = score(targets, recipe, split or list(Split), terminal)
    table = scored_table([(one.label, one.evaluation, one.reported) for one in scored], METRICS[recipe.data.task])
    terminal.table(table)
    if out is not None:
        write_scores(scored, out)
        terminal.say(f"results  {out / 'eval.json'}")
    raise typer.Exit(1 if len(scored) < len(targets) else 0)


def inspect(
    target: Annotated[
        str, Argument(metavar="RUN_OR_SEGMENT", help="Folder of a run; or name of a segment, or how it begins.")
    ],
    arm: Annotated[str | None, Option(help="Of a run. Default: all.")] = None,
    seed: Annotated[int | None, Option(help="Of a run. Default: all.")] = None,
    intruders: Annotated[
        bool, Option("--intruders", help="Count a run's intruder dimensions too, which takes minutes.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Of a run: what its links, chains and full fine-tuning learned, as spectra. Of a segment: where it came from.

    A run's spectra are ranks, sizes and singular values of each update, and which directions the links share with each
    other and with full fine-tuning; what its folder lacks of them is computed and kept there. A segment is followed
    back to the base: every link, knot, learning rate and batch, names and checksums verified.
    """
    from cola.report.terminal import Terminal

    if target and Path(target).is_dir():
        if store is not None:
            raise ColaError("--store is for a segment; a run is inspected from its own folder")
        from cola.cli.run_view import inspect_run

        inspect_run(Path(target), Terminal(), arm, seed, intruders)
        return
    if arm is not None or seed is not None or intruders:
        raise ColaError(f"{target} is no run folder; --arm, --seed and --intruders belong to a run")
    from cola.cli import store as stores

    stores.inspect(stores.open_store(store), target, Terminal())


def ls(store: StoreOption = None) -> None:
    """List the segments and the disk they take."""
    from cola.cli import store as stores

    stores.ls(stores.open_store(store))


def verify(store: StoreOption = None) -> None:
    """Check every name and checksum; what is damaged is set aside and trained again when it is needed.

    Exit code: 0 all is whole, 1 something was damaged.
    """
    from cola.cli import store as stores

    raise typer.Exit(1 if stores.verify(stores.open_store(store)) else 0)


def prune(store: StoreOption = None, yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False) -> None:
    """Free what no run folder that still exists refers to. Says what that is, then asks."""
    from cola.cli import store as stores

    stores.prune(stores.open_store(store), yes)
