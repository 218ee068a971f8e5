"""What the user sees while a run goes on: live bars on a terminal, plain lines otherwise."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table as RichTable

from cola.report.numbers import duration
from cola.report.signs import showable
from cola.report.table import Table

LINE_EVERY_SECONDS = 10.0


def longest_word(cells: Iterable[str]) -> int:
    """The width of the longest word of some cells; a number is a word."""
    return max((cell_len(word) for cell in cells for word in cell.split()), default=1)


def fitting(columns: list[tuple[str, ...]], room: int) -> list[int]:
    """Widths that make columns (head, then cells) fit into `room`.

    The widest shrinks first, as far as its words allow; then words of heads are cut, then numbers, and row names last.
    """
    widths = [max(map(cell_len, column)) for column in columns]
    floors = [
        [longest_word(column) for column in columns],
        [longest_word(column[1:]) for column in columns],
        [min(longest_word(columns[0]), 16)] + [1] * (len(columns) - 1),
    ]
    for floor in floors:
        while sum(widths) > room:
            spare = [width if width > least else 0 for width, least in zip(widths, floor, strict=True)]
            if not any(spare):
                break
            widths[spare.index(max(spare))] -= 1
    return widths


@dataclass
class Terminal:
    """Prints to a console. Text of the user's (names, messages) is never read as markup."""

    console: Console = field(default_factory=lambda: Console(highlight=False, stderr=False, soft_wrap=True))

    def say(self, text: str = "") -> None:
        self.console.print(self.escaped(text))

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/] {self.escaped(text)}")

    def escaped(self, text: str) -> str:
        """A text of the user's as it can be shown here, never read as markup."""
        return escape(showable(text, self.console.encoding))

    def table(self, table: Table) -> None:
        """A table, as wide as it needs to be where the output is no terminal; a narrow terminal wraps its cells."""
        shown = RichTable(
            title=showable(table.title, self.console.encoding),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        columns, *rows = (
            [showable(cell, self.console.encoding) for cell in row] for row in [table.columns, *table.texts]
        )
        for number, column in enumerate(columns):
            shown.add_column(escape(column), justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            shown.add_row(*map(escape, row))
        natural = Measurement.get(self.console, self.console.options.update(max_width=sys.maxsize), shown).maximum
        if self.console.is_terminal:
            cells = list(zip(columns, *rows, strict=True))
            lines = natural - sum(fitting(cells, sys.maxsize))
            for column, width in zip(shown.columns, fitting(cells, self.console.width - lines), strict=True):
                column.width = width
        else:
            self.console.width = max(self.console.width, natural)
        self.console.print(shown)

    @contextmanager
    def progress(self, jobs: int = 0, total_steps: int = 0) -> Iterator["RunProgress"]:
        """Shows what is done and left of a whole run, and of the job at hand, once it is told of jobs."""
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        progress = RunProgress(self, bars, bars.add_task("all jobs", total=0, state=""), 0, 0)
        try:
            if jobs:
                progress.expect(jobs, total_steps)
            yield progress
        finally:
            bars.stop()


@dataclass
class RunProgress:
    """Progress of a run; `job` begins an arm, `step` and `stage` tell where it is.

    What is left of the whole is told by the jobs that trained anything in this session: their time, scoring and loading
    included, by the steps that they made. Steps that will be found in the store are taken for steps to be made.
    """

    terminal: Terminal
    bars: Progress
    whole: TaskID
    jobs: int
    steps: int  # of all jobs
    begun: int = 0  # jobs
    over: int = 0  # steps of the jobs that are over
    busy: float = 0.0  # seconds of those that made steps
    made: int = 0  # steps of theirs
    label: str = ""
    task: TaskID | None = None
    total: int = 0  # steps of the job at hand, and so are the rest
    done: int = 0
    own: int = 0  # those that it made
    tokens: int = 0
    seconds: float = 0.0
    started: float = 0.0
    last_line: float = field(default_factory=monotonic)

    def expect(self, jobs: int, steps: int) -> None:
        """So many jobs, with so many steps in all, are to be done."""
        self.jobs, self.steps = self.jobs + jobs, self.steps + steps
        self.bars.update(self.whole, total=self.steps)
        self.bars.start()

    def job(self, label: str, total_steps: int) -> None:
        """Begin an arm (or a trial) of so many steps."""
        self.close()
        self.begun += 1
        self.label, self.total, self.done, self.own = label, total_steps, 0, 0
        self.tokens, self.seconds, self.started = 0, 0.0, monotonic()
        self.task = self.bars.add_task(
            self.terminal.escaped(label), total=max(total_steps, 1), state="looking in the store"
        )
        self._say_left()
        self._line(self._left())

    def wait(self, label: str, text: str) -> None:
        """What is left is another process's."""
        self.close()
        self.label = label
        self.task = self.bars.add_task(self.terminal.escaped(label), total=1, state=text)
        self._line(text)

    def stage(self, text: str) -> None:
        """What is going on besides training."""
        if self.task is not None:
            self.bars.update(self.task, state=text)
        self._line(text)

    def step(self, link: str, loss: float, tokens: int, seconds: float, made: bool) -> None:
        """One more optimizer step is there: made, or found."""
        self.done += 1
        self.own += made
        self.tokens += tokens
        self.seconds += seconds
        rate = self.tokens / max(self.seconds, 1e-9)
        left = duration(self.seconds / self.done * (self.total - self.done))
        state = f"{link} loss {loss:.3f} {rate:.0f} tok/s, {left} of training left"
        if self.task is not None:
            self.bars.update(self.task, completed=self.done, state=state)
        self.bars.update(self.whole, completed=self.over + self.done)
        self._say_left()
        if monotonic() - self.last_line >= LINE_EVERY_SECONDS:
            self._line(f"step {self.done}/{self.total} {state}; {self._left()}")

    def skip(self, steps: int) -> None:
        """A job whose result is there already: its steps will not be made."""
        self.close()
        self.begun += 1
        self.total = steps
        self.close()

    def close(self) -> None:
        """The job is over, whether it came to its end or failed; its bar goes."""
        if self.own:
            self.busy += monotonic() - self.started
            self.made += self.own
        self.over += self.total
        self.total, self.done, self.own = 0, 0, 0
        self.bars.update(self.whole, completed=self.over)
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def _left(self) -> str:
        """Which job of all it is, and how long all of them may take."""
        made, busy = self.made, self.busy
        if self.own:
            made, busy = made + self.own, busy + monotonic() - self.started
        place = f"job {self.begun} of {self.jobs}"
        return f"{place}, about {duration(busy / made * (self.steps - self.over - self.done))} left" if made else place

    def _say_left(self) -> None:
        self.bars.update(self.whole, state=self._left())

    def _line(self, text: str) -> None:
        if not self.terminal.console.is_terminal:
            self.terminal.say(f"{self.label}: {text}")
            self.last_line = monotonic()
