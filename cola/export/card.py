"""An export's model card, as the hub shows it."""

import re
from collections.abc import Callable

import jinja2
from huggingface_hub import ModelCardData

from cola.compare.records import Summary
from cola.export.outcome import Outcome
from cola.recipe.schema import SPLITS, is_remote
from cola.report.numbers import interval
from cola.report.table import NONE, Shown, Table
from cola.tree.records import Knot, TrainedLink
from cola.tree.run_folder import read_json


def model_card(outcome: Outcome, form: str, dtype: str, notes: list[str], parts: list[str], name: str) -> str:
    """The text of README.md.

    Args:
        dtype: Of a merged checkpoint's weights; of the base otherwise.
        notes: What making the export has found.
        parts: Names of the links' folders, for knots.
        name: What others load.
    """
    recipe, base = outcome.recipe, outcome.base_name
    data = f"{recipe.data.hub.name} of the Hugging Face hub" if recipe.data.hub else "local files"
    data = f"{recipe.data.reasoning_gym.name} of reasoning-gym" if recipe.data.reasoning_gym else data
    front = ModelCardData(
        base_model=base if is_remote(base) else None,
        datasets=recipe.data.hub.name if recipe.data.hub else None,
        library_name="transformers" if form == "merged" else "peft",
        tags=["chain-of-lora", *(["lora"] if outcome.kind.is_pair else [])],
    )
    loader = jinja2.PackageLoader("cola.export", ".")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = (outcome.folder.path / "recipe.yaml").read_text(encoding="utf-8")
    return environment.get_template("card.md.j2").render(
        front=front.to_yaml(),
        name=name,
        form=form,
        outcome=outcome,
        base=base,
        dtype=dtype,
        parts=parts,
        data=data,
        links=_links_table(outcome).markdown(),
        results=_results_table(outcome).markdown(),
        notes=notes,
        recipe=text,
        fence="`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1),
    )


def _links_table(outcome: Outcome) -> Table:
    """The chain: what each link trained, what its knot did, and validation where it ended."""
    looks = {look.step: look.loss for look in outcome.info.evaluations}
    knots = {knot.link: knot for knot in outcome.info.knots}

    def modules(link: TrainedLink) -> str:
        return ", ".join(link.target_modules) if isinstance(link.target_modules, list) else link.target_modules or NONE

    columns: dict[str, Callable[[int, TrainedLink, Knot | None], str]] = {
        "link": lambda number, link, _: f"{number}, {link.method}",
        "steps": lambda _, link, __: f"{link.first_step + 1}–{link.last_step}",
        "rank": lambda _, link, __: _text(link.rank, "d"),
        "alpha": lambda _, link, __: _text(link.alpha, "g"),
        "target_modules": lambda _, link, __: modules(link),
        "learning rate": lambda _, link, __: f"{link.learning_rate_peak:g}",
        "‖ΔW‖/‖W‖": lambda _, __, knot: _text(knot and knot.relative_size_median, ".2g"),
        "error": lambda _, __, knot: _text(knot and knot.error_max, ".2g"),
        "logits": lambda _, __, knot: _text(knot and knot.drift_max_logit_change, ".2g"),
        "validation loss": lambda _, link, __: _text(looks.get(link.last_step), ".4f"),
    }
    rows = [(number, link, knots.get(number)) for number, link in enumerate(outcome.info.links, 1)]
    return Table.of("The chain", columns, rows)


def _results_table(outcome: Outcome) -> Table:
    """What the run measured of this arm and seed; against the others, over all seeds."""
    evaluation = outcome.result.evaluation
    scored = {split: getattr(evaluation, split) for split in SPLITS}
    rows: list[list[Shown]] = [
        [split, f"{one.loss:.4f}", _text(one.score, ".4f"), str(one.n)] for split, one in scored.items()
    ]
    rows.append(["gap", f"{evaluation.gap_loss:+.4f}", _text(evaluation.gap_acc, "+.4f"), ""])
    summary = read_json(outcome.folder.path / "summary.json", Summary)
    if summary is not None and (arm := summary.arms.get(outcome.job.arm)) is not None:
        compared = {key: value for key, value in arm.given().items() if key in ("ft_gap", "closed")}
        rows += [[f"{key}, all seeds", "", interval(value), ""] for key, value in compared.items()]
    return Table("Results", ["", "loss", "score", "rows"], rows)


def _text(number: float | str | None, form: str) -> str:
    return NONE if number is None else format(number, form)
