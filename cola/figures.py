"""Figures of a run and of an ablation, drawn from numbers that are ready. The only file that imports matplotlib.

`figures_of` and `ablation_figure` draw, `svg` gives a figure as a part of a page, `save` as a file for a paper. Arms
differ in colour, marker and dash, so that a print in grey and any colour vision can tell them apart; a cell of a heat
map has its number in it.
"""

import hashlib
import io
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from fontTools import subset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from cola.ablation import mean_of, short
from cola.record import write_bytes

# Okabe & Ito without black and yellow: told apart with any colour vision, and readable on white and on black.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p"]  # 7 × 8: the first 56 arms differ in the pair of both
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
GREY = "#7F868E"  # of what is there for comparison; readable on white and on black
INK = "#010203"  # drawn with, then replaced by the page's own text colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cola",  # the same results give the same file
    "pdf.fonttype": 42,  # whole fonts inside, which journals ask for
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
MANY = 8  # arms; with more of them names stand in panels, rows or a legend, not at the points
# Latin, Greek, signs, arrows and operators.
LETTERS = frozenset([ord("\n"), *range(0x20, 0x250), *range(0x370, 0x400), *range(0x2000, 0x2300)])
WIDE = 7.2  # inches: a page of two columns
NAMES = ["train-test", "contrasts", "curves", "gaps", "cost", "knots", "spectra", "overlap"]

Curves = dict[str, list[list[dict[str, Any]]]]  # the metric rows of each arm's seeds


def figures_of(summary: dict[str, Any], curves: Curves) -> dict[str, Figure]:
    """Every figure that a run has data for, by name, in the order in which a page shows them.

    Args:
        summary: What summary.json holds.
        curves: The rows of metrics.jsonl of every arm that trained, one list per seed.
    """
    with mpl.rc_context(STYLE):
        drawn = {
            "train-test": _train_test(summary),
            "contrasts": _contrasts(summary),
            "curves": _curves(summary, curves),
            "gaps": _gaps(summary),
            "cost": _cost(summary),
            "knots": _knots(summary),
            "spectra": _spectra(summary),
            "overlap": _overlap(summary),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def contrasts_figure(summary: dict[str, Any]) -> Figure | None:
    """The forest plot alone, of several runs; None where there is no contrast."""
    with mpl.rc_context(STYLE):
        return _contrasts(summary)


def svg(figure: Figure, prefix: str) -> str:
    """A figure as an SVG element for a page: lines and text in the page's colour, ids that begin with the prefix.

    It is as wide as it was drawn, or as narrow as its place is; the page's styles join and end its lines.
    """
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", _svg(figure), count=1, flags=re.DOTALL)  # for all `*`
    text = re.sub(r'<g id="[^"]+">', "<g>", text)  # named for an editor
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)  # two figures may hold the same marker
    width = 72 * figure.get_figwidth()
    root = f'<svg aria-hidden="true" focusable="false" style="max-width: {width:g}pt"'
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", root, 1).replace(INK, "currentColor")


def save(figure: Figure, path: Path) -> None:
    """Write a figure for a paper: .svg, .pdf (fonts inside) or .png, dark on a transparent ground, the same bytes each
    time."""
    if path.suffix == ".svg":
        write_bytes(path, _svg(figure).replace(INK, "#000000").encode())
        return
    buffer = io.BytesIO()
    style, metadata = STYLE, {}
    if path.suffix == ".pdf":
        if LETTERS.issuperset(ord(letter) for text in figure.findobj(Text) for letter in text.get_text()):
            style = {**STYLE, "font.sans-serif": [*_lean_fonts(), *mpl.rcParams["font.sans-serif"]]}
        metadata = {"CreationDate": None, "Producer": None, "Creator": None}
    with mpl.rc_context(style):
        figure.savefig(buffer, format=path.suffix[1:], transparent=True, metadata=metadata, dpi=200)
    write_bytes(path, buffer.getvalue())


