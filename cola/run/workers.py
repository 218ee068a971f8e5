"""`--workers N` and `--on ray`: several processes do the jobs of one run, or of all points of an ablation.

The command prepares, hands out the jobs one by one, shows how far each process is, and reports; it trains nothing.
Each job is claimed in the store as any other command's is, so that several commands share the work all the same. A
process that dies is said and another one takes its place; the store has what it had kept. Where a process is begun, on
this machine (`hands.py`) or on a cluster (`on_ray.py`), is all that differs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import connection
from pathlib import Path
from time import monotonic
from typing import Any

from cola.errors import LeaseLost, RunFolderError
from cola.report.terminal import RunProgress
from cola.run.asked import Asked, Task
from cola.run.ended import let_full_weights_go
from cola.run.hands import End, Hand
from cola.run.interrupt import Interrupted
from cola.run.one_job import record_end
from cola.run.worker import Place, RayPlace

Begin = Callable[[Place, Path, RunProgress], Hand]

LOOK_AGAIN = 1.0  # seconds until a job is asked for again that another command was at
DEATHS = 2  # of workers, at one job, until that has failed


@contextmanager
def crew(begin: Begin, places: Sequence[Place], logs: Path, progress: RunProgress) -> Iterator["Crew"]:
    """Workers, begun now; whatever happens, none outlives the command."""
    hands = Crew(begin, places, logs, progress)
    try:
        yield hands
    finally:
        hands.close()


class Crew:
    """Hands out jobs to workers, and hears what becomes of them."""

    def __init__(self, begin: Begin, places: Sequence[Place], logs: Path, progress: RunProgress) -> None:
        self._begin, self._logs, self._progress, self._tasks = begin, logs, progress, list[Task]()
        self._tracked: frozenset[tuple[str, int, str]] = frozenset()
        self._hands = [begin(place, self._log(place), progress.beside(f"worker {place.number}")) for place in places]
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
            hand.stop()
        for hand in self._hands:
            hand.wait()
            hand.stop(at_once=True)

    def _log(self, place: Place) -> Path:
        return self._logs / "workers" / str(place.number) / "log.txt"

    def _hand_out(self) -> None:
        at_hand = {id(hand.task) for hand in self._hands}
        for hand in self._hands:
            if hand.task is not None or not hand.ready or hand.spare:
                continue
            now = monotonic()
            free = [task for task in self._tasks if id(task) not in at_hand and task.not_before <= now]
            task = next((task for task in free if task.run.is_open(task.job)), None)
            if task is not None:
                at_hand.add(id(task))
                hand.order(task, self._tracked)
        self._let_go(sum(id(task) not in at_hand for task in self._tasks))

    def _let_go(self, n_left: int) -> None:
        """End the workers for whom nothing can come to be left: what they have of a machine is of use to others."""
        idle = sorted((hand for hand in self._hands if hand.task is None and not hand.spare), key=lambda one: one.ready)
        for hand in idle[: max(len(idle) - n_left, 0)]:
            hand.spare = True
            hand.stop()

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
        """What a worker cannot prepare, or no job can have (a base that is not there), none of them can; a
        RunFolderError where it could not even begin."""
        if not hand.ready:
            raise RunFolderError(message)
        task, hand.task = hand.task, None
        hand.progress.close()
        if task is not None:
            task.run.error = message
            self._tasks = [other for other in self._tasks if other.run is not task.run]

    def _take_over(self, hand: Hand) -> None:
        """A worker has ended: another one takes its place, and its job is handed out again."""
        task, end = hand.task, hand.end()
        hand.progress.again()
        if hand.spare:
            self._hands.remove(hand)
            return
        if task is not None or not hand.ready:
            self._say_death(hand, task, end)
        if not hand.ready:
            self._unready += 1
            if self._unready > len(self._hands) + 1:
                raise RunFolderError(f"workers end before they have begun, {end.said}; {hand.log} may say why")
        if task is not None and task in self._tasks:
            task.deaths += end.by_its_job
            if task.deaths >= DEATHS:
                reason = f"{DEATHS} workers have ended at it, the last one {end.said}; see {hand.log}"
                record_end(task.run.bench, task.job, "failed", hand.began, reason)
                self._progress.terminal.warn(f"{task.job.label} failed, the others go on: {reason}")
                self._tasks.remove(task)
                task.run.end(task.job)
        self._hands[self._hands.index(hand)] = self._begin(hand.place, hand.log, hand.progress)

    def _say_death(self, hand: Hand, task: Task | None, end: End) -> None:
        at = f"; its work ({task.job.label}) is taken over" if task is not None else ""
        self._progress.terminal.warn(f"{hand.progress.worker} has ended, {end.said}{at}; {hand.log} says more")

    def _wind_down(self) -> None:
        """Have all workers keep a checkpoint and end; a second signal ends them at once."""
        self._progress.terminal.say("stopping: each worker keeps a checkpoint")
        try:
            for hand in self._hands:
                hand.stop()
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
                hand.stop(at_once=True)
            raise


def _place_to_begin(runs: Sequence[Asked], places: Sequence[Place], logs: Path) -> AbstractContextManager[Begin]:
    if not isinstance(places[0], RayPlace):
        return nullcontext(Hand)
    from cola.run.on_ray import office  # where Ray is installed

    return office(runs, logs)


def do_runs(runs: Sequence[Asked], places: Sequence[Place], logs: Path, progress: RunProgress) -> bool:
    """Do all jobs of some runs with workers; returns whether the user stopped it."""
    interrupted = False
    with _place_to_begin(runs, places, logs) as begin, crew(begin, places, logs, progress) as hands:
        for run in runs:
            run.begin()
        interrupted = hands.do(runs)
    for run in runs:
        run.bench.write_references()
        run.bench.folder.forget_workers()
        for seed in run.bench.recipe.seeds:  # one that has died may have wanted weights until now
            let_full_weights_go(run.bench, seed)
    return interrupted
