"""Segments and measurements on disk: content-addressed, atomic, checked on every read. No torch.

STORE/segments/NAME/       one state: the weights (a PEFT adapter, or a whole model), optimizer.safetensors, steps.jsonl
STORE/segments/NAME/segment.json   its causes in clear, what made it, SHA-256 of each file
STORE/measured/KEY.json    what was measured at a state: per-example scores, a knot's drift, spectra
STORE/runs/, locks/, damaged/, writing/

A segment is written aside, synced and renamed, so it is there as a whole or not at all; its files are read-only. What
does not match its checksum, or its name, is set aside under damaged/ and made anew. Locks are the kernel's (flock):
those of a dead process are gone with it. Many processes of one machine may use a store at once.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cola.errors import StoreError, quoted
from cola.files import digest, file_digest, remove_all, sync_folder
from cola.tree.locks import claimed
from cola.tree.segments import Causes, state_name

FORMAT = 1
WAIT_SECONDS = 0.2
IN_USE = "in-use"  # the lock that every run holds
CHANGES = "changes"  # the lock on putting, changing and removing segments, for the moment it takes
KINDS = ("record", "checkpoint", "point", "segment")  # from the shortest-lived to the longest


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
                aside = path / f".format-{secrets.token_hex(4)}"
                aside.write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
                aside.replace(note)
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
        if fault_of(folder) is None:
            return Segment(folder, _read(folder / "segment.json"))
        # Another process may have changed it between two of these reads: what counts is what it is at rest.
        with self.lock(CHANGES):
            return self._at_rest(name)

    def _at_rest(self, name: str) -> Segment | None:
        """`get` for who holds the lock on changes."""
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
    ) -> tuple[Segment, bool]:
        """Keep a state. Where it is there already, the longer-lived kind holds, and an optimizer once kept stays.

        Args:
            name: The state's.
            kind: See `Segment.kind`.
            causes: From `Lineage.causes`; they hash to the name.
            root: Causes of the base's name.
            notes: What is worth knowing and is no cause: rows, seconds, versions, `towards`.
            write: Writes the files into the folder it is given.

        Returns:
            The segment, and whether there was none of that name before.
        """
        assert state_name(causes) == name
        aside = Path(tempfile.mkdtemp(dir=self.path / "writing"))
        try:
            write(aside)
            files = {}
            for file in sorted(aside.iterdir()):
                sync_folder(file)
                files[file.name] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
                _protect(file)
            record = {"format": FORMAT, "name": name, "kind": kind, "root": root, "causes": causes}
            made = self._write_record(aside, {**record, **notes, "files": files})
            aside.chmod(0o755)
            sync_folder(aside)
            self.get(name)  # sets a damaged one aside, before the lock: hashing takes its time
            with self.lock(CHANGES):
                return self._publish(made)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _publish(self, made: Segment) -> tuple[Segment, bool]:
        folder = self._segment(made.name)
        there = Segment(folder, self.record(folder)) if folder.is_dir() else None
        if there is not None and there.record:
            # A record is of what was the end of a segment.
            kind = "segment" if not there.has_weights else max(there.kind, made.kind, key=KINDS.index)
            if there.has_weights and (there.resumable or not made.resumable):
                return self._write_record(there.folder, {**there.record, "kind": kind}), False
            made = self._write_record(made.folder, {**made.record, "kind": kind})
        if there is not None:
            self._remove(folder)
        folder.parent.mkdir(exist_ok=True)
        made.folder.rename(folder)
        sync_folder(folder.parent)
        return Segment(folder, made.record), there is None

    def mark(self, name: str, kind: str) -> str | None:
        """Let a state that is there live as long as this kind does, at least; returns what it was."""
        folder = self._segment(name)
        with self.lock(CHANGES):
            record = self.record(folder)
            if record and KINDS.index(record["kind"]) < KINDS.index(kind):
                self._write_record(folder, {**record, "kind": kind})
            return record.get("kind")

    def let_go(self, names: Set[str], run: Path) -> None:
        """Remove the weights of those of these segments that no other run wants, and keep the record of how they were
        made and what their steps measured.

        Args:
            names: The segments'.
            run: The folder of the run that has no more use for them.

        Raises:
            StoreError: what the other runs want cannot be told, so nothing goes.
        """
        with self.lock(CHANGES):
            others = self.references(("weights",))
            wanted = set().union(*(theirs for folder, theirs in others.items() if folder != run.resolve()))
            for name in names - wanted:
                folder = self._segment(name)
                if not (record := self.record(folder)):
                    continue
                files = {file: entry for file, entry in record["files"].items() if not file.endswith(".safetensors")}
                if files != record["files"]:
                    self._write_record(folder, {**record, "kind": "record", "files": files})
                for file in folder.glob("*.safetensors"):
                    file.unlink(missing_ok=True)

    def drop(self, name: str, kind: str) -> None:
        """Remove a state if it is of this kind: what has come to be kept for longer stays."""
        with self.lock(CHANGES):
            if self.record(self._segment(name)).get("kind") == kind:
                self._remove(self._segment(name))

    def _write_record(self, folder: Path, record: dict[str, Any]) -> Segment:
        record = {key: value for key, value in record.items() if key != "sha256"}
        record["sha256"] = digest(record)
        self._write(folder / "segment.json", json.dumps(record, indent=1))
        return Segment(folder, record)

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
            raise StoreError(f"{what} with {quoted(beginning)} in {self.path}; `cola store ls` shows them all")
        segment = self.get(found[0])
        if segment is None:
            raise StoreError(f"segment {found[0]} is damaged; it is trained again when a run needs it")
        return segment

    def _segment(self, name: str) -> Path:
        return self.path / "segments" / name[:2] / name

    def _set_aside(self, path: Path, fault: str) -> bool:
        """Whether there was something to be set aside."""
        aside = self.path / "damaged" / f"{path.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False  # another process was first
        self.warn(f"store: {path.name} is damaged ({fault}); it is set aside in {aside} and made anew")
        return True

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

    def knows(self, what: dict[str, Any]) -> bool:
        """Whether a measurement lies there; `recall` tells whether it is whole."""
        return self._measurement(digest(what)).is_file()

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
        waited = False
        while True:
            with self.claim(key) as mine:
                if mine:
                    yield
                    return
            if not waited:
                on_wait()
            waited = True
            time.sleep(WAIT_SECONDS)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold a key for this process unless another one does; whether it is held now."""
        with claimed(self.path / "locks" / key) as mine:
            yield mine

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by every run, so that pruning waits for it; the first one clears what dead ones left."""
        with (self.path / "locks" / IN_USE).open("a") as file:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_all((self.path / "writing").iterdir())
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self.warn(f"store: {self.path} is being pruned; waiting for that to end")
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

    def references(self, kinds: Sequence[str] = ("segments", "measured")) -> dict[Path, set[str]]:
        """What each registered run folder refers to; an empty set for one that is gone.

        Raises:
            StoreError: a note of a run, or its segments.json, is damaged: then nothing can be said to be loose.
        """
        found = {}
        for note in sorted((self.path / "runs").iterdir()):
            file = note
            try:
                folder = Path(_read(note)["folder"])
                file = folder / "segments.json"
                kept = _read(file) if file.is_file() else {}
                found[folder] = {name for kind in kinds for name in kept.get(kind, [])}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(
                    f"{file} is damaged ({type(error).__name__}); going on with its run writes it anew, or delete it"
                ) from None
        return found

    def garbage(self) -> list[Path]:
        """What no run folder that is still there refers to: segments, measurements, and what was set aside.

        A checkpoint is kept while a kept run still needs the end of its segment, and the best so far of a run that has
        not come to its end; and what was measured of any state that is kept.
        """
        kept = set().union(*self.references().values())
        loose, states = [], set()
        for folder in self.segments():
            record = self.record(folder)
            towards = record.get("towards") or ""
            on_the_way = towards in kept and (record.get("kind") == "point" or not self.has(towards))
            if folder.name not in kept and not on_the_way:
                loose.append(folder)
            else:
                states.add(folder.name)
        for path in sorted((self.path / "measured").glob("*/*.json")):
            if path.stem not in kept and _state_of(path) not in states:
                loose.append(path)
        return loose + sorted((self.path / "damaged").iterdir()) + sorted((self.path / "writing").iterdir())

    def prune(self, garbage: list[Path]) -> None:
        """Remove these, and forget run folders that are gone."""
        remove_all(garbage)
        remove_all(path for path in (self.path / "locks").iterdir() if path.name != IN_USE)
        for note in (self.path / "runs").iterdir():
            if not Path(json.loads(note.read_text(encoding="utf-8"))["folder"]).is_dir():
                note.unlink()

    def verify(self) -> tuple[int, list[str]]:
        """Check everything; returns how many were looked at and what was damaged, which is set aside."""
        looked, faults = 0, []
        for folder in self.segments():
            looked += 1
            if fault_of(folder) is not None:
                with self.lock(CHANGES):
                    fault = fault_of(folder)
                    if fault is not None and self._set_aside(folder, fault):
                        faults.append(f"segment {folder.name}: {fault}")
        for path in sorted((self.path / "measured").glob("*/*.json")):
            looked += 1
            fault = _measurement_fault(path)
            if fault is not None and self._set_aside(path, fault):
                faults.append(f"measurement {path.stem}: {fault}")
        return looked, faults

    def _write(self, path: Path, text: str) -> None:
        aside = self.path / "writing" / f"{path.name}-{secrets.token_hex(8)}"
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
    # Any other failure to read (no permission, too many open files) says nothing about what is there.
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
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
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {type(error).__name__}"
    return None


def _state_of(path: Path) -> str | None:
    """The state that a measurement is of; None where it is damaged."""
    try:
        state = _read(path)["what"]["state"]
        return state if isinstance(state, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def size_of(path: Path) -> int:
    """Bytes of a file or of a folder's files; of what goes in the meantime: none."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in path.rglob("*") if path.is_dir() else [path]:
            total += file.stat().st_size if file.is_file() else 0
    return total


def hand_out(file: Path, place: Path, large: bool) -> None:
    """Give a segment's file to a run folder, so that nothing that is done there changes the segment unseen.

    A copy, which is the user's to edit. Of a large file it is the file itself, since a copy would double a model's
    disk: read-only, and who writes into it all the same (root, or after chmod) changes the segment's too, which no
    longer matches its checksum then and is made anew.

    Args:
        file: The segment's.
        place: Where it is wanted; nothing is there.
        large: Whether a copy would cost too much. Made nevertheless on another disk.
    """
    if large:
        with contextlib.suppress(OSError):
            _protect(file)
            os.link(file, place)
            return
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.copyfile(file, aside)
    sync_folder(aside)
    aside.replace(place)


def _protect(file: Path) -> None:
    """Let nobody write into a file; it can still be moved and removed."""
    file.chmod(file.stat().st_mode & ~0o222)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
