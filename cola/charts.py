"""The charts of a run: curves, gaps, train against test, contrasts and cost; None where there is nothing to draw."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from cola.drawing import (
    COLOURS,
    GREY,
    INK,
    MANY,
    WIDE,
    Look,
    arm_legend,
    clipped,
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
from cola.tables import choice_share, value_text

Curves = dict[str, list[list[dict[str, Any]]]]  # the metric rows of each arm's seeds
ROLES = {
    "primary": "primary, named beforehand",
    "secondary": "secondary",
    "later": "not named before: no claim",
}


@dataclass(frozen=True)
class Curve:
    """The losses of an arm against the optimizer step: means over seeds, and the validation loss of each seed."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    seeds: list[list[tuple[int, float]]]
    knots: list[int]


def curve_of(seeds: list[list[dict[str, Any]]]) -> Curve:
    """What the metric rows of an arm's seeds say of its losses."""
    # The last knot ends the run; the marks show where a chain was tied and went on.
    knots = sorted({row["step"] for rows in seeds for row in rows if row["kind"] == "knot"})[:-1]
    each = [_mean_by_step([rows], "validation") for rows in seeds]
    return Curve(_mean_by_step(seeds, "step"), _mean_by_step(seeds, "validation"), each, knots)


def _mean_by_step(seeds: list[list[dict[str, Any]]], kind: str) -> list[tuple[int, float]]:
    at: dict[int, list[float]] = defaultdict(list)
    for rows in seeds:
        for row in rows:
            if row["kind"] == kind:
                at[row["step"]].append(row["loss"])
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
        axes.plot(
            steps,
            losses,
            color=look.colour,
            linewidth=1.8,
            linestyle=look.dash,
            marker=look.marker,
            ms=4,
            markevery=every,
        )
        heights = np.interp(curve.knots, steps, losses)
        axes.plot(curve.knots, heights, linestyle="", marker="o", ms=7.5, mfc="none", mec=INK, mew=1.1, zorder=4)


