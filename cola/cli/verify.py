"""cola verify RUN: every file of a run against its manifests. No torch."""

from pathlib import Path

from cola.errors import ColaError, RunFolderError, listed
from cola.files import store_path
from cola.recipe.read import read_recipe
from cola.report.numbers import size
from cola.report.terminal import Terminal
from cola.tree import manifest
from cola.tree.links import need_inside
from cola.tree.manifest import NAME, ROOT
from cola.tree.mend import said
from cola.tree.run_folder import TRACKER_NOTES, RunFolder, references_in

OTHERS = {"exports", "wandb", "mlflow", "workers"}  # what a run folder holds beside a run: workers have logs there


def verify(path: Path, terminal: Terminal) -> int:
    """Check a run, or all points of an ablation; 0 if all is whole, 1 if something is not, or cannot be told. Raises
    RunFolderError if it is neither, or something in it leads elsewhere."""
    is_run = (path / "recipe.yaml").is_file()
    if not is_run and not (path / "ablation.json").is_file():
        raise RunFolderError(f"{path} is no run folder: it has no recipe.yaml")
    need_inside(path)
    if is_run:
        return _verify(path, terminal)
    points = sorted(file.parent for file in path.glob("points/*/recipe.yaml"))
    return max([_verify(one, terminal) for one in [path, *points]])


def _verify(path: Path, terminal: Terminal) -> int:
    """Check one folder that has a manifest of its own."""
    number, n_bytes, wrong = 0, 0, []
    try:
        if not manifest.is_begun(path):
            terminal.say(f"{path}: nothing to check against: it has no {NAME}, as none had before cola wrote them")
            return 1
    except RunFolderError as error:
        wrong.append(said(error))
    for unit in [ROOT, *manifest.units(path)]:
        try:
            n_files, n_more, faults = manifest.faults(path, unit)
            if not n_files and (path / unit / "result.json").exists():
                faults = [manifest.Fault(unit, NAME, "has gone")]
            number, n_bytes = number + n_files, n_bytes + n_more
            wrong += [f"{path / fault.unit / fault.name} {fault.what}{_remedy(path, fault)}" for fault in faults]
        except RunFolderError as error:
            wrong.append(said(error))
    wrong += _gone(path)
    try:
        if (path / "recipe.yaml").is_file() and not (path / "segments.json").exists():
            wrong.append(f"{path / 'segments.json'} has gone: cola run --resume {path} makes it again")
        references_in(path)
    except RunFolderError as error:
        wrong.append(said(error))
    for line in wrong:
        terminal.warn(line)
    terminal.say(
        f"{path}: {number} files checked, {size(n_bytes)}, "
        + (f"{len(wrong)} not what was written" if wrong else "all as they were written")
    )
    if others := _others(path):
        terminal.say(f"{path}: in no manifest: {listed(others, 5)}")
    return 1 if wrong else 0


def _gone(path: Path) -> list[str]:
    """Arms and seeds that the summary tells of and that have no folder any more."""
    try:
        told = RunFolder(path).state()
    except RunFolderError:
        return []  # said before
    jobs = [
        (arm, seed) for arm, of in (told.arms if told else {}).items() for seed, as_ in of.states.items() if as_ == "ok"
    ]
    folders = [path / "arms" / arm / f"seed-{seed}" for arm, seed in jobs]
    return [f"{folder} has gone: cola run --resume {path} makes it again" for folder in folders if not folder.exists()]


def _remedy(path: Path, fault: manifest.Fault) -> str:
    """What brings a file back."""
    if fault.unit == ROOT:
        if fault.name == "recipe.yaml":
            return ": put it back as it was"
        late = fault.name.startswith(manifest.WRITTEN_LAST)
        return f": cola {'report' if late else 'run --resume'} {path} makes it again"
    found = manifest.read(path, fault.unit)
    segments = [_segment(path, name) for name in found.states] if found else []
    where = "takes it from the store again" if segments and all(segments) else "makes it again"
    return f": cola run --resume {path} {where}"


def _segment(path: Path, name: str) -> bool:
    """Whether the run's store has a state, whole or not."""
    try:
        store = store_path(read_recipe(path / "recipe.yaml").store)
    except (ColaError, OSError):
        return False
    return (store / "segments" / name[:2] / name / "segment.json").is_file()


def _others(path: Path) -> list[str]:
    """Files of a run that no manifest has, but for what is no part of it."""
    known = {"segments.json"}
    for unit in [ROOT, *manifest.units(path)]:
        known.add((unit / NAME).as_posix())
        try:
            found = manifest.read(path, unit)
        except RunFolderError:
            continue
        known |= {(unit / key).as_posix() for key in found.files} if found else set()
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    mine = [
        file
        for file in files
        if file.parts[0] not in OTHERS
        and file.name not in TRACKER_NOTES.values()
        and not any(part.startswith(".") for part in file.parts)
    ]
    points = "points" if (path / "ablation.json").is_file() else None
    return [file.as_posix() for file in mine if file.as_posix() not in known and file.parts[0] != points]
