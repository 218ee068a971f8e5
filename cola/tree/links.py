"""What lies in a folder that others may have made lies in it: no link in a run's folder, or in a store, is followed out
of it. The folder itself may be reached by one. No torch.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from cola.errors import RunFolderError, StoreError

# Of a run's folder and an ablation's; of what else lies there, such as a tracker's files, nothing is read.
PARTS = ("recipe.yaml", "provenance.json", "plan.json", "summary.json", "segments.json", "manifest.json", "report.html")
PARTS += ("code", "arms", "trials", "workers", "tables", "figures", "exports")
PARTS += ("ablation.json", "ablation.html", "points")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is in truth one outside of it."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def need_inside(run: Path) -> None:
    """Raise a RunFolderError where a part of a run's folder, or of an ablation's, leads out of it by a link, or is
    neither a file nor a folder, which may be waited for without end."""
    for path in _of_another_kind(run, PARTS):
        if not path.is_symlink():
            raise RunFolderError(f"{path} is neither a file nor a folder; remove it")
        if leads_out(path, run):
            raise RunFolderError(
                f"{path} leads out of {run} by a link, which is not followed; put what it leads to in its place, or "
                "remove it"
            )


def _of_another_kind(folder: Path, only: tuple[str, ...] = ()) -> Iterator[Path]:
    """What below a folder is no file and no folder of its own; `only`: of these entries."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if only and entry.name not in only:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _of_another_kind(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


def need_shelves_inside(store: Path) -> None:
    """Raise a StoreError where a folder in which a store's segments or measurements lie is a link that leads out: what
    is set aside, or let go, would be what lies there."""
    for shelves in (store / "segments", store / "measured"):
        with os.scandir(shelves) as entries:
            for entry in entries:
                if entry.is_symlink() and leads_out(Path(entry.path), shelves):
                    raise StoreError(f"store: {entry.path} leads out of the store by a link; remove it")