def curves_figure(summary: dict[str, Any], curves: Curves) -> Figure | None:
    """Train and validation loss against the optimizer step: one chart of few arms, a panel each of many."""
    found = {name: curve_of(seeds) for name, seeds in curves.items() if name in summary["arms"]}
    found = {name: curve for name, curve in found.items() if curve.train or curve.validation}
    if not found:
        return None
    look = looks(summary["arms"])
    kinds = [
        {"color": INK, "linewidth": 1.8, "marker": "o", "ms": 4, "label": "validation"},
        {"color": INK, "linewidth": 0.9, "alpha": 0.5, "label": "train, smoothed"},
    ]
    if any(curve.knots for curve in found.values()):
        kinds.append({"linestyle": "", "marker": "o", "ms": 7.5, "mfc": "none", "mec": INK, "label": "knot"})
    if len(found) <= MANY:
        figure = new_figure(4.2)
        axes = figure.subplots()
        for name, curve in found.items():
            _draw_curve(axes, curve, look[name])
        log_scale(axes)
        axes.set(xlabel="optimizer step", ylabel="loss, nats per target token")
        axes.grid(alpha=0.15)
        ends = {name: (curve.validation or _smooth(curve.train))[-1] for name, curve in found.items()}
        last = max(step for step, _ in ends.values())
        shown = clipped(ends)
        texts = {
            name: axes.annotate(
                shown[name],
                (last, loss),
                (9, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                annotation_clip=False,
            )
            for name, (_, loss) in ends.items()
        }
        figure.legend(handles=[axes.plot([], [], **kind)[0] for kind in kinds], loc="outside lower center", ncols=3)
        settle(figure)
        scale = figure.dpi / 72
        heights = [axes.transData.transform(end)[1] for end in ends.values()]
        for (name, text), height, place in zip(texts.items(), heights, spread_out(heights, 12 * scale), strict=True):
            text.set_position((16, (place - height) / scale))
            step, loss = ends[name]
            x = axes.transData.transform((last, loss))[0]
            tip = axes.transData.inverted().transform((x + 14 * scale, place))
            axes.plot([step, tip[0]], [loss, tip[1]], color=look[name].colour, linewidth=0.8, clip_on=False)
        return figure
    figure, panels = panels_of(len(found), (1.8, 1.5), 4, sharex=True, sharey=True)
    shown = clipped(found, 22)
    beside = [(name, dash) for name, dash in (("lora", (0, (4, 1.5))), ("full", (0, (1, 1)))) if name in found]
    for axes, (name, curve) in zip(panels, found.items(), strict=True):
        for other, dash in beside:
            if found[other].validation:
                axes.plot(*zip(*found[other].validation, strict=True), color=GREY, linewidth=1.2, linestyle=dash)
        _draw_curve(axes, curve, Look(look[name].colour, "o", "-"))
        axes.set_title(shown[name], fontsize=8)
        axes.grid(alpha=0.15)
    log_scale(panels[0])
    panels[0].xaxis.set_major_locator(MaxNLocator(3))
    for axes in panels[-4:]:
        axes.set_xlabel("optimizer step")
    figure.supylabel("loss, nats per target token", fontsize=9)
    kinds += [
        {"color": GREY, "linewidth": 1.2, "linestyle": dash, "label": f"validation of {other}"}
        for other, dash in beside
    ]
    handles = [panels[0].plot([], [], **kind)[0] for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return settle(figure)


def choices_figure(summary: dict[str, Any]) -> Figure | None:
    """Validation loss and score against what each arm's search tried: a line through the means, a dot for each seed."""
    searches = {arm: search for arm, search in summary["trials"].items() if arm in summary["arms"]}
    if not searches:
        return None
    look = looks(summary["arms"])
    kinds = [("loss", "loss")]
    kinds += [] if summary["metric"] == "perplexity" else [("score", summary["metric"])]
    columns = min(4, len(searches))
    blocks = math.ceil(len(searches) / columns)
    figure = new_figure(blocks * (1.5 * len(kinds) + 0.8) + 0.6, {1: 4.4, 2: 5.6}.get(columns, WIDE))
    grid = figure.subplots(blocks * len(kinds), columns, squeeze=False)
    shown = clipped(searches, 20)
    for number, (arm, search) in enumerate(searches.items()):
        row, column = divmod(number, columns)
        panels = grid[row * len(kinds) : (row + 1) * len(kinds), column]
        panels[0].set_title(f"{shown[arm]}\n{_share_text(search)}", fontsize=8)
        for axes, (key, label) in zip(panels, kinds, strict=True):
            _draw_choices(axes, search, key, look[arm])
            if column == 0:
                axes.set_ylabel(f"{label} (decides)" if key == search["select_by"] else label, fontsize=8)
            axes.tick_params(labelsize=7.5)
        panels[-1].set_xlabel(", ".join(searched_keys(search)).replace("_", " "), fontsize=8)
        for axes in panels[:-1]:
            axes.tick_params(labelbottom=False)
    for number in range(len(searches), blocks * columns):
        row, column = divmod(number, columns)
        for axes in grid[row * len(kinds) : (row + 1) * len(kinds), column]:
            axes.set_visible(False)
    marks = [
        {"marker": "o", "ms": 5, "label": "mean over the trials' seeds"},
        {"linestyle": "", "marker": "o", "ms": 3, "alpha": 0.45, "mew": 0, "label": "a seed"},
        {"linestyle": "", "marker": "o", "ms": 10, "mfc": "none", "mew": 1.2, "label": "chosen"},
    ]
    if any(_left_out(search, key) for search in searches.values() for key, _ in kinds):
        marks.append({"linestyle": "", "marker": "x", "ms": 5, "label": "far worse, or failed"})
    handles = [grid[0, 0].plot([], [], color=INK, **mark)[0] for mark in marks]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if columns < 3 else len(handles))
    return settle(figure)


def searched_keys(search: dict[str, Any]) -> list[str]:
    """The keys that a search of summary.json is over."""
    return list(search["choices"][0]["trials"][0]["values"])


def _share_text(search: dict[str, Any]) -> str:
    """In how many resampled trials the choice is the same."""
    share = choice_share(search)
    return "not resampled" if share is None else f"{share:.0%} of resamples"


def _tried(search: dict[str, Any], key: str) -> tuple[list[float | None], list[list[tuple[int, float]]]]:
    """Of each value that was tried, the mean over all seeds, None where it failed or diverged; and the seeds' own."""
    means: list[float | None] = []
    dots: list[list[tuple[int, float]]] = []
    for number in range(len(search["choices"][0]["trials"])):
        rows = [choice["trials"][number] for choice in search["choices"]]
        each = [(one["seed"], one[key]) for row in rows for one in row["each"] if one[key] is not None]
        finite = all(math.isfinite(one["loss"]) for row in rows for one in row["each"])
        whole = bool(each) and finite and not any(row["failed"] for row in rows)
        means.append(sum(value for _, value in each) / len(each) if whole else None)
        dots.append(each if whole else [])
    return means, dots


def _left_out(search: dict[str, Any], key: str) -> list[int]:
    """The values without a mean, or with one so far off that the others could not be told apart beside it."""
    means, _ = _tried(search, key)
    known = sorted((mean for mean in means if mean is not None), reverse=key == "score")
    if not known:
        return list(range(len(means)))
    room = 8 * abs(known[len(known) // 2] - known[0])
    far = [mean is None or (len(known) > 2 and 0 < room < abs(mean - known[0])) for mean in means]
    return [number for number, out in enumerate(far) if out]


def _draw_choices(axes: Axes, search: dict[str, Any], key: str, look: Look) -> None:
    means, dots = _tried(search, key)
    axes.margins(x=0.1, y=0.12)
    at, ticks, by_number = _places(search)
    out = _left_out(search, key)
    if by_number and min(at) > 0 and max(at) > 4 * min(at):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    points = sorted((at[n], mean) for n, mean in enumerate(means) if mean is not None and n not in out)
    line = "-" if by_number else ""
    axes.plot([x for x, _ in points], [y for _, y in points], look.marker, ls=line, lw=1.5, ms=5, color=look.colour)
    if any(len(each) > 1 for each in dots):
        pairs = [(at[n], value) for n, each in enumerate(dots) if n not in out for _, value in each]
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], "o", color=look.colour, ms=3, alpha=0.45, mew=0)
    for choice in search["choices"]:
        n = choice["chosen"]
        own = dict(dots[n]).get(choice["seed"], means[n])
        if n not in out and own is not None:
            axes.plot(at[n], own, "o", ms=10 if choice["seed"] is None else 7, mfc="none", mec=INK, mew=1.2, zorder=4)
    axes.set_xticks(at, ticks)
    if out:
        worst = axes.get_ylim()[key == "loss"]
        axes.plot([at[n] for n in out], [worst] * len(out), "x", color=INK, ms=5, clip_on=False, zorder=5)
    if sum(map(len, ticks)) > 16:
        axes.tick_params(axis="x", rotation=55)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.grid(alpha=0.15)


def _places(search: dict[str, Any]) -> tuple[list[float], list[str], bool]:
    """Where each value stands, what is written below it, and whether that is at its number: where one key has numbers.
    Any other values stand side by side."""
    tried = [list(trial["values"].values()) for trial in search["choices"][0]["trials"]]
    if all(len(values) == 1 and type(values[0]) in (int, float) for values in tried):
        numbers = [float(values[0]) for values in tried]
        return numbers, [f"{number:g}" for number in numbers], True
    texts = [", ".join(value_text(value) for value in values) for values in tried]
    return [float(n) for n in range(len(tried))], list(clipped(texts, 16).values()), False


def gaps_figure(summary: dict[str, Any]) -> Figure | None:
    """Gap and test number against the number of links of the arms that train low-rank pairs."""
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.get("knots")}
    lengths = sorted({arm["links"] for arm in arms.values()})
    if len(lengths) < 2:
        return None
    look = {name: look for name, look in looks(summary["arms"]).items() if name in arms}
    (gap, formula), (key, metric) = gap_of(summary), metric_of(summary)
    # Arms of one length stand side by side, no farther apart than half way to the next length.
    step = min(later - earlier for earlier, later in itertools.pairwise(lengths))
    most = max(sum(arm["links"] == length for arm in arms.values()) for length in lengths)
    at = {}
    for length in lengths:
        mine = [name for name, arm in arms.items() if arm["links"] == length]
        for number, name in enumerate(mine):
            at[name] = length + (number - (len(mine) - 1) / 2) * min(0.16, 0.8 / most) * step
    figure = new_figure(3.4)
    panels = figure.subplots(1, 2)
    for axes, (what, label) in zip(panels, ((gap, formula), (f"test_{key}", f"test {metric}")), strict=True):
        for name, arm in arms.items():
            seeds = seed_values(arm, what)
            axes.plot(
                [at[name]] * len(seeds), seeds, look[name].marker, color=look[name].colour, ms=3, alpha=0.45, mew=0
            )
            axes.plot(at[name], arm[what]["mean"], look[name].marker, color=look[name].colour, ms=7, mec=INK, mew=0.6)
        axes.set(xlabel="links", ylabel=label)
        axes.set_xticks(lengths)
        axes.set_xlim(min(at.values()) - 0.4 * step, max(at.values()) + 0.4 * step)
        axes.margins(y=0.12)
        axes.grid(alpha=0.15)
    panels[0].axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    if len(arms) > MANY:
        arm_legend(figure, look)
        return settle(figure)
    settle(figure)
    for axes, what in zip(panels, (gap, f"test_{key}"), strict=True):
        dots = [(at[name], value) for name, arm in arms.items() for value in seed_values(arm, what)]
        label_points(axes, {name: (at[name], arm[what]["mean"]) for name, arm in arms.items()}, dots)
    return figure


