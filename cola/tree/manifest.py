"""Manifests: of every file of a run folder its SHA-256, and what it belongs to. No torch.

RUN/manifest.json                      recipe, provenance, code, choices of searches, summary, page, figures, tables
RUN/arms/ARM/seed-S/manifest.json      the files of one arm and seed, and likewise of a trial

Each is written by the one process that is at work there, and names files by their places in its own folder, so that a
copied, packed or moved run is checked as it lies. A file's entry is written before the file is, with the digest of what
was there: whatever a kill leaves agrees with one of the two. That of an arm and seed is written when all its files are
there, just before result.json, without which it has not come to its end.

A run that has none, of an earlier version, is read without a check: there is nothing to check against. What others
keep here is in none: a tracker's files, exports, segments.json (which has its own checksum).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest as hash_of
from pathlib import Path

from pydantic import Field

from cola.errors import RunFolderError, plain
from cola.files import digest, file_digest, load_json, sha256, write_text
from cola.tree.shapes import Bytes, Count, Name, Record, Text, fault_of

NAME = "manifest.json"
ROOT = Path()
JOBS = ("arms/*/seed-*", "trials/*/*/seed-*")  # folders with a manifest of their own
REMEDY = "`cola run --resume` of its run takes it from the store again, and trains what the store has not"
WRITTEN_LAST = ("summary.json", "report.html", "tables/", "figures/")  # of the results: cola report makes them again
OF_THE_RUN = ("recipe.yaml", "provenance.json", "code/*", "trials/*/chosen*.json", "summary.json")


class Entry(Record):
    """A file, as it was when it was last written."""

    sha256: Text = Field(description="of what it holds, 64 hex digits")
    bytes: Bytes | None = Field(default=None, description="its size")
    before: Text | None = Field(
        default=None, description="SHA-256 of what it took the place of, which a kill at that moment leaves"
    )
    link: Count | None = Field(default=None, description="of weights: the link that trained them, from 1")
    state: Name | None = Field(default=None, description="likewise: their state's name in the store")


class Manifest(Record):
    """What each file of a folder is."""

    place: Text = Field(description="the folder, from the run's: `arms/ARM/seed-S`; empty: the run's own files")
    arm: Name | None = Field(default=None, description="whose files they are; absent of the run's own")
    seed: Count | None = Field(default=None, description="likewise")
    states: list[Name] = Field(default=[], description="names in the store of the states that they come from")
    files: dict[str, Entry] = Field(json_schema_extra={"key": "FILE"})
    sha256: Text = Field(default="", description="of this file's other keys, in canonical JSON, 32 hex digits of it")


@dataclass(frozen=True)
class Fault:
    """A file of a run that is not what was written."""

    unit: Path  # the folder whose manifest has it, from the run's
    name: str  # in that folder
    what: str

    def __str__(self) -> str:
        return f"{self.unit / self.name} {self.what}"


def unit_of(name: Path) -> Path:
    """The folder whose manifest has a file, both from the run's folder."""
    parts = name.parts
    depth = {"arms": 3, "trials": 4}.get(parts[0], len(parts))
    return Path(*parts[:depth]) if len(parts) > depth else ROOT


def units(run: Path) -> list[Path]:
    """The folders of arms, seeds and trials, from the run's."""
    found = (path for pattern in JOBS for path in sorted(run.glob(pattern)))
    return [path.relative_to(run) for path in found if path.is_dir() and not path.is_symlink()]


def is_begun(run: Path) -> bool:
    """Whether a run has manifests; a RunFolderError where its own has gone from beside those of its arms."""
    if (run / NAME).is_file():
        return True
    if any((run / unit / NAME).is_file() for unit in units(run)):
        raise damaged_file(run / NAME, "it has gone")
    return False


