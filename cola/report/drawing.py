"""What the figures share: their style, the look of an arm, labels that cover nothing, and their files.

Arms differ in colour, marker and dash, so that a print in grey and any colour vision can tell them apart.
"""

import io
import itertools
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from fontTools import subset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

from cola.compare.ablation_records import Ablation
from cola.compare.records import ArmSummary, Summary, TasksSummary
from cola.files import file_digest, write_bytes
from cola.report.marks import Drawing, belong, marked

# Drawn with, and what stands for it on a dark ground: 3 : 1 and more against white and against the page's black, and as
# far apart as ten colours get with and without red and green (Machado 2009, distances in OKLab).
COLOURS = {
    "#0072B2": "#96D2FF", "#D55E00": "#FF8A33", "#009E73": "#00A583", "#A3127A": "#E14BD2", "#8A6DFF": "#A99BFF",
    "#1B1464": "#4D8DFF", "#7A5200": "#F0C300", "#F5478B": "#FF9CC4", "#14532D": "#00E1A5", "#6B0F1A": "#FF4D6D",
}  # fmt: skip
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # 10 × 7: the first 70 arms differ in the pair of both
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
GREY = "#7F868E"  # of what is there for comparison, an untrained base among it; readable on white and on black
INK = "#010203"  # drawn with, then replaced by the page's own text colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cola",  # the same results give the same file
    "pdf.fonttype": 42,  # whole fonts inside, which journals ask for
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
# Latin, Greek, signs, arrows and operators.
LETTERS = frozenset([ord("\n"), *range(0x20, 0x250), *range(0x370, 0x400), *range(0x2000, 0x2300)])
WIDE = 7.2  # inches: a page of two columns
LEAST = 0.85  # of its width a figure keeps on a page, so that its smallest text, 8 points, is 9 pixels on a phone


def svg(figure: Figure, prefix: str, classes: Mapping[str, str] | None = None) -> str:
    """A figure as an SVG element for a page: lines and text in the page's colours, ids that begin with the prefix.

    It is as wide as it was drawn, or a little narrower where its place is; the page's styles join and end its lines and
    give it its fonts. `classes`: each arm's, of what is drawn of it.
    """
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", _svg(figure), count=1, flags=re.DOTALL)  # for all `*`
    text = re.sub(r" font-family: [^;]+;|\s(?=\n)", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]+"', "", re.sub(r">\s+<", "><", text))
    text = marked(text, figure, classes or {})
    text = re.sub(r'<g id="[^"]+">', "<g>", text)  # named for an editor
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)  # two figures may hold the same marker
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour.lower(), f"var(--arm-{number})")
    width = 72 * figure.get_figwidth()
    root = f'<svg aria-hidden="true" focusable="false" style="width: {width:g}pt; min-width: {LEAST * width:g}pt"'
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", root, 1).replace(INK, "currentColor")


def save(figure: Figure, path: Path) -> None:
    """Write a figure for a paper, .svg or .pdf (fonts inside): dark on no ground, the same bytes each time."""
    if path.suffix == ".svg":
        write_bytes(path, _svg(figure).replace(INK, "#000000").encode())
        return
    buffer, style = io.BytesIO(), STYLE
    if LETTERS.issuperset(ord(letter) for text in figure.findobj(Text) for letter in text.get_text()):
        style = {**STYLE, "font.sans-serif": [*_lean_fonts(), *mpl.rcParams["font.sans-serif"]]}
    metadata = {"CreationDate": None, "Producer": None, "Creator": None}
    with mpl.rc_context(style):
        figure.savefig(buffer, format="pdf", transparent=True, metadata=metadata, dpi=200)
    write_bytes(path, buffer.getvalue())


