"""What in a store is still wanted, and by which runs; the rest can be removed. No torch."""

import contextlib
import json
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from cola.errors import RunFolderError, StoreError
from cola.files import digest, load_json, remove_all, write_text
from cola.tree import leases
from cola.tree.run_folder import RunFolder, references_in
from cola.tree.store import Store


def register(store: Store, run: Path) -> None:
    """Note that a run folder refers to segments of a store (its segments.json says which)."""
    place = str(run.resolve())
    write_text(store.path / "runs" / digest(place), json.dumps({"folder": place}), store.path / "writing")


def references(
    store: Store, kinds: Sequence[str] = ("segments", "measured"), but: Path | None = None
) -> dict[Path, set[str]]:
    """What each registered run folder refers to, by its segments.json and those of its workers, or all of them `but`
    one; an empty set for a folder that is gone. A StoreError where a note of a run, or a segments.json, is damaged:
    then nothing can be said to be loose."""
    names = {}
    for note in sorted((store.path / "runs").iterdir()):
        try:
            folder = Path(load_json(note)["folder"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{note} is damaged ({type(error).__name__}); going on with its run writes it anew, or delete it"
            ) from None
        try:
            kept = references_in(folder, but)
        except RunFolderError as error:
            raise StoreError(str(error)) from None
        names[folder] = {name for kind in kinds for name in kept[kind]}
    return names


def let_go(store: Store, names: Set[str], own: Path) -> None:
    """Strip those of these segments whose weights nobody wants besides the run with this segments.json, which has no
    more use for them. A StoreError where what the others want cannot be told: then nothing goes."""
    with leases.lock(store.path, leases.CHANGES):
        wanted = set().union(*references(store, ("weights",), own.resolve()).values())
        for name in names - wanted:
            store.strip(name)


def garbage(store: Store) -> list[Path]:
    """What no run folder that is still there refers to: segments, measurements, and what was set aside.

    A checkpoint is kept while a kept run still needs the end of its segment, and the best so far of a run that has not
    come to its end; and what was measured of any state that is kept.
    """
    needed = references(store)
    kept = set().union(*needed.values())
    unfinished = set().union(*(names for run, names in needed.items() if not RunFolder(run).finished))
    loose, states = [], set()
    for folder in store.segments():
        record = store.record(folder)
        towards = record.get("towards") or ""
        # A kill before its run has dropped it leaves a point that was outdone.
        on_the_way = (
            towards in unfinished if record.get("kind") == "point" else towards in kept and not store.has(towards)
        )
        if folder.name not in kept and not on_the_way:
            loose.append(folder)
        else:
            states.add(folder.name)
    loose += [path for path in store.measurements() if path.stem not in kept and _state_of(path) not in states]
    return loose + sorted((store.path / "damaged").iterdir()) + sorted((store.path / "writing").iterdir())


def _state_of(path: Path) -> str | None:
    """The state that a measurement is of; None where it is damaged."""
    try:
        state = load_json(path)["what"]["state"]
        return state if isinstance(state, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune(store: Store, paths: Iterable[Path]) -> None:
    """Remove what `garbage` has found, and forget run folders that are gone."""
    remove_all(paths)
    leases.forget_free(store.path)
    for note in (store.path / "runs").iterdir():
        if not Path(load_json(note)["folder"]).is_dir():
            note.unlink()


def verify(store: Store) -> tuple[int, int]:
    """Check everything; returns how much was looked at and how much of it was damaged, which is set aside."""
    checked = [store.set_aside_if_damaged(path) for path in (*store.segments(), *store.measurements())]
    return len(checked), sum(checked)


def size_of(path: Path) -> int:
    """Bytes of a file or of a folder's files; of what goes in the meantime: none."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in path.rglob("*") if path.is_dir() else [path]:
            total += file.stat().st_size if file.is_file() else 0
    return total
