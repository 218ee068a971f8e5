"""One of several processes that do a run's jobs: it is told one after the other, and tells how far it is."""

import contextlib
import os
import queue
import signal
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console

from cola.errors import ColaError, LeaseLost
from cola.files import without_home
from cola.recipe.plan import Job, jobs_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import RunProgress, Terminal, Whole, bars_on
from cola.run.assignment import Bench
from cola.run.ended import SpectrumFiles, want_weights
from cola.run.interrupt import RESUMABLE, Interrupted, Signals
from cola.run.one_job import do, key_of
from cola.run.prepare import prepared
from cola.run.search import chosen_jobs
from cola.tree.leases import check_held, claim
from cola.tree.run_folder import RunFolder

# How a job has ended here: its result is there; another command is at it; this process has lost it to one.
Ended = Literal["ended", "busy", "lost"]


@dataclass(frozen=True)
class Place:
    """What a worker has of the machine."""

    number: int  # counted from 1
    threads: int
    card: str | None  # what CUDA_VISIBLE_DEVICES says; None without cards


@dataclass(frozen=True)
class RayPlace(Place):
    """What a worker has of a Ray cluster: so many cores as it has threads, and a card or none."""

    cards: int


@dataclass(frozen=True)
class Point:
    """A run whose jobs are done: of `cola run` the one, of an ablation one of several."""

    recipe: Recipe
    folder: Path
    group: str | None
    siblings: tuple[Recipe, ...]  # of the ablation's other points


@dataclass(frozen=True)
class Order:
    """What a worker is told to do."""

    point: Point
    job: Job
    tracked: frozenset[tuple[str, int, str]]  # what the tracker has been sent by others


class Told(RunProgress):
    """Progress that is told to the command, and written into the worker's log."""

    tell: partial[None]

    def job(self, label: str, total_steps: int) -> None:
        self.tell("job", label, total_steps)
        super().job(label, total_steps)

    def stage(self, text: str) -> None:
        self.tell("stage", text)
        super().stage(text)

    def step(self, link: str, loss: float, tokens: int, seconds: float, made: bool) -> None:
        self.tell("step", link, loss, tokens, seconds, made)
        super().step(link, loss, tokens, seconds, made)


@dataclass
class Log(Terminal):
    """A worker's terminal: its log, which lies in the run folder and names no home. What it warns of while it is at a
    job, the command says too."""

    tell: partial[None] | None = None

    def warn(self, text: str) -> None:
        if self.tell is not None:
            self.tell("warn", text)
        super().warn(without_home(text))

    def say(self, text: str = "") -> None:
        super().say(without_home(text))


class Pipe(Protocol):
    """The other end of what the command listens to; an OSError or EOFError where that has gone."""

    def send(self, words: Any) -> None: ...
    def recv(self) -> Any: ...


def work(place: Place, log: Path, pipe: Pipe) -> None:
    """Do what the pipe orders until it is closed; SIGTERM ends it in a checkpoint and exit code 75."""
    with contextlib.suppress(PermissionError):  # it leads a group of its own
        os.setsid()  # Ctrl-C reaches the command, which passes it on once
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    settle(place)
    tell = partial(_tell, pipe)
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    try:
        with Signals(once=True).installed() as signals, ExitStack() as held:
            tell("ready")
            worker = Worker(place, tell, signals, held)
            while True:
                tell("done", *worker.do(orders.get()))
    except Interrupted:
        raise SystemExit(RESUMABLE) from None
    except ColaError as error:
        tell("error", str(error), isinstance(error, LeaseLost))
        raise SystemExit(2) from None


def settle(place: Place) -> None:
    """Keep to what this process has of the machine."""
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    torch.set_num_threads(place.threads)
    if place.card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.card


def _tell(pipe: Pipe, *words: Any) -> None:
    try:
        pipe.send(words)
    except OSError:  # the command was killed: what is done is kept, and this process ends
        os.kill(os.getpid(), signal.SIGTERM)


def _listen(pipe: Pipe, orders: queue.SimpleQueue[Order]) -> None:
    try:
        while True:
            orders.put(pipe.recv())
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


class Worker:
    """Does jobs of any of the points, each of which is prepared when it is first met."""

    def __init__(self, place: Place, tell: partial[None], signals: Signals, held: ExitStack) -> None:
        self._place, self._tell, self._signals, self._held = place, tell, signals, held
        self._benches: dict[Path, tuple[Bench, list[Job], SpectrumFiles]] = {}
        self._log = Log(Console(highlight=False, soft_wrap=True, force_terminal=False))
        bars = bars_on(self._log.console)
        self._progress = Told(self._log, Whole(bars, bars.add_task("", total=0, state="")))
        self._progress.tell = tell

    def do(self, order: Order) -> tuple[Ended, frozenset[tuple[str, int, str]]]:
        """Do a job unless another command is at it; how that ended, and what the tracker was sent."""
        bench, jobs, files = self._bench(order.point)
        bench.tracked.update(order.tracked)
        self._log.tell = self._tell
        try:
            with claim(bench.store.path, key_of(bench, order.job)) as mine:
                if not mine:
                    return "busy", frozenset()
                mates = [job for job in jobs if job.seed == order.job.seed]
                want_weights(bench, mates, files)
                do(bench, order.job)
                files.update(chosen_jobs(bench, [job for job in mates if not job.trial]))
                # The command wants what others of the seed will look at.
                want_weights(bench, (), files)
            return "ended", frozenset(bench.tracked - order.tracked)
        except LeaseLost as lost:
            check_held()  # the store's is another matter
            self._log.warn(f"{order.job.label}: {lost}")
            return "lost", frozenset()
        finally:
            self._log.tell = None

    def _bench(self, point: Point) -> tuple[Bench, list[Job], SpectrumFiles]:
        if point.folder not in self._benches:
            bench = self._held.enter_context(
                prepared(
                    point.recipe,
                    RunFolder(point.folder),
                    self._signals,
                    self._progress,
                    point.group,
                    siblings=point.siblings,
                    notes=f"workers/{self._place.number}/segments.json",
                )
            )
            self._benches[point.folder] = bench, jobs_of(bench.recipe), SpectrumFiles(bench)
        return self._benches[point.folder]
