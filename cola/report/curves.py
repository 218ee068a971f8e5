"""Losses against the optimizer step: of every arm, and against LoRA's on the same minibatches."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cola.compare.records import Summary
from cola.report.drawing import (
    GREY,
    INK,
    clipped,
    explain,
    log_scale,
    looks_of,
    panels_of,
    settle,
    window,
)
from cola.report.marks import belong, of, say, some
from cola.tree.records import MetricRow

Points = list[tuple[int, float]]  # a loss at each of some steps
Curves = dict[str, dict[int, list[MetricRow]]]  # the metric rows of each arm by its seeds
REFERENCES = {"lora": (0, (4, 1.5)), "full": (0, (1, 1))}  # arms that stand in the panels of the others, and their dash


@dataclass(frozen=True)
class Curve:
    """The losses of an arm against the optimizer step: means over seeds, and the validation loss of each seed."""

    train: Points
    validation: Points
    seeds: list[Points]
    knots: list[int]


def curve_of(seeds: dict[int, list[MetricRow]]) -> Curve:
    """What the metric rows of an arm's seeds say of its losses."""
    rows = list(seeds.values())
    return Curve(
        _mean_by_step([_losses(one, "step") for one in rows]),
        _mean_by_step(each := [_losses(one, "validation") for one in rows]),
        each,
        _knots(seeds),
    )


def _knots(seeds: dict[int, list[MetricRow]]) -> list[int]:
    """Where a chain was tied and went on; the last knot ends the run."""
    return sorted({row.step for rows in seeds.values() for row in rows if row.kind == "knot"})[:-1]


def _losses(rows: list[MetricRow], kind: str) -> Points:
    return sorted({row.step: row.loss for row in rows if row.kind == kind and row.loss is not None}.items())


def _mean_by_step(seeds: list[Points]) -> Points:
    at: dict[int, list[float]] = defaultdict(list)
    for points in seeds:
        for step, loss in points:
            at[step].append(loss)
    return [(step, sum(losses) / len(losses)) for step, losses in sorted(at.items())]


