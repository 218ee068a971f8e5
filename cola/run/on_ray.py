"""`--on ray`: workers as tasks of a Ray cluster, each with its cores, card and memory.

Ray decides where and when a worker runs; which job it does is handed out as to processes of this machine
(`workers.py`), which also begins a new one where one has died. So Ray is to try none again by itself: it would not know
of the job that was at hand, nor when to give that up.
"""

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cola.errors import RanksLost, RecipeError, one_line, plain
from cola.files import store_path
from cola.report.terminal import RunProgress
from cola.run.asked import Asked
from cola.run.hands import End, Hand, said_of
from cola.run.ray_task import COMMAND, END, Post, Shared, serve
from cola.run.worker import Order, Place, RayPlace
from cola.tree.foreseen import Foreseen
from cola.tree.leases import IN_USE
from cola.tree.process import this_process
from cola.tree.run_holder import LEASE

# Where files lie, and whether the hub may be asked; never a key.
PASSED = ("COLA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM")
CONNECT_SECONDS = 10


# ---------------------------------------------------------------------------------------------------------
# The cluster


def join(on: str, n_cores: int) -> None:
    """Connect to the cluster, or begin one of so many cores of this machine; a RecipeError where it is not reached."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of one begun here: nothing is sent to anybody
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if on != "ray":
            _need_answer(on)
            ray.init(on, **quiet)
            return
        try:
            ray.init("auto", **quiet)
        except ConnectionError:
            if "RAY_ADDRESS" in os.environ:
                raise
            ray.init("local", num_cpus=n_cores, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, exceptions.RayError) as error:
        raise RecipeError(f"--on {plain(on)}: no Ray cluster is reached: {one_line(error)}") from error
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself
            signal.signal(number, handler)


def _need_answer(on: str) -> None:
    """Ray asks for minutes of an address at which nobody answers."""
    parts = urlsplit(on)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 10001), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--on {plain(on)}: nobody answers there ({one_line(error)}); `ray start --head` begins a cluster whose "
            "address for commands from outside is ray://HOST:10001"
        ) from error


def places_on(asked: str | None) -> list[Place]:
    """The places of as many workers as are asked for, or as there is room for; a RecipeError where that is too many."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    own = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None  # the user's word
    n_cards = int(torch.cuda.is_available())
    number, threads = divided(nodes, int(asked) if asked else None, n_cards, own)
    card = None if n_cards else ""  # where Ray gives none, none is to be found
    return [RayPlace(place, threads, card, n_cards) for place in range(1, number + 1)]


