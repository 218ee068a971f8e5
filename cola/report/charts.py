"""The charts of a run or several: scores, gaps, train against test, cost; None where there is nothing to draw."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator

from cola.compare.records import ArmSummary, Contrast, Difference, Summary, TaskContrast, TasksSummary
from cola.report.drawing import (
    INK,
    WIDE,
    Look,
    arm_legend,
    clipped,
    draw_seeds,
    edge_text,
    explain,
    gap_of,
    looks_of,
    metric_of,
    new_figure,
    scored_arms,
    seed_values,
    settle,
    window,
)
from cola.report.marks import belong_rows, of, say
from cola.report.numbers import count, duration, interval, size, spread
from cola.report.table import Cell

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Task:
    """What the first figure shows of a task: its name, each arm's test numbers, and the primary contrast."""

    label: str
    seeds: dict[str, list[float]]
    primary: Difference | None


def primary_of(summary: Summary | TasksSummary) -> Contrast | TaskContrast | None:
    """The contrast that was named beforehand as the primary one, where it has a number."""
    found = (one for one in summary.contrasts if one.role == "primary" and one.value is not None)
    return next(found, None)


def tasks_of(summary: Summary | TasksSummary) -> tuple[list[Task], str]:
    """The tasks of a page, a run being one, and what the arms are judged by."""
    primary = primary_of(summary)
    if isinstance(summary, TasksSummary):
        labels, metric = [task.label for task in summary.tasks], "−loss" if summary.by_loss else summary.metric
        of = primary.tasks if isinstance(primary, TaskContrast) else {}
        arms = summary.arms.items()
        return [Task(x, {n: arm.seeds[x] for n, arm in arms if x in arm.seeds}, of.get(x)) for x in labels], metric
    key, metric = metric_of(summary)
    seeds = {n: [getattr(one, f"test_{key}") for one in arm.seeds] for n, arm in scored_arms(summary).items()}
    return [Task("", seeds, primary if isinstance(primary, Difference) else None)], metric


def hero_figure(summary: Summary | TasksSummary) -> Figure | None:
    """Every seed's test number of each arm on each task, and the primary contrast beside them."""
    tasks, metric = tasks_of(summary)
    arms = [name for name in summary.arms if any(name in task.seeds for task in tasks)]
    if not arms:
        return None
    look, primary = looks_of(summary), primary_of(summary)
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    ratios = [1.0] * columns + ([0.6 if columns == 1 else 1.2] if primary else [])
    beside = 0.36 * len(tasks) + 1.2 if primary and len(tasks) > 1 else 0
    height = max(rows * (0.24 * len(arms) + 0.7) + 0.25, beside)
    figure = new_figure(height, WIDE if len(ratios) < 4 else 9.6)
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios)
    panels = [figure.add_subplot(grid[divmod(number, columns)]) for number in range(len(tasks))]
    names, titles = clipped(arms, 20), clipped((task.label for task in tasks), 20)
    trained = {name for name in arms if summary.arms[name].links}
    for number, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        _hero_panel(axes, {name: task.seeds.get(name, []) for name in arms}, trained or set(arms), look)
        axes.set_yticks(range(len(arms)), list(names.values()) if number % columns == 0 else [""] * len(arms))
        belong_rows(axes, arms)
        axes.set_title(titles[task.label])
        axes.set_xlabel(f"test {metric}")
    if primary:
        axes = figure.add_subplot(grid[:, columns])
        several = [(titles[task.label], task.primary) for task in tasks if task.primary] if len(tasks) > 1 else []
        over = (f"mean of {len(several)} tasks" if several else "", primary)
        better = primary.first if (primary.value or 0) > 0 else primary.second
        _hero_contrast(axes, [over, *several], look[better].colour if primary.claim else INK)
        axes.set_title(" − ".join(clipped([primary.first, primary.second], 20).values()))
    return settle(figure)


def _hero_panel(axes: Axes, seeds: dict[str, list[float]], trained: set[str], look: dict[str, Look]) -> None:
    means = {name: sum(values) / len(values) for name, values in seeds.items() if values}
    near = [value for name in means if name in trained for value in seeds[name]]
    ends = window(near or means.values(), [value for values in seeds.values() for value in values])
    for row, name in enumerate(seeds):
        if name not in means:
            continue
        mean, edge = edge_text(means[name], ends, f"{means[name]:.3f}")
        with of(axes, name):
            if edge:
                axes.annotate(edge, (mean, row), va="center", ha="left" if mean == ends[0] else "right")
                continue
            axes.plot(seeds[name], [row] * len(seeds[name]), "o", color=look[name].colour, ms=4.5, alpha=0.45, mew=0)
            axes.plot(mean, row, "|", color=look[name].colour, ms=13, mew=2.6)
            axes.annotate(f"{mean:.3f}", (1, row), (5, 0), axes.get_yaxis_transform(), "offset points", va="center")
        say(axes, name, [(value, row, f"{name}, a seed: {value:.4f}") for value in seeds[name]])
        say(axes, name, [(mean, row, f"{name}, mean of {len(seeds[name])}: {mean:.4f}")])
    axes.set(xlim=ends, ylim=(len(seeds) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(3))


def _hero_contrast(axes: Axes, rows: list[tuple[str, Difference | Contrast | TaskContrast]], colour: str) -> None:
    """The primary contrast with its interval, over the tasks and on each of them."""
    for row, (_, one) in enumerate(rows):
        assert one.value is not None  # the others are left out
        drawn, size, mark = (colour, 2.4, "D") if row == 0 else (INK, 1.3, "o")
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [row, row], color=drawn, linewidth=size)
        axes.plot(one.value, row, mark, color=drawn, ms=3 + 2 * size, zorder=3)
    texts = ["\n".join(filter(None, [label, str(interval(one)).replace("-", "−")])) for label, one in rows]
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(rows)), texts, fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="right: the first is better")
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(-max(-low, high), max(-low, high))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.spines["left"].set_visible(False)


