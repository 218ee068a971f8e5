"""What can go wrong in a user's words: one line, saying what, where and what would be right.

The command line prints these without a traceback and exits with code 2; anything else is a defect of cola
and keeps its traceback. What of the user's is shown is cut here, so that no message is longer than can be read.
"""

import difflib
from collections.abc import Iterable
from itertools import accumulate

QUOTED = 80  # characters of a value or name that a message shows
LONGEST = 1500  # characters of a message
MOST_LINES = 12  # of a message


def quoted(value: object) -> str:
    """A value as Python writes it, as every message shows one: cut where it is long."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 4]}...{text[-1]}"


def plain(name: object, most: int = QUOTED) -> str:
    """A name as it is, without quotes, on one line and cut where it is long."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Iterable[object], most: int = 40) -> str:
    """Names with commas between them, of many the first."""
    shown = [plain(name) for name in names]
    more = len(shown) - most
    return ", ".join(shown) if more <= 0 else f"{', '.join(shown[:most])} and {more} more"


def one_line(error: Exception, most: int = 300) -> str:
    """What another library's error says, on one line and cut; its kind, where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` of a name that is nearly one of those that there are; else nothing."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def nearest(name: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The name most like this one of those that there are, by difflib's ratio; None where none is so much alike."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=alike)), None)


class ColaError(Exception):
    """Base of every error that is the user's to mend."""

    def __init__(self, message: str) -> None:
        super().__init__(_readable(message))


def _readable(message: str) -> str:
    """A message in as many characters and lines as can be read: of many faults the first, and of a long line its
    beginning, which says what is wrong, and its end, which says what would be right."""
    room = LONGEST - 20  # beside the number of those that are left out
    whole = message.splitlines()
    lines = [line if len(line) < room else f"{line[: room // 2]} ... {line[6 - room // 2 :]}" for line in whole]
    ends = accumulate(len(line) + 1 for line in lines)
    fitting = sum(end <= room for end in ends)
    if fitting == len(lines) <= MOST_LINES:
        return "\n".join(lines)
    kept = min(fitting, MOST_LINES - 1)
    return "\n".join([*lines[:kept], f"and {len(lines) - kept} more"])


class RecipeError(ColaError, ValueError):
    """The recipe says something impossible: names file, line and key."""


class DataError(ColaError, ValueError):
    """The data cannot serve the task: names the source, the row and the field."""


class ModelError(ColaError, ValueError):
    """The model cannot be found, loaded, or trained as asked."""


class RunFolderError(ColaError, OSError):
    """The run folder exists, is no run folder, or has no room."""


class RunChanged(RunFolderError):
    """The folder's run began with another recipe, other data or another base."""


class FolderGone(RunFolderError):
    """A run folder was removed while this process came to hold it."""


class StoreError(ColaError, OSError):
    """The store of segments cannot be used, or has no such segment."""


class LeaseLost(ColaError):
    """What this process was at was taken over while it stood still; it publishes nothing more of it."""


class NonFiniteLoss(ColaError, ArithmeticError):
    """The loss or its gradient left the finite numbers; the update was not made."""


class NoGradient(ColaError, ArithmeticError):
    """None of the weights that a link trains got a gradient, so it would train nothing."""


class MomentsNotCleared(ColaError, ArithmeticError):
    """A knot cleared less of the optimizer's state than it was to."""


class MomentsNotKept(ColaError):
    """A knot is to hand on an optimizer's state that is not there."""


class RankFailed(ColaError):
    """One of the processes that train together failed in its passes, and so the arm did; all of them are there."""


class RanksLost(ColaError, ConnectionError):
    """Another of the processes that train together has ended; exit code 75, as the same command goes on."""


class IdeaError(ColaError, ValueError):
    """What fills a joint of a link may not run, raised an error, or gave what is of no use there."""


class KnotDrift(ColaError, ArithmeticError):
    """Tying a knot changed the model's outputs by more than rounding can explain."""
