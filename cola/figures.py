"""Figures as inline SVG, drawn from numbers that are ready. The only file that imports matplotlib."""

import io
import itertools
import re
from collections import defaultdict
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cola.ablation import mean_of, short

# Okabe & Ito: told apart with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#666666"]
INK = "#010203"  # drawn with, then replaced by the page's own text colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cola",  # the same results give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def loss_figure(curves: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Train and validation loss of all arms on one chart, knots marked, as inline SVG.

    With several seeds each seed's validation loss is a thin line and their mean a thick one.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        axes = figure.subplots()
        for number, (arm, seeds) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            train = _mean_by_step(seeds, "step")
            if not train:
                continue
            smooth = _smooth([loss for _, loss in train])
            axes.plot([s for s, _ in train], smooth, color=colour, alpha=0.45, linewidth=1.2)
            validation = _mean_by_step(seeds, "validation")
            if not validation:  # the arm ended before its first evaluation point
                continue
            if len(seeds) > 1:
                for rows in seeds:
                    points = _mean_by_step([rows], "validation")
                    axes.plot(*zip(*points, strict=True), color=colour, alpha=0.3, linewidth=0.7)
            axes.plot(*zip(*validation, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4, label=arm)
            # The last knot ends the run; the marks show where a chain was tied and went on.
            knots = sorted({row["step"] for rows in seeds for row in rows if row["kind"] == "knot"})[:-1]
            heights = np.interp(knots, [step for step, _ in validation], [loss for _, loss in validation])
            axes.plot(knots, heights, color=colour, linestyle="", marker="D", markersize=7, mec=INK, zorder=3)
        axes.plot([], [], color=INK, alpha=0.45, linewidth=1.2, label="train (thin, smoothed)")
        axes.plot([], [], color=INK, linewidth=2.2, marker="o", markersize=4, label="validation (thick)")
        axes.plot([], [], color=INK, linestyle="", marker="D", markersize=6, label="knot")
        axes.set(xlabel="optimizer step", ylabel="loss, nats per target token")
        axes.set_yscale("log")  # the first steps fall far, the arms part far below
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, ncols=2)
        return _svg(figure)


def _mean_by_step(seeds: list[list[dict[str, Any]]], kind: str) -> list[tuple[int, float]]:
    at: dict[int, list[float]] = defaultdict(list)
    for rows in seeds:
        for row in rows:
            if row["kind"] == kind:
                at[row["step"]].append(row["loss"])
    return [(step, sum(losses) / len(losses)) for step, losses in sorted(at.items())]


def _smooth(values: list[float]) -> list[float]:
    """Mean over the tenth of the curve before each point: batches of few rows, alike in length, are noisy."""
    width = max(1, len(values) // 10)
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i - max(0, i - width + 1) + 1) for i in range(len(values))]


def ablation_figure(summary: dict[str, Any]) -> str:
    """Score, gap and cost against the ablated value: a line through the means, a dot for each seed; SVG.

    An arm that the keys are not about is a level line.
    """
    scored = summary["metric"] != "perplexity"
    panels = [
        ("test_score", f"test {summary['metric']}") if scored else ("test_loss", "test loss, nats per token"),
        ("gap_acc", "gap_acc = train − test") if scored else ("gap_loss", "gap_loss = test − train"),
        ("total_seconds", "cost, seconds"),
    ]
    points = [point["values"] for point in summary["points"]]
    at = _positions(points)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
            _panel(axes, summary["rows"], points, at, key)
            axes.set(xlabel=", ".join(map(short, summary["keys"])), ylabel=label)
            axes.set_xticks(at, [", ".join(values.values()) for values in points])
            axes.grid(alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.08)
            if key == "total_seconds":
                axes.set_ylim(bottom=0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        return _svg(figure)


def _panel(axes: Axes, rows: list[dict[str, Any]], points: list[dict[str, str]], at: list[float], key: str) -> None:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for colour, arm in zip(itertools.cycle(COLOURS), arms, strict=False):
        mine = [row for row in rows if row["arm"] == arm and row["seeds"]]
        for row in mine:
            if row["values"] is None:
                axes.axhline(mean_of(row["seeds"], key), color=colour, linestyle="--", linewidth=1.4, label=arm)
        moving = [(at[points.index(row["values"])], row["seeds"]) for row in mine if row["values"] is not None]
        if moving:
            means = [mean_of(seeds, key) for _, seeds in moving]
            axes.plot([x for x, _ in moving], means, color=colour, linewidth=2, marker="D", markersize=5, label=arm)
        dots = [(x, seed[key]) for x, seeds in moving for seed in seeds if len(seeds) > 1]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, markersize=4, alpha=0.45)


def _positions(points: list[dict[str, str]]) -> list[float]:
    """Where each point stands: at its number, where one key has numbers, else side by side."""
    if len(points[0]) == 1:
        try:
            return [float(value) for values in points for value in values.values()]
        except ValueError:
            pass
    return [float(number) for number in range(len(points))]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names a drawing program and three web sites
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
