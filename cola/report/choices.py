"""Figures against values that were tried: those of a search, and those of an ablation."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cola.compare.ablation import short
from cola.compare.ablation_records import Ablation, AblationRow
from cola.compare.records import Search, Summary
from cola.report.drawing import (
    GREY,
    INK,
    WIDE,
    Look,
    clipped,
    draw_seeds,
    explain,
    gap_of,
    looks_of,
    new_figure,
    settle,
    turn_ticks,
    window,
)
from cola.report.marks import belong, of, say
from cola.report.numbers import choice_share, value_text, values_text

BESIDE = (0, (4, 1.5))  # dash of lora's line in the other panels


def choices_figure(summary: Summary) -> Figure | None:
    """Validation loss and score against what each arm's search tried: a line through the means, a dot for each seed.
    Where all searched one number, on the same axes, with lora's line in every panel."""
    searches = summary.trials
    if not searches:
        return None
    look = looks_of(summary)
    kinds = {"loss": "loss"} | ({} if summary.metric == "perplexity" else {"score": summary.metric})
    columns = min(4, len(searches))
    blocks = math.ceil(len(searches) / columns)
    figure = new_figure(blocks * (1.5 * len(kinds) + 0.8) + 0.6, {1: 4.4, 2: 5.6}.get(columns, WIDE))
    grid = figure.subplots(blocks * len(kinds), columns, squeeze=False)
    shown = clipped(searches, 18)
    keys = {key for search in searches.values() for key in search.choices[0].trials[0].values}
    alike = len(keys) == 1 and all(_places(search)[2] for search in searches.values())
    drawn: dict[str, list[Axes]] = {key: [] for key in kinds}
    for number, (arm, search) in enumerate(searches.items()):
        row, column = divmod(number, columns)
        panels = grid[row * len(kinds) : (row + 1) * len(kinds), column]
        share = choice_share(search)
        resampled = "not resampled" if share is None else f"{share:.0%} of resamples"
        belong((arm,), panels[0].set_title(f"{shown[arm]}\n{resampled}"))
        for axes, (key, label) in zip(panels, kinds.items(), strict=True):
            if alike and arm != "lora" and "lora" in searches:
                with of(axes, arm, "lora"):
                    _line(axes, searches["lora"], key, color=GREY, linewidth=1, linestyle=BESIDE)
            with of(axes, arm):
                _draw_choices(axes, search, key, look[arm], alike)
            texts = [values_text(trial.values) for trial in search.choices[0].trials]
            tried = zip(_places(search)[0], _tried(search, key)[0], texts, strict=True)
            say(
                axes,
                arm,
                [(x, y, f"{arm}, {text}: validation {label} {y:.4f}") for x, y, text in tried if y is not None],
            )
            drawn[key].append(axes)
            if column == 0:
                axes.set_ylabel(label)
            if alike and column:
                axes.tick_params(labelleft=False)
        panels[-1].set_xlabel(", ".join(search.choices[0].trials[0].values).replace("_", " "))
        for axes in panels[:-1]:
            axes.tick_params(labelbottom=False)
    for key, panels in drawn.items():
        if alike:
            _align(panels, searches.values())
        for axes, (arm, search) in zip(panels, searches.items(), strict=True):
            with of(axes, arm):
                _cross_out(axes, search, key)
    for axes in grid[-len(kinds) :, len(searches) - columns * (blocks - 1) :].flat:
        axes.set_visible(False)
    explain(figure, _marks(searches, kinds, alike), 2 if columns < 3 else 3)
    return settle(figure)


def _marks(searches: dict[str, Search], kinds: dict[str, str], alike: bool) -> list[dict[str, Any]]:
    """What the legend explains."""
    rules = " or ".join(sorted({kinds.get(search.select_by, search.select_by) for search in searches.values()}))
    dot: dict[str, Any] = {"color": INK, "linestyle": "", "marker": "o"}
    marks = [
        {**dot, "linestyle": "-", "ms": 5, "label": "mean over the trials' seeds"},
        {**dot, "ms": 3, "alpha": 0.45, "mew": 0, "label": "a seed"},
        {**dot, "ms": 10, "mfc": "none", "label": f"chosen, by {rules}"},
    ]
    if any(_left_out(_tried(search, key)[0], key) for search in searches.values() for key in kinds):
        marks.append({**dot, "marker": "x", "ms": 5, "label": "far worse, or failed"})
    if alike and "lora" in searches and len(searches) > 1:
        marks.append({"color": GREY, "linewidth": 1, "linestyle": BESIDE, "label": "lora's"})
    return marks


