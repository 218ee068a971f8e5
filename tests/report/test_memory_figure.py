"""The figure of a run's memory by part. Run: pytest tests/report/test_memory_figure.py"""

import pytest
from summaries import many, quickstart

from cola.plan.memory import PARTS
from cola.report.memory_figure import SHOWN, memory_figure, parts_of


def test_every_part_of_a_plan_is_shown_once() -> None:
    shown = [part for parts in SHOWN.values() for part in parts]
    assert sorted(shown) == sorted(PARTS)


def test_a_bar_is_as_long_as_the_peak_and_the_mark_is_where_it_was_measured() -> None:
    summary = many(8)
    assert summary.foreseen is not None
    figure = memory_figure(summary)
    assert figure is not None
    (axes,) = figure.axes
    ends: dict[int, float] = {}
    for bar in axes.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    for row, (name, arm) in enumerate(summary.foreseen.arms.items()):
        assert sum(parts_of(arm).values()) == arm.peak
        assert ends[row] == pytest.approx(arm.peak / 1e9), name
    marks = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert marks == [pytest.approx(arm.peak_memory / 1e9) for arm in summary.arms.values() if arm.peak_memory]


def test_a_run_that_expected_nothing_has_no_such_figure() -> None:
    assert memory_figure(quickstart()) is None