def train_test_figure(summary: dict[str, Any]) -> Figure | None:
    """Train against test: few arms on two axes, where the diagonal is no gap; many in rows, joined by their gap."""
    arms = scored_arms(summary)
    if not arms:
        return None
    key, metric = metric_of(summary)
    look = looks(summary["arms"])
    train, test = f"train_{key}", f"test_{key}"
    if len(arms) > MANY:
        return _train_test_rows(arms, look, key, metric)
    figure = new_figure(4.4, 4.8)
    axes = figure.subplots()
    dots = []
    for name, arm in arms.items():
        pairs = list(zip(seed_values(arm, train), seed_values(arm, test), strict=True))
        dots += pairs
        axes.plot(
            [x for x, _ in pairs],
            [y for _, y in pairs],
            look[name].marker,
            color=look[name].colour,
            ms=3,
            alpha=0.45,
            mew=0,
        )
        axes.plot(
            arm[train]["mean"], arm[test]["mean"], look[name].marker, color=look[name].colour, ms=8, mec=INK, mew=0.6
        )
    means = {name: (arm[train]["mean"], arm[test]["mean"]) for name, arm in arms.items()}
    values = [value for pair in [*means.values(), *dots] for value in pair]
    room = 0.07 * (max(values) - min(values) or 0.1)
    limits = (min(values) - room, max(values) + room)
    axes.plot(limits, limits, color=INK, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xlabel=f"train {metric}", ylabel=f"test {metric}", xlim=limits, ylim=limits)
    axes.set_aspect("equal")
    axes.grid(alpha=0.15)
    settle(figure)
    corner = limits[0] + 0.95 * (limits[1] - limits[0])
    axes.annotate(
        "no gap",
        (corner, corner),
        (-3, 3),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        ha="right",
        fontsize=8,
    )
    along = [(value, value) for value in np.linspace(*limits, 60)]
    label_points(axes, means, [*dots, *along])
    return figure