@lru_cache(maxsize=1)
def _lean_fonts() -> list[str]:
    """The family, if any, of the fonts in use with no more than the letters above and without tables of typesetting;
    they are made once, and kept in matplotlib's cache.

    For each PDF matplotlib reads whole fonts and cuts them down to the letters in use, which was half of the time of a
    page.
    """
    for weight in ("normal", "bold"):
        whole = Path(findfont(FontProperties(family="sans-serif", weight=weight)))
        if whole.suffix != ".ttf":
            return []
        lean = Path(mpl.get_cachedir()) / "cola" / f"{hashlib.sha256(whole.read_bytes()).hexdigest()}.ttf"
        if not lean.exists():
            options = subset.Options(legacy_kern=True, recommended_glyphs=True)
            options.drop_tables += ["FFTM", "GDEF", "GPOS", "GSUB", "MATH"]
            cut, buffer = subset.Subsetter(options), io.BytesIO()
            cut.populate(unicodes=LETTERS)
            with subset.load_font(whole, options) as font:
                cut.subset(font)
                font.save(buffer)
            write_bytes(lean, buffer.getvalue())
        fontManager.ttflist.append(FontEntry(str(lean), name="cola", weight=weight, size="scalable"))
    return ["cola"]


@lru_cache(maxsize=16)  # the page and the file of a figure are one drawing
def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # names a drawing program and three web sites
    return text[text.index("<svg") :]


# --- what the figures share ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every figure of a run alike."""

    colour: str
    marker: str
    dash: Any


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look of its own for each arm."""
    cycles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(DASHES), strict=False)
    return {name: Look(*look) for name, look in zip(names, cycles, strict=False)}


def clipped(names: Iterable[str], most: int = 24) -> dict[str, str]:
    """Names that fit a label: long ones without their middle, but no two alike."""
    names = list(dict.fromkeys(names))
    while True:
        short = {n: n if len(n) <= most else f"{n[: most // 2]}…{n[-(most - most // 2 - 1) :]}" for n in names}
        if len(set(short.values())) == len(names):
            return short
        most += 2


def scored_arms(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms that have numbers."""
    return {name: arm for name, arm in summary["arms"].items() if arm["n_seeds"]}


def metric_of(summary: dict[str, Any]) -> tuple[str, str]:
    """Key and name of what the arms are judged by: plain text has a loss and no score."""
    return ("loss", "loss, nats per token") if summary["metric"] == "perplexity" else ("score", summary["metric"])


def gap_of(summary: dict[str, Any]) -> tuple[str, str]:
    """Key and formula of the gap that belongs to it."""
    if summary["metric"] == "perplexity":
        return "gap_loss", "gap_loss = test − train"
    return "gap_acc", "gap_acc = train − test"


def _new(height: float, width: float = WIDE) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _settle(figure: Figure) -> Figure:
    """Fix the layout, which else each of several files would compute again, and the ground on which labels are laid."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # "none" would leave a stand-in, for which each file draws once more
    return figure


def _grid(n: int, panel: tuple[float, float], columns: int, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of n panels in rows of at most `columns`."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = _new(rows * panel[1] + 0.5, max(columns * panel[0], 3.4))
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten().tolist()
    for left_over in axes[n:]:
        left_over.set_visible(False)
    for number in range(max(0, n - columns), n):  # the lowest panel of each column, which may have none below it
        axes[number].tick_params(labelbottom=True)
    return figure, axes[:n]


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _seed_values(arm: dict[str, Any], key: str) -> list[float]:
    """One number for each seed, where there are several."""
    found = [seed[key] for seed in arm.get("seeds", ()) if seed.get(key) is not None]
    return found if len(found) > 1 else []


def _label(axes: Axes, points: Mapping[str, tuple[float, float]], dots: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, over no other name or point; a thin line leads to one that had to move away.

    Args:
        axes: Of a figure whose layout is fixed.
        points: Where each name belongs, in data coordinates.
        dots: Other places to be left free.
    """
    scale = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    inside = axes.bbox
    where = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in where.values()]
    taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in map(axes.transData.transform, dots)]
    angles = [0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240]
    shown = clipped(points)
    for name, (x, y) in where.items():
        text = axes.annotate(shown[name], points[name], (0, 0), textcoords="offset points", fontsize=8.5, zorder=6)
        size = text.get_window_extent()
        best, least = (7.0, 0), math.inf
        for radius, angle in itertools.product((7, 13, 22, 34, 48, 64, 84), angles):
            box = _beside(x, y, size.width, size.height, radius * scale, angle)
            out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            # Far is bad, covering is worse, and out of the axes a name may be cut off.
            cost = 1e6 * out + sum(_covered(box, other) for other in taken) + radius / 1000
            if cost < least:
                best, least = (radius, angle), cost
            if cost < 1:
                break
        box = _beside(x, y, size.width, size.height, best[0] * scale, best[1])
        taken.append(box)
        # The box of a text begins below its own place by the depth of its font.
        text.set_position(((box.x0 - x) / scale, (box.y0 - y - (size.y0 - y)) / scale))
        if best[0] > 13:
            near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            to = axes.transData.inverted().transform(near)
            axes.plot([points[name][0], to[0]], [points[name][1], to[1]], color=GREY, linewidth=0.6, zorder=1)