def gaps_figure(summary: Summary) -> Figure | None:
    """Gap and test number against the number of links of the arms that train pairs, of three lengths or more."""
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.knots}
    lengths = sorted({arm.links for arm in arms.values()})
    if len(lengths) < 3:
        return None
    look = {name: look for name, look in looks_of(summary).items() if name in arms}
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
            mean = getattr(arm, key).mean
            with of(axes, name):
                draw_seeds(axes, [(at[name], value) for value in seed_values(arm, key)], look[name])
                axes.plot(at[name], mean, look[name].marker, c=look[name].colour, ms=7, mec=INK, mew=0.6)
            says = f"{name}, {arm.links} links: {label} {spread(getattr(arm, key))}"
            say(axes, name, [(at[name], mean, says)])
        axes.set(xlabel="links", ylabel=label)
        axes.set_xticks(lengths)
        axes.set_xlim(min(at.values()) - 0.4 * step, max(at.values()) + 0.4 * step)
        axes.margins(y=0.12)
    panels[0].axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    arm_legend(figure, look, _seed_mark(arms))
    return settle(figure)


def train_test_figure(summary: Summary) -> Figure | None:
    """Train and test number of each arm, the best on test on top, joined by the gap."""
    arms = scored_arms(summary)
    if not arms:
        return None
    (key, metric), look = metric_of(summary), looks_of(summary)
    figure = new_figure(0.24 * len(arms) + 1.1)
    axes = figure.subplots()
    ordered = sorted(arms, key=lambda name: getattr(arms[name], f"test_{key}").mean, reverse=key == "loss")
    numbers = {n: [v for s in ("train", "test") for v in _values(arms[n], f"{s}_{key}")] for n in ordered}
    near = [value for name in ordered if arms[name].links for value in numbers[name]]
    ends = window(near or itertools.chain(*numbers.values()), itertools.chain(*numbers.values()))
    for row, name in enumerate(ordered):
        arm, colour = arms[name], look[name].colour
        means = [getattr(arm, f"{split}_{key}").mean for split in ("train", "test")]
        x, edge = edge_text(means[1], ends, f"train {means[0]:.3f}, test {means[1]:.3f}")
        with of(axes, name):
            if edge:
                axes.annotate(edge, (x, row), va="center", ha="left" if x == ends[0] else "right")
                continue
            axes.plot(means, [row, row], color=colour, linewidth=2, alpha=0.5, zorder=2)
            for split, mean, face, marker in zip(SPLITS, means, ("none", colour), ("o", "s"), strict=True):
                seeds = seed_values(arm, f"{split}_{key}")
                form: dict[str, Any] = {"mfc": face, "color": colour}
                axes.plot(seeds, [row] * len(seeds), marker, ms=2.5, alpha=0.6, mew=0.6, zorder=1, **form)
                axes.plot(mean, row, marker, ms=6, mew=1.4, zorder=3, **form)
        texts = [f"{name}, {split}: {spread(getattr(arm, f'{split}_{key}'))}" for split in SPLITS]
        say(axes, name, [(mean, row, text) for mean, text in zip(means, texts, strict=True)])
    axes.set_yticks(range(len(ordered)), list(clipped(ordered).values()))
    belong_rows(axes, ordered)
    axes.set(xlim=ends, ylim=(-0.7, len(ordered) - 0.3), xlabel=metric)
    axes.tick_params(axis="y", length=0)
    kinds = [("o", "none", "train"), ("s", INK, "test"), ("", INK, "between them: the gap")]
    marks = [
        {"linestyle": "" if marker else "-", "marker": marker, "mec": INK, "mfc": face, "color": INK, "label": label}
        for marker, face, label in kinds
    ]
    explain(figure, [*marks, *_seed_mark(arms)], 4)
    return settle(figure)


def _seed_mark(arms: Mapping[str, ArmSummary]) -> list[dict[str, Any]]:
    """The legend's mark of a seed, where there are several."""
    several = any(arm.n_seeds > 1 for arm in arms.values())
    return [{"linestyle": "", "marker": "o", "ms": 3, "color": INK, "alpha": 0.5, "label": "a seed"}] if several else []


