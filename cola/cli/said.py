"""How a command ends: what went wrong by the user's doing in one line, and the exit codes. No torch."""

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from cola.cli.imports import no_garbage
from cola.environment import launched
from cola.errors import ColaError, LeaseLost, RanksLost, plain
from cola.files import NO_ROOM
from cola.run.interrupt import RESUMABLE, Interrupted

USERS_ERRORS = {*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}  # disk or path
INTERRUPTED = 130


def one_line_errors(command: Callable[..., None], unsaid: str = "") -> Callable[..., None]:
    """A command that says the user's mistakes in a line and without a traceback; defects of cola keep theirs.

    `unsaid`: a recipe's key that messages name and that means nothing to whom names a model on the command line.
    """

    @wraps(command)
    def run(*words: Any, **options: Any) -> None:
        try:
            command(*words, **options)
        except (LeaseLost, RanksLost) as error:
            print(f"error: {error}", file=sys.stderr)
            code = RESUMABLE
        except ColaError as error:
            for line in str(error).replace(unsaid, "").splitlines():
                print(f"error: {line}", file=sys.stderr)
            code = 2
        except OSError as error:
            if error.errno not in USERS_ERRORS:
                raise
            print(f"error: {plain(error.filename or 'a file', 300)}: {os.strerror(error.errno)}", file=sys.stderr)
            code = 2
        except (MemoryError, ImportError) as error:
            if isinstance(error, ImportError) and "failed to map segment" not in str(error):  # as a loader says it
                raise
            print("error: no memory is left; make some free, or raise the limit (`ulimit -v`)", file=sys.stderr)
            code = 2
        except Interrupted:
            print("interrupted; the same command goes on", file=sys.stderr)
            code = RESUMABLE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = INTERRUPTED
        else:
            return
        raise typer.Exit(code)

    return run


def of_all_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """A command that torchrun or accelerate launch may start several times: one of them does it, the others help."""

    @wraps(command)
    def run(*words: Any, **options: Any) -> None:
        if not launched():
            return command(*words, **options)
        with no_garbage():
            from cola.run import helper, ranks
        with ranks.team() as leads:
            if not leads:
                raise typer.Exit(helper.help_along())
            command(*words, **options)

    return run
