"""Segments and measurements on disk: content-addressed, atomic, checked on every read. No torch.

STORE/segments/NAME/       one state: the weights (a PEFT adapter, or a whole model), optimizer.safetensors, steps.jsonl
STORE/segments/NAME/segment.json   its causes in clear, what made it, SHA-256 of each file
STORE/measured/KEY.json    what was measured at a state: per-example scores, a knot's drift
STORE/runs/, locks/, damaged/, writing/

A segment is written aside, synced and renamed, so it is there as a whole or not at all. What does not match its
checksum, or its name, is set aside under damaged/ and made anew. Locks are the kernel's (flock): those of a dead
process are gone with it. Many processes of one machine may use a store at once.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cola.errors import StoreError
from cola.segments import Causes, digest, state_name

FORMAT = 1
WAIT_SECONDS = 0.2
IN_USE = "in-use"  # the lock that every run holds
KINDS = ("record", "point", "checkpoint", "segment")  # from the shortest-lived to the longest


@dataclass(frozen=True)
class Segment:
    """A kept state, verified when it was read.

    Attributes:
        folder: Where its files are.
        record: The content of segment.json.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def kind(self) -> str:
        """`segment`: the end of one; `checkpoint`: inside one, until its end is there; `point`: the best so far;
        `record`: the end of one whose weights were let go."""
        return self.record["kind"]

    @property
    def has_weights(self) -> bool:
        return self.kind != "record"

    @property
    def resumable(self) -> bool:
        """Whether the optimizer's state is there, so that its link can be trained further."""
        return "optimizer.safetensors" in self.record["files"]

    @property
    def n_bytes(self) -> int:
        return sum(file["bytes"] for file in self.record["files"].values())

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of each step of its link so far."""
        return [json.loads(line) for line in (self.folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


class Store:
    """A folder of segments and measurements.

    Args:
        path: The folder; made where it is missing.
        warn: Told of what was found damaged.

    Raises:
        StoreError: the folder cannot be made, or is of another format.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self.warn = warn
        try:
            for name in ("segments", "measured", "runs", "locks", "damaged", "writing"):
                (path / name).mkdir(parents=True, exist_ok=True)
            note = path / "format.json"
            if not note.is_file():
                self._write(note, json.dumps({"format": FORMAT}))
            found = json.loads(note.read_text(encoding="utf-8"))["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"store: {path} cannot be used: {error}; set store to another folder") from None
        if found != FORMAT:
            raise StoreError(f"store: {path} is of format {found}, this version reads {FORMAT}; set store to another")

    # -----------------------------------------------------------------------------------------------------
    # Segments

    def has(self, name: str) -> bool:
        """Whether a segment of this name lies there; `get` tells whether it is whole."""
        return (self._segment(name) / "segment.json").is_file()

    def get(self, name: str) -> Segment | None:
        """The segment, all its checksums verified; None where there is none, or a damaged one, which is set aside."""
        folder = self._segment(name)
        if not folder.is_dir():
            return None
        if (fault := fault_of(folder)) is not None:
            self._set_aside(folder, fault)
            return None
        return Segment(folder, _read(folder / "segment.json"))

    def put(
        self,
        name: str,
        kind: str,
        causes: Causes,
        root: Causes,
        notes: dict[str, Any],
        write: Callable[[Path], None],
    ) -> Segment:
        """Keep a state. One of that name that is there already stays, unless it lacks the optimizer and this has it.

        Args:
            name: The state's.
            kind: See `Segment.kind`.
            causes: From `Lineage.causes`; they hash to the name.
            root: Causes of the base's name.
            notes: What is worth knowing and is no cause: rows, seconds, versions, `towards`.
            write: Writes the files into the folder it is given.
        """
        assert state_name(causes) == name
        aside = Path(tempfile.mkdtemp(dir=self.path / "writing"))
        try:
            write(aside)
            files = {}
            for file in sorted(aside.iterdir()):
                _sync(file)
                files[file.name] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
            record = {"format": FORMAT, "name": name, "kind": kind, "root": root, "causes": causes}
            record |= {**notes, "files": files}
            self._write(aside / "segment.json", json.dumps(record | {"sha256": digest(record)}, indent=1))
            aside.chmod(0o755)
            _sync(aside)
            return self._publish(Segment(aside, record))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _publish(self, made: Segment) -> Segment:
        folder = self._segment(made.name)
        folder.parent.mkdir(exist_ok=True)
        with self.lock("publish"):
            there = self.get(made.name)
            if there is not None:
                # One state may be the end of a segment, a checkpoint and the best so far: the longest-lived is kept.
                lives, needed = KINDS.index(there.kind), KINDS.index(made.kind)
                if lives > needed or (lives == needed and (there.resumable or not made.resumable)):
                    return there
                self._remove(folder)
            made.folder.rename(folder)
        _sync(folder.parent)
        return Segment(folder, made.record)

    def let_go(self, name: str) -> None:
        """Remove a segment's weights and keep the record of how it was made and what its steps measured."""
        segment = self.get(name)
        if segment is None or not segment.has_weights:
            return
        files = {file: entry for file, entry in segment.record["files"].items() if not file.endswith(".safetensors")}
        record = {**segment.record, "kind": "record", "files": files}
        record.pop("sha256")
        self._write(segment.folder / "segment.json", json.dumps(record | {"sha256": digest(record)}, indent=1))
        for file in segment.record["files"].keys() - files.keys():
            (segment.folder / file).unlink()

    def drop(self, name: str) -> None:
        """Remove a segment; nothing where there is none."""
        if self._segment(name).is_dir():
            self._remove(self._segment(name))

    def _remove(self, folder: Path) -> None:
        # Renamed first: a segment is there as a whole or not at all, also while it goes.
        gone = Path(tempfile.mkdtemp(dir=self.path / "writing")) / "gone"
        folder.rename(gone)
        shutil.rmtree(gone.parent, ignore_errors=True)

    def segments(self) -> Iterator[Path]:
        """The folders of all segments, unverified."""
        yield from sorted((self.path / "segments").glob("*/*/"))

    def record(self, folder: Path) -> dict[str, Any]:
        """A segment's record unless it is damaged; the files are not looked at. Empty where it is."""
        try:
            record = _read(folder / "segment.json")
            whole = record.pop("sha256")
            return record if digest(record) == whole else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def find(self, beginning: str) -> Segment:
        """The one segment whose name begins so.

        Raises:
            StoreError: none does, or several do.
        """
        found = [folder.name for folder in self.segments() if folder.name.startswith(beginning)]
        if len(found) != 1 or not beginning:
            what = f"{len(found)} segments begin" if found else "no segment begins"
            raise StoreError(f"{what} with {beginning!r} in {self.path}; `cola store ls` shows them all")
        segment = self.get(found[0])
        if segment is None:
            raise StoreError(f"segment {found[0]} is damaged; it is trained again when a run needs it")
        return segment

    def _segment(self, name: str) -> Path:
        return self.path / "segments" / name[:2] / name

    def _set_aside(self, path: Path, fault: str) -> None:
        aside = self.path / "damaged" / f"{path.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return  # another process was first
        self.warn(f"store: {path.name} is damaged ({fault}); it is set aside in {aside} and made anew")

    # -----------------------------------------------------------------------------------------------------
    # Measurements

    def recall(self, what: dict[str, Any]) -> Any:
        """What was measured under exactly these circumstances; None where nothing was.

        Args:
            what: The circumstances, the state's name among them.
        """
        path = self._measurement(digest(what))
        if not path.is_file():
            return None
        if (fault := _measurement_fault(path)) is not None:
            self._set_aside(path, fault)
            return None
        return _read(path)["value"]

    def remember(self, what: dict[str, Any], value: Any) -> None:
        """Keep a measurement."""
        path = self._measurement(digest(what))
        path.parent.mkdir(exist_ok=True)
        record = {"format": FORMAT, "what": what, "value": value}
        self._write(path, json.dumps(record | {"sha256": digest(record)}))

    def _measurement(self, key: str) -> Path:
        return self.path / "measured" / key[:2] / f"{key}.json"

    # -----------------------------------------------------------------------------------------------------
    # Processes

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a key for this process; `on_wait` is called once if another one holds it."""
        with (self.path / "locks" / key).open("a") as file:
            waited = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waited:
                        on_wait()
                    waited = True
                    time.sleep(WAIT_SECONDS)
            yield

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by every run, so that pruning waits for it; the first one clears what dead ones left."""
        with (self.path / "locks" / IN_USE).open("a") as file:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_all((self.path / "writing").iterdir())
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No run uses the store.

        Raises:
            StoreError: one does.
        """
        with (self.path / "locks" / IN_USE).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"store: a run is at work in {self.path}; prune when it has ended") from None
            yield

    def register(self, run: Path) -> None:
        """Note that a run folder refers to segments here (its segments.json says which)."""
        self._write(self.path / "runs" / digest(str(run.resolve())), json.dumps({"folder": str(run.resolve())}))

    # -----------------------------------------------------------------------------------------------------
    # Housekeeping

    def references(self) -> dict[Path, set[str]]:
        """What each registered run folder refers to; an empty set for one that is gone."""
        found = {}
        for note in sorted((self.path / "runs").iterdir()):
            folder = Path(json.loads(note.read_text(encoding="utf-8"))["folder"])
            names = folder / "segments.json"
            kept = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else {}
            found[folder] = {name for kind in ("segments", "measured") for name in kept.get(kind, [])}
        return found

    def garbage(self) -> list[Path]:
        """What no run folder that is still there refers to: segments, measurements, and what was set aside.

        A checkpoint is kept while a kept run still needs the end of its segment.
        """
        kept = set().union(*self.references().values())
        loose = []
        for folder in self.segments():
            record = self.record(folder)
            towards = record.get("towards") or ""
            on_the_way = record.get("kind") == "checkpoint" and towards in kept and not self.has(towards)
            if folder.name not in kept and not on_the_way:
                loose.append(folder)
        loose += [path for path in sorted((self.path / "measured").glob("*/*.json")) if path.stem not in kept]
        return loose + sorted((self.path / "damaged").iterdir()) + sorted((self.path / "writing").iterdir())

    def prune(self, garbage: list[Path]) -> None:
        """Remove these, and forget run folders that are gone."""
        _remove_all(garbage)
        _remove_all(path for path in (self.path / "locks").iterdir() if path.name != IN_USE)
        for note in (self.path / "runs").iterdir():
            if not Path(json.loads(note.read_text(encoding="utf-8"))["folder"]).is_dir():
                note.unlink()

    def verify(self) -> tuple[int, list[str]]:
        """Check everything; returns how many were looked at and what was damaged, which is set aside."""
        looked, faults = 0, []
        for folder in self.segments():
            looked += 1
            if (fault := fault_of(folder)) is not None:
                faults.append(f"segment {folder.name}: {fault}")
                self._set_aside(folder, fault)
        for path in sorted((self.path / "measured").glob("*/*.json")):
            looked += 1
            if (fault := _measurement_fault(path)) is not None:
                faults.append(f"measurement {path.stem}: {fault}")
                self._set_aside(path, fault)
        return looked, faults

    def _write(self, path: Path, text: str) -> None:
        aside = self.path / "writing" / f"{path.name}-{os.getpid()}"
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a segment's folder; None where every checksum and the name agree."""
    try:
        record = _read(folder / "segment.json")
        whole = record.pop("sha256")
        if digest(record) != whole:
            return "segment.json does not match its checksum"
        if not record["name"] == folder.name == state_name(record["causes"]):
            return "its causes do not hash to its name"
        for name, file in record["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != file["bytes"] or file_digest(folder / name) != file["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"segment.json cannot be read: {type(error).__name__}"
    return None


def _measurement_fault(path: Path) -> str | None:
    try:
        record = _read(path)
        whole = record.pop("sha256")
        if digest(record) != whole:
            return "it does not match its checksum"
        if digest(record["what"]) != path.stem:
            return "its circumstances do not hash to its name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {type(error).__name__}"
    return None


def _remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file or of a folder's files."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