def _beside(x: float, y: float, width: float, height: float, radius: float, angle: float) -> Bbox:
    """A box of this size whose nearest edge is a radius away from a point, in a direction of so many degrees."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    middle = x + cos * (radius + width / 2), y + sin * (radius + height / 2)
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)


def _covered(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _spread(wanted: Sequence[float], distance: float) -> list[float]:
    """Places as near to the wanted ones as they can be when no two are nearer to each other than the distance."""
    groups: list[list[int]] = []  # of neighbours that touch, lowest first
    centres: list[float] = []
    for index in sorted(range(len(wanted)), key=wanted.__getitem__):
        groups.append([index])
        centres.append(wanted[index])
        while len(groups) > 1 and centres[-1] - centres[-2] < distance * (len(groups[-1]) + len(groups[-2])) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
            centres[-2:] = [sum(wanted[i] for i in groups[-1]) / len(groups[-1])]
    places = [0.0] * len(wanted)
    for group, centre in zip(groups, centres, strict=True):
        for number, index in enumerate(group):
            places[index] = centre + (number - (len(group) - 1) / 2) * distance
    return places


def _arm_legend(figure: Figure, shown: Mapping[str, Look]) -> None:
    """Marker, colour and name of every arm, below the panels, for which the figure grows."""
    names = clipped(shown)
    axes = figure.axes[0]
    handles = [axes.plot([], [], look.marker, color=look.colour, label=names[n])[0] for n, look in shown.items()]
    columns = max(1, int(figure.get_figwidth() / (0.45 + 0.075 * max(map(len, names.values())))))
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), handletextpad=0.2)


# --- the figures --------------------------------------------------------------------------------------------------


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


def _curves(summary: dict[str, Any], curves: Curves) -> Figure | None:
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
        figure = _new(4.2)
        axes = figure.subplots()
        for name, curve in found.items():
            _draw_curve(axes, curve, look[name])
        _log_scale(axes)
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
        _settle(figure)
        scale = figure.dpi / 72
        heights = [axes.transData.transform(end)[1] for end in ends.values()]
        for (name, text), height, place in zip(texts.items(), heights, _spread(heights, 12 * scale), strict=True):
            text.set_position((16, (place - height) / scale))
            step, loss = ends[name]
            x = axes.transData.transform((last, loss))[0]
            tip = axes.transData.inverted().transform((x + 14 * scale, place))
            axes.plot([step, tip[0]], [loss, tip[1]], color=look[name].colour, linewidth=0.8, clip_on=False)
        return figure
    figure, panels = _grid(len(found), (1.8, 1.5), 4, sharex=True, sharey=True)
    shown = clipped(found, 22)
    beside = [(name, dash) for name, dash in (("lora", (0, (4, 1.5))), ("full", (0, (1, 1)))) if name in found]
    for axes, (name, curve) in zip(panels, found.items(), strict=True):
        for other, dash in beside:
            if found[other].validation:
                axes.plot(*zip(*found[other].validation, strict=True), color=GREY, linewidth=1.2, linestyle=dash)
        _draw_curve(axes, curve, Look(look[name].colour, "o", "-"))
        axes.set_title(shown[name], fontsize=8)
        axes.grid(alpha=0.15)
    _log_scale(panels[0])
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
    return _settle(figure)


def _gaps(summary: dict[str, Any]) -> Figure | None:
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
    figure = _new(3.4)
    panels = figure.subplots(1, 2)
    for axes, (what, label) in zip(panels, ((gap, formula), (f"test_{key}", f"test {metric}")), strict=True):
        for name, arm in arms.items():
            seeds = _seed_values(arm, what)
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
        _arm_legend(figure, look)
        return _settle(figure)
    _settle(figure)
    for axes, what in zip(panels, (gap, f"test_{key}"), strict=True):
        dots = [(at[name], value) for name, arm in arms.items() for value in _seed_values(arm, what)]
        _label(axes, {name: (at[name], arm[what]["mean"]) for name, arm in arms.items()}, dots)
    return figure


def _train_test(summary: dict[str, Any]) -> Figure | None:
    """Train against test: few arms on two axes, where the diagonal is no gap; many in rows, joined by their gap."""
    arms = scored_arms(summary)
    if not arms:
        return None
    key, metric = metric_of(summary)
    look = looks(summary["arms"])
    train, test = f"train_{key}", f"test_{key}"
    if len(arms) > MANY:
        return _train_test_rows(arms, look, key, metric)
    figure = _new(4.4, 4.8)
    axes = figure.subplots()
    dots = []
    for name, arm in arms.items():
        pairs = list(zip(_seed_values(arm, train), _seed_values(arm, test), strict=True))
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
    _settle(figure)
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
    _label(axes, means, [*dots, *along])
    return figure


def _train_test_rows(arms: dict[str, dict[str, Any]], look: dict[str, Look], key: str, metric: str) -> Figure:
    figure = _new(0.23 * len(arms) + 1.1)
    axes = figure.subplots()
    ordered = sorted(arms, key=lambda name: arms[name][f"test_{key}"]["mean"], reverse=key == "loss")
    for row, name in enumerate(ordered):
        arm, colour = arms[name], look[name].colour
        means = [arm[f"{split}_{key}"]["mean"] for split in ("train", "test")]
        axes.plot(means, [row, row], color=colour, linewidth=2, alpha=0.5, zorder=2)
        for split, mean, face, marker in zip(("train", "test"), means, ("none", colour), ("o", "s"), strict=True):
            seeds = _seed_values(arm, f"{split}_{key}")
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
    return _settle(figure)


ROLES = {
    "primary": "primary, named beforehand",
    "secondary": "secondary",
    "full": "not named before: against full",
}


def _contrasts(summary: dict[str, Any]) -> Figure | None:
    """A forest plot: each difference with its interval, what could have been found, and whether it carries a claim."""
    contrasts = [contrast for contrast in summary.get("contrasts") or () if contrast["value"] is not None]
    if not contrasts:
        return None
    metrics = list(dict.fromkeys(contrast["metric"] for contrast in contrasts))
    lines = len(contrasts) + 2 * len({(c["metric"], c["role"]) for c in contrasts})
    figure = _new(0.24 * lines + 1.2 * len(metrics))
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
    return _settle(figure)


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


def _cost(summary: dict[str, Any]) -> Figure | None:
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
    figure = _new(3.9)
    axes = figure.subplots()
    log = bool(paid) and max(paid) > 10 * min(paid)
    if log:
        axes.set_xscale("log")
    left = min(paid) / 3 if log else 0.0  # where what costs nothing stands
    at = {name: (cost if cost > 0 else left, value) for name, (cost, value) in points.items()}
    dots = [(at[name][0], value) for name, arm in arms.items() for value in _seed_values(arm, f"test_{key}")]
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
        _arm_legend(figure, {name: look[name] for name in at})
        axes.legend(handles=handles, loc="lower right")
        return _settle(figure)
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    _settle(figure)
    steps = [np.linspace(first, second, 25) for first, second in itertools.pairwise(corners)]
    _label(axes, at, [*dots, *[tuple(place) for step in steps for place in step]])
    return figure


@dataclass(frozen=True)
class Heat:
    """A heat map whose cells have their numbers in them.

    Attributes:
        title: Of the panel.
        columns, rows: Names.
        texts: What stands in each cell, by row and column; None leaves it empty.
        shades: How dark each cell is, 0 to 1.
    """

    title: str
    columns: list[str]
    rows: list[str]
    texts: list[list[str | None]]
    shades: list[list[float]]


def _draw_heat(axes: Axes, heat: Heat, colour: str = COLOURS[0]) -> None:
    # Rectangles of the colour in front of whatever ground there is: readable on white and on black, and not an image.
    for (row, line), column in itertools.product(enumerate(heat.texts), range(len(heat.columns))):
        text = line[column]
        if text is None:
            continue
        alpha = 0.06 + 0.54 * min(1.0, max(0.0, heat.shades[row][column]))
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colour, alpha=alpha, linewidth=0))
        axes.text(column, row, text, ha="center", va="center_baseline", fontsize=7)
    axes.set_xlim(-0.55, len(heat.columns) - 0.45)
    axes.set_ylim(len(heat.rows) - 0.45, -0.55)
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(heat.title)


def _knots(summary: dict[str, Any]) -> Figure | None:
    """The knot ledger as heat maps: what each link of each arm added, and how much of it the weights then held."""
    arms = {name: arm["knots"] for name, arm in summary["arms"].items() if arm.get("knots")}
    if not arms:
        return None
    n_links = max(knot["link"] for knots in arms.values() for knot in knots)
    columns = [str(link) for link in range(1, n_links + 1)]
    kinds = [
        ("relative_size_median", "size ‖ΔW‖/‖W‖", _percent, False),
        ("error_max", "error of what is applied", _scientific, True),
        ("cosine_min", "1 − cosine", _scientific, True),
    ]
    shown = list(clipped(arms).values())
    panels = []
    for key, title, written, logarithmic in kinds:
        numbers: dict[tuple[str, int], float] = {}
        for name, knots in arms.items():
            for knot in knots:
                if knot.get(key) is not None:
                    value = max(0.0, 1 - knot[key]) if key == "cosine_min" else knot[key]
                    numbers[name, knot["link"]] = value
        cells = [[numbers.get((name, link)) for link in range(1, n_links + 1)] for name in arms]
        panels.append(_heat(title, columns, shown, cells, written, _shade(numbers.values(), logarithmic)))
    beside = n_links <= 8  # else one below the other: the numbers need room
    height = 0.22 * len(arms) + 0.75
    figure = _new(
        height if beside else 3 * height, max(WIDE if beside else 4.0, 1.7 + (3 if beside else 1) * 0.36 * n_links)
    )
    axes = figure.subplots(*((1, 3) if beside else (3, 1)), sharey=beside).tolist()
    for panel, heat in zip(axes, panels, strict=True):
        _draw_heat(panel, heat)
        panel.set_xlabel("link")
    return _settle(figure)


def _percent(number: float) -> str:
    return f"{100 * number:.2g}%"


def _scientific(number: float) -> str:
    return "0" if number == 0 else f"{number:.0e}".replace("e-0", "e-").replace("-", "−")


def _shade(numbers: Iterable[float], logarithmic: bool) -> Callable[[float], float]:
    """From a number to how dark its cell is, 0 to 1."""
    if logarithmic:
        # From float32's own rounding to all: the same error is as dark in every run.
        return lambda number: (math.log10(max(number, 1e-8)) + 8) / 8
    most = max(numbers, default=0.0) or 1.0
    return lambda number: number / most


def _heat(
    title: str,
    columns: list[str],
    rows: list[str],
    cells: list[list[float | None]],
    written: Callable[[float], str],
    shade: Callable[[float], float],
) -> Heat:
    texts = [[None if number is None else written(number) for number in row] for row in cells]
    shades = [[0.0 if number is None else shade(number) for number in row] for row in cells]
    return Heat(title, columns, rows, texts, shades)


def _spectra(summary: dict[str, Any]) -> Figure | None:
    """Singular values by the largest: of each link, of the chain, and of full fine-tuning beside them."""
    found = {name: about["values"] for name, about in (summary.get("spectra") or {}).items() if about.get("values")}
    full = next((values["all weights"] for values in found.values() if "all weights" in values), None)
    own = {name: values for name, values in found.items() if "all weights" not in values} or found
    if not own:
        return None
    size = (1.8, 1.7) if len(own) > 3 else (2.4, 2.2)
    figure, panels = _grid(len(own), size, 4, sharex=True, sharey=True)
    links = list(dict.fromkeys(label for values in own.values() for label in values if label.startswith("link ")))
    look = looks(links)
    lines = {name: {"color": look[name].colour, "linestyle": look[name].dash, "linewidth": 1.5} for name in links}
    lines["chain"] = {"color": INK, "linewidth": 1.8}
    lines["all weights"] = {"color": GREY, "linewidth": 1.5, "linestyle": (0, (4, 1.5))}
    names, shown = clipped(own, 22), {}
    for axes, (name, values) in zip(panels, own.items(), strict=True):
        if full is not None:
            values = {**values, "all weights": full}
        for label, numbers in values.items():
            if label == "chain" and "link 2" not in values:
                continue  # a chain of one link is that link
            positive = [number if number > 0 else math.nan for number in numbers]
            [line] = axes.plot(range(1, len(positive) + 1), positive, **lines[label])
            if len(positive) < 10:
                line.set(marker=".", markersize=4)
            shown.setdefault({"all weights": "full fine-tuning"}.get(label, label), line)
        axes.set_title(names[name], fontsize=8)
        axes.grid(alpha=0.15)
    _log_scale(panels[0])
    panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], 1e-6))
    panels[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in panels[-4:]:
        axes.set_xlabel("singular value, by size")
    figure.supylabel("share of the largest", fontsize=9)
    width = figure.get_figwidth()
    figure.legend(
        handles=list(shown.values()), labels=list(shown), loc="outside lower center", ncols=max(1, int(width / 1.3))
    )
    return _settle(figure)


def _overlap(summary: dict[str, Any]) -> Figure | None:
    """How far the links' subspaces are the same, and lie in full fine-tuning's, against what chance would give."""
    found = {
        name: about
        for name, about in (summary.get("spectra") or {}).items()
        if about.get("overlap") or about.get("with_full")
    }
    if not found:
        return None
    names = clipped(found)
    maps = [_overlap_map(names[name], about) for name, about in found.items()]
    if len(maps) > MANY:
        return _overlap_rows(names, found)
    columns = max(len(heat.columns) for heat in maps)
    width = max(2.2, 0.34 * columns + 0.5)
    figure, panels = _grid(
        len(maps), (width, 0.24 * max(len(heat.rows) for heat in maps) + 0.75), int(WIDE / width) or 1
    )
    for axes, heat in zip(panels, maps, strict=True):
        _draw_heat(axes, heat, COLOURS[2])
        axes.title.set_fontsize(8)
        axes.set_aspect(0.7)
    return _settle(figure)


def _share(number: float) -> str:
    return f"{number:.2f}".replace("0.", ".", 1)


def _overlap_map(name: str, about: dict[str, Any]) -> Heat:
    """One arm's links against each other, and each against full fine-tuning in the last column."""
    links, full = about["overlap"], about["with_full"]
    rows: list[str] = list(dict.fromkeys([*(links["labels"] if links else []), *(full["labels"] if full else [])]))
    columns: list[str] = [*(links["labels"] if links else []), *(["full"] if full else [])]
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    if links:
        for i, line in enumerate(links["matrix"]):
            cells[i][: len(line)] = line
    if full:
        for label, value in zip(full["labels"], full["values"], strict=True):
            cells[rows.index(label)][-1] = value
    chance = [f"{what} {_share(part['random'])}" for what, part in (("links", links), ("full", full)) if part]
    heads = [label.removeprefix("link ") for label in columns]
    sides = [label.removeprefix("link ") for label in rows]
    return _heat(f"{name}\nby chance: {', '.join(chance)}", heads, sides, cells, _share, float)