def _smooth(points: Points, always: list[int]) -> Points:
    """Mean over the tenth of the curve before each point: batches of few rows, alike in length, are noisy. Of a long
    curve some 100 points are kept, and those of the steps that are always to be there."""
    width = max(1, len(points) // 10)
    sums = np.concatenate([[0.0], np.cumsum([loss for _, loss in points])])
    kept = {*range(0, len(points), max(1, len(points) // 100)), len(points) - 1}
    kept |= {n for n, (step, _) in enumerate(points) if step in always}
    return [(points[i][0], float(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i in sorted(kept)]


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    smooth = _smooth(curve.train, curve.knots) if curve.train else []
    if smooth:
        axes.plot(*zip(*smooth, strict=True), color=colour, alpha=0.6, linewidth=1)
    if len(curve.seeds) > 1:
        for points in filter(None, curve.seeds):
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=0.6)
    if curve.validation:  # an arm may have ended before its first evaluation point
        steps, losses = zip(*curve.validation, strict=True)
        every = max(1, len(steps) // 12)
        axes.plot(steps, losses, color=colour, linewidth=1.8, marker="o", ms=4, markevery=every)
    # A ring stands at a loss that was measured at the knot's own step: on validation where it was looked at there, else
    # on the train curve.
    measured = dict(smooth) | dict(curve.validation)
    rings = [(step, measured[step]) for step in curve.knots if step in measured]
    axes.plot([x for x, _ in rings], [y for _, y in rings], linestyle="", **_ring(colour))


def _ring(colour: str) -> dict[str, Any]:
    return {"marker": "o", "ms": 7.5, "mfc": "none", "mec": colour, "mew": 1.3, "zorder": 4}


def curves_figure(summary: Summary, curves: Curves) -> Figure | None:
    """Train and validation loss against the optimizer step: every arm in a panel, beside those of lora and full."""
    drawn = {name: c for name, seeds in curves.items() if (c := curve_of(seeds)).train or c.validation}
    if not drawn:
        return None
    figure, panels = panels_of(len(drawn), "optimizer step")
    look, shown = looks_of(summary), clipped(drawn, 18)
    beside = {name: dash for name, dash in REFERENCES.items() if name in drawn and drawn[name].train}
    for axes, (name, curve) in zip(panels, drawn.items(), strict=True):
        for other, dash in beside.items():
            if other != name:
                line = _smooth(drawn[other].train, [])
                with of(axes, name, other):
                    axes.plot(*zip(*line, strict=True), color=GREY, linewidth=1, linestyle=dash)
        with of(axes, name):
            _draw_curve(axes, curve, look[name].colour)
        belong((name,), axes.set_title(shown[name]))
        train = some(_smooth(curve.train, []) if curve.train else [])
        say(axes, name, [(x, y, f"{name}, step {x:g}: train {y:.4f}, smoothed") for x, y in train])
        say(axes, name, [(x, y, f"{name}, step {x}: validation {y:.4f}") for x, y in curve.validation])
    log_scale(panels[0])
    panels[0].xaxis.set_major_locator(MaxNLocator(3))
    figure.supylabel("loss, nats per target token", fontsize=9)
    marks = [
        {"color": INK, "linewidth": 1.8, "marker": "o", "ms": 4, "label": "validation"},
        {"color": INK, "linewidth": 1, "alpha": 0.6, "label": "train, smoothed"},
    ]
    marks += [{"linestyle": "", "label": "knot", **_ring(INK)}] if any(curve.knots for curve in drawn.values()) else []
    if len(drawn) > 1:
        marks += [
            {"color": GREY, "lw": 1, "linestyle": dash, "label": f"train of {name}"} for name, dash in beside.items()
        ]
    explain(figure, marks, 3)
    return settle(figure)


def leads_over_lora(curves: Curves) -> dict[str, list[Points]]:
    """Of each arm that read the same minibatches as lora: its training loss minus lora's, step by step, under each seed
    that both have."""
    lora = {seed: dict(_losses(rows, "step")) for seed, rows in curves.get("lora", {}).items()}
    found: dict[str, list[Points]] = {}
    for name, seeds in curves.items():
        own = {seed: dict(_losses(rows, "step")) for seed, rows in seeds.items() if seed in lora and name != "lora"}
        pairs = [(own[seed], lora[seed]) for seed in own if own[seed] and own[seed].keys() == lora[seed].keys()]
        if pairs:
            found[name] = [[(step, loss - other[step]) for step, loss in mine.items()] for mine, other in pairs]
    return found


def minibatches_figure(summary: Summary, curves: Curves) -> Figure | None:
    """Training loss minus LoRA's on the same minibatches: a panel for each arm, its mean over seeds, and the seeds."""
    leads, look = leads_over_lora(curves), looks_of(summary)
    if not leads:
        return None
    figure, panels = panels_of(len(leads), "optimizer step")
    shown = clipped(leads, 18)
    later: list[float] = []  # after the first fifth of the steps, where the arms fall together
    for axes, (name, seeds) in zip(panels, leads.items(), strict=True):
        knots = _knots(curves[name])
        axes.axhline(0, color=INK, linewidth=0.8)
        for points in [_smooth(points, []) for points in seeds if len(seeds) > 1]:
            axes.plot(*zip(*points, strict=True), color=look[name].colour, alpha=0.3, linewidth=0.6)
        mean = _smooth(_mean_by_step(seeds), knots)
        later += [lead for _, lead in mean[len(mean) // 5 :]]
        axes.plot(*zip(*mean, strict=True), color=look[name].colour, linewidth=1.6)
        rings = [(step, lead) for step, lead in mean if step in knots]
        axes.plot([x for x, _ in rings], [y for _, y in rings], linestyle="", **_ring(look[name].colour))
        belong((name,), axes.set_title(shown[name]), *axes.lines[1:])  # the first one is the level of 0
        say(axes, name, [(x, y, f"{name}, step {x:g}: {y:+.4f} against lora, smoothed") for x, y in some(mean)])
    panels[0].xaxis.set_major_locator(MaxNLocator(3))
    low, high = window([0.0, *later])
    panels[0].set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    figure.supylabel("training loss − lora's", fontsize=9)
    several = len(summary.seeds) > 1
    marks = [{"color": INK, "linewidth": 1.6, "label": "mean over seeds, smoothed" if several else "smoothed"}]
    marks += [{"color": INK, "alpha": 0.3, "linewidth": 0.6, "label": "a seed"}] if several else []
    marks += [{"linestyle": "", "label": "knot", **_ring(INK)}] if any(_knots(curves[name]) for name in leads) else []
    explain(figure, marks, 3)
    return settle(figure)
