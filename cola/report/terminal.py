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


def bars_on(console: Console) -> Progress:
    """Bars that show where the console is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=not console.is_terminal,
    )


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
        bars = bars_on(self.console)
        whole = Whole(bars, bars.add_task("all jobs", total=0, state=""))
        progress = RunProgress(self, whole)
        try:
            if jobs:
                progress.expect(jobs, total_steps)
            yield progress
        finally:
            bars.stop()


@dataclass
class Whole:
    """What is done of all jobs.

    What is left is told by the jobs that trained anything in this session: their time, scoring and loading included, by
    the steps that they made. Steps that will be found in the store are taken for steps to be made.
    """

    bars: Progress
    task: TaskID
    jobs: int = 0
    steps: int = 0  # of all jobs
    begun: int = 0  # jobs
    over: int = 0  # steps of the jobs that are over
    busy: float = 0.0  # seconds of those that made steps
    made: int = 0  # steps of theirs
    at_work: "list[RunProgress]" = field(default_factory=list)  # one for each process


@dataclass
class RunProgress:
    """Progress of a run; `job` begins an arm, `step` and `stage` tell where it is."""

    terminal: Terminal
    whole: Whole
    worker: str = ""  # which of several processes does the jobs
    label: str = ""
    task: TaskID | None = None
    total: int = 0  # steps of the job at hand, and so are the rest
    done: int = 0
    own: int = 0  # those that it made
    tokens: int = 0
    seconds: float = 0.0
    started: float = 0.0
    last_line: float = field(default_factory=monotonic)
    at: bool = False  # whether there is a job at hand

    def __post_init__(self) -> None:
        self.whole.at_work.append(self)

    @property
    def bars(self) -> Progress:
        """What a terminal shows."""
        return self.whole.bars

    def beside(self, worker: str) -> "RunProgress":
        """The same run's progress in one of several processes; there is none in this one then."""
        if self in self.whole.at_work:
            self.whole.at_work.remove(self)
        return RunProgress(self.terminal, self.whole, worker)

    def expect(self, jobs: int, steps: int) -> None:
        """So many jobs, with so many steps in all, are to be done."""
        self.whole.jobs, self.whole.steps = self.whole.jobs + jobs, self.whole.steps + steps
        self.bars.update(self.whole.task, total=self.whole.steps)
        self.bars.start()

    def job(self, label: str, total_steps: int) -> None:
        """Begin an arm (or a trial) of so many steps."""
        self.close()
        self.at = True
        self.whole.begun += 1
        self.label, self.total, self.done, self.own = self._named(label), total_steps, 0, 0
        self.tokens, self.seconds, self.started = 0, 0.0, monotonic()
        self.task = self.bars.add_task(
            self.terminal.escaped(self.label), total=max(total_steps, 1), state="looking in the store"
        )
        self._say_left()
        self._line(self._left())

    def wait(self, label: str, text: str) -> None:
        """What is left is another process's."""
        self.close()
        self.label = self._named(label)
        self.task = self.bars.add_task(self.terminal.escaped(self.label), total=1, state=text)
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
        self._say_done()
        self._say_left()
        if monotonic() - self.last_line >= LINE_EVERY_SECONDS:
            self._line(f"step {self.done}/{self.total} {state}; {self._left()}")

    def skip(self, steps: int) -> None:
        """A job whose result is there already: its steps will not be made."""
        self.close()
        self.whole.begun += 1
        self.total = steps
        self.close()

    def again(self) -> None:
        """The job at hand was not done, and will be begun once more."""
        self.whole.begun -= self.at
        self.total = 0
        self.close()

    def close(self) -> None:
        """The job is over, whether it came to its end or failed; its bar goes."""
        if self.own:
            self.whole.busy += monotonic() - self.started
            self.whole.made += self.own
        self.whole.over += self.total
        self.total, self.done, self.own, self.at = 0, 0, 0, False
        self._say_done()
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def _named(self, label: str) -> str:
        return f"{self.worker}: {label}" if self.worker else label

    def _left(self) -> str:
        """Which job of all it is, and how long all of them may take."""
        whole = self.whole
        training = [one for one in whole.at_work if one.own]
        made = whole.made + sum(one.own for one in training)
        busy = whole.busy + sum(monotonic() - one.started for one in training)
        place = f"job {whole.begun} of {whole.jobs}"
        if not made:
            return place
        left = whole.steps - whole.over - sum(one.done for one in whole.at_work)
        return f"{place}, about {duration(busy / made * left / max(len(whole.at_work), 1))} left"

    def _say_done(self) -> None:
        done = self.whole.over + sum(one.done for one in self.whole.at_work)
        self.bars.update(self.whole.task, completed=done)

    def _say_left(self) -> None:
        self.bars.update(self.whole.task, state=self._left())

    def _line(self, text: str) -> None:
        if not self.terminal.console.is_terminal:
            self.terminal.say(f"{self.label}: {text}")
            self.last_line = monotonic()
