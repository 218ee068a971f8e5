"""Figures of a run and of an ablation, drawn from numbers that are ready.

Drawn by charts.py, choices.py, forest.py, costs.py and heatmaps.py; `svg` and `save` of drawing.py make parts of a page
and files for a paper of them.
"""

import itertools
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cola.compare.ablation import short
from cola.compare.records import Ablation, AblationRow, AblationSeed, Summary, TasksSummary
from cola.report.charts import Curves, curves_figure, gaps_figure, train_test_figure
from cola.report.choices import choices_figure
from cola.report.costs import cost_figure
from cola.report.drawing import STYLE, Look, clipped, draw_seeds, gap_of, looks, new_figure, settle, turn_ticks
from cola.report.forest import contrasts_forest
from cola.report.heatmaps import knots_figure, overlap_figure, spectra_figure

# In the order in which a page shows them; each is None where a run has no data for it.
FIGURES: dict[str, Callable[[Summary, Curves], Figure | None]] = {
    "train-test": lambda summary, _: train_test_figure(summary),
    "contrasts": lambda summary, _: contrasts_forest(summary),
    "curves": curves_figure,
    "choices": lambda summary, _: choices_figure(summary),
    "gaps": lambda summary, _: gaps_figure(summary),
    "cost": lambda summary, _: cost_figure(summary),
    "knots": lambda summary, _: knots_figure(summary),
    "spectra": lambda summary, _: spectra_figure(summary),
    "overlap": lambda summary, _: overlap_figure(summary),
}


def figures_of(summary: Summary, curves: Curves) -> dict[str, Figure]:
    """Every figure that a run has data for, by name, in the order in which a page shows them.

    Args:
        summary: Of the run.
        curves: The rows of metrics.jsonl of every arm that trained, one list per seed.
    """
    with mpl.rc_context(STYLE):
        drawn = {name: draw(summary, curves) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def contrasts_figure(summary: TasksSummary) -> Figure | None:
    """The forest plot alone, of several runs; None where there is no contrast."""
    with mpl.rc_context(STYLE):
        return contrasts_forest(summary)


def ablation_figure(summary: Ablation) -> Figure:
    """Score, gap and cost against the ablated value: a line through the means, a dot for each seed.

    An arm that the keys are not about is a level line.
    """
    scored = summary.metric != "perplexity"
    panels = [
        ("test_score", f"test {summary.metric}") if scored else ("test_loss", "test loss, nats per token"),
        gap_of(summary),
        ("total_seconds", "cost, seconds"),
    ]
    points = [point.values for point in summary.points]
    at = _positions(points)
    settings = [", ".join(values.values()) for values in points]
    ticks = [clipped(settings, 16)[setting] for setting in settings]
    with mpl.rc_context(STYLE):
        figure = new_figure(3.3, 9)
        for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
            for name, look in looks(dict.fromkeys(row.arm for row in summary.rows)).items():
                rows = [row for row in summary.rows if row.arm == name and row.seeds]
                _panel(axes, rows, points, at, key, look)
            axes.set(xlabel=", ".join(map(short, summary.keys)), ylabel=label)
            axes.set_xticks(at, ticks)
            if sum(map(len, ticks)) > 22:
                turn_ticks(axes, 40)
            axes.grid(alpha=0.15)
            axes.margins(x=0.08)
            if key == "total_seconds":
                axes.set_ylim(bottom=0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        ncols = min(len(labels), max(1, int(9 / (0.6 + 0.075 * max(map(len, labels))))))
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        return settle(figure)


def _panel(
    axes: Axes, rows: list[AblationRow], points: list[dict[str, str]], at: list[float], key: str, look: Look
) -> None:
    """One arm in one panel; its rows are of one name."""
    name = clipped(row.arm for row in rows).get(rows[0].arm) if rows else None
    for row in rows:
        if row.values is None:
            level = _mean(row.seeds, key)
            axes.axhline(level, color=look.colour, linestyle=look.dash, linewidth=1.4, label=name)
    moving = [(at[points.index(row.values)], row.seeds) for row in rows if row.values is not None]
    if moving:
        means = [_mean(seeds, key) for _, seeds in moving]
        axes.plot([x for x, _ in moving], means, color=look.colour, lw=1.8, marker=look.marker, ms=6, label=name)
    dots = [(x, getattr(seed, key)) for x, seeds in moving for seed in seeds if len(seeds) > 1]
    draw_seeds(axes, dots, look, alpha=0.5)


def _mean(seeds: list[AblationSeed], key: str) -> float:
    return float(np.mean([getattr(seed, key) for seed in seeds]))


def _positions(points: list[dict[str, str]]) -> list[float]:
    """Where each point stands: at its number, where one key has numbers that do not crowd, else side by side."""
    if len(points[0]) == 1:
        try:
            at = [float(value) for values in points for value in values.values()]
        except ValueError:
            at = []
        apart = [later - earlier for earlier, later in itertools.pairwise(sorted(at))]
        if apart and min(apart) > 0.05 * sum(apart):
            return at
    return [float(number) for number in range(len(points))]
