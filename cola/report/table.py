"""A table of cells, in text, HTML, Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

NONE = "–"  # where there is nothing to say


@dataclass(frozen=True)
class Cell:
    """What stands in a table."""

    text: str
    # What the text begins with, in units of one and rounded as it is there, by which its column is sorted.
    value: float | None = None
    alone: bool = False  # whether the text is that number and no more: no unit, no spread, no interval

    def __str__(self) -> str:
        return self.text


Shown = Cell | str  # a str is a cell of words
Columns = dict[str, Callable[..., Shown]]  # each says what it shows of an arm, or of whatever a row is about


@dataclass(frozen=True)
class Table:
    """A titled table; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[Shown]]

    @classmethod
    def of(cls, title: str, heads: list[str], columns: Columns, rows: Iterable[tuple[Any, ...]]) -> "Table":
        """A table by its columns: the cells of its heads come first in a row, and last what the columns show."""
        cells = [[*head, *(shown(about) for shown in columns.values())] for *head, about in rows]
        return cls(title, [*heads, *columns], cells)

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, every cell with its value."""
        return [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows]

    @property
    def texts(self) -> list[list[str]]:
        """The rows as they are read."""
        return [[str(cell) for cell in row] for row in self.rows]

    def without_empty(self) -> "Table":
        """The table without the columns in which no row has anything to say."""
        kept = [n for n, column in enumerate(zip(*self.texts, strict=True)) if n == 0 or set(column) - {NONE, ""}]
        columns = [self.columns[n] for n in kept]
        return Table(self.title, columns, [[row[n] for n in kept] for row in self.rows]) if self.rows else self

    def markdown(self) -> str:
        """The table for a README."""
        lines = [self.columns, [":--", *["--:"] * (len(self.columns) - 1)], *self.texts]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def csv(self) -> str:
        """The table for another program: the same texts, the title left out."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.columns, *self.texts])
        return buffer.getvalue()

    def latex(self, label: str) -> str:
        """The table for a paper that loads booktabs; the title is its caption."""
        head, *rows = (" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.texts))
        lines = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            *(r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "[": "{[}", "]": "{]}", "−": "$-$", "–": "--", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "→": r"$\to$",
    "‖": r"$\|$", "Δ": r"$\Delta$", "σ": r"$\sigma$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}", "\n": " ",
}  # fmt: skip


def _latex(text: str) -> str:
    """A text that LaTeX sets as it stands; a minus before a number is a minus and no hyphen."""
    text = re.sub(r"(?<![\w.)])-(?=\.?\d)", "−", text)
    return "".join(LATEX.get(sign, sign) for sign in text)


def typed_rows(table: Table) -> list[list[Any]]:
    """A table's rows for a tracker, which sorts and draws a column of numbers: one whose every cell is a plain number
    or a dash holds numbers and None, any other keeps its text. The first column names the rows and stays text."""
    typed = [
        [cell.value for cell in column]
        if number and all(cell.alone or cell.text == NONE for cell in column)
        else [cell.text for cell in column]
        for number, column in enumerate(zip(*table.cells, strict=True))
    ]
    return [list(row) for row in zip(*typed, strict=True)]
