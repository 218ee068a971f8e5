"""`--workers N`: several processes of this machine do the jobs of one run, or of all points of an ablation.

The command prepares, hands out the jobs one by one, shows how far each process is, and reports; it trains nothing.
Each job is claimed in the store as any other command's is, so that several commands share the work all the same. A
process that dies is said and another one takes its place; the store has what it had kept.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from cola.errors import LeaseLost, RunFolderError
from cola.recipe.plan import Job, jobs_of, trials_of
from cola.report.terminal import RunProgress
from cola.run.announce import say_plan
from cola.run.assignment import Bench
from cola.run.ended import SpectrumFiles, let_full_weights_go, want_weights
from cola.run.interrupt import Interrupted
from cola.run.one_job import record_end
from cola.run.search import chosen_jobs, known_jobs
from cola.run.worker import Order, Place, Point, work

LOOK_AGAIN = 1.0  # seconds until a job is asked for again that another command was at
DEATHS = 2  # of workers, at one job, until that has failed


@dataclass(eq=False)
class Asked:
    """A run that is prepared, and what of it is to be done."""

    point: Point
    bench: Bench
    left: list[Job] = field(default_factory=list)  # neither ended nor failed; those at hand among them
    error: str | None = None  # what keeps all that is left from being done

    def __post_init__(self) -> None:
        self.jobs = jobs_of(self.bench.recipe)
        self.files = SpectrumFiles(self.bench)
        self.bench.ready.clear()  # the workers load their own

    def begin(self) -> None:
        """Say the plan, and note what is needed of the store."""
        bench, self.left = self.bench, list(self.jobs)
        known = known_jobs(bench, self.jobs)
        want_weights(bench, self.jobs, self.files)
        bench.folder.forget_workers()  # of an earlier session: what they have noted is noted here
        say_plan(bench, known, self.left)
        self.searching = len(known) < len(self.left)
        for job in [job for job in self.jobs if bench.folder.status(job) == "ok"]:
            bench.progress.skip(bench.tree.lineage(job).n_steps)
            self.end(job)

    def is_open(self, job: Job) -> bool:
        """Whether the trials that a job chooses among have ended."""
        return bool(job.trial) or not set(self.left).intersection(trials_of(self.bench.recipe, job.arm, job.seed))

    def end(self, job: Job) -> None:
        """What follows when a job has come to its end, whoever did it."""
        bench = self.bench
        self.left.remove(job)
        self.files.update(chosen_jobs(bench, [mate for mate in self.jobs if mate.seed == job.seed and not mate.trial]))
        known = known_jobs(bench, self.jobs)
        want_weights(bench, self.jobs, self.files)
        let_full_weights_go(bench, job.seed)
        if self.searching and not any(other.trial for other in self.left):
            say_plan(bench, known, known)
            self.searching = False


@dataclass(eq=False)
class Task:
    """A job of a run, until it has ended."""

    run: Asked
    job: Job
    deaths: int = 0  # of workers that were at it
    not_before: float = 0.0


class Hand:
    """A worker as the command sees it."""

    def __init__(self, place: Place, log: Path, progress: RunProgress) -> None:
        self.place, self.log, self.progress = place, log, progress
        self.task: Task | None = None
        self.ready = False
        self.began = perf_counter()
        mine, theirs = connection.Pipe()
        self.pipe = mine
        self.process = _context(place).Process(target=work, args=(place, log, theirs), name=f"worker-{place.number}")
        self.process.start()
        theirs.close()  # so that its death is the pipe's end

    def order(self, task: Task, tracked: frozenset[tuple[str, int, str]]) -> None:
        """Have it do a job."""
        self.task = task
        with contextlib.suppress(OSError):  # it has died, which is found when it is next listened to
            self.pipe.send(Order(task.run.point, task.job, tracked))

    def stop(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        if self.process.pid and self.process.is_alive():
            os.kill(self.process.pid, number)

    def end(self) -> int | None:
        """Its exit code, when its pipe has come to an end."""
        self.pipe.close()
        self.process.join(60)
        return self.process.exitcode


def _context(place: Place) -> Any:
    """Forked from a server that has imported all and computed nothing; with cards each is begun anew, since a process
    that was forked cannot use what its parent has asked of CUDA."""
    return multiprocessing.get_context("spawn" if place.card is not None else "forkserver")


@contextmanager
def crew(places: Sequence[Place], logs: Path, progress: RunProgress) -> Iterator["Crew"]:
    """Workers, begun now; whatever happens, none outlives the command."""
    hands = Crew(places, logs, progress)
    try:
        yield hands
    finally:
        hands.close()


class Crew:
    """Hands out jobs to workers, and hears what becomes of them."""

    def __init__(self, places: Sequence[Place], logs: Path, progress: RunProgress) -> None:
        self._logs, self._progress, self._tasks = logs, progress, list[Task]()
        self._tracked: frozenset[tuple[str, int, str]] = frozenset()
        self._hands = [Hand(place, self._log(place), progress.beside(f"worker {place.number}")) for place in places]
        self._unready = 0  # that died before they had begun, in a row

    def do(self, runs: Sequence[Asked]) -> bool:
        """Do the jobs of these runs; returns whether the user stopped it. LeaseLost where a worker has lost the store;
        a RunFolderError where no worker can be begun."""
        self._tasks = [Task(run, job) for run in runs for job in run.left]
        try:
            while self._tasks:
                self._hand_out()
                self._listen(0.2)
        except Interrupted:
            self._wind_down()
            return True
        return False

    def close(self) -> None:
        """End the workers, which have nothing at hand, or whose work nobody waits for."""
        for hand in self._hands:
            hand.pipe.close()
            hand.stop(signal.SIGTERM)
        for hand in self._hands:
            hand.process.join(60)
            hand.stop(signal.SIGKILL)

    def _log(self, place: Place) -> Path:
        return self._logs / "workers" / str(place.number) / "log.txt"

    def _hand_out(self) -> None:
        at_hand = {id(hand.task) for hand in self._hands}
        for hand in self._hands:
            if hand.task is not None or not hand.ready:
                continue
            now = monotonic()
            free = [task for task in self._tasks if id(task) not in at_hand and task.not_before <= now]
            task = next((task for task in free if task.run.is_open(task.job)), None)
            if task is not None:
                at_hand.add(id(task))
                hand.order(task, self._tracked)

    def _listen(self, seconds: float) -> None:
        for pipe in connection.wait([hand.pipe for hand in self._hands], seconds):
            hand = next(hand for hand in self._hands if hand.pipe is pipe)
            try:
                kind, *words = hand.pipe.recv()
            except (EOFError, OSError):
                self._take_over(hand)
                continue
            self._hear(hand, kind, words)

    def _hear(self, hand: Hand, kind: str, words: list[Any]) -> None:
        match kind:
            case "ready":
                hand.ready, self._unready = True, 0
            case "job" | "stage" | "step":
                getattr(hand.progress, kind)(*words)
            case "warn":
                self._progress.terminal.warn(f"{hand.progress.worker}: {words[0]}")
            case "error":
                message, lost = words
                if lost:
                    raise LeaseLost(message)
                self._give_up(hand, message)
            case "done":
                self._end(hand, *words)

    def _end(self, hand: Hand, how: str, sent: frozenset[tuple[str, int, str]]) -> None:
        task, hand.task = hand.task, None
        assert task is not None
        self._tracked |= sent
        if how == "lost":
            hand.progress.again()
            return
        if how == "busy":
            task.not_before = monotonic() + LOOK_AGAIN
            if hand.progress.task is None and len(self._tasks) == 1:
                hand.progress.wait(task.job.label, "another command is at it, and at all that is left; waiting")
            return
        hand.progress.close()
        if task in self._tasks:
            self._tasks.remove(task)
        task.run.end(task.job)

    def _give_up(self, hand: Hand, message: str) -> None:
        """What a worker cannot prepare, or no job can have (a base that is not there), none of them can."""
        task, hand.task = hand.task, None
        hand.progress.close()
        if task is not None:
            task.run.error = message
            self._tasks = [other for other in self._tasks if other.run is not task.run]

    def _take_over(self, hand: Hand) -> None:
        """A worker has ended: another one takes its place, and its job is handed out again."""
        task, code = hand.task, hand.end()
        hand.progress.again()
        if task is not None or not hand.ready:
            self._say_death(hand, task, code)
        if not hand.ready:
            self._unready += 1
            if self._unready > len(self._hands) + 1:
                raise RunFolderError(f"workers end before they have begun; {hand.log} says why")
        if task is not None and task in self._tasks:
            task.deaths += 1
            if task.deaths >= DEATHS:
                reason = f"{DEATHS} workers have ended at it, the last one {_said(code)}; see {hand.log}"
                record_end(task.run.bench, task.job, "failed", hand.began, reason)
                self._progress.terminal.warn(f"{task.job.label} failed, the others go on: {reason}")
                self._tasks.remove(task)
                task.run.end(task.job)
        self._hands[self._hands.index(hand)] = Hand(hand.place, hand.log, hand.progress)

    def _say_death(self, hand: Hand, task: Task | None, code: int | None) -> None:
        at = f"; its work ({task.job.label}) is taken over" if task is not None else ""
        self._progress.terminal.warn(f"{hand.progress.worker} has ended, {_said(code)}{at}; {hand.log} says more")

    def _wind_down(self) -> None:
        """Have all workers keep a checkpoint and end; a second signal ends them at once."""
        self._progress.terminal.say("stopping: each worker keeps a checkpoint")
        try:
            for hand in self._hands:
                hand.stop(signal.SIGTERM)
            while self._hands:
                for pipe in connection.wait([hand.pipe for hand in self._hands]):
                    hand = next(hand for hand in self._hands if hand.pipe is pipe)
                    try:
                        hand.pipe.recv()
                    except (EOFError, OSError):
                        hand.end()
                        self._hands.remove(hand)
        except KeyboardInterrupt:
            for hand in self._hands:
                hand.stop(signal.SIGKILL)
            raise


def _said(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (for memory, perhaps)" if name == "SIGKILL" else "")
    return f"with exit code {code}" if code is not None else "for no reason that can be told"


def do_runs(runs: Sequence[Asked], places: Sequence[Place], logs: Path, progress: RunProgress) -> bool:
    """Do all jobs of some runs with workers; returns whether the user stopped it."""
    interrupted = False
    with crew(places, logs, progress) as hands:
        for run in runs:
            run.begin()
        interrupted = hands.do(runs)
    for run in runs:
        run.bench.write_references()
        run.bench.folder.forget_workers()
        for seed in run.bench.recipe.seeds:  # one that has died may have wanted weights until now
            let_full_weights_go(run.bench, seed)
    return interrupted
