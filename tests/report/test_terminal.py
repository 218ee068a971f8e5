import io

import pytest
from rich.console import Console

from cola.report import terminal as terminals
from cola.report.table import Table
from cola.report.terminal import Terminal


def table_on(columns: list[str], rows: list[list[str]], width: int, terminal: bool) -> list[str]:
    """The lines of a table on a terminal or in a file."""
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, soft_wrap=True, color_system=None)
    Terminal(console).table(Table("", [*columns], [[*row] for row in rows]))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 115])
def test_a_table_in_a_narrow_terminal_cuts_no_number_where_a_head_can_give_way(width: int) -> None:
    columns = ["arm", "tokens", "a_long_head_of_one_word", "learning rate", "peak memory", "and one more of them"]
    rows = [["full", "1234", "0.00025", "0.00016", "3.91 GB", "1.414e-05"]]
    lines = table_on(columns, rows, width, terminal=True)
    assert all(len(line) <= width for line in lines)
    assert {"full", "1234", "0.00025", "0.00016", "3.91", "1.414e-05"} <= set(" ".join(lines).split())


def test_a_terminal_too_narrow_for_the_numbers_cuts_them_rather_than_the_names_and_loses_nothing() -> None:
    columns, rows = ["arm", *"abcdefghij"], [["all_linear", *["0.000123456"] * 10]]
    lines = table_on(columns, rows, 60, terminal=True)
    assert all(len(line) <= 60 for line in lines)
    assert any(line.split()[:1] == ["all_linear"] for line in lines)
    assert "".join("".join(lines).split()).count("6") == 10


def test_a_table_in_a_file_is_as_wide_as_it_needs_to_be() -> None:
    columns = [f"column number {number}" for number in range(20)]
    rows = [[f"{number} of twenty" for number in range(20)]]
    assert [line.split() for line in table_on(columns, rows, 80, terminal=False)] == [
        line.split() for line in table_on(columns, rows, 1000, terminal=True)
    ]


class Clock:
    """Time that goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminals, "monotonic", clock)
    return clock


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_what_is_left_is_that_of_all_jobs_by_what_the_steps_so_far_took(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with Terminal(console).progress(jobs=5, total_steps=40) as progress:
        progress.skip(10)  # finished before
        progress.job("lora, seed 0", 10)
        assert lines_of(console)[-1] == "lora, seed 0: job 2 of 5"  # nothing is known yet
        for _ in range(6):  # found in the store, in no time
            progress.step("training", 1.0, 100, 2.0, made=False)
        for _ in range(4):
            clock.now += 5.0
            progress.step("training", 1.0, 100, 2.0, made=True)
        said = "step 10/10 training loss 1.000 50 tok/s, 0 s of training left; job 2 of 5, about 1 min 40 s left"
        assert lines_of(console)[-1] == f"lora, seed 0: {said}"
        clock.now += 20.0  # scoring: 4 steps have taken 40 seconds
        progress.job("base", 0)
        assert lines_of(console)[-1] == "base: job 3 of 5, about 3 min 20 s left"
        progress.wait("chain3", "another process is at it")
        progress.job("chain3", 10)  # fails at its third step
        for _ in range(2):
            clock.now += 10.0
            progress.step("link 1/3", 1.0, 100, 2.0, made=True)
        progress.job("full", 10)
        assert lines_of(console)[-1] == "full: job 5 of 5, about 1 min 40 s left"


def test_a_terminal_shows_the_same_beside_the_bar_of_all_jobs(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with Terminal(console).progress(jobs=2, total_steps=20) as progress:
        progress.job("lora", 10)
        for _ in range(10):
            clock.now += 3.0
            progress.step("training", 1.0, 100, 2.0, made=True)
        progress.job("chain3", 10)
        progress.bars.refresh()
        [whole] = [line for line in lines_of(console)[::-1] if "all jobs" in line][:1]
        assert "10/20 job 2 of 2, about 30 s left" in whole
