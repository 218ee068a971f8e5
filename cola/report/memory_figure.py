"""The figure of what a run was expected to hold in memory, part by part, beside the most that was measured."""

from matplotlib.figure import Figure

from cola.compare.records import Summary
from cola.report.drawing import COLOURS, INK, clipped, explain, new_figure, settle
from cola.report.marks import belong_rows, of, say
from cola.report.numbers import size
from cola.tree.foreseen import ForeseenArm

# Parts (`plan.memory.PARTS`) that are shown as one, by what they are called here, from the axis on.
SHOWN = {
    "weights": ("weights", "quantization"),
    "pairs": ("pairs", "residual"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "a pass": ("activations", "logits"),
    "knot": ("knot",),
    "scoring": ("evaluation",),
    "heap": ("allocator",),
    "libraries": ("libraries",),
}


def parts_of(arm: ForeseenArm) -> dict[str, int]:
    """Bytes of what is shown, which add up to the peak."""
    parts = {name: sum(arm.memory.get(part, 0) for part in parts) for name, parts in SHOWN.items()}
    return {name: n for name, n in parts.items() if n}


def told_memory(summary: Summary) -> dict[str, tuple[ForeseenArm, float | None]]:
    """Of each arm that is in the summary what was expected, and the most that was measured."""
    expected = summary.foreseen.arms if summary.foreseen else {}
    return {name: (expected[name], arm.peak_memory) for name, arm in summary.arms.items() if name in expected}


def memory_figure(summary: Summary) -> Figure | None:
    """A bar an arm, its parts one after the other, and a mark at what was measured."""
    if not (told := told_memory(summary)):
        return None
    names = clipped(told)
    figure = new_figure(0.9 + 0.32 * len(told))
    axes = figure.subplots()
    colours = dict(zip(SHOWN, COLOURS, strict=False))
    drawn = [name for name in SHOWN if any(name in parts_of(expected) for expected, _ in told.values())]
    for row, (arm, (expected, measured)) in enumerate(told.items()):
        with of(axes, arm):
            begin = 0.0
            for part, n in parts_of(expected).items():
                axes.barh(row, n / 1e9, left=begin, height=0.62, color=colours[part], linewidth=0)
                begin += n / 1e9
            if measured is not None:
                axes.plot(measured / 1e9, row, "|", color=INK, ms=16, mew=2)
        inside = ", ".join(f"{part} {size(n)}" for part, n in parts_of(expected).items())
        found = "" if measured is None else f"; measured {size(measured)}"
        say(axes, arm, [(begin, row, f"{arm}: {size(expected.peak)} expected ({inside}){found}")])
    axes.set_yticks(range(len(told)), [names[arm] for arm in told])
    axes.set_ylim(len(told) - 0.5, -0.5)
    axes.set_xlabel("memory at its largest moment, GB")
    axes.grid(visible=False, axis="y")
    belong_rows(axes, told)
    marks = [{"marker": "s", "ls": "", "ms": 8, "color": colours[part], "label": part} for part in drawn]
    explain(figure, [*marks, {"marker": "|", "ls": "", "ms": 12, "mew": 2, "color": INK, "label": "measured"}], 5)
    figure.set_figheight(figure.get_figheight() + 0.19 * ((len(marks) + 5) // 5))
    return settle(figure)
