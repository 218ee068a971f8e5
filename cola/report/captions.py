"""What the figures show in words: a caption for everyone, a sentence with the numbers for who does not see them."""

from collections.abc import Callable, Iterable
from typing import Any

from cola.compare.records import Ablation, Summary, TasksSummary
from cola.report.costs import costs_of, pareto
from cola.report.drawing import gap_of, metric_of, scored_arms
from cola.report.forest import p_text
from cola.report.numbers import interval, values_text

# By the figure's name: its heading, and what there is to see in any such figure.
CAPTIONS = {
    "train-test": (
        "Train against test",
        "Each arm on the rows it was trained on and on test, scored alike; small marks are seeds. The farther an "
        "arm is from the diagonal, or its two marks from each other, the larger its gap. A small gap beside a bad "
        "test number is underfitting.",
    ),
    "contrasts": (
        "Contrasts",
        "Paired differences on test with 95 % intervals. A filled mark carries a claim, an open one does not. "
        "Differences in the faint band are too small to be found in four of five runs with these seeds and rows. "
        "p: for other seeds and other test examples, as the interval; for the secondary contrasts after Holm.",
    ),
    "curves": (
        "Learning curves",
        "Loss against the optimizer step, means over seeds; with several seeds the thin lines of an arm's colour "
        "are its seeds on validation. A ring is a knot: there a link was tied into the weights and a fresh pair "
        "and optimizer began.",
    ),
    "choices": (
        "Searched values",
        "What validation said of each value that was tried; the ring is the one that was chosen. The share is of "
        "resampled trials that choose it again: of validation rows, and of the trials' seeds where there are several; "
        "with one seed nothing is known of another, so that the share is too large.",
    ),
    "gaps": (
        "Gap against chain length",
        "The generalization gap and the test number of the arms that train low-rank pairs, against the number of "
        "links; small marks are seeds. Arms of one length stand side by side.",
    ),
    "cost": (
        "Cost against test",
        "What an arm's training cost against what it brings. The line joins the arms than which none is both "
        "better and no dearer, by their means: it is no test of a difference.",
    ),
    "knots": (
        "Knot ledger",
        "What each link added, relative to the base's weights, and how far what the weights then held was from "
        "what was learned. Darker is more; the last two on a logarithmic scale of all precisions.",
    ),
    "spectra": (
        "Spectra",
        "Singular values of what each link, the whole chain and full fine-tuning added to the weights, by the "
        "largest; median over matrices.",
    ),
    "overlap": (
        "Overlap of subspaces",
        "Share of one link's left subspace that lies in another's, and of its in full fine-tuning's top one: 1 is "
        "the same again, and what two random subspaces would give stands above each map.",
    ),
    "ablation": (
        "Score, gap and cost",
        "Lines join the means over seeds, small marks are seeds; a level line is an arm that the values are not about.",
    ),
}
MOST = 8  # of a figure's numbers in its sentence; the tables have all


def alternative(name: str, summary: Summary | TasksSummary | Ablation) -> str:
    """What a figure of these results says, in a sentence or two."""
    return SAYS[name](summary)


def _train_test(summary: Summary) -> str:
    key, metric = metric_of(summary)
    said = [
        f"{name} {getattr(arm, f'train_{key}').mean:.3f} and {getattr(arm, f'test_{key}').mean:.3f}"
        for name, arm in scored_arms(summary).items()
    ]
    return f"Train and test {metric} of each arm: {_some(said)}."


def _contrasts(summary: Summary | TasksSummary) -> str:
    said = [f"{c.first} minus {c.second} {interval(c)}, {p_text(c)}" for c in summary.contrasts]
    claims = sum(contrast.claim for contrast in summary.contrasts)
    return f"Forest plot of {len(said)} contrasts, of which {claims} carry a claim: {_some(said)}."


def _curves(summary: Summary) -> str:
    said = [f"{n} {arm.validation_loss.mean:.3f}" for n, arm in scored_arms(summary).items() if arm.validation_loss]
    return f"Train and validation loss against the optimizer step. Validation loss that was scored: {_some(said)}."


def _choices(summary: Summary) -> str:
    said = [
        f"{arm} {values_text(trial.values)}"
        + (f" by seed {choice.seed}" if choice.seed is not None else "")
        + (f" in {trial.share:.0%}" if trial.share is not None else "")
        for arm, search in summary.trials.items()
        for choice in search.choices
        for trial in [choice.trials[choice.chosen]]
    ]
    return f"Validation loss and score against the searched values. Chosen, and its share: {_some(said)}."


def _gaps(summary: Summary) -> str:
    (gap, _), (key, metric) = gap_of(summary), metric_of(summary)
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.knots}
    said = [
        f"{name} with {arm.links} {gap} {getattr(arm, gap).mean:+.3f}, test {getattr(arm, f'test_{key}').mean:.3f}"
        for name, arm in sorted(arms.items(), key=lambda item: item[1].links)
    ]
    return f"{gap} and test {metric} against the number of links: {_some(said)}."


def _cost(summary: Summary) -> str:
    label, points = costs_of(summary)
    return f"Test number against {label}. On the Pareto front, by their means, cheapest first: {_some(pareto(points))}."


def _knots(summary: Summary) -> str:
    knots = [(name, knot) for name, arm in summary.arms.items() for knot in arm.knots]
    said = [f"{name} link {knot.link} {knot.relative_size_median:.2%}" for name, knot in knots]
    worst = max(((knot.error_max, name) for name, knot in knots if knot.error_max is not None), default=None)
    lost = "" if worst is None else f" The largest error is {worst[0]:.0e}, of {worst[1]}."
    return f"Relative size of each link: {_some(said)}.{lost}"


def _spectra(summary: Summary) -> str:
    said = [
        f"{name} {row.what} {_learned(row.effective_rank, 1)}"
        for name, arm in summary.spectra.items()
        for row in arm.rows
    ]
    return f"Singular values in order of size. Effective ranks: {_some(said)}."


def _overlap(summary: Summary) -> str:
    said = [
        f"{name} {links.labels[i]} and {links.labels[i + 1]} {_learned(links.matrix[i][i + 1], 2)}"
        for name, arm in summary.spectra.items()
        if (links := arm.overlap)
        for i in range(len(links.labels) - 1)
    ]
    return f"Overlap of each link's subspace with the next one's: {_some(said) or 'one link only'}."


SAYS: dict[str, Callable[[Any], str]] = {
    "train-test": _train_test,
    "contrasts": _contrasts,
    "curves": _curves,
    "choices": _choices,
    "gaps": _gaps,
    "cost": _cost,
    "knots": _knots,
    "spectra": _spectra,
    "overlap": _overlap,
    "ablation": lambda _: (
        "Test number, generalization gap and cost against the ablated value, for every arm; the table has them."
    ),
}


def _learned(number: float | None, digits: int) -> str:
    return "nothing learned" if number is None else f"{number:.{digits}f}"


def _some(parts: Iterable[str]) -> str:
    parts = list(parts)
    more = f"; and {len(parts) - MOST} more in the table" if len(parts) > MOST else ""
    return "; ".join(parts[:MOST]) + more
