"""The figure of contrasts: every interval beside its zero."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cola.compare.records import Contrast, Summary, TaskContrast, TasksSummary
from cola.report.drawing import INK, Look, clipped, edge_text, looks_of, new_figure, settle, window
from cola.report.marks import belong, of, say
from cola.report.numbers import interval, p_value

ROLES = {"primary": "primary, named beforehand", "secondary": "secondary", "later": "not named before: no claim"}


def contrasts_forest(summary: Summary | TasksSummary) -> Figure | None:
    """A forest plot: each difference with its interval, what could have been found, and whether it carries a claim."""
    contrasts = [contrast for contrast in summary.contrasts if contrast.value is not None]
    if not contrasts:
        return None
    figure = new_figure(0.24 * (len(contrasts) + 2 * len({c.role for c in contrasts})) + 1.2)
    axes = figure.subplots()
    trained = {name for name, arm in summary.arms.items() if arm.links}
    ends = window(
        [0.0, *(end for c in contrasts if {c.first, c.second} <= trained for end in _ends(c))],
        (end for c in contrasts for end in _ends(c)),
    )
    _forest(axes, contrasts, ends, looks_of(summary))
    name = summary.metric if contrasts[0].metric == "score" else "−loss, nats per token"
    axes.set_xlabel(f"difference in test {name}; right of the line the first is the better one")
    handles = [
        axes.plot([], [], "o-", color=INK, ms=6, label="claim")[0],
        axes.plot([], [], "o-", color=INK, ms=6, mfc="none", label="no claim")[0],
    ]
    if any(contrast.minimum_detectable is not None for contrast in contrasts):
        band = axes.fill_between([], [], [], color=INK, alpha=0.09, linewidth=0, label="too small to be found")
        handles.append(band)  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return settle(figure)


def _ends(one: Contrast | TaskContrast) -> list[float]:
    return [number for number in (one.value, one.low, one.high) if number is not None]


def _forest(
    axes: Axes, contrasts: list[Contrast | TaskContrast], ends: tuple[float, float], look: dict[str, Look]
) -> None:
    place, ticks = 0.0, []
    rows: dict[float, tuple[str, str]] = {}
    shown = clipped([arm for contrast in contrasts for arm in (contrast.first, contrast.second)], 20)
    for role, heading in ROLES.items():
        mine = [contrast for contrast in contrasts if contrast.role == role]
        if not mine:
            continue
        ticks.append((place, heading))
        for contrast in mine:
            place -= 1
            ticks.append((place, f"{shown[contrast.first]} − {shown[contrast.second]}"))
            rows[place] = contrast.first, contrast.second
            with of(axes, *rows[place]):
                _forest_row(axes, contrast, place, ends, look)
            name = f"{contrast.first} − {contrast.second}"
            value = contrast.value or 0.0  # the others are left out
            say(axes, rows[place], [(value, place, f"{name}: {interval(contrast)}, {p_text(contrast)}")])
        place -= 1.4
    axes.set_xlim(ends)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(place + 0.8, 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    for (y, _), text in zip(ticks, axes.get_yticklabels(), strict=True):
        if y in rows:
            belong(rows[y], text)
        else:
            text.set_fontweight("bold")


def _forest_row(
    axes: Axes, contrast: Contrast | TaskContrast, y: float, ends: tuple[float, float], look: dict[str, Look]
) -> None:
    value, low, high, claim = contrast.value, contrast.low, contrast.high, contrast.claim
    assert value is not None  # the others are left out
    colour = look[contrast.first if value > 0 else contrast.second].colour if claim else INK
    marker, size = ("D", 8) if contrast.role == "primary" else ("o", 6)
    if (detectable := contrast.minimum_detectable) is not None:
        axes.add_patch(Rectangle((-detectable, y - 0.42), 2 * detectable, 0.84, color=INK, alpha=0.09, linewidth=0))
    place, edge = edge_text(value, ends, "")
    if edge:
        axes.annotate(edge.strip(), (place, y), va="center", ha="left" if value < 0 else "right")
    else:
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2 if claim else 1.3, solid_capstyle="butt")
        axes.plot(value, y, marker, color=colour, ms=size, mfc=colour if claim else "none", mew=1.4, zorder=3)
    numbers = f"{value:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None else ", no interval")
    form: dict[str, Any] = {"va": "center", "fontsize": 8, "weight": "bold" if claim else "normal"}
    for text, place in ((numbers.replace("-", "−"), 8), (p_text(contrast), 140)):
        axes.annotate(text, (1, y), (place, 0), axes.get_yaxis_transform(), "offset points", **form)


def p_text(contrast: Contrast | TaskContrast) -> str:
    """The p that a contrast is judged by: the primary one's own, of the others Holm's."""
    holm = contrast.p_holm if contrast.role != "primary" else None
    number = contrast.p if holm is None else holm
    if number is None:
        return "no p"
    return f"p = {p_value(number)}".replace("= <", "<") + (" (Holm)" if holm is not None else "")
