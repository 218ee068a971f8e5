"""cola store ls | verify | prune: what runs share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cola.errors import ColaError

if TYPE_CHECKING:
    from cola.tree.store import Store

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="The store. Default: $COLA_STORE, else `store` in the cache.")
]


def ls(store: StoreOption = None) -> None:
    """List the segments and the disk they take."""
    from cola.cli.store_view import show_all
    from cola.report.terminal import Terminal

    show_all(open_store(store), Terminal())


def verify(store: StoreOption = None) -> None:
    """Check every name and checksum; what is damaged is set aside and trained again when it is needed.

    Exit code: 0 all is whole, 1 something was damaged.
    """
    from cola.cli import store_view
    from cola.report.terminal import Terminal

    whole = store_view.verify(open_store(store), Terminal())
    raise typer.Exit(0 if whole else 1)


def prune(store: StoreOption = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Free what no run folder that still exists refers to. Says what that is, then asks."""
    from cola.cli.store_view import say_garbage
    from cola.report.terminal import Terminal
    from cola.tree.locks import alone
    from cola.tree.prune import prune as remove

    opened = open_store(store)
    with alone(opened.path):
        garbage = say_garbage(opened, Terminal())
        if not garbage:
            return
        if not yes and not sys.stdin.isatty():
            raise ColaError("nothing was removed: there is no terminal to ask at; say --yes")
        if yes or typer.confirm("Remove these?"):
            remove(opened, garbage)


def open_store(path: Path | None) -> "Store":
    """The store that a command names, or the one of this machine.

    Raises:
        ColaError: there is none.
    """
    from cola.files import store_path
    from cola.report.terminal import Terminal
    from cola.tree.store import Store

    path = store_path(str(path) if path else None)
    if not (path / "format.json").is_file():
        raise ColaError(f"there is no store at {path}; `cola run` makes one, and --store or $COLA_STORE names another")
    return Store(path, Terminal().warn)
