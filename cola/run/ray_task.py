"""What runs on the nodes of a Ray cluster: a worker as a Ray task, and the post between it and the command. No torch.

Nothing is imported here that reads the environment, so that a worker can be given the command's first.
"""

import asyncio
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cola.tree.leases import EXPIRY, sees

COMMAND = "command"  # the command's own box
END = None  # a letter after which there is none


class Post:
    """An actor that keeps letters until they are taken. In Ray all who write can reach it, and no port is opened."""

    def __init__(self) -> None:
        self._boxes = defaultdict[str, asyncio.Queue[Any]](asyncio.Queue)

    async def put(self, box: str, letter: Any) -> None:
        """Leave a letter in a box."""
        self._boxes[box].put_nowait(letter)

    async def take(self, box: str) -> list[Any]:
        """All that lies in a box; waits for the first."""
        letters, queue = [await self._boxes[box].get()], self._boxes[box]
        while not queue.empty():
            letters.append(queue.get_nowait())
        return letters


class Line:
    """A worker's end of the post, as that of a pipe: an EOFError or OSError where there is no other end any more."""

    def __init__(self, post: Any, box: str) -> None:
        self._post, self._box, self._letters, self._last = post, box, list[Any](), None

    def send(self, words: Any) -> None:
        self._last = self._post.put.remote(COMMAND, (self._box, words))  # in order, and waited for by nobody

    def recv(self) -> Any:
        if not self._letters:
            try:
                self._letters = ray.get(self._post.take.remote(self._box))
            except RayError as error:
                raise EOFError from error
        if (letter := self._letters.pop(0)) is END:
            raise EOFError
        return letter

    def flush(self) -> None:
        """Until what was sent has arrived."""
        if self._last is not None:
            ray.get(self._last)


@dataclass(frozen=True)
class Shared:
    """What the command and its workers must have in common."""

    folders: tuple[Path, ...]  # in each of which the command holds a lease
    holder: str  # the command, as its leases name it
    version: str
    card: bool  # whether the command computes on one: a base on a card is another by name
    directory: str  # where the command was begun, from which a recipe's paths go
    variables: dict[str, str]  # of the command's environment: where files lie, and whether the hub may be asked
    patience: float = EXPIRY / 2  # seconds for which a network file system may show an old state

    def trouble(self) -> str | None:
        """What this node has not; None where it has all."""
        node = f"node {ray.util.get_node_ip_address()} of the cluster"
        if (mine := version("chain-of-lora")) != self.version:
            return f"{node} has cola {mine}, and this command is {self.version}: install one version on all"
        for folder in self.folders:
            until = time.monotonic() + self.patience
            while not sees(folder, self.holder):
                if time.monotonic() > until:
                    place = folder.parent if folder.name == ".lease" else folder.parent.parent
                    return (
                        f"{place}: {node} does not see this folder as this machine does: put the recipe's output and "
                        "the store (COLA_STORE) onto a disk that all nodes share, under one path"
                    )
                time.sleep(1)
        if not Path(self.directory).is_dir():
            return (
                f"{self.directory}: {node} has no such folder, from which the recipe's paths go: begin in a shared one"
            )
        return None


def serve(place: Any, log: Path, post: Any, box: str, shared: Shared) -> int | None:
    """Work as one process of a command, until it says no more; the exit code that a process would have."""
    line = Line(post, box)
    if (trouble := shared.trouble()) is None:
        os.environ.update(shared.variables)
        os.chdir(shared.directory)
        trouble = _settled(place, shared)
    if trouble is not None:
        line.send(("error", trouble, False))
        line.flush()
        return 2
    from cola.run.worker import work

    code = None
    try:
        work(place, log, line)
    except SystemExit as end:
        code = end.code
    line.flush()
    return code if isinstance(code, int) else None


def _settled(place: Any, shared: Shared) -> str | None:
    import torch  # with what reads the environment

    from cola.run.worker import settle

    settle(place)
    if torch.cuda.is_available() == shared.card:
        return None
    return "torch finds no card" if shared.card else "torch finds a card, though none was asked for"
