"""A new folder that is there as a whole or not at all, whatever ends the process that writes it. No torch."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cola.errors import RunFolderError
from cola.tree.leases import claimed


@contextmanager
def folder_aside(to: Path) -> Iterator[Path]:
    """A new folder to write into, which has its name when all is written. It lies aside under one name and a lease: the
    next one to write it clears what a kill has left. A RunFolderError where another process is at it.

    Whoever may read other new files may read these too: safetensors makes its own for the user alone."""
    aside = to.with_name(f".{to.name}.new")
    aside.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            mine = held.enter_context(claimed(aside / "lease"))
        except FileNotFoundError:  # its holder has just ended
            mine = False
        if not mine:
            raise RunFolderError(f"{to} is being written by another process; wait for it to end")
        written = aside / "written"
        shutil.rmtree(written, ignore_errors=True)
        try:
            written.mkdir()
            readers = written.stat().st_mode & 0o444
            yield written
            for path in [written, *written.rglob("*")]:
                path.chmod(path.stat().st_mode | readers)
            written.rename(to)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
