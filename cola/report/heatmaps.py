"""What each link added and what is in common, as heat maps whose cells have their numbers in them, and the spectra."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cola.compare.records import KnotLedger, Summary
from cola.report.drawing import (
    DASHES,
    GREY,
    INK,
    WIDE,
    clipped,
    explain,
    log_scale,
    looks_of,
    new_figure,
    panels_of,
    settle,
)
from cola.report.marks import belong, belong_rows, of, say, some

Cells = list[list[float | None]]  # by row and column; None is left empty


@dataclass(frozen=True)
class Heat:
    """A heat map whose cells have their numbers in them."""

    title: str
    columns: list[str]
    arms: list[str]  # a row each
    cells: Cells
    written: Callable[[float], str]  # a number as it stands in its cell
    shade: Callable[[float], float] = float  # how dark its cell is, 0 to 1


def _draw_heat(axes: Axes, heat: Heat) -> None:
    # Grey rectangles before whatever ground there is: readable on white and on black, no arm's colour, and no image.
    for row, (arm, line) in enumerate(zip(heat.arms, heat.cells, strict=True)):
        with of(axes, arm):
            for column, number in enumerate(line):
                if number is None:
                    continue
                alpha = 0.06 + 0.64 * min(1.0, max(0.0, heat.shade(number)))
                axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=GREY, alpha=alpha, linewidth=0))
                axes.text(column, row, heat.written(number), ha="center", va="center_baseline", fontsize=8)
    axes.set_xlim(-0.55, len(heat.columns) - 0.45)
    axes.set_ylim(len(heat.arms) - 0.45, -0.55)
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.arms)), list(clipped(heat.arms).values()))
    belong_rows(axes, heat.arms)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(heat.title)


def knots_figure(summary: Summary) -> Figure | None:
    """The knot ledger as heat maps: what each link of each arm added, and how much of it the weights then held."""
    arms = {name: arm.knots for name, arm in summary.arms.items() if arm.knots}
    if sum(map(len, arms.values())) < 2:
        return None  # one number is no map
    n_links = max(knot.link for knots in arms.values() for knot in knots)
    links, names = range(1, n_links + 1), list(arms)
    columns = list(map(str, links))

    def cells(number: Callable[[KnotLedger], float | None]) -> Cells:
        at = {(name, knot.link): number(knot) for name, knots in arms.items() for knot in knots}
        return [[at.get((name, link)) for link in links] for name in arms]

    sizes = cells(lambda knot: knot.relative_size_median)
    errors = cells(lambda knot: knot.error_max)
    cosines = cells(lambda knot: None if knot.cosine_min is None else max(0.0, 1 - knot.cosine_min))
    largest = max((size for row in sizes for size in row if size is not None), default=0.0) or 1.0
    heats = [
        Heat("size ‖ΔW‖/‖W‖", columns, names, sizes, _percent, lambda size: size / largest),
        Heat("error of what is applied", columns, names, errors, _scientific, _logarithmic),
        Heat("1 − cosine", columns, names, cosines, _scientific, _logarithmic),
    ]
    beside = n_links <= 8  # else one below the other: the numbers need room
    height = 0.22 * len(arms) + 0.75
    width = max(WIDE if beside else 4.0, 1.7 + (3 if beside else 1) * 0.42 * n_links)
    figure = new_figure(height if beside else 3 * height, width)
    panels = figure.subplots(*((1, 3) if beside else (3, 1)), sharey=beside).tolist()
    for axes, heat in zip(panels, heats, strict=True):
        _draw_heat(axes, heat)
        axes.set_xlabel("link")
    return settle(figure)


def _percent(number: float) -> str:
    return f"{float(f'{100 * number:.2g}'):g}%"  # 120%, where .2g alone writes 1.2e+02


def _scientific(number: float) -> str:
    return "0" if number == 0 else f"{number:.0e}".replace("e-0", "e-").replace("-", "−")


def _logarithmic(number: float) -> float:
    """From float32's own rounding to all: the same error is as dark in every run."""
    return (math.log10(max(number, 1e-8)) + 8) / 8


