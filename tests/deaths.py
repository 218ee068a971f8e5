"""How a process of cola is killed: at a call of the system's, at a place of the computation, or after a time."""

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from children import PASSED, command

from cola import chain
from cola.link import forward, train
from cola.measure import evaluate
from cola.run import start, workers
from cola.run.worker import Place, work

PACKAGE = f"{Path(chain.__file__).parent}/"
# What Python says of each call before it makes it (PEP 578): a name, or of `open` its flags.
AUDITED = {"os.rename": "rename", "os.remove": "unlink", "os.link": "link", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
CALLS = ("fsync", *AUDITED.values(), "create", "write", "rmtree")
MOMENTS = ("step", "knot", "half a knot", "pass", "score")
TIME = "time"
KINDS = (*CALLS, *MOMENTS, TIME)
# What a process was at, by the innermost of these that it was in.
STAGES = {
    "report/to_wandb.py": "W&B",
    "report/tracking.py": "W&B",
    "export/": "export",
    "tree/prune.py": "prune",
    "report/page.py": "report",
    "report/drawing.py": "report",
    "compare/": "report",
    "link/residual.py": "knot",
    "chain.py tie": "knot",
    "measure/spectrum.py": "spectra",
    "measure/selfcheck.py": "self-check",
    "measure/evaluate.py": "scoring",
    "run/scoring.py": "scoring",
    "link/train.py": "training",
    "run/training.py": "training",
    "run/ended.py": "between two jobs",
    "run/one_job.py": "a job's files",
    "run/prepare.py": "beginning",
    "tree/mend.py": "beginning",
    "tree/run_holder.py": "beginning",
    "cli/show.py": "report",
}


@dataclass(frozen=True)
class Death:
    """A kill -9 that waits for a process, once."""

    kind: str  # of KINDS
    after: float  # at which call, counted from 1, or after how many seconds
    who: int  # 0: the command; else the worker of that number
    note: Path  # where the process says at the last what it is at

    def come(self, frame: FrameType | None) -> None:
        """Note what the process is at, and kill it; nothing where it was killed once."""
        try:
            file = os.open(self.note, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return
        told = {**asdict(self), "note": None, "stage": stage_of(frame), "at": at(frame)[:6]}
        os.write(file, json.dumps(told).encode())
        os.kill(os.getpid(), signal.SIGKILL)


def at(frame: FrameType | None) -> list[str]:
    """The functions of cola that a process is in, from the innermost out."""
    found = []
    while frame is not None:
        if (name := frame.f_code.co_filename).startswith(PACKAGE):
            found.append(f"{name.removeprefix(PACKAGE)} {frame.f_code.co_name}")
        frame = frame.f_back
    return found


def stage_of(frame: FrameType | None) -> str:
    """What a process was at, in words; of a trial's job that it was one."""
    names = at(frame)
    stage = next((STAGES[part] for name in names for part in STAGES if name.startswith(part)), "the rest")
    while frame is not None and at(frame)[:1] != ["run/one_job.py do"]:
        frame = frame.f_back
    return f"trial: {stage}" if frame is not None and frame.f_locals["job"].trial else stage


class Calls:
    """Counts a process's calls of each kind; where `death` is one, it comes before the n-th."""

    def __init__(self, death: Death | None) -> None:
        self.death = death
        self.count: Counter[str] = Counter()
        self.dying = False

    def __call__(self, kind: str) -> None:
        comes = self.comes(kind)
        self.count[kind] += 1
        if comes and self.death is not None:
            self.dying = True  # its note is a file that it opens
            self.death.come(sys._getframe(1))
            self.dying = False

    def comes(self, kind: str) -> bool:
        """Whether the next call of this kind is the last."""
        return self.death is not None and self.death.kind == kind and self.count[kind] + 1 == self.death.after

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if self.dying:
            return
        if event == "open" and isinstance(flags := arguments[2], int):
            if flags & os.O_EXCL:
                self("create")
            elif flags & (os.O_WRONLY | os.O_RDWR):
                self("write")
        elif event in AUDITED:
            self(AUDITED[event])

    def before(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self(kind)
            return function(*args, **kwargs)

        return counted

    def in_the_middle(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """A knot, of which half is written when the process is killed."""

        def counted(model: Any, base: Any, residual: Any, names: list[str], *how: Any) -> Any:
            if self.comes("half a knot"):
                write(model, base, residual, names[: len(names) // 2], *how)
            self("half a knot")
            return write(model, base, residual, names, *how)

        return counted

    def install(self) -> None:
        """Count in this process from now on."""
        sys.addaudithook(self.heard)
        os.fsync = self.before("fsync", os.fsync)
        shutil.rmtree = self.before("rmtree", shutil.rmtree)
        torch.optim.AdamW.step = self.before("step", torch.optim.AdamW.step)
        chain.residual.write = self.in_the_middle(self.before("knot", chain.residual.write))
        train.logits_at = evaluate.logits_at = self.before("pass", forward.logits_at)
        evaluate.Evaluator.__call__ = self.before("score", evaluate.Evaluator.__call__)
        if self.death is not None and self.death.kind == TIME:
            threading.Thread(target=self.wait, args=(self.death, threading.get_ident()), daemon=True).start()

    def wait(self, death: Death, thread: int) -> None:
        """Kill the process after the time, whatever its first thread is in."""
        time.sleep(death.after)
        self.dying = True
        death.come(sys._current_frames().get(thread))


def mortal(death: Death, place: Place, log: Path, pipe: Connection) -> None:
    """A worker whose death waits for it."""
    if death.who == place.number:
        Calls(death).install()
    work(place, log, pipe)


def live(
    words: list[str], said: Path, passed: dict[str, str], drawn: bool, death: Death | None, counts: Path | None
) -> None:
    """A command line of cola, in a process that was forked for it; it, or a worker of it, is killed. `counts`: where
    to write how many calls of each kind it has made."""
    for name in PASSED:
        os.environ.pop(name, None)
    os.environ.update(passed)
    tempfile.tempdir = None
    gc.freeze()  # accelerate collects garbage at every link, among all that was imported
    # Its workers are forked from the server that it was forked from itself, which has imported all.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    start.CORES = 2  # two workers are to race, on a single core too
    own = death if death is not None and not death.who else None
    if death is not None and death.who:
        workers.work = partial(mortal, death)
    calls = Calls(own)
    calls.install()
    try:
        command(words, said, passed["COLA_CACHE"], drawn)
    finally:
        if counts is not None:
            counts.write_text(json.dumps(calls.count))
