"""Figures against values that were tried: those of a search, and those of an ablation."""

import itertools
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cola.compare.ablation import short
from cola.compare.records import Ablation, AblationRow, AblationSeed, Search, Summary
from cola.report.drawing import (
    INK,
    WIDE,
    Look,
    clipped,
    draw_seeds,
    explain,
    gap_of,
    looks,
    new_figure,
    settle,
    turn_ticks,
)
from cola.report.numbers import choice_share, value_text


def choices_figure(summary: Summary) -> Figure | None:
    """Validation loss and score against what each arm's search tried: a line through the means, a dot for each seed."""
    searches = summary.trials
    if not searches:
        return None
    look = looks(summary.arms)
    kinds = {"loss": "loss"} | ({} if summary.metric == "perplexity" else {"score": summary.metric})
    columns = min(4, len(searches))
    blocks = math.ceil(len(searches) / columns)
    figure = new_figure(blocks * (1.5 * len(kinds) + 0.8) + 0.6, {1: 4.4, 2: 5.6}.get(columns, WIDE))
    grid = figure.subplots(blocks * len(kinds), columns, squeeze=False)
    shown = clipped(searches, 20)
    for number, (arm, search) in enumerate(searches.items()):
        row, column = divmod(number, columns)
        panels = grid[row * len(kinds) : (row + 1) * len(kinds), column]
        share = choice_share(search)
        resampled = "not resampled" if share is None else f"{share:.0%} of resamples"
        panels[0].set_title(f"{shown[arm]}\n{resampled}", fontsize=8)
        for axes, (key, label) in zip(panels, kinds.items(), strict=True):
            _draw_choices(axes, search, key, look[arm])
            if column == 0:
                axes.set_ylabel(f"{label} (decides)" if key == search.select_by else label, fontsize=8)
            axes.tick_params(labelsize=7.5)
        panels[-1].set_xlabel(", ".join(search.choices[0].trials[0].values).replace("_", " "), fontsize=8)
        for axes in panels[:-1]:
            axes.tick_params(labelbottom=False)
    for axes in grid[-len(kinds) :, len(searches) - columns * (blocks - 1) :].flat:
        axes.set_visible(False)
    marks = [
        {"marker": "o", "ms": 5, "label": "mean over the trials' seeds"},
        {"linestyle": "", "marker": "o", "ms": 3, "alpha": 0.45, "mew": 0, "label": "a seed"},
        {"linestyle": "", "marker": "o", "ms": 10, "mfc": "none", "mew": 1.2, "label": "chosen"},
    ]
    if any(_left_out(_tried(search, key)[0], key) for search in searches.values() for key in kinds):
        marks.append({"linestyle": "", "marker": "x", "ms": 5, "label": "far worse, or failed"})
    explain(figure, [{"color": INK, **mark} for mark in marks], 2 if columns < 3 else len(marks))
    return settle(figure)


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


def _draw_choices(axes: Axes, search: Search, key: str, look: Look) -> None:
    means, dots = _tried(search, key)
    axes.margins(x=0.1, y=0.12)
    at, ticks, by_number = _places(search)
    out = _left_out(means, key)
    if by_number and min(at) > 0 and max(at) > 4 * min(at):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    points = sorted((at[n], mean) for n, mean in enumerate(means) if mean is not None and n not in out)
    line = "-" if by_number else ""
    axes.plot([x for x, _ in points], [y for _, y in points], look.marker, ls=line, lw=1.5, ms=5, color=look.colour)
    if any(len(each) > 1 for each in dots):
        pairs = [(at[n], value) for n, each in enumerate(dots) if n not in out for _, value in each]
        draw_seeds(axes, pairs, look, "o")
    for choice in search.choices:
        n = choice.chosen
        own = means[n] if choice.seed is None else dict(dots[n]).get(choice.seed, means[n])
        if n not in out and own is not None:
            axes.plot(at[n], own, "o", ms=10 if choice.seed is None else 7, mfc="none", mec=INK, mew=1.2, zorder=4)
    axes.set_xticks(at, ticks)
    if out:
        worst = axes.get_ylim()[key == "loss"]
        axes.plot([at[n] for n in out], [worst] * len(out), "x", color=INK, ms=5, clip_on=False, zorder=5)
    if sum(map(len, ticks)) > 16:
        turn_ticks(axes, 55)


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
    """Score, gap and cost against the ablated value: a line through the means, a dot for each seed. An arm that the
    keys are not about is a level line."""
    if not any(row.n_seeds for row in summary.rows):
        return None
    scored = summary.metric != "perplexity"
    panels = [
        ("test_score", f"test {summary.metric}") if scored else ("test_loss", "test loss, nats per token"),
        gap_of(summary),
        ("total_seconds", "cost, seconds"),
    ]
    points = [point.values for point in summary.points]
    at = _positions(points)
    settings = [", ".join(values.values()) for values in points]
    ticks = [clipped(settings, 16)[setting] for setting in settings]
    look = looks(dict.fromkeys(row.arm for row in summary.rows))
    figure = new_figure(3.3, 9)
    for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in look:
            rows = [row for row in summary.rows if row.arm == name and row.seeds]
            _panel(axes, rows, points, at, key, look[name])
        axes.set(xlabel=", ".join(map(short, summary.keys)), ylabel=label)
        axes.set_xticks(at, ticks)
        if sum(map(len, ticks)) > 22:
            turn_ticks(axes, 40)
        axes.margins(x=0.08)
        if key == "total_seconds":
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    ncols = min(len(labels), max(1, int(9 / (0.6 + 0.075 * max(map(len, labels))))))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
    return settle(figure)


def _panel(
    axes: Axes, rows: list[AblationRow], points: list[dict[str, str]], at: list[float], key: str, look: Look
) -> None:
    """One arm in one panel; its rows are of one name."""
    name = clipped(row.arm for row in rows).get(rows[0].arm) if rows else None
    for row in rows:
        if row.values is None:
            level = _mean(row.seeds, key)
            axes.axhline(level, color=look.colour, linestyle=look.dash, linewidth=1.4, label=name)
    moving = [(at[points.index(row.values)], row.seeds) for row in rows if row.values is not None]
    if moving:
        means = [_mean(seeds, key) for _, seeds in moving]
        axes.plot([x for x, _ in moving], means, color=look.colour, lw=1.8, marker=look.marker, ms=6, label=name)
    dots = [(x, getattr(seed, key)) for x, seeds in moving for seed in seeds if len(seeds) > 1]
    draw_seeds(axes, dots, look, alpha=0.5)


def _mean(seeds: list[AblationSeed], key: str) -> float:
    return float(np.mean([getattr(seed, key) for seed in seeds]))


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
