"""The charts of a run: curves, gaps, train against test, cost; None where there is nothing to draw."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from cola.compare.records import ArmSummary, Summary
from cola.report.drawing import (
    GREY,
    INK,
    MANY,
    Look,
    arm_legend,
    clipped,
    draw_seeds,
    explain,
    gap_of,
    label_points,
    log_scale,
    looks,
    metric_of,
    new_figure,
    panels_of,
    scored_arms,
    seed_values,
    settle,
    spread_out,
)
from cola.tree.records import MetricRow

Curves = dict[str, list[list[MetricRow]]]  # the metric rows of each arm's seeds


@dataclass(frozen=True)
class Curve:
    """The losses of an arm against the optimizer step: means over seeds, and the validation loss of each seed."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    seeds: list[list[tuple[int, float]]]
    knots: list[int]


def curve_of(seeds: list[list[MetricRow]]) -> Curve:
    """What the metric rows of an arm's seeds say of its losses."""
    # The last knot ends the run; the marks show where a chain was tied and went on.
    knots = sorted({row.step for rows in seeds for row in rows if row.kind == "knot"})[:-1]
    each = [_mean_by_step([rows], "validation") for rows in seeds]
    return Curve(_mean_by_step(seeds, "step"), _mean_by_step(seeds, "validation"), each, knots)


