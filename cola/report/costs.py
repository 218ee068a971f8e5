"""The figure of what quality costs."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from cola.compare.records import Summary
from cola.report.drawing import (
    GREY,
    INK,
    MANY,
    arm_legend,
    label_points,
    looks,
    metric_of,
    new_figure,
    scored_arms,
    seed_values,
    settle,
)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points than which none is both better and no dearer, cheapest first.

    Args:
        points: Cost and score of each; more score is better.
    """
    front: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def costs_of(summary: Summary) -> tuple[str, dict[str, tuple[float, float]]]:
    """What a run's arms cost against what they bring: the name of the cost and of each arm (cost, test number, where
    more is better: minus the loss of a text)."""
    arms = scored_arms(summary)
    key, _ = metric_of(summary)
    known = all(math.isfinite(arm.flops or math.nan) for arm in arms.values() if arm.links)
    cost, label = ("flops", "training FLOPs") if known else ("total_seconds", "time of training and scoring, seconds")
    sign = -1 if key == "loss" else 1
    return label, {name: (getattr(arm, cost), sign * getattr(arm, f"test_{key}").mean) for name, arm in arms.items()}


def cost_figure(summary: Summary) -> Figure | None:
    """Cost against the test number; a line joins the arms than which none is both better and no dearer."""
    label, found = costs_of(summary)
    if len(found) < 2:
        return None
    key, metric = metric_of(summary)
    sign = -1 if key == "loss" else 1
    front = pareto(found)
    look = looks(summary.arms)
    paid = [cost for cost, _ in found.values() if cost > 0]
    figure = new_figure(3.9)
    axes = figure.subplots()
    log = bool(paid) and max(paid) > 10 * min(paid)
    if log:
        axes.set_xscale("log")
    left = min(paid) / 3 if log else 0.0  # where what costs nothing stands
    at = {name: (cost if cost > 0 else left, sign * value) for name, (cost, value) in found.items()}
    seeds = {name: seed_values(arm, f"test_{key}") for name, arm in scored_arms(summary).items()}
    dots = [(at[name][0], value) for name, values in seeds.items() for value in values]
    axes.plot([x for x, _ in dots], [y for _, y in dots], ".", color=GREY, ms=4, alpha=0.5, mew=0)
    corners = [at[front[0]]]
    for name in front[1:]:
        corners += [(at[name][0], corners[-1][1]), at[name]]
    axes.plot(*zip(*corners, strict=True), color=INK, linewidth=1, alpha=0.6)
    for name, (x, y) in at.items():
        face = look[name].colour if name in front else "none"
        axes.plot(x, y, look[name].marker, ms=8, mec=look[name].colour, mfc=face, mew=1.4, zorder=3)
    axes.set(xlabel=label, ylabel=f"test {metric}")
    axes.margins(x=0.14, y=0.12)
    if not log:
        axes.set_xlim(left=-0.06 * max(paid or [1]))
    axes.xaxis.set_major_formatter(EngFormatter() if label.endswith("FLOPs") else "{x:g}")
    if key == "loss":
        axes.invert_yaxis()  # better is higher, as with a score
    axes.grid(alpha=0.15)
    handles = [
        axes.plot([], [], "o-", color=INK, ms=7, label="on the Pareto front (of means)")[0],
        axes.plot([], [], "o", color=INK, ms=7, mfc="none", label="not on it")[0],
        *(axes.plot([], [], ".", color=GREY, label="a seed") if dots else []),
    ]
    if len(at) > MANY:
        arm_legend(figure, {name: look[name] for name in at})
        axes.legend(handles=handles, loc="lower right")
        return settle(figure)
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    settle(figure)
    steps = [np.linspace(first, second, 25) for first, second in itertools.pairwise(corners)]
    label_points(axes, at, [*dots, *[tuple(place) for step in steps for place in step]])
    return figure