def _overlap_rows(names: dict[str, str], found: dict[str, dict[str, Any]]) -> Figure:
    """Many arms, one row each: every link against the one before it, and against full fine-tuning."""
    before = {name: about["overlap"] for name, about in found.items() if about["overlap"]}
    full = {name: about["with_full"] for name, about in found.items() if about["with_full"]}
    most = max(len(part["labels"]) for part in before.values()) if before else 0
    labels: list[str] = list(dict.fromkeys(label for part in full.values() for label in part["labels"]))
    labels.sort(key=lambda label: label == "chain")
    steps: list[list[float | None]] = []
    shares: list[list[float | None]] = []
    for name in found:
        matrix = before[name]["matrix"] if name in before else []
        steps.append([matrix[k][k + 1] if k + 1 < len(matrix) else None for k in range(most - 1)])
        of = dict(zip(full[name]["labels"], full[name]["values"], strict=True)) if name in full else {}
        shares.append([of.get(label) for label in labels])
    maps: list[Heat] = []
    pairs, heads = [f"{k}·{k + 1}" for k in range(1, most)], [label.removeprefix("link ") for label in labels]
    for title, parts, columns, cells in (
        ("a link and the next", before, pairs, steps),
        ("in full fine-tuning's", full, heads, shares),
    ):
        if not columns:
            continue
        chance = sorted({_share(part["random"]) for part in parts.values()})
        by = chance[0] if len(chance) == 1 else f"{chance[0]} to {chance[-1]}"
        maps.append(_heat(f"{title}\nby chance: {by}", columns, list(names.values()), cells, _share, float))
    n_columns = sum(len(heat.columns) for heat in maps)
    figure = _new(0.22 * len(found) + 0.9, 1.8 + 0.37 * n_columns)
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False, width_ratios=[len(heat.columns) for heat in maps])
    for panel, heat in zip(axes.flatten(), maps, strict=True):
        _draw_heat(panel, heat, COLOURS[2])
    return _settle(figure)