def divided(nodes: Sequence[dict[str, float]], asked: int | None, n_cards: int, own: int | None) -> tuple[int, int]:
    """How many workers a cluster has room for, at most as many as are asked for, and how many threads each has: as many
    as leave room for all that are asked for; else for one on each card, or where there are none on each node. `own`:
    the threads that the user has said."""
    cores = [int(node.get("CPU", 0)) for node in nodes]
    cards = [int(node.get("GPU", 0)) for node in nodes]

    def room(threads: int) -> int:
        each = [n // threads for n in cores]
        return sum(map(min, each, cards)) if n_cards else sum(each)

    most = sum(map(min, cores, cards)) if n_cards else sum(cores)
    if n_cards and not most:
        raise RecipeError(
            "--on ray: this command has a card, so each worker is to have one, and no node of the cluster has any; "
            "CUDA_VISIBLE_DEVICES= before the command computes on cores"
        )
    wanted = asked or (most if n_cards else sum(map(bool, cores)))
    if own and room(own) < (asked or 1):
        raise RecipeError(
            f"--on ray: OMP_NUM_THREADS={own} leaves room for {room(own)} workers on the cluster's {sum(cores)} cores"
        )
    if wanted > most or not most:
        of = "cards" if n_cards else "cores"
        raise RecipeError(f"--workers {wanted}: the cluster has {most} {of}; at most so many workers")
    threads = own or next(number for number in range(max(cores), 0, -1) if room(number) >= wanted)
    return asked or room(threads), threads


# ---------------------------------------------------------------------------------------------------------
# Workers


class RayHand(Hand):
    """A worker that is a Ray task."""

    def __init__(self, office: "Office", place: RayPlace, log: Path, progress: RunProgress) -> None:
        self._office, self._box = office, secrets.token_hex(8)  # another one's letters are not this one's
        self._end = End("for no reason that can be told")
        self._over = threading.Event()
        super().__init__(place, log, progress)

    def _begin(self) -> Connection:
        mine, self._theirs = connection.Pipe()
        self.progress.wait("a Ray task", "it begins where the cluster has room")
        self._task = self._office.begin(self, self.place, self.log, self._box)
        threading.Thread(target=self._watch, daemon=True).start()
        return mine

    def hear(self, words: Any) -> None:
        """What it has told, or that it has ended, for who listens to the pipe."""
        with contextlib.suppress(OSError):  # nobody does any more
            if words is END:
                self._theirs.close()
            else:
                self._theirs.send(words)

    def _watch(self) -> None:
        try:
            self._end = End(said_of(ray.get(self._task)))
        except Exception as error:  # Ray's, and what unpickling raises on a node without cola
            self._end = _end_of(error)
        self._over.set()
        self._office.put(COMMAND, (self._box, END))  # after all that it has told

    def _send(self, order: Order) -> None:
        self._office.put(self._box, order)

    def stop(self, at_once: bool = False) -> None:
        if self._over.is_set():
            return
        self._office.put(self._box, END)
        if at_once or not self.ready:
            with contextlib.suppress(exceptions.RayError, ValueError):
                ray.cancel(self._task, force=at_once)

    def end(self) -> End:
        self.pipe.close()
        self._office.need_there()
        return self._end

    def wait(self) -> None:
        self._over.wait(60)


def _end_of(error: Exception) -> End:
    match error:
        case exceptions.NodeDiedError():
            return End("as its node died", by_its_job=False)
        case exceptions.OutOfMemoryError():
            return End("killed by Ray, as its node had no memory left")
        case exceptions.WorkerCrashedError():
            return End("killed, or crashed")
        case exceptions.TaskCancelledError():
            return End("stopped")
        case exceptions.RayTaskError():
            return End(one_line(getattr(error, "cause", None) or error))
    return End(one_line(error))


class Office:
    """Begins workers on the cluster, and passes on what is written."""

    def __init__(self, shared: Shared, memory: int) -> None:
        self._shared, self._memory = shared, memory
        self._hands: dict[str, RayHand] = {}
        self._lost: str | None = None
        self._serve = ray.remote(max_retries=0, max_calls=1)(serve)
        # With the command, so that no other node's death takes it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._post: Any = ray.remote(Post).options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        threading.Thread(target=self._deliver, daemon=True).start()

    def begin(self, hand: RayHand, place: Place, log: Path, box: str) -> Any:
        """The task of a worker, which the cluster begins where it has room."""
        assert isinstance(place, RayPlace)
        self.need_there()
        self._hands[box] = hand
        asked = self._serve.options(num_cpus=place.threads, num_gpus=place.cards, memory=self._memory or None)
        return asked.remote(place, log, self._post, box, self._shared)

    def put(self, box: str, letter: Any) -> None:
        with contextlib.suppress(exceptions.RayError, ConnectionError):  # the cluster is lost, which is found elsewhere
            self._post.put.remote(box, letter)

    def need_there(self) -> None:
        """RanksLost where the cluster is lost."""
        if self._lost is not None:
            raise RanksLost(
                f"the Ray cluster does not answer any more ({self._lost}); what was kept is whole: the same command "
                "goes on from there"
            )

    def _deliver(self) -> None:
        try:
            while True:
                for box, words in ray.get(self._post.take.remote(COMMAND)):
                    if box is END:
                        return
                    self._hands[box].hear(words)
        except Exception as error:
            self._lost = one_line(error)
            for hand in self._hands.values():
                hand.hear(END)

    def close(self) -> None:
        """Nothing is written any more."""
        self.put(COMMAND, (END, END))


@contextmanager
def office(runs: Sequence[Asked], logs: Path) -> Iterator[Callable[[Place, Path, RunProgress], Hand]]:
    """Where workers of these runs are begun; `logs`: the folder of the run, or of the ablation."""
    stores = {run.bench.store.path for run in runs}
    variables = {name: os.environ[name] for name in PASSED if name in os.environ}
    shared = Shared(
        folders=(logs.resolve() / LEASE, *(store.resolve() / "leases" / IN_USE for store in sorted(stores))),
        holder=this_process().owner,
        version=version("chain-of-lora"),
        card=torch.cuda.is_available(),
        directory=str(Path.cwd()),
        variables=variables | {"COLA_STORE": str(store_path())},
    )
    mine = Office(shared, _memory(runs))

    def begin(place: Place, log: Path, progress: RunProgress) -> Hand:
        assert isinstance(place, RayPlace)
        return RayHand(mine, place, log.resolve(), progress)

    try:
        yield begin
    finally:
        mine.close()


def _memory(runs: Sequence[Asked]) -> int:
    """Bytes that a worker takes of its node by the plan of its largest arm, where it computes on cores; of the largest
    node's no more than there are, since a task that asks for more is never begun. 0: not known."""
    plans = [run.bench.folder.read("plan.json", Foreseen) for run in runs]
    peaks = [arm.peak for plan in plans if plan and plan.device == "cpu" for arm in plan.arms.values()]
    there = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])
    return min(max(peaks, default=0), there)