def _train_test_rows(arms: dict[str, dict[str, Any]], look: dict[str, Look], key: str, metric: str) -> Figure:
    figure = new_figure(0.23 * len(arms) + 1.1)
    axes = figure.subplots()
    ordered = sorted(arms, key=lambda name: arms[name][f"test_{key}"]["mean"], reverse=key == "loss")
    for row, name in enumerate(ordered):
        arm, colour = arms[name], look[name].colour
        means = [arm[f"{split}_{key}"]["mean"] for split in ("train", "test")]
        axes.plot(means, [row, row], color=colour, linewidth=2, alpha=0.5, zorder=2)
        for split, mean, face, marker in zip(("train", "test"), means, ("none", colour), ("o", "s"), strict=True):
            seeds = seed_values(arm, f"{split}_{key}")
            axes.plot(seeds, [row] * len(seeds), marker, ms=2.5, color=colour, mfc=face, alpha=0.6, mew=0.6, zorder=1)
            axes.plot(mean, row, marker, ms=6, mec=colour, mfc=face, mew=1.4, zorder=3)
    axes.set_yticks(range(len(ordered)), list(clipped(ordered).values()))
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(metric)
    axes.grid(alpha=0.15)
    kinds = [("o", "none", "train"), ("s", INK, "test"), ("", INK, "between them: the gap")]
    handles = [
        axes.plot([], [], linestyle="" if marker else "-", marker=marker, mec=INK, mfc=face, color=INK, label=label)[0]
        for marker, face, label in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return settle(figure)


def contrasts_forest(summary: dict[str, Any]) -> Figure | None:
    """A forest plot: each difference with its interval, what could have been found, and whether it carries a claim."""
    contrasts = [contrast for contrast in summary.get("contrasts") or () if contrast["value"] is not None]
    if not contrasts:
        return None
    metrics = list(dict.fromkeys(contrast["metric"] for contrast in contrasts))
    lines = len(contrasts) + 2 * len({(c["metric"], c["role"]) for c in contrasts})
    figure = new_figure(0.24 * lines + 1.2 * len(metrics))
    heights = [sum(c["metric"] == metric for c in contrasts) + 2 for metric in metrics]
    panels = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        _forest(axes, [contrast for contrast in contrasts if contrast["metric"] == metric])
        name = summary["metric"] if metric == "score" else "−loss, nats per token"
        axes.set_xlabel(f"difference in test {name}; right of the line the first is the better one")
    axes = panels[0]
    handles = [
        axes.plot([], [], "o-", color=INK, ms=6, label="claim")[0],
        axes.plot([], [], "o-", color=INK, ms=6, mfc="none", label="no claim")[0],
    ]
    if any(contrast.get("minimum_detectable") is not None for contrast in contrasts):
        handles.append(axes.fill_between([], [], [], color=INK, alpha=0.09, linewidth=0, label="too small to be found"))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return settle(figure)


def _forest(axes: Axes, contrasts: list[dict[str, Any]]) -> None:
    place, ticks, headings = 0.0, [], []
    shown = clipped([contrast[key] for contrast in contrasts for key in ("first", "second")], 20)
    for role, heading in ROLES.items():
        mine = [contrast for contrast in contrasts if contrast["role"] == role]
        if not mine:
            continue
        ticks.append((place, heading))
        headings.append(heading)
        for contrast in mine:
            place -= 1
            ticks.append((place, f"{shown[contrast['first']]} − {shown[contrast['second']]}"))
            _forest_row(axes, contrast, place)
        place -= 1.4
    ends = [c[key] for c in contrasts for key in ("value", "low", "high") if c[key] is not None] + [0.0]
    room = 0.08 * (max(ends) - min(ends)) or 0.1
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(place + 0.8, 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.15)
    for text in axes.get_yticklabels():
        if text.get_text() in headings:
            text.set_fontweight("bold")


def _forest_row(axes: Axes, contrast: dict[str, Any], y: float) -> None:
    value, low, high, claim = contrast["value"], contrast["low"], contrast["high"], contrast["claim"]
    colour = COLOURS[0 if value > 0 else 1] if claim else INK
    marker, size = ("D", 8) if contrast["role"] == "primary" else ("o", 6)
    detectable = contrast.get("minimum_detectable")
    if detectable is not None:
        axes.add_patch(Rectangle((-detectable, y - 0.42), 2 * detectable, 0.84, color=INK, alpha=0.09, linewidth=0))
    if low is not None:
        axes.plot([low, high], [y, y], color=colour, linewidth=2.2 if claim else 1.3, solid_capstyle="butt")
    axes.plot(value, y, marker, color=colour, ms=size, mfc=colour if claim else "none", mew=1.4, zorder=3)
    interval = f"{value:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None else ", no interval")
    axes.annotate(
        interval.replace("-", "−"),
        (1, y),
        (8, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        fontsize=8,
        weight="bold" if claim else "normal",
    )
    axes.annotate(
        p_text(contrast),
        (1, y),
        (140, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        fontsize=8,
        weight="bold" if claim else "normal",
    )


def p_text(contrast: dict[str, Any]) -> str:
    """The p that a contrast is judged by: the primary one's own, of the others Holm's."""
    holm = contrast.get("p_holm") if contrast["role"] != "primary" else None
    number = contrast.get("p") if holm is None else holm
    if number is None:
        return "no p"
    text = "p < .001" if number < 0.001 else f"p = {number:.3f}".replace("0.", ".", 1)
    return text + (" (Holm)" if holm is not None else "")


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


def costs_of(summary: dict[str, Any]) -> tuple[str, dict[str, tuple[float, float]]]:
    """What a run's arms cost against what they bring: the name of the cost and of each arm (cost, test number, where
    more is better: minus the loss of a text)."""
    arms = scored_arms(summary)
    key, _ = metric_of(summary)
    known = all(math.isfinite(arm["flops"] or math.nan) for arm in arms.values() if arm["links"])
    cost, label = ("flops", "training FLOPs") if known else ("total_seconds", "time of training and scoring, seconds")
    sign = -1 if key == "loss" else 1
    return label, {name: (arm[cost] or 0.0, sign * arm[f"test_{key}"]["mean"]) for name, arm in arms.items()}


def cost_figure(summary: dict[str, Any]) -> Figure | None:
    """Cost against the test number; a line joins the arms than which none is both better and no dearer."""
    arms = scored_arms(summary)
    label, found = costs_of(summary)
    if len(found) < 2:
        return None
    key, metric = metric_of(summary)
    sign = -1 if key == "loss" else 1
    points = {name: (cost, sign * value) for name, (cost, value) in found.items()}
    front = pareto(found)
    look = looks(summary["arms"])
    paid = [cost for cost, _ in points.values() if cost > 0]
    figure = new_figure(3.9)
    axes = figure.subplots()
    log = bool(paid) and max(paid) > 10 * min(paid)
    if log:
        axes.set_xscale("log")
    left = min(paid) / 3 if log else 0.0  # where what costs nothing stands
    at = {name: (cost if cost > 0 else left, value) for name, (cost, value) in points.items()}
    dots = [(at[name][0], value) for name, arm in arms.items() for value in seed_values(arm, f"test_{key}")]
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
    ]
    if dots:
        handles.append(axes.plot([], [], ".", color=GREY, label="a seed")[0])
    if len(at) > MANY:
        arm_legend(figure, {name: look[name] for name in at})
        axes.legend(handles=handles, loc="lower right")
        return settle(figure)
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    settle(figure)
    steps = [np.linspace(first, second, 25) for first, second in itertools.pairwise(corners)]
    label_points(axes, at, [*dots, *[tuple(place) for step in steps for place in step]])
    return figure
