"""Who has a run folder: one process, from its making to its end; found or made, and removed if nothing came of it.

No torch.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from time import sleep

from cola.errors import FolderGone, RunFolderError
from cola.files import make_new
from cola.tree.leases import WAIT_SECONDS, claimed, holder_of
from cola.tree.run_folder import RunFolder

LEASE = ".lease"  # of a run folder
Wait = Callable[[str], None]


@contextmanager
def lock_run(path: Path, on_wait: Wait | None = None) -> Iterator[None]:
    """Hold a run folder for one process, however that ends. Where another one is at work in it, `on_wait` is told so
    once, and its end is waited for; without it, a RunFolderError. FolderGone where it is not there any more."""
    if (path / LEASE).is_symlink():
        raise RunFolderError(f"{path / LEASE} is a link, which is not followed; remove it")
    told = False
    while True:
        with ExitStack() as held:
            try:
                mine = held.enter_context(claimed(path / LEASE))
            except FileNotFoundError:
                raise FolderGone(f"{path} is not there any more") from None
            if mine:
                yield
                return
        busy = f"{path}: {holder_of(path / LEASE)} is at work in this run"
        if on_wait is None:
            raise RunFolderError(f"{busy}; wait for it to end")
        if not told:
            on_wait(f"{busy}; waiting for it to end, to go on with what it leaves")
        told = True
        sleep(WAIT_SECONDS)


@contextmanager
def take_run(
    recipe: str, path: Path, dated: bool = False, on_wait: Wait | None = None
) -> Iterator[tuple[RunFolder, bool]]:
    """Hold a folder for a run of exactly this recipe, and say whether the run is new.

    Several processes may ask for one folder at once: the first has it, and the others, refused or waiting, leave it
    alone.
    Nothing that exists is touched; what was made here is removed again, while it is held, if the caller fails
    before a job has begun, so that a mistake in a recipe leaves nothing behind. A RunFolderError where another process
    holds it, it is something else, or it cannot be made.

    Args:
        recipe: The text of the resolved recipe, written into a new folder.
        path: The folder: this run's, or new or empty.
        dated: Whether to make one that has this name and the time.
        on_wait: As of `lock_run`.
    """
    with ExitStack() as held:
        while True:
            try:
                folder, made = _make_and_hold(recipe, path, dated, held, on_wait)
                break
            except FolderGone:  # its maker is at it, or failed and has removed it again
                continue
        run = RunFolder(folder)
        fresh = not run.recipe_file.is_file()
        _check_free(run, recipe)
        try:
            if fresh:
                run.write_text("recipe.yaml", recipe)
            yield run, fresh
        except BaseException:
            if fresh and folder.is_dir() and not _begun(folder):
                _remove(run, made)
            raise


@contextmanager
def unfinished_run(recipe: str, path: Path) -> Iterator[RunFolder | None]:
    """Hold the last run of exactly this recipe that no other process is at, if it did not come to its end: of the
    folders that `take_run` has given this name and a time."""
    same = _runs_of(recipe, path)
    with last_unfinished(same, lambda folder: RunFolder(folder).finished) as folder:
        yield folder and RunFolder(folder)


def finished_run(recipe: str, path: Path) -> RunFolder | None:
    """The last run of exactly this recipe, of those of `unfinished_run`; None where it did not come to its end."""
    last = max(_runs_of(recipe, path), key=_changed_at, default=None)
    return RunFolder(last) if last is not None and RunFolder(last).finished else None


def _runs_of(recipe: str, path: Path) -> list[Path]:
    """The run folders of this name and a time that are of exactly this recipe, and of this version's format."""
    same = []
    for file in path.parent.glob(f"{path.name}-*/recipe.yaml"):
        with suppress(FileNotFoundError):  # a process that fails takes its new folder away again
            if file.is_file() and file.read_bytes() == recipe.encode() and RunFolder(file.parent).readable:
                same.append(file.parent)
    return same


@contextmanager
def last_unfinished(paths: Iterable[Path], is_finished: Callable[[Path], bool]) -> Iterator[Path | None]:
    """Hold the newest of these folders that no other process is at; None if it, or a newer one, is finished."""
    for path in sorted(paths, key=_changed_at, reverse=True):
        if is_finished(path):
            break
        with ExitStack() as held:
            try:
                held.enter_context(lock_run(path))
            except RunFolderError:
                continue  # a second process of one command goes on with the second run that was stopped
            if is_finished(path):
                break  # while it was being looked for
            yield path
            return
    yield None


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _make_and_hold(recipe: str, path: Path, dated: bool, held: ExitStack, on_wait: Wait | None) -> tuple[Path, bool]:
    """The folder, there now and locked, and whether it was not there before."""
    try:
        if dated:
            path = make_new(path.parent, f"{path.name}-{datetime.now():%Y%m%d-%H%M%S}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path) and _make_held(path, held):
                return path, True
            _check_free(RunFolder(path), recipe)  # before a lease is put into what is no run folder
    except RunFolderError:
        raise
    except OSError as error:
        place = path.parent if dated else path
        raise RunFolderError(f"{place}: the run folder cannot be made: {error.strerror}") from None
    held.enter_context(lock_run(path, on_wait))
    return path, dated


def _make_held(path: Path, held: ExitStack) -> bool:
    """Make a folder that is locked from its first moment on, so that its maker and its holder are one process; False
    where another process was first, FolderGone where one is at it. It is made aside, always under one name, so that a
    kill leaves nothing that the next one would not take; and rename takes no folder's place but an empty one's."""
    aside = path.with_name(f".{path.name}.new")
    aside.mkdir(exist_ok=True)
    with ExitStack() as own:
        try:
            own.enter_context(lock_run(aside))
        except RunFolderError:
            sleep(0.01)
            raise FolderGone(f"{path} is being made by another process") from None
        try:
            aside.rename(path)
        except OSError as error:
            shutil.rmtree(aside)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            raise
        held.enter_context(own.pop_all())
    return True


def _check_free(run: RunFolder, recipe: str) -> None:
    """Raise a RunFolderError where a folder holds anything but a run of exactly this recipe, or what a kill left of
    making it; FolderGone where it is not there any more."""
    path = run.path
    try:
        if run.recipe_file.is_file():
            free = run.recipe_file.read_text(encoding="utf-8") == recipe
        else:
            free = all(file.name == LEASE or file.name.startswith(".recipe.yaml.") for file in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.lexists(path):
            raise FolderGone(f"{path} is not there any more") from None
        free = False
    if not free:
        raise RunFolderError(
            f"{path} exists and is no run of exactly this recipe; it is kept as it is: name another folder"
        )


def _begun(path: Path) -> bool:
    """Whether something was trained or scored in a run folder."""
    begun = [file for name in ("metrics.jsonl", "result.json") for file in path.glob(f"**/seed-*/{name}")]
    return any(file.stat().st_size for file in begun)


def _remove(run: RunFolder, made: bool) -> None:
    """Empty a folder that is held, and remove it if it was made here.

    The lease goes last, so that nobody else has the folder before all is gone; and rmdir takes none that somebody
    has come to have since. Before it goes the recipe, by which a command that was killed here knows the folder.
    """
    last = [run.recipe_file, run.path / LEASE]
    for file in [*(file for file in run.path.iterdir() if file not in last), *last]:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
    if made:
        with suppress(OSError):
            run.path.rmdir()
