"""What of a run folder is not what was written, taken away before the run goes on: it is found in the store again, or
made again, as what was never there. No torch."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cola.errors import RunFolderError
from cola.files import remove_all
from cola.tree import manifest
from cola.tree.links import need_inside
from cola.tree.made import Provenance
from cola.tree.manifest import NAME, ROOT, Fault
from cola.tree.records import Chosen, Result, TrialResult
from cola.tree.run_folder import RESULTS, RunFolder, references_in
from cola.tree.spectra import SPECTRUM

ASIDE = re.compile(r"\..+\.[0-9a-f]{8}")  # what a kill leaves of a file that was being written
AGAIN = "it is found in the store again, or made again"

Warn = Callable[[str], None]


def mend(folder: RunFolder, warn: Warn) -> None:
    """Check every file of a run that this process holds; `warn` is told what was damaged or has gone, and what follows.
    A RunFolderError where its recipe is not the one that it began with, which only the user can put back, or where
    something in it leads elsewhere."""
    path = folder.path
    need_inside(path)
    remove_all([left for left in path.rglob(".*") if ASIDE.fullmatch(left.name) and left.is_file()])
    began = (path / NAME).is_file()
    try:
        if manifest.is_begun(path):
            manifest.read(path, ROOT)
    except RunFolderError as error:
        warn(f"{said(error)}; it is made again of what lies there")
        remove_all([path / NAME])
        manifest.begin(path, {})
    folder.bytes_of("recipe.yaml")
    for unit in manifest.units(path):
        _mend_unit(folder, unit, began, warn)
    _mend_provenance(folder, warn)
    _mend_page(folder, warn)
    known = manifest.read(path, ROOT)
    choices = {path / name for name in known.files if Path(name).match("chosen*.json")} if known else set()
    for chosen in sorted(choices.union(path.glob("trials/*/chosen*.json"))):
        _check(lambda chosen=chosen: folder.read(chosen, Chosen), folder, chosen, warn)
    if known and any(path.glob(RESULTS)) and not (path / "segments.json").exists():
        warn(f"{path / 'segments.json'} has gone; it is made again")
    _check(lambda: references_in(path), folder, path / "segments.json", warn)


def _mend_unit(folder: RunFolder, unit: Path, began: bool, warn: Warn) -> None:
    path, result = folder.path, folder.path / unit / "result.json"
    try:
        _, _, faults = manifest.faults(path, unit)
        if began and result.exists() and not (path / unit / NAME).is_file():
            faults = [Fault(unit, NAME, "has gone")]
        if not faults and result.exists():
            folder.result_at(result, TrialResult if unit.parts[0] == "trials" else Result)
    except RunFolderError as error:
        warn(f"{said(error)}; {AGAIN}")
        remove_all([result, path / unit / NAME])
        return
    if not faults:
        return
    warn(f"{path}: {_listed(faults)}; {AGAIN}")
    if [fault.name for fault in faults] == [SPECTRUM]:  # which is looked for without the rest
        remove_all([path / unit / SPECTRUM])
        manifest.drop(path, unit, SPECTRUM)
    else:
        remove_all([result, path / unit / NAME])


def _mend_provenance(folder: RunFolder, warn: Warn) -> None:
    """Every result has a copy of what the run was made with."""
    file = folder.path / "provenance.json"
    if not file.exists() and not manifest.units(folder.path):
        manifest.drop(folder.path, ROOT, file.name)  # killed as it began
        return
    try:
        if folder.read(file, Provenance) is not None or not any(folder.path.glob(RESULTS)):
            return
        told = f"{file} has gone"
    except RunFolderError as error:
        told = said(error)
    remove_all([file])
    manifest.drop(folder.path, ROOT, file.name)
    whole = [result for result in folder.results([]) if isinstance(result, Result)]
    if whole:
        first = min(whole, key=lambda result: result.run_info.created_at or "")
        folder.write(file.name, first.meta_info)
    warn(f"{told}; " + ("it is taken from a result" if whole else "it is made again"))


def _mend_page(folder: RunFolder, warn: Warn) -> None:
    """What is written at the end of a session, whatever was there."""
    _, _, faults = manifest.faults(folder.path, ROOT)
    if late := [fault for fault in faults if fault.name.startswith(manifest.WRITTEN_LAST)]:
        warn(f"{folder.path}: {_listed(late)}; it is made again")
        remove_all(folder.path / fault.name for fault in late)


def _check(read: Callable[[], object], folder: RunFolder, file: Path, warn: Warn) -> None:
    try:
        read()
    except RunFolderError as error:
        warn(f"{said(error)}; it is made again")
        remove_all([file])
        manifest.drop(folder.path, ROOT, file.relative_to(folder.path).as_posix())


def said(error: RunFolderError) -> str:
    """What is wrong, without what to do: it is being done."""
    return str(error).partition(f"; {manifest.REMEDY}")[0]


def _listed(faults: Sequence[Fault]) -> str:
    more = f", and {len(faults) - 1} more of its files" if len(faults) > 1 else ""
    return f"{faults[0]}{more}"