@lru_cache(maxsize=1)
def _lean_fonts() -> list[str]:
    """The family, if any, of the fonts in use with no more than the letters above and without tables of typesetting,
    made once and kept in matplotlib's cache: it reads whole fonts for each PDF, which was half of the time of a page.
    """
    for weight in ("normal", "bold"):
        whole = Path(findfont(FontProperties(family="sans-serif", weight=weight)))
        if whole.suffix != ".ttf":
            return []
        lean = Path(mpl.get_cachedir()) / "cola" / f"{file_digest(whole)}.ttf"
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
    text = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a hundredth of a point
    return text[text.index("<svg") :]


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every figure of a run alike."""

    colour: str
    marker: str
    dash: Any


def looks(names: Iterable[str], untrained: Container[str] = ()) -> dict[str, Look]:
    """A look of its own for each arm; grey ones for those that were not trained."""
    cycles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(DASHES), strict=False)
    return {n: Look(GREY, "o", DASHES[0]) if n in untrained else Look(*next(cycles)) for n in names}


def looks_of(summary: Summary | TasksSummary | Ablation) -> dict[str, Look]:
    """Those of its arms, the same in every figure of a page."""
    if isinstance(summary, Ablation):
        rows = [row for row in summary.rows if row.n_seeds]
        return looks(dict.fromkeys(row.arm for row in rows), {row.arm for row in rows if not row.links})
    return looks(summary.arms, [name for name, arm in summary.arms.items() if not arm.links])


def window(near: Iterable[float], others: Iterable[float] = ()) -> tuple[float, float]:
    """Ends of an axis that shows the near numbers, and of the others those that would not crush them."""
    near = list(near)
    low, high = min(near), max(near)
    far = 0.6 * (high - low or 0.1 * abs(low) or 0.1)
    seen = [low, high, *(other for other in others if low - far <= other <= high + far)]
    room = 0.08 * (max(seen) - min(seen)) or far
    return min(seen) - room, max(seen) + room


def edge_text(number: float, ends: tuple[float, float], text: str) -> tuple[float, str]:
    """Where a number stands on an axis with such ends, and what is written there: one beyond them at the edge, with an
    arrow to where it is."""
    low, high = ends
    if low <= number <= high:
        return number, ""
    return (low, f"◂ {text}") if number < low else (high, f"{text} ▸")


def clipped(names: Iterable[str], most: int = 24) -> dict[str, str]:
    """Names that fit a label: long ones without their middle, but no two alike."""
    names = list(dict.fromkeys(names))
    while True:
        short = {n: n if len(n) <= most else f"{n[: most // 2]}…{n[-(most - most // 2 - 1) :]}" for n in names}
        if len(set(short.values())) == len(names):
            return short
        most += 2


def scored_arms(summary: Summary) -> dict[str, ArmSummary]:
    """The arms that have numbers."""
    return {name: arm for name, arm in summary.arms.items() if arm.n_seeds}


def metric_of(summary: Summary) -> tuple[str, str]:
    """Key and name of what the arms are judged by: plain text has a loss and no score."""
    return ("loss", "loss, nats per token") if summary.metric == "perplexity" else ("score", summary.metric)


def gap_of(summary: Summary | Ablation) -> tuple[str, str]:
    """Key and formula of the gap that belongs to it."""
    key, of = ("gap_loss", "test − train") if summary.metric == "perplexity" else ("gap_acc", "train − test")
    return key, f"{key} = {of}"


def new_figure(height: float, width: float = WIDE) -> Drawing:
    """An empty figure, in inches."""
    return Drawing(figsize=(width, height), layout="constrained")


def settle(figure: Figure) -> Figure:
    """Fix the layout, which else each of several files would compute again."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)  # the layout alone; `draw_without_rendering` draws everything once more, for nothing
    figure.set_layout_engine(None)  # "none" would leave a stand-in, for which each file draws once more
    return figure


def panels_of(n: int, xlabel: str) -> tuple[Figure, list[Axes]]:
    """A figure of n panels with the same axes, in rows of at most four; few are larger."""
    columns = min(n, 4)
    rows, (width, height) = math.ceil(n / columns), (1.8, 1.6) if n > 3 else (2.4, 2.2)
    figure = new_figure(rows * height + 0.5, max(columns * width, 3.6))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for left_over in axes[n:]:
        left_over.set_visible(False)
    for number in range(max(0, n - columns), n):  # the lowest panel of each column, which may have none below it
        axes[number].tick_params(labelbottom=True)
        axes[number].set_xlabel(xlabel)
    return figure, axes[:n]


def log_scale(axes: Axes) -> None:
    """A logarithmic scale whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())  # each would be drawn in every panel


def seed_values(arm: ArmSummary, key: str) -> list[float]:
    """One number for each seed, where there are several."""
    found = [value for seed in arm.seeds if (value := getattr(seed, key)) is not None]
    return found if len(found) > 1 else []


def draw_seeds(
    axes: Axes, places: Sequence[tuple[float, float]], look: Look, marker: str | None = None, alpha: float = 0.45
) -> None:
    """A small faint mark for each seed, in its arm's look."""
    x, y = [x for x, _ in places], [y for _, y in places]
    axes.plot(x, y, marker or look.marker, color=look.colour, ms=3, alpha=alpha, mew=0)


def explain(figure: Figure, marks: Iterable[dict[str, Any]], columns: int, arms: Sequence[str] = ()) -> None:
    """A legend below the panels of what the marks mean; `arms`: whose the first ones are."""
    handles = [figure.axes[0].plot([], [], **mark)[0] for mark in marks]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    for arm, handle, text in zip(arms, legend.legend_handles, legend.get_texts(), strict=False):
        belong((arm,), text, *([handle] if handle else []))


def turn_ticks(axes: Axes, degrees: float) -> None:
    """Long labels of a horizontal axis aslant, each ending at its tick."""
    axes.tick_params(axis="x", rotation=degrees)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")


def arm_legend(figure: Figure, shown: Mapping[str, Look], more: Iterable[dict[str, Any]] = ()) -> None:
    """Marker, colour and name of every arm below the panels, for which the figure grows, and what other marks mean."""
    names = clipped(shown)
    marks = [{"marker": look.marker, "color": look.colour, "ls": "", "label": names[n]} for n, look in shown.items()]
    marks += more
    columns = max(1, int(figure.get_figwidth() / (0.45 + 0.075 * max(len(mark["label"]) for mark in marks))))
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(marks) / columns))
    explain(figure, marks, min(columns, len(marks)), list(shown))
