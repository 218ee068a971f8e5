"""The figures of a page: what each shows, in words, and how it is drawn, from numbers that are ready.

A caption is for everyone; a sentence with the numbers, `says`, for who does not see the figure.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cola.compare.ablation_records import Ablation
from cola.compare.records import Summary, TasksSummary
from cola.report.charts import (
    PRICES,
    cost_figure,
    costs_of,
    gaps_figure,
    hero_figure,
    losses_figure,
    pareto,
    primary_of,
    tasks_of,
    train_test_figure,
)
from cola.report.choices import ablation_figure, choices_figure
from cola.report.curves import Curves, curves_figure, leads_over_lora, minibatches_figure
from cola.report.drawing import STYLE, gap_of, metric_of, scored_arms
from cola.report.forest import contrasts_forest, p_text
from cola.report.heatmaps import knots_figure, overlap_figure, spectra_figure
from cola.report.memory_figure import memory_figure, told_memory
from cola.report.numbers import interval, sample_text, size, values_text
from cola.report.verdict import ablation_headlines

OF_CURVES = ("curves", "minibatches")  # drawn from the metric rows too
MOST = 8  # of a figure's numbers in its sentence; the tables have all


def _some(parts: Iterable[str]) -> str:
    parts = list(parts)
    more = f"; and {len(parts) - MOST} more in the table" if len(parts) > MOST else ""
    return "; ".join(parts[:MOST]) + more


def _hero(summary: Summary | TasksSummary) -> str:
    tasks, metric = tasks_of(summary)
    said = [
        f"{name} {f'on {task.label} ' if task.label else ''}{sum(seeds) / len(seeds):.3f}"
        for task in tasks
        for name, seeds in task.seeds.items()
    ]
    one = primary_of(summary)
    primary = "" if one is None else f" Primary contrast, {one.first} minus {one.second}: {interval(one)}."
    return f"Test {metric} of each arm, mean over seeds: {_some(said)}.{primary}"


def _train_test(summary: Summary) -> str:
    return _two_splits(summary, *metric_of(summary))


def _losses(summary: Summary) -> str:
    return _two_splits(summary, "loss", "loss")


def _two_splits(summary: Summary, key: str, metric: str) -> str:
    said = [
        f"{name} {getattr(arm, f'train_{key}').mean:.3f} and {getattr(arm, f'test_{key}').mean:.3f}"
        for name, arm in scored_arms(summary).items()
    ]
    return f"Train and test {metric} of each arm{sample_text(summary.train_sample)}: {_some(said)}."


def _contrasts(summary: Summary | TasksSummary) -> str:
    said = [f"{c.first} minus {c.second} {interval(c)}, {p_text(c)}" for c in summary.contrasts]
    claims = sum(contrast.claim for contrast in summary.contrasts)
    return f"Forest plot of {len(said)} contrasts, of which {claims} carry a claim: {_some(said)}."


def _curves(summary: Summary, _: Curves) -> str:
    said = [f"{n} {arm.validation_loss.mean:.3f}" for n, arm in scored_arms(summary).items() if arm.validation_loss]
    return f"Train and validation loss against the optimizer step. Validation loss that was scored: {_some(said)}."


def _ablation(summary: Ablation) -> str:
    return f"Each arm against the ablated value. {' '.join(ablation_headlines(summary))}"


def _minibatches(_: Summary, curves: Curves) -> str:
    said = []
    for name, seeds in leads_over_lora(curves).items():
        last = [lead for points in seeds for _, lead in points[-max(1, len(points) // 10) :]]
        said.append(f"{name} {sum(last) / len(last):+.3f}")
    return f"Training loss minus LoRA's, mean over the last tenth of the steps: {_some(said)}."


def _choices(summary: Summary) -> str:
    said = []
    for arm, choice in ((arm, choice) for arm, search in summary.trials.items() for choice in search.choices):
        trial = choice.trials[choice.chosen]
        by = "" if choice.seed is None else f" by seed {choice.seed}"
        share = "" if trial.share is None else f" in {trial.share:.0%}"
        said.append(f"{arm} {values_text(trial.values)}{by}{share}")
    return f"Validation loss and score against the searched values. Chosen, and its share: {_some(said)}."


def _gaps(summary: Summary) -> str:
    (gap, _), (key, metric) = gap_of(summary), metric_of(summary)
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.knots}
    said = [
        f"{name} with {arm.links} {gap} {getattr(arm, gap).mean:+.3f}, test {getattr(arm, f'test_{key}').mean:.3f}"
        for name, arm in sorted(arms.items(), key=lambda item: item[1].links)
    ]
    sample = sample_text(summary.train_sample)
    return f"{gap} and test {metric} against the number of links{sample}: {_some(said)}."


def _cost(kind: str, summary: Summary) -> str:
    price, points = PRICES[kind], costs_of(summary, kind)
    said = [f"{name} at {price.shown(points[name][0])}" for name in pareto(points)]
    return f"Test number against {price.label}. On the Pareto front, by their means, cheapest first: {_some(said)}."


def _memory(summary: Summary) -> str:
    said = [
        f"{name} {size(expected.peak)}" + ("" if measured is None else f", measured {size(measured)}")
        for name, (expected, measured) in told_memory(summary).items()
    ]
    return f"Memory that was expected at the largest moment: {_some(said)}."


def _knots(summary: Summary) -> str:
    knots = [(name, knot) for name, arm in summary.arms.items() for knot in arm.knots]
    said = [f"{name} link {knot.link} {knot.relative_size_median:.2%}" for name, knot in knots]
    worst = max(((knot.error_max, name) for name, knot in knots if knot.error_max is not None), default=None)
    lost = "" if worst is None else f" The largest error is {worst[0]:.0e}, of {worst[1]}."
    return f"Relative size of each link: {_some(said)}.{lost}"


def _learned(number: float | None, form: str) -> str:
    return "nothing learned" if number is None else f"{number:{form}}"


def _spectra(summary: Summary) -> str:
    rows = [(name, row) for name, arm in summary.spectra.items() for row in arm.rows]
    said = [f"{name} {row.what} {_learned(row.effective_rank, '.1f')}" for name, row in rows]
    return f"Singular values in order of size. Effective ranks: {_some(said)}."


def _overlap(summary: Summary) -> str:
    said = [
        f"{name} {links.labels[i]} and {links.labels[i + 1]} {_learned(links.matrix[i][i + 1], '.2f')}"
        for name, arm in summary.spectra.items()
        if (links := arm.overlap)
        for i in range(len(links.labels) - 1)
    ]
    return f"Overlap of each link's subspace with the next one's: {_some(said) or 'one link only'}."


@dataclass(frozen=True)
class Kind:
    """A figure by its heading, what there is to see in it, what this one says, and its drawing, which is None where the
    results have no data for it."""

    title: str
    caption: dict[str, str]  # sentences, each told where the figure has its key written in it
    says: Callable[..., str]
    draw: Callable[..., Figure | None]


OFF = {arrow: f"{arrow} leads to what is so far off that it would crush the others." for arrow in "◂▸"}
RING = "A ring is a knot, at the loss that was measured there: a link was tied into the weights and the next one began."
# Of a run, in the order in which a page shows them.
FIGURES = {
    "hero": Kind(
        "Every seed of every arm",
        {
            "": "A dot is a seed, a bar the mean, whose number stands at the right.",
            **OFF,
            "the first is better": "Beside them the primary contrast, which was named before the run: the difference "
            "of its two arms with its 95 % interval, in colour where it carries a claim.",
        },
        _hero,
        hero_figure,
    ),
    "contrasts": Kind(
        "Contrasts",
        {
            "": "Paired differences on test with 95 % intervals. A filled mark carries a claim, in the colour of the "
            "better arm; an open one carries none. p: as the interval, for other seeds and other test examples.",
            "too small": "Differences in the faint band are too small to be found in four of five runs with these "
            "seeds and rows.",
            **OFF,
        },
        _contrasts,
        contrasts_forest,
    ),
    "curves": Kind(
        "Learning curves",
        {"": "Loss against the optimizer step, means over seeds.", ">knot<": RING},
        _curves,
        curves_figure,
    ),
    "minibatches": Kind(
        "Training loss minus LoRA's, on the same minibatches",
        {
            "": "Under a seed every step of an arm and of lora reads the same rows, so that the difference is the "
            "arms'. Below the line the arm fits its rows better. The axis is that of the steps after the first fifth.",
            ">knot<": "A ring is a knot.",
        },
        _minibatches,
        minibatches_figure,
    ),
    "choices": Kind(
        "Score and loss against what was searched",
        {
            "": "What validation said of each value that was tried.",
            "of resamples": "The share is that of resampled trials which choose the same again.",
        },
        _choices,
        choices_figure,
    ),
    "train-test": Kind(
        "Train against test",
        {
            "": "Each arm on the rows that it was trained on and on test, scored alike. The farther its two marks are "
            "apart, the larger is its gap. A small gap beside a bad test number is underfitting.",
            **OFF,
        },
        _train_test,
        train_test_figure,
    ),
    "losses": Kind(
        "Test loss against train loss",
        {"": "The arms that were trained. Of two with the same train loss the lower one generalizes better."},
        _losses,
        losses_figure,
    ),
    "gaps": Kind(
        "Gap against chain length",
        {"": "The arms that train low-rank pairs, against their number of links; those of one length side by side."},
        _gaps,
        gaps_figure,
    ),
    **{
        kind: Kind(
            f"Test against {price.label.split(',')[0]}",
            {
                "": "What an arm cost against what it brings. Filled are the trained arms than which none is both "
                "better and no dearer, by their means: it is no test of a difference.",
                "wall clock": "Wall clock has in it what else the machine did: no finding.",
                "peak memory": "Memory is the largest of any seed.",
            },
            partial(_cost, kind),
            partial(cost_figure, kind),
        )
        for kind, price in PRICES.items()
    },
    "memory": Kind(
        "Memory, by part",
        {
            "": "What was expected before the run began, at the moment that holds most of it (`cola plan`).",
            "measured": "The upright mark is the most that was measured, of all seeds.",
        },
        _memory,
        memory_figure,
    ),
    "knots": Kind(
        "Knot ledger",
        {
            "": "What each link added, relative to the base's weights, and how far what the weights then held was from "
            "what was learned. A stronger shade is more; the last two on a logarithmic scale of all precisions."
        },
        _knots,
        knots_figure,
    ),
    "spectra": Kind(
        "Spectra",
        {"": "Singular values of what was added to the weights, by the largest; median over matrices."},
        _spectra,
        spectra_figure,
    ),
    "overlap": Kind(
        "Overlap of subspaces",
        {
            "a link and the next": "Share of one link's left subspace that lies in the next one's.",
            "in full": "Share of a link's left subspace that lies in full fine-tuning's top one.",
            "": "1 is the same again; what two random subspaces would give stands above.",
        },
        _overlap,
        overlap_figure,
    ),
}
KINDS = FIGURES | {
    "ablation": Kind(
        "Against the ablated value",
        {
            "": "Lines join the means over seeds, small marks are seeds; a level line is an arm that the values are "
            "not about.",
            "▾": "▾ leads to one that is below the axis.",
            "▴": "▴ leads to one that is above the axis.",
            "difference from": "The difference is that to the first value, paired by seed and test example, with its "
            "95 % interval.",
        },
        _ablation,
        ablation_figure,
    )
}


def figures_of(summary: Summary, curves: Curves) -> dict[str, Figure]:
    """Every figure that a run has data for, by name; `curves` has the metric rows of every arm that trained."""
    return drawn(FIGURES, summary, curves)


def drawn(
    names: Iterable[str], summary: Summary | TasksSummary | Ablation, curves: Curves | None = None
) -> dict[str, Figure]:
    """Those of the figures that there is data for."""
    with mpl.rc_context(STYLE):
        figures = {n: KINDS[n].draw(*_about(n, summary, curves)) for n in names}
    return {name: figure for name, figure in figures.items() if figure is not None}


def told_of(
    name: str, drawing: str, summary: Summary | TasksSummary | Ablation, curves: Curves | None = None
) -> dict[str, str]:
    """A figure's title, the caption of what is drawn in its SVG, and what it says."""
    kind = KINDS[name]
    caption = " ".join(sentence for key, sentence in kind.caption.items() if key in drawing)
    return {"title": kind.title, "caption": caption, "says": kind.says(*_about(name, summary, curves))}


def _about(name: str, summary: Summary | TasksSummary | Ablation, curves: Curves | None) -> list[Any]:
    """What a figure is drawn from: some from the metric rows too."""
    return [summary, *([curves or {}] if name in OF_CURVES else [])]
