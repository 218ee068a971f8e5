"""Ctrl-C and SIGTERM, taken where nothing is half done."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RESUMABLE = 75  # the exit code of what goes on later: EX_TEMPFAIL of sysexits.h


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stand_by() -> None:
    """Until `Signals` are installed, and again after them until `stand_down`, a signal ends this process as one that
    goes on later: at once, since an exception could be lost in what is being imported, and nothing is half done that
    the same command would not take as it lies."""
    for number in SIGNALS:
        signal.signal(number, _leave)


def stand_down() -> None:
    """What there is to go on with is done: a signal is again what it is to any process."""
    for number, default in zip(SIGNALS, (signal.default_int_handler, signal.SIG_DFL), strict=True):
        if signal.getsignal(number) is _leave:
            signal.signal(number, default)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"interrupted; the same command goes on\n")
    os._exit(RESUMABLE)


class Interrupted(BaseException):
    """The user or the cluster asked to stop; weights and optimizer are those of a whole step."""


class Signals:
    """While installed, SIGINT and SIGTERM raise `Interrupted`: at once, or inside `deferred` at the next `check`.

    A second signal is a wish to stop without more ado: it raises KeyboardInterrupt, and nothing more is kept. Not so
    with `once`: a worker is sent one by the command, and perhaps another by a cluster that tells every process.
    """

    def __init__(self, once: bool = False) -> None:
        self._once = once
        self._deferring = False
        self._pending = False

    @contextmanager
    def installed(self) -> Iterator["Signals"]:
        """Handle both signals; what handled them before does so again afterwards."""
        before: dict[signal.Signals, Any] = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for `check`, or for the end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside `deferred`: work that may be left at any point."""
        self.check()
        before, self._deferring = self._deferring, False
        try:
            yield
        finally:
            self._deferring = before

    def check(self) -> None:
        """Raise `Interrupted` if a signal waits."""
        if self._pending:
            raise Interrupted

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._pending:
            if self._once:
                return
            raise KeyboardInterrupt
        self._pending = True
        if not self._deferring:
            raise Interrupted
