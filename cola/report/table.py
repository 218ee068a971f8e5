"""A table, in text, HTML, Markdown, LaTeX and CSV."""

import csv
import io
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table for a README."""
        lines = [self.columns, [":--", *["--:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def csv(self) -> str:
        """The table for another program: the same texts, the title left out."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.columns, *self.rows])
        return buffer.getvalue()

    def latex(self, label: str) -> str:
        """The table for a paper that loads booktabs; the title is its caption."""
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows)]
        return "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\label{{tab:{label}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "[": "{[}", "]": "{]}", "−": "$-$", "–": "--", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "→": r"$\to$",
    "‖": r"$\|$", "Δ": r"$\Delta$", "σ": r"$\sigma$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}", "\n": " ",
}  # fmt: skip


def _latex(text: str) -> str:
    """A text that LaTeX sets as it stands; a minus before a number is a minus and no hyphen."""
    text = re.sub(r"(?<![\w.)])-(?=\.?\d)", "−", text)
    return "".join(LATEX.get(sign, sign) for sign in text)


SIZES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21, "%": 0.01}
NUMBER = re.compile(r"([+−-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?: ?([A-Za-z%]+))?(?=$|[\s,;–])", re.IGNORECASE)


def sort_key(cell: str) -> float | None:
    """The number that a cell begins with, in units of one, by which its column is sorted; None where it is a text."""
    found = NUMBER.match(cell)
    if found is None or (found[2] and found[2] not in SIZES):
        return None
    number = float(found[1].replace("−", "-")) * SIZES.get(found[2], 1)
    # A time in two units; the second never stands alone.
    rest = re.match(r" (\d+) (min|s)$", cell[found.end() :]) if found[2] in ("h", "min") else None
    return number + (int(rest[1]) * SIZES[rest[2]] if rest else 0)
