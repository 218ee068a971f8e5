import io

import pytest
from rich.console import Console

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
