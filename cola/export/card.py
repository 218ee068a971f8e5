"""An export's model card, as the hub shows it."""

import re

import jinja2
from huggingface_hub import ModelCardData

from cola.compare.records import Summary
from cola.export.outcome import Outcome
from cola.recipe.bounds import SPLITS, is_remote
from cola.recipe.recipe import Recipe
from cola.report.numbers import interval
from cola.report.table import NONE, Shown, Table
from cola.tree.run_folder import read_json


def model_card(outcome: Outcome, form: str, dtype: str, notes: list[str], parts: list[str], name: str) -> str:
    """The text of README.md.

    Args:
        outcome: The arm and seed.
        form: `adapter`, `merged` or `knots`.
        dtype: Of a merged checkpoint's weights; of the base otherwise.
        notes: What making the export has found.
        parts: Names of the links' folders, for knots.
        name: The export's folder.
    """
    recipe, provenance = outcome.recipe, outcome.folder.provenance()
    assert provenance is not None  # a result was written after it
    base = outcome.base_name
    front = ModelCardData(
        base_model=base if is_remote(base) else None,
        datasets=recipe.data.hub.name if recipe.data.hub else None,
        library_name="transformers" if form == "merged" else "peft",
        tags=["chain-of-lora", *(["lora"] if outcome.is_pair else [])],
    )
    loader = jinja2.PackageLoader("cola.export", ".")
    template = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True).get_template(
        "card.md.j2"
    )
    text = (outcome.folder.path / "recipe.yaml").read_text(encoding="utf-8")
    return template.render(
        front=front.to_yaml(),
        name=name,
        form=form,
        method=outcome.method,
        outcome=outcome,
        base=base,
        base_sha256=provenance.model.sha256,
        dtype=dtype,
        parts=parts,
        data=_data(recipe),
        links=_links_table(outcome).markdown(),
        results=_results_table(outcome).markdown(),
        notes=notes,
        recipe=text,
        fence="`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1),
        packages=provenance.packages,
        cola=provenance.cola,
        created=outcome.result.run_info.created_at,
    )


def _data(recipe: Recipe) -> str:
    """Where the rows came from, in words."""
    data = recipe.data
    if data.hub:
        return f"{data.hub.name} of the Hugging Face hub"
    if data.reasoning_gym:
        return f"{data.reasoning_gym.name} of reasoning-gym"
    return "local files"


def _links_table(outcome: Outcome) -> Table:
    """The chain: what each link trained, what its knot did, and validation where it ended."""
    columns = ["link", "steps", "rank", "alpha", "target_modules", "learning rate", "‖ΔW‖/‖W‖", "error", "logits"]
    table = Table("The chain", [*columns, "validation loss"], [])
    looks = {look.step: look.loss for look in outcome.info.evaluations}
    knots = {knot.link: knot for knot in outcome.info.knots}
    for number, link in enumerate(outcome.info.links, 1):
        knot, end = knots.get(number), link.last_step
        modules = NONE if link.target_modules is None else link.target_modules
        cells = [knot and knot.relative_size_median, knot and knot.error_max, knot and knot.drift_max_logit_change]
        table.rows.append(
            [
                f"{number}, {link.method}",
                f"{link.first_step + 1}–{end}",
                NONE if link.rank is None else str(link.rank),
                NONE if link.alpha is None else f"{link.alpha:g}",
                modules if isinstance(modules, str) else ", ".join(modules),
                f"{link.learning_rate_peak:g}",
                *(NONE if cell is None else f"{cell:.2g}" for cell in cells),
                f"{looks[end]:.4f}" if end in looks else NONE,
            ]
        )
    return table


def _results_table(outcome: Outcome) -> Table:
    """What the run measured of this arm and seed; against the others, over all seeds."""
    evaluation = outcome.result.evaluation
    scored = {split: getattr(evaluation, split) for split in SPLITS}
    rows: list[list[Shown]] = [
        [split, f"{one.loss:.4f}", _score(one.score), str(one.n)] for split, one in scored.items()
    ]
    gap = evaluation.gap_acc
    rows.append(["gap", f"{evaluation.gap_loss:+.4f}", NONE if gap is None else f"{gap:+.4f}", ""])
    summary = read_json(outcome.folder.path / "summary.json", Summary)
    if summary is not None and (arm := summary.arms.get(outcome.job.arm)) is not None:
        compared = {key: value for key, value in arm.given().items() if key in ("ft_gap", "closed")}
        rows += [[f"{key}, all seeds", "", interval(value), ""] for key, value in compared.items()]
    return Table("Results", ["", "loss", "score", "rows"], rows)


def _score(score: float | None) -> str:
    return NONE if score is None else f"{score:.4f}"