def _mean_by_step(seeds: list[list[MetricRow]], kind: str) -> list[tuple[int, float]]:
    at: dict[int, list[float]] = defaultdict(list)
    for rows in seeds:
        for row in rows:
            if row.kind == kind and row.loss is not None:
                at[row.step].append(row.loss)
    return [(step, sum(losses) / len(losses)) for step, losses in sorted(at.items())]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over the tenth of the curve before each point: batches of few rows, alike in length, are noisy. Of a long
    curve some 200 points are kept."""
    width = max(1, len(points) // 10)
    sums = np.concatenate([[0.0], np.cumsum([loss for _, loss in points])])
    kept = sorted({*range(0, len(points), max(1, len(points) // 200)), len(points) - 1})
    return [(points[i][0], float(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i in kept]


def _draw_curve(axes: Axes, curve: Curve, look: Look) -> None:
    if curve.train:
        axes.plot(*zip(*_smooth(curve.train), strict=True), color=look.colour, alpha=0.5, linewidth=0.9)
    if len(curve.seeds) > 1:
        for points in filter(None, curve.seeds):
            axes.plot(*zip(*points, strict=True), color=look.colour, alpha=0.35, linewidth=0.6)
    if curve.validation:  # an arm may have ended before its first evaluation point
        steps, losses = zip(*curve.validation, strict=True)
        every = max(1, len(steps) // 12)
        axes.plot(steps, losses, color=look.colour, lw=1.8, ls=look.dash, marker=look.marker, ms=4, markevery=every)
        heights = np.interp(curve.knots, steps, losses)
        axes.plot(curve.knots, heights, linestyle="", marker="o", ms=7.5, mfc="none", mec=INK, mew=1.1, zorder=4)


def curves_figure(summary: Summary, curves: Curves) -> Figure | None:
    """Train and validation loss against the optimizer step: one chart of few arms, a panel each of many."""
    drawn = {name: c for name, seeds in curves.items() if (c := curve_of(seeds)).train or c.validation}
    if not drawn:
        return None
    marks = [
        {"color": INK, "linewidth": 1.8, "marker": "o", "ms": 4, "label": "validation"},
        {"color": INK, "linewidth": 0.9, "alpha": 0.5, "label": "train, smoothed"},
    ]
    if any(curve.knots for curve in drawn.values()):
        marks.append({"linestyle": "", "marker": "o", "ms": 7.5, "mfc": "none", "mec": INK, "label": "knot"})
    return (_curves_together if len(drawn) <= MANY else _curves_apart)(drawn, looks(summary.arms), marks)


def _curves_together(curves: dict[str, Curve], look: dict[str, Look], marks: list[dict[str, Any]]) -> Figure:
    figure = new_figure(4.2)
    axes = figure.subplots()
    for name, curve in curves.items():
        _draw_curve(axes, curve, look[name])
    log_scale(axes)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per target token")
    ends = {name: (curve.validation or _smooth(curve.train))[-1] for name, curve in curves.items()}
    last = max(step for step, _ in ends.values())
    shown = clipped(ends)
    form: dict[str, Any] = {"textcoords": "offset points", "va": "center", "color": INK, "annotation_clip": False}
    texts = [axes.annotate(shown[name], (last, loss), (9, 0), **form) for name, (_, loss) in ends.items()]
    explain(figure, marks, 3)
    settle(figure)
    scale = figure.dpi / 72
    heights = [axes.transData.transform(end)[1] for end in ends.values()]
    places = spread_out(heights, 12 * scale)
    for (name, (step, loss)), text, height, place in zip(ends.items(), texts, heights, places, strict=True):
        text.set_position((16, (place - height) / scale))
        x = axes.transData.transform((last, loss))[0]
        tip = axes.transData.inverted().transform((x + 14 * scale, place))
        axes.plot([step, tip[0]], [loss, tip[1]], color=look[name].colour, linewidth=0.8, clip_on=False)
    return figure


def _curves_apart(curves: dict[str, Curve], look: dict[str, Look], marks: list[dict[str, Any]]) -> Figure:
    """Every curve in a panel, beside those of lora and full."""
    figure, panels = panels_of(len(curves), (1.8, 1.5), 4, sharex=True, sharey=True)
    shown = clipped(curves, 22)
    beside = [(name, dash) for name, dash in (("lora", (0, (4, 1.5))), ("full", (0, (1, 1)))) if name in curves]
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        for other, dash in beside:
            if curves[other].validation:
                axes.plot(*zip(*curves[other].validation, strict=True), color=GREY, linewidth=1.2, linestyle=dash)
        _draw_curve(axes, curve, Look(look[name].colour, "o", "-"))
        axes.set_title(shown[name], fontsize=8)
    log_scale(panels[0])
    panels[0].xaxis.set_major_locator(MaxNLocator(3))
    for axes in panels[-4:]:
        axes.set_xlabel("optimizer step")
    figure.supylabel("loss, nats per target token", fontsize=9)
    for other, dash in beside:
        marks.append({"color": GREY, "linewidth": 1.2, "linestyle": dash, "label": f"validation of {other}"})
    explain(figure, marks, len(marks))
    return settle(figure)


def gaps_figure(summary: Summary) -> Figure | None:
    """Gap and test number against the number of links of the arms that train low-rank pairs."""
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.knots}
    lengths = sorted({arm.links for arm in arms.values()})
    if len(lengths) < 2:
        return None
    look = {name: look for name, look in looks(summary.arms).items() if name in arms}
    (gap, formula), (score, metric) = gap_of(summary), metric_of(summary)
    # Arms of one length stand side by side, no farther apart than half way to the next length.
    step = min(later - earlier for earlier, later in itertools.pairwise(lengths))
    most = max(sum(arm.links == length for arm in arms.values()) for length in lengths)
    at = {}
    for length in lengths:
        mine = [name for name, arm in arms.items() if arm.links == length]
        for number, name in enumerate(mine):
            at[name] = length + (number - (len(mine) - 1) / 2) * min(0.16, 0.8 / most) * step
    figure = new_figure(3.4)
    panels, labels = figure.subplots(1, 2), {gap: formula, f"test_{score}": f"test {metric}"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for name, arm in arms.items():
            draw_seeds(axes, [(at[name], value) for value in seed_values(arm, key)], look[name])
            axes.plot(at[name], getattr(arm, key).mean, look[name].marker, c=look[name].colour, ms=7, mec=INK, mew=0.6)
        axes.set(xlabel="links", ylabel=label)
        axes.set_xticks(lengths)
        axes.set_xlim(min(at.values()) - 0.4 * step, max(at.values()) + 0.4 * step)
        axes.margins(y=0.12)
    panels[0].axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    if len(arms) > MANY:
        arm_legend(figure, look)
        return settle(figure)
    settle(figure)
    for axes, key in zip(panels, labels, strict=True):
        dots = [(at[name], value) for name, arm in arms.items() for value in seed_values(arm, key)]
        label_points(axes, {name: (at[name], getattr(arm, key).mean) for name, arm in arms.items()}, dots)
    return figure


def train_test_figure(summary: Summary) -> Figure | None:
    """Train against test: few arms on two axes, where the diagonal is no gap; many in rows, joined by their gap."""
    arms = scored_arms(summary)
    if not arms:
        return None
    key, metric = metric_of(summary)
    look = looks(summary.arms)
    train, test = f"train_{key}", f"test_{key}"
    if len(arms) > MANY:
        return _train_test_rows(arms, look, key, metric)
    figure = new_figure(4.4, 4.8)
    axes = figure.subplots()
    means = {name: (getattr(arm, train).mean, getattr(arm, test).mean) for name, arm in arms.items()}
    dots = []
    for name, arm in arms.items():
        pairs = list(zip(seed_values(arm, train), seed_values(arm, test), strict=True))
        dots += pairs
        draw_seeds(axes, pairs, look[name])
        axes.plot(*means[name], look[name].marker, color=look[name].colour, ms=8, mec=INK, mew=0.6)
    values = [value for pair in [*means.values(), *dots] for value in pair]
    room = 0.07 * (max(values) - min(values) or 0.1)
    limits = (min(values) - room, max(values) + room)
    axes.plot(limits, limits, color=INK, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xlabel=f"train {metric}", ylabel=f"test {metric}", xlim=limits, ylim=limits, aspect="equal")
    settle(figure)
    corner = limits[0] + 0.95 * (limits[1] - limits[0])
    aslant: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor", "ha": "right"}
    axes.annotate("no gap", (corner, corner), (-3, 3), textcoords="offset points", fontsize=8, **aslant)
    along = [(value, value) for value in np.linspace(*limits, 60)]
    label_points(axes, means, [*dots, *along])
    return figure


def _train_test_rows(arms: dict[str, ArmSummary], look: dict[str, Look], key: str, metric: str) -> Figure:
    figure = new_figure(0.23 * len(arms) + 1.1)
    axes = figure.subplots()
    ordered = sorted(arms, key=lambda name: getattr(arms[name], f"test_{key}").mean, reverse=key == "loss")
    for row, name in enumerate(ordered):
        arm, colour = arms[name], look[name].colour
        means = [getattr(arm, f"{split}_{key}").mean for split in ("train", "test")]
        axes.plot(means, [row, row], color=colour, linewidth=2, alpha=0.5, zorder=2)
        for split, mean, face, marker in zip(("train", "test"), means, ("none", colour), ("o", "s"), strict=True):
            seeds = seed_values(arm, f"{split}_{key}")
            axes.plot(seeds, [row] * len(seeds), marker, ms=2.5, color=colour, mfc=face, alpha=0.6, mew=0.6, zorder=1)
            axes.plot(mean, row, marker, ms=6, mec=colour, mfc=face, mew=1.4, zorder=3)
    axes.set_yticks(range(len(ordered)), list(clipped(ordered).values()))
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(metric)
    kinds = [("o", "none", "train"), ("s", INK, "test"), ("", INK, "between them: the gap")]
    marks = [
        {"linestyle": "" if marker else "-", "marker": marker, "mec": INK, "mfc": face, "color": INK, "label": label}
        for marker, face, label in kinds
    ]
    explain(figure, marks, 3)
    return settle(figure)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (cost and score) than which none is both better and no dearer, cheapest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def costs_of(summary: Summary) -> tuple[str, dict[str, tuple[float, float]]]:
    """The name of the cost, and each arm's cost and test number, of which more is better: minus the loss of a text."""
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