def _align(panels: list[Axes], searches: Iterable[Search]) -> None:
    """The same axes for panels of one number."""
    numbers = [at for search in searches for at in _places(search)[0]]
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if min(numbers) > 0 and max(numbers) > 4 * min(numbers):
            axes.set(xscale="log", xlim=(min(numbers) / 1.4, max(numbers) * 1.4))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(numbers) < 20 * min(numbers) else (1,)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")


def _tried(search: Search, key: str) -> tuple[list[float | None], list[list[tuple[int, float]]]]:
    """Of each value that was tried, the mean over all seeds, None where it failed or diverged; and the seeds' own."""
    means: list[float | None] = []
    dots: list[list[tuple[int, float]]] = []
    for rows in zip(*(choice.trials for choice in search.choices), strict=True):
        each = [(one.seed, value) for row in rows for one in row.each if (value := getattr(one, key)) is not None]
        finite = all(math.isfinite(one.loss) for row in rows for one in row.each)
        whole = bool(each) and finite and not any(row.failed for row in rows)
        means.append(sum(value for _, value in each) / len(each) if whole else None)
        dots.append(each if whole else [])
    return means, dots


def _left_out(means: list[float | None], key: str) -> list[int]:
    """The values without a mean, or with one so far off that the others could not be told apart beside it."""
    known = sorted((mean for mean in means if mean is not None), reverse=key == "score")
    room = 8 * abs(known[len(known) // 2] - known[0]) if len(known) > 2 else 0
    return [n for n, mean in enumerate(means) if mean is None or 0 < room < abs(mean - known[0])]


def _draw_choices(axes: Axes, search: Search, key: str, look: Look, alike: bool) -> None:
    means, dots = _tried(search, key)
    axes.margins(x=0.1, y=0.12)
    at, ticks, by_number = _places(search)
    out = _left_out(means, key)
    if not alike:
        if by_number and min(at) > 0 and max(at) > 4 * min(at):
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(at, ticks)
        if sum(map(len, ticks)) > 16:
            turn_ticks(axes, 55)
    line = "-" if by_number else ""
    _line(axes, search, key, marker=look.marker, linestyle=line, linewidth=1.5, ms=5, color=look.colour)
    if any(len(each) > 1 for each in dots):
        pairs = [(at[n], value) for n, each in enumerate(dots) if n not in out for _, value in each]
        draw_seeds(axes, pairs, look, "o")
    for choice in search.choices:
        n = choice.chosen
        own = means[n] if choice.seed is None else dict(dots[n]).get(choice.seed, means[n])
        if n not in out and own is not None:
            axes.plot(at[n], own, "o", ms=10 if choice.seed is None else 7, mfc="none", mec=INK, mew=1.2, zorder=4)


def _line(axes: Axes, search: Search, key: str, **style: Any) -> None:
    """Through the means of what was tried, those that are far off left out."""
    means = _tried(search, key)[0]
    at, out = _places(search)[0], _left_out(means, key)
    points = sorted((at[n], mean) for n, mean in enumerate(means) if mean is not None and n not in out)
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def _cross_out(axes: Axes, search: Search, key: str) -> None:
    """A cross at the worse end of the axis for what is far off or failed."""
    at, out = _places(search)[0], _left_out(_tried(search, key)[0], key)
    if out:
        worst = axes.get_ylim()[key == "loss"]
        axes.plot([at[n] for n in out], [worst] * len(out), "x", color=INK, ms=5, clip_on=False, zorder=5)


def _places(search: Search) -> tuple[list[float], list[str], bool]:
    """Where each value stands, what is written below it, and whether that is at its number: where one key has numbers.
    Any other values stand side by side."""
    tried = [list(trial.values.values()) for trial in search.choices[0].trials]
    if all(len(values) == 1 and type(values[0]) in (int, float) for values in tried):
        numbers = [float(values[0]) for values in tried]
        return numbers, [f"{number:g}" for number in numbers], True
    texts = [", ".join(map(value_text, values)) for values in tried]
    return [float(n) for n in range(len(tried))], list(clipped(texts, 16).values()), False


def ablation_figure(summary: Ablation) -> Figure | None:
    """Score, its difference from the first value, gap and, where it differs, cost against the ablated value: a line
    through the means, a dot for each seed. An arm that the keys are not about is a level line."""
    rows = [row for row in summary.rows if row.n_seeds]
    if not rows:
        return None
    scored = summary.metric != "perplexity"
    panels: dict[str, str] = dict(
        [("test_score", f"test {summary.metric}") if scored else ("test_loss", "test loss, nats per token")]
    )
    if any(row.difference for row in rows):
        panels["difference"] = "difference from the first value"
    panels |= dict([gap_of(summary)])
    paid = [row.flops for row in rows if row.links]
    if all(map(math.isfinite, paid)) and max(paid, default=0) > 1.01 * min(paid, default=0):
        panels["flops"] = "training FLOPs"
    points = [point.values for point in summary.points]
    at = _positions(points)
    settings = [", ".join(values.values()) for values in points]
    ticks = [clipped(settings, 16)[setting] for setting in settings]
    look = looks_of(summary)
    figure = new_figure(3.3, 3 * len(panels))
    for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, rows, dict(zip(map(str, points), at, strict=True)), key, look)
        axes.set(xlabel=", ".join(map(short, summary.keys)), ylabel=label)
        axes.set_xticks(at, ticks)
        if sum(map(len, ticks)) > 22:
            turn_ticks(axes, 40)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ncols = min(len(unique), max(1, int(9 / (0.6 + 0.075 * max(map(len, unique))))))
    legend = figure.legend(unique.values(), unique, loc="outside lower center", ncols=ncols)
    by_label = {label: arm for arm, label in clipped(look).items()}
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        belong((by_label.get(text.get_text(), ""),), text, *([handle] if handle else []))
    return settle(figure)


def _panel(axes: Axes, rows: list[AblationRow], at: dict[str, float], key: str, look: dict[str, Look]) -> None:
    """Every arm in one panel, on an axis that shows what the values do."""
    names = clipped(row.arm for row in rows)
    numbers = {row.arm: _numbers(row, key) for row in rows if row.values is None}
    moving = [
        (row.arm, row.label, at[str(row.values)], of_row)
        for row in rows
        if row.values and (of_row := _numbers(row, key))
    ]
    seen = [number for *_, of_row in moving for number in of_row] or list(itertools.chain(*numbers.values()))
    if not seen:
        return
    ends = window([*seen, *([0.0] if key == "difference" else [])], itertools.chain(*numbers.values()))
    axes.set_ylim(ends)
    for arm, (level, *_) in ((arm, of_arm) for arm, of_arm in numbers.items() if of_arm):
        if ends[0] <= level <= ends[1]:
            with of(axes, arm):
                axes.axhline(level, color=look[arm].colour, linestyle=look[arm].dash, linewidth=1.4, label=names[arm])
            say(axes, arm, [(x, level, f"{arm}: {level:.4g}") for x in at.values()])
        else:
            arrow, place = ("▾", 0.02) if level < ends[0] else ("▴", 0.92)
            with of(axes, arm):
                axes.annotate(f"{arrow} {names[arm]} {level:.3g}", (0.02, place), xycoords="axes fraction", color=GREY)
    if key == "difference":
        axes.axhline(0, color=INK, linewidth=0.8)
    for arm in dict.fromkeys(arm for arm, *_ in moving):
        mine = [(label, x, of_row) for whose, label, x, of_row in moving if whose == arm]
        style: dict[str, Any] = {"color": look[arm].colour, "marker": look[arm].marker, "label": names[arm]}
        with of(axes, arm):
            axes.plot([x for _, x, _ in mine], [of_row[0] for *_, of_row in mine], lw=1.8, ms=6, **style)
            if key == "difference":
                ends_of = [(x, *(of_row[1:] or of_row * 2)) for _, x, of_row in mine]
                axes.vlines(*zip(*ends_of, strict=True), color=look[arm].colour)
            else:
                draw_seeds(axes, [(x, number) for _, x, of_row in mine for number in of_row[1:]], look[arm], alpha=0.5)
        rest = "95 % interval" if key == "difference" else "seeds"
        for label, x, (first, *others) in mine:
            more = f"; {rest} {', '.join(f'{number:.3f}' for number in others)}" if others else ""
            say(axes, arm, [(x, first, f"{arm}, {label}: {first:.4g}{more}")])
    axes.margins(x=0.08)


def _numbers(row: AblationRow, key: str) -> list[float]:
    """What a panel shows of a row: its mean and then its seeds, a difference and then its interval."""
    if key == "difference":
        one = row.difference
        return [] if one is None else [number for number in (one.value, one.low, one.high) if number is not None]
    if key == "flops":
        return [row.flops]
    seeds = [number for seed in row.seeds if (number := getattr(seed, key)) is not None]
    return [float(np.mean(seeds)), *(seeds if len(seeds) > 1 else [])] if seeds else []


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