# --- an ablation --------------------------------------------------------------------------------------------------


def ablation_figure(summary: dict[str, Any]) -> Figure:
    """Score, gap and cost against the ablated value: a line through the means, a dot for each seed.

    An arm that the keys are not about is a level line.
    """
    scored = summary["metric"] != "perplexity"
    panels = [
        ("test_score", f"test {summary['metric']}") if scored else ("test_loss", "test loss, nats per token"),
        gap_of(summary),
        ("total_seconds", "cost, seconds"),
    ]
    points = [point["values"] for point in summary["points"]]
    at = _positions(points)
    names = list(dict.fromkeys(row["arm"] for row in summary["rows"]))
    settings = [", ".join(values.values()) for values in points]
    ticks = [clipped(settings, 16)[setting] for setting in settings]
    with mpl.rc_context(STYLE):
        figure = _new(3.3, 9)
        for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
            for name, look in looks(names).items():
                _panel(
                    axes, [row for row in summary["rows"] if row["arm"] == name and row["seeds"]], points, at, key, look
                )
            axes.set(xlabel=", ".join(map(short, summary["keys"])), ylabel=label)
            axes.set_xticks(at, ticks)
            if sum(map(len, ticks)) > 22:
                axes.tick_params(axis="x", rotation=40)
                for text in axes.get_xticklabels():
                    text.set(ha="right", rotation_mode="anchor")
            axes.grid(alpha=0.15)
            axes.margins(x=0.08)
            if key == "total_seconds":
                axes.set_ylim(bottom=0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        ncols = min(len(labels), max(1, int(9 / (0.6 + 0.075 * max(map(len, labels))))))
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        return _settle(figure)


def _panel(
    axes: Axes, rows: list[dict[str, Any]], points: list[dict[str, str]], at: list[float], key: str, look: Look
) -> None:
    """One arm in one panel; its rows are of one name."""
    name = clipped(row["arm"] for row in rows).get(rows[0]["arm"]) if rows else None
    for row in rows:
        if row["values"] is None:
            level = mean_of(row["seeds"], key)
            axes.axhline(level, color=look.colour, linestyle=look.dash, linewidth=1.4, label=name)
    moving = [(at[points.index(row["values"])], row["seeds"]) for row in rows if row["values"] is not None]
    if moving:
        means = [mean_of(seeds, key) for _, seeds in moving]
        axes.plot([x for x, _ in moving], means, color=look.colour, lw=1.8, marker=look.marker, ms=6, label=name)
    dots = [(x, seed[key]) for x, seeds in moving for seed in seeds if len(seeds) > 1]
    axes.plot([x for x, _ in dots], [y for _, y in dots], look.marker, color=look.colour, ms=3, alpha=0.5, mew=0)


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