def spectra_figure(summary: Summary) -> Figure | None:
    """Singular values by the largest: of each link, of the chain, and of full fine-tuning beside them."""
    found = {name: about.values for name, about in summary.spectra.items() if about.values}
    full = next((values["all weights"] for values in found.values() if "all weights" in values), None)
    own = {name: values for name, values in found.items() if "all weights" not in values} or found
    if not own:
        return None
    figure, panels = panels_of(len(own), "singular value, by size")
    links = list(dict.fromkeys(label for values in own.values() for label in values if label.startswith("link ")))
    lines: dict[str, dict[str, Any]] = {
        name: {"linestyle": DASHES[n % len(DASHES)], "linewidth": 1.4} for n, name in enumerate(links)
    }
    lines["chain"] = {"color": INK, "linewidth": 1.8}
    lines["all weights"] = {"color": GREY, "linewidth": 1.5, "linestyle": (0, (4, 1.5))}
    look, names, shown = looks_of(summary), clipped(own, 18), {}
    for axes, (name, values) in zip(panels, own.items(), strict=True):
        if full is not None:
            values = {**values, "all weights": full}
        for label, numbers in values.items():
            if label == "chain" and "link 2" not in values:
                continue  # a chain of one link is that link
            positive = [number if number > 0 else math.nan for number in numbers]
            style: dict[str, Any] = {"color": look[name].colour} | lines[label]
            axes.plot(range(1, len(positive) + 1), positive, **style, marker="." if len(positive) < 10 else "", ms=4)
            shown[title := {"all weights": "full fine-tuning"}.get(label, label)] = {"color": INK} | lines[label]
            points = [(float(n), value) for n, value in enumerate(positive, 1) if value > 0]
            say(axes, name, [(x, y, f"{name}, {title}, value {x:g}: {y:.3g} of the largest") for x, y in some(points)])
        belong((name,), axes.set_title(names[name]), *axes.lines)
    log_scale(panels[0])
    panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], 1e-6))
    panels[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supylabel("share of the largest", fontsize=9)
    marks = [{**shown[label], "label": label} for label in sorted(shown, key=[*links, *lines, *shown].index)]
    explain(figure, marks, max(1, int(figure.get_figwidth() / 1.4)))
    return settle(figure)


def _share(number: float) -> str:
    return f"{number:.2f}".replace("0.", ".", 1)


def overlap_figure(summary: Summary) -> Figure | None:
    """How far each link's subspace is the next one's, and lies in full fine-tuning's, against what chance would give: a
    row for each arm. An arm of one link has one number, which is in the table."""
    found = {name: about.overlap for name, about in summary.spectra.items() if about.overlap}
    if not found:
        return None
    full = {name: shared for name in found if (shared := summary.spectra[name].with_full)}
    most = max(len(part.labels) for part in found.values())
    labels: list[str] = list(dict.fromkeys(label for part in full.values() for label in part.labels))
    labels.sort(key=lambda label: label == "chain")
    steps: Cells = []
    shares: Cells = []
    for name in found:
        matrix = found[name].matrix
        steps.append([matrix[k][k + 1] if k + 1 < len(matrix) else None for k in range(most - 1)])
        of = dict(zip(full[name].labels, full[name].values, strict=True)) if name in full else {}
        shares.append([of.get(label) for label in labels])
    maps: list[Heat] = []
    for title, parts, columns, cells in (
        ("a link and the next", found, [f"{k}·{k + 1}" for k in range(1, most)], steps),
        ("in full fine-tuning's", full, [label.removeprefix("link ") for label in labels], shares),
    ):
        if columns:
            chance = sorted({_share(part.random) for part in parts.values() if part.random is not None})
            by = " to ".join(dict.fromkeys([chance[0], chance[-1]])) if chance else "nothing learned"
            maps.append(Heat(f"{title}\nby chance: {by}", columns, list(found), cells, _share))
    n_columns = sum(len(heat.columns) for heat in maps)
    if n_columns * len(found) < 2:
        return None
    figure = new_figure(0.24 * len(found) + 0.9, max(4.2, 1.8 + 0.42 * n_columns))
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False, width_ratios=[len(heat.columns) for heat in maps])
    for panel, heat in zip(axes.flatten(), maps, strict=True):
        _draw_heat(panel, heat)
    return settle(figure)
