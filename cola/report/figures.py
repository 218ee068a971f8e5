"""The figures of a page: what each shows, in words, and how it is drawn, from numbers that are ready.

A caption is for everyone; a sentence with the numbers, `says`, for who does not see the figure.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cola.compare.records import Ablation, Summary, TasksSummary
from cola.report.charts import Curves, cost_figure, costs_of, curves_figure, gaps_figure, pareto, train_test_figure
from cola.report.choices import ablation_figure, choices_figure
from cola.report.drawing import STYLE, gap_of, metric_of, scored_arms
from cola.report.forest import contrasts_forest, p_text
from cola.report.heatmaps import knots_figure, overlap_figure, spectra_figure
from cola.report.numbers import interval, sample_text, values_text

MOST = 8  # of a figure's numbers in its sentence; the tables have all


def _some(parts: Iterable[str]) -> str:
    parts = list(parts)
    more = f"; and {len(parts) - MOST} more in the table" if len(parts) > MOST else ""
    return "; ".join(parts[:MOST]) + more


def _train_test(summary: Summary) -> str:
    key, metric = metric_of(summary)
    said = [
        f"{name} {getattr(arm, f'train_{key}').mean:.3f} and {getattr(arm, f'test_{key}').mean:.3f}"
        for name, arm in scored_arms(summary).items()
    ]
    return f"Train and test {metric} of each arm{sample_text(summary.train_sample)}: {_some(said)}."


def _contrasts(summary: Summary | TasksSummary) -> str:
    said = [f"{c.first} minus {c.second} {interval(c)}, {p_text(c)}" for c in summary.contrasts]
    claims = sum(contrast.claim for contrast in summary.contrasts)
    return f"Forest plot of {len(said)} contrasts, of which {claims} carry a claim: {_some(said)}."


def _curves(summary: Summary) -> str:
    said = [f"{n} {arm.validation_loss.mean:.3f}" for n, arm in scored_arms(summary).items() if arm.validation_loss]
    return f"Train and validation loss against the optimizer step. Validation loss that was scored: {_some(said)}."


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


def _cost(summary: Summary) -> str:
    label, points = costs_of(summary)
    return f"Test number against {label}. On the Pareto front, by their means, cheapest first: {_some(pareto(points))}."


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
    """A figure by its heading, what there is to see in any such figure, what this one says, and its drawing, which is
    None where the results have no data for it."""

    title: str
    caption: str
    says: Callable[[Any], str]
    draw: Callable[..., Figure | None]


# Of a run, in the order in which a page shows them.
FIGURES = {
    "train-test": Kind(
        "Train against test",
        "Each arm on the rows it was trained on and on test, scored alike; small marks are seeds. The farther an "
        "arm is from the diagonal, or its two marks from each other, the larger its gap. A small gap beside a bad "
        "test number is underfitting.",
        _train_test,
        train_test_figure,
    ),
    "contrasts": Kind(
        "Contrasts",
        "Paired differences on test with 95 % intervals. A filled mark carries a claim, an open one does not. "
        "Differences in the faint band are too small to be found in four of five runs with these seeds and rows. "
        "p: for other seeds and other test examples, as the interval; for the secondary contrasts after Holm.",
        _contrasts,
        contrasts_forest,
    ),
    "curves": Kind(
        "Learning curves",
        "Loss against the optimizer step, means over seeds; with several seeds the thin lines of an arm's colour "
        "are its seeds on validation. A ring is a knot: there a link was tied into the weights and a fresh pair "
        "and optimizer began.",
        _curves,
        curves_figure,
    ),
    "choices": Kind(
        "Searched values",
        "What validation said of each value that was tried; the ring is the one that was chosen. The share is of "
        "resampled trials that choose it again: of validation rows, and of the trials' seeds where there are several; "
        "with one seed nothing is known of another, so that the share is too large.",
        _choices,
        choices_figure,
    ),
    "gaps": Kind(
        "Gap against chain length",
        "The generalization gap and the test number of the arms that train low-rank pairs, against the number of "
        "links; small marks are seeds. Arms of one length stand side by side.",
        _gaps,
        gaps_figure,
    ),
    "cost": Kind(
        "Cost against test",
        "What an arm's training cost against what it brings. The line joins the arms than which none is both "
        "better and no dearer, by their means: it is no test of a difference.",
        _cost,
        cost_figure,
    ),
    "knots": Kind(
        "Knot ledger",
        "What each link added, relative to the base's weights, and how far what the weights then held was from "
        "what was learned. Darker is more; the last two on a logarithmic scale of all precisions.",
        _knots,
        knots_figure,
    ),
    "spectra": Kind(
        "Spectra",
        "Singular values of what each link, the whole chain and full fine-tuning added to the weights, by the "
        "largest; median over matrices.",
        _spectra,
        spectra_figure,
    ),
    "overlap": Kind(
        "Overlap of subspaces",
        "Share of one link's left subspace that lies in another's, and of its in full fine-tuning's top one: 1 is "
        "the same again, and what two random subspaces would give stands above each map.",
        _overlap,
        overlap_figure,
    ),
}
KINDS = FIGURES | {
    "ablation": Kind(
        "Score, gap and cost",
        "Lines join the means over seeds, small marks are seeds; a level line is an arm that the values are not about.",
        lambda _: (
            "Test number, generalization gap and cost against the ablated value, for every arm; the table has them."
        ),
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
        figures = {n: KINDS[n].draw(summary, *([curves] if n == "curves" else ())) for n in names}
    return {name: figure for name, figure in figures.items() if figure is not None}