def read(run: Path, unit: Path) -> Manifest | None:
    """A folder's manifest; None where it has none. A RunFolderError where it is damaged, or another folder's."""
    path = run / unit / NAME
    try:
        found = load_json(path)
        if found.pop("sha256") != digest(found):
            raise ValueError("it does not match its own checksum")
        manifest = Manifest.model_validate(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = fault_of(error) if isinstance(error, ValueError) else f"it cannot be read: {type(error).__name__}"
        raise damaged_file(path, why) from None
    if Path(manifest.place) != unit:
        raise damaged_file(path, f"it is that of {plain(manifest.place)}")
    return manifest


def write(run: Path, unit: Path, manifest: Manifest) -> None:
    """Write a folder's manifest, with its checksum."""
    record = manifest.model_dump(exclude_defaults=True, exclude={"sha256"}) | {"place": manifest.place}
    write_text(run / unit / NAME, json.dumps(record | {"sha256": digest(record)}, indent=1) + "\n")


def note(run: Path, name: Path, data: bytes) -> None:
    """Say of a file that is about to be written what it will be, where its folder has a manifest."""
    unit = unit_of(name)
    if (manifest := read(run, unit)) is None:
        return
    key, new = name.relative_to(unit).as_posix(), sha256(data)
    old = manifest.files.get(key)
    if old is None or old.sha256 != new:
        entry = entry_of(data).model_copy(update={"before": old and _there(run / name, old)})
        write(run, unit, manifest.model_copy(update={"files": {**manifest.files, key: entry}}))


def _there(path: Path, entry: Entry) -> str:
    """Which of its two digests a file has that is about to be replaced: where it was about to be before, and that
    process was killed, it is what it was."""
    try:
        found = file_digest(path)
    except OSError:
        return entry.sha256
    return found if found == entry.before else entry.sha256


def check(run: Path, name: Path, data: bytes) -> None:
    """Raise a RunFolderError where a file is not what its manifest says; nothing where there is none to go by."""
    unit = unit_of(name)
    manifest = read(run, unit)
    if manifest is None:
        if is_begun(run):
            raise damaged_file(run / unit / NAME, "it has gone")
        return
    entry = manifest.files.get(name.relative_to(unit).as_posix())
    if entry is None:
        if unit != ROOT:
            raise damaged_file(run / name, f"{unit / NAME} does not have it")
    elif sha256(data) not in (entry.sha256, entry.before):
        if name.name == "recipe.yaml":
            raise RunFolderError(f"{run / name} is not what this run began with: put it back as it was")
        raise damaged_file(run / name, "it does not match its SHA-256")


def has(run: Path, name: Path) -> bool:
    """Whether a file is, or was, one of the run's."""
    unit = unit_of(name)
    found = read(run, unit)
    return found is not None and name.relative_to(unit).as_posix() in found.files


def check_folder(run: Path, folder: Path) -> None:
    """Raise a RunFolderError where any file of a folder of an arm and seed, from the run's, is missing or not what it
    was; weights are read for it once."""
    unit = unit_of(folder / "any")
    if (manifest := read(run, unit)) is None:
        if is_begun(run):
            raise damaged_file(run / unit / NAME, "it has gone")
        return
    inside = f"{folder.relative_to(unit).as_posix()}/"
    for key, entry in manifest.files.items():
        if key.startswith(inside) and (what := _fault(run / unit / key, entry)):
            raise damaged_file(run / unit / key, f"it {what}")


def faults(run: Path, unit: Path) -> tuple[int, int, list[Fault]]:
    """Check all files of a folder's manifest: their number, their bytes, and what is wrong with some. A RunFolderError
    where the manifest is damaged."""
    manifest = read(run, unit)
    if manifest is None:
        return 0, 0, []
    found = [
        Fault(unit, key, what) for key, entry in manifest.files.items() if (what := _fault(run / unit / key, entry))
    ]
    return len(manifest.files), sum(entry.bytes or 0 for entry in manifest.files.values()), found


def _fault(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file; None where nothing is."""
    try:
        with path.open("rb") as file:
            found = hash_of(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "has gone"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found in (entry.sha256, entry.before) else "does not match its SHA-256"


def begin(run: Path, about_to_write: Mapping[str, bytes]) -> None:
    """Give a run its manifest, unless it has one: of what lies there and of the files that come next."""
    if (run / NAME).is_file():
        return
    for unit in units(run):
        folder = run / unit
        if (folder / "result.json").is_file() and not (folder / NAME).is_file():  # an earlier version's
            files = dict(entries_of(folder, sorted(folder.rglob("*"))))
            write(run, unit, Manifest(place=unit.as_posix(), files=files))
    entries = dict(entries_of(run, (path for pattern in OF_THE_RUN for path in sorted(run.glob(pattern)))))
    entries |= {name: entry_of(data) for name, data in about_to_write.items()}
    write(run, ROOT, Manifest(place="", files=entries))


def entry_of(data: bytes) -> Entry:
    """What is said of a file that holds these bytes."""
    return Entry(sha256=sha256(data), bytes=len(data))


def entries_of(folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, Entry]]:
    """Entries of files as they lie in a folder; what is no file of its own is passed over."""
    for path in paths:
        if path.is_file() and not path.is_symlink() and path.name != NAME and not path.name.startswith("."):
            with path.open("rb") as file:
                known = hash_of(file, "sha256").hexdigest()
            yield path.relative_to(folder).as_posix(), Entry(sha256=known, bytes=path.stat().st_size)


def drop(run: Path, unit: Path, name: str) -> None:
    """Say nothing of a file any more."""
    if (manifest := read(run, unit)) is not None and name in manifest.files:
        files = {key: entry for key, entry in manifest.files.items() if key != name}
        write(run, unit, manifest.model_copy(update={"files": files}))


def put(run: Path, entries: Mapping[str, Entry] | None, below: tuple[str, ...]) -> None:
    """Exchange what the run's own manifest, where it has one, says of files whose places begin so; None: they are about
    to be written, and it says nothing of them until they are there."""
    if (manifest := read(run, ROOT)) is not None:
        others = {key: entry for key, entry in manifest.files.items() if not key.startswith(below)}
        write(run, ROOT, manifest.model_copy(update={"files": {**others, **(entries or {})}}))


def damaged_file(path: Path, why: str) -> RunFolderError:
    """What is said of a file of a run that cannot be used."""
    return RunFolderError(f"{path} is damaged ({why}); {REMEDY}")
