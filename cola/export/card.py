"""An export's model card, as the hub shows it."""

import re

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from cola.compare.records import Summary
from cola.export.outcome import Outcome
from cola.recipe.schema import SPLITS, is_remote
from cola.report.numbers import interval
from cola.report.table import NONE, Columns, Shown, Table
from cola.tree.records import TrainedLink


def model_card(
    outcome: Outcome,
    form: str,
    dtype: str,
    notes: list[str],
    parts: list[str],
    name: str,
    scores: list[EvalResult],
) -> str:
    """The text of README.md.

    Args:
        dtype: Of a merged checkpoint's weights; of the base otherwise.
        notes: What making the export has found.
        parts: Names of the links' folders, for knots.
        name: What others load.
        scores: What `model-index` says of it.
    """
    recipe, base = outcome.recipe, outcome.base_name
    data = f"{recipe.data.hub.name} of the Hugging Face hub" if recipe.data.hub else "local files"
    data = f"{recipe.data.reasoning_gym.name} of reasoning-gym" if recipe.data.reasoning_gym else data
    front = ModelCardData(
        base_model=base if is_remote(base) else None,
        datasets=recipe.data.hub.name if recipe.data.hub else None,
        library_name="transformers" if form == "merged" else "peft",
        tags=["chain-of-lora", *(["lora"] if outcome.kind.is_pair else [])],
        model_name=name,
        eval_results=scores or None,
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

    columns: Columns = {
        "steps": lambda of: f"{of[0].first_step + 1}–{of[0].last_step}",
        "rank": lambda of: _text(of[0].rank, "d"),
        "alpha": lambda of: _text(of[0].alpha, "g"),
        "target_modules": lambda of: modules(of[0]),
        "learning rate": lambda of: f"{of[0].learning_rate_peak:g}",
        "‖ΔW‖/‖W‖": lambda of: _text(of[1] and of[1].relative_size_median, ".2g"),
        "error": lambda of: _text(of[1] and of[1].error_max, ".2g"),
        "logits": lambda of: _text(of[1] and of[1].drift_max_logit_change, ".2g"),
        "validation loss": lambda of: _text(looks.get(of[0].last_step), ".4f"),
    }
    links = enumerate(outcome.info.links, 1)
    rows = [(f"{number}, {link.method}", (link, knots.get(number))) for number, link in links]
    return Table.of("The chain", ["link"], columns, rows)


def _results_table(outcome: Outcome) -> Table:
    """What the run measured of this arm and seed; against the others, over all seeds."""
    evaluation = outcome.result.evaluation
    scored = {split: getattr(evaluation, split) for split in SPLITS}
    rows: list[list[Shown]] = [
        [split, f"{one.loss:.4f}", _text(one.score, ".4f"), str(one.n)] for split, one in scored.items()
    ]
    rows.append(["gap", f"{evaluation.gap_loss:+.4f}", _text(evaluation.gap_acc, "+.4f"), ""])
    summary = outcome.folder.read("summary.json", Summary)
    if summary is not None and (arm := summary.arms.get(outcome.job.arm)) is not None:
        compared = {key: value for key, value in arm.given().items() if key in ("ft_gap", "closed")}
        rows += [[f"{key}, all seeds", "", interval(value), ""] for key, value in compared.items()]
    return Table("Results", ["", "loss", "score", "rows"], rows)


def _text(number: float | str | None, form: str) -> str:
    return NONE if number is None else format(number, form)