def _values(arm: ArmSummary, key: str) -> list[float]:
    """An arm's mean and its seeds' numbers."""
    return [getattr(arm, key).mean, *seed_values(arm, key)]


def losses_figure(summary: Summary) -> Figure | None:
    """Test loss against train loss of the arms that were trained: a mark for the mean, a dot for each seed."""
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.links}
    if len(arms) < 2:
        return None
    look = {name: look for name, look in looks_of(summary).items() if name in arms}
    figure = new_figure(3.4, 5.4)
    axes = figure.subplots()
    for name, arm in arms.items():
        pairs = list(zip(seed_values(arm, "train_loss"), seed_values(arm, "test_loss"), strict=True))
        train, test = _values(arm, "train_loss")[0], _values(arm, "test_loss")[0]
        with of(axes, name):
            draw_seeds(axes, pairs, look[name])
            axes.plot(train, test, look[name].marker, color=look[name].colour, ms=8, mec=INK, mew=0.6)
        say(axes, name, [(x, y, f"{name}, a seed: train {x:.3f}, test {y:.3f}") for x, y in pairs])
        say(axes, name, [(train, test, f"{name}: train {spread(arm.train_loss)}, test {spread(arm.test_loss)}")])
    axes.set(xlabel="train loss, nats per target token", ylabel="test loss")
    axes.margins(0.1)
    arm_legend(figure, look, _seed_mark(arms))
    return settle(figure)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (cost and score) than which none is both better and no dearer, cheapest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


@dataclass(frozen=True)
class Price:
    """One of the costs that scores can be set against."""

    label: str  # of its axis
    of: Callable[[ArmSummary], float | None]
    shown: Callable[[float], Cell]
    tick: Formatter | str


PRICES = {
    "cost": Price("training FLOPs", lambda arm: arm.flops, count, EngFormatter()),
    "cost-cpu": Price("CPU time, seconds", lambda arm: arm.total_cpu_seconds, duration, "{x:g}"),
    "cost-time": Price("wall clock, seconds", lambda arm: arm.total_seconds, duration, "{x:g}"),
    "cost-memory": Price("peak memory, bytes", lambda arm: arm.peak_memory, size, EngFormatter()),
    "cost-parameters": Price("trained parameters", lambda arm: arm.num_trainable_params, count, EngFormatter()),
}


def costs_of(summary: Summary, kind: str) -> dict[str, tuple[float, float]]:
    """Each trained arm's cost and test number, of which more is better (minus the loss of a text); empty where the cost
    of one is not known, or there are less than two."""
    arms = {name: arm for name, arm in scored_arms(summary).items() if arm.links}
    (key, _), price = metric_of(summary), PRICES[kind].of
    sign = -1 if key == "loss" else 1
    paid = {n: cost for n, arm in arms.items() if (cost := price(arm)) is not None and math.isfinite(cost)}
    if len(paid) < max(2, len(arms)):
        return {}
    return {name: (cost, sign * getattr(arms[name], f"test_{key}").mean) for name, cost in paid.items()}


def cost_figure(kind: str, summary: Summary) -> Figure | None:
    """Cost against the test number; a line joins the arms than which none is both better and no dearer."""
    if not (found := costs_of(summary, kind)):
        return None
    (key, metric), price, arms = metric_of(summary), PRICES[kind], summary.arms
    look, sign, front = looks_of(summary), -1 if key == "loss" else 1, pareto(found)
    figure = new_figure(3.6)
    axes = figure.subplots()
    at = {name: (cost, sign * number) for name, (cost, number) in found.items()}
    if max(paid := [cost for cost, _ in at.values()]) > 10 * min(paid) > 0:
        axes.set_xscale("log")
    steps = [at[name] for name in front]
    axes.step([x for x, _ in steps], [y for _, y in steps], color=INK, where="post", linewidth=1, alpha=0.6)
    for name, (x, y) in at.items():
        face = look[name].colour if name in front else "none"
        with of(axes, name):
            draw_seeds(axes, [(x, value) for value in seed_values(arms[name], f"test_{key}")], look[name], ".")
            axes.plot(x, y, look[name].marker, ms=8, mec=look[name].colour, mfc=face, mew=1.4, zorder=3)
        test = spread(getattr(arms[name], f"test_{key}"))
        say(axes, name, [(x, y, f"{name}: {price.shown(x)} {price.label.split(',')[0]}, test {metric} {test}")])
    axes.set(xlabel=price.label, ylabel=f"test {metric}")
    axes.margins(x=0.14, y=0.12)
    axes.xaxis.set_major_formatter(price.tick)
    if key == "loss":
        axes.invert_yaxis()  # better is higher, as with a score
    filled = {"linestyle": "", "marker": "o", "color": INK, "ms": 7}
    marks = [{**filled, "label": "on the Pareto front (of means)"}, {**filled, "mfc": "none", "label": "not on it"}]
    arm_legend(figure, {name: look[name] for name in at}, [*marks, *_seed_mark({name: arms[name] for name in at})])
    return settle(figure)
