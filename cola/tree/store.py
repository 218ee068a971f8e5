"""Segments and measurements on disk: content-addressed, atomic, checked on every read. No torch.

STORE/segments/NAME/       one state: the weights (a PEFT adapter, or a whole model), optimizer.safetensors, steps.jsonl
STORE/segments/NAME/segment.json   its causes in clear, what made it, SHA-256 of each file
STORE/measured/KEY.json    what was measured at a state: per-example scores, a knot's drift, spectra
STORE/runs/, leases/, damaged/, writing/

A segment is written aside, synced and renamed, so it is there as a whole or not at all; its files are read-only. What
does not match its checksum, or its name, is set aside under damaged/ and made anew. Many processes, of one machine or
of several that share the disk, may use a store at once (leases.py). What is published stays: of two that have made the
same state the first is kept, and the weights of the second are compared with it.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import sleep
from typing import Any

from cola.errors import StoreError, quoted
from cola.files import digest, file_digest, load_json, sync, write_text, written_aside
from cola.tree.leases import CHANGES, WAIT_SECONDS, check_held, lock
from cola.tree.links import leads_out, need_shelves_inside
from cola.tree.process import this_process
from cola.tree.segments import Causes, state_name

FORMAT = 1  # of segments and measurements
HELD = 2  # of format.json: runs hold leases; until 1, locks of the kernel, which keep no lease out
KINDS = ("record", "checkpoint", "point", "segment")  # from the shortest-lived to the longest


@dataclass(frozen=True)
class Segment:
    """A kept state, verified when it was read."""

    folder: Path
    record: dict[str, Any]  # the content of segment.json

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
    """A folder of segments and measurements, made where it is missing; `warn` is told of what was found damaged. A
    StoreError where it cannot be made, or is of another format."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self.warn = warn
        try:
            for name in ("segments", "measured", "runs", "leases", "damaged", "writing"):
                (path / name).mkdir(parents=True, exist_ok=True)
            note = path / "format.json"
            if not note.is_file() or (found := _format_of(note)) == 1:
                write_text(note, json.dumps({"format": HELD}), path / "writing")
                found = HELD
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"store: {path} cannot be used: {error}; set store to another folder") from None
        need_shelves_inside(path)
        if found != HELD:
            raise StoreError(f"store: {path} is of format {found}, this version reads {HELD}; set store to another")

    def has(self, name: str) -> bool:
        """Whether a segment of this name lies there; `get` tells whether it is whole."""
        return (self.folder(name) / "segment.json").is_file()

    def get(self, name: str) -> Segment | None:
        """The segment, all its checksums verified; None where there is none, or a damaged one, which is set aside."""
        folder = self.folder(name)
        if not folder.is_dir() or self.set_aside_if_damaged(folder):
            return None
        record = self.record(folder)
        return Segment(folder, record) if record else None  # another process may have dropped it by now

    def set_aside_if_damaged(self, path: Path) -> bool:
        """Verify all checksums of a segment or a measurement; whether it was damaged, and is set aside."""
        if fault_of(path) is None:
            return False
        # Another process may have changed it between two of these reads: what counts is what it is at rest.
        with lock(self.path, CHANGES):
            fault = fault_of(path)
            if fault is None or not path.exists():
                return False
            aside = self.path / "damaged" / f"{path.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
            path.rename(aside)
        self.warn(f"store: {path.name} is damaged ({fault}); it is set aside in {aside} and made anew")
        return True

    def put(
        self, kind: str, causes: Causes, root: Causes, notes: dict[str, Any], write: Callable[[Path], None]
    ) -> tuple[Segment, bool]:
        """Keep a state, and say whether there was none of its name before. Where there was, the longer-lived kind
        holds, and an optimizer once kept stays.

        Args:
            kind: See `Segment.kind`.
            causes: From `Lineage.causes`; they hash to the state's name.
            root: Causes of the base's name.
            notes: What is worth knowing and is no cause: rows, seconds, versions, `towards`.
            write: Writes the files into the folder it is given.
        """
        name = state_name(causes)
        aside = self._new_aside()
        try:
            write(aside)
            files = {}
            for file in sorted(aside.iterdir()):
                sync(file)
                files[file.name] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
                _protect(file)
            record = {"format": FORMAT, "name": name, "kind": kind, "root": root, "causes": causes}
            made = self._write_record(aside, record | notes | {"files": files})
            aside.chmod((self.path / "writing").stat().st_mode & 0o777)  # mkdtemp makes its own for the user alone
            sync(aside)
            self.get(name)  # sets a damaged one aside, before the lock: hashing takes its time
            with lock(self.path, CHANGES):
                return self._publish(made)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _publish(self, made: Segment) -> tuple[Segment, bool]:
        folder = self.folder(made.name)
        there = Segment(folder, self.record(folder)) if folder.is_dir() else None
        if there is not None and there.record:
            self._compare(there, made)
            # A record is of what was the end of a segment.
            kind = "segment" if not there.has_weights else max(there.kind, made.kind, key=KINDS.index)
            if there.has_weights and (there.resumable or not made.resumable):
                return self._write_record(there.folder, {**there.record, "kind": kind}), False
            made = self._write_record(made.folder, {**made.record, "kind": kind})
        if there is not None:
            self._remove(folder)
        folder.parent.mkdir(exist_ok=True)
        try:
            made.folder.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process has published it, which this one did not see: on a network file system that takes a while.
            sleep(WAIT_SECONDS)
            return self._publish(made)
        sync(folder.parent)
        return Segment(folder, made.record), there is None

    def _compare(self, there: Segment, made: Segment) -> None:
        """Say where the weights of one state, made twice, are not the same to the bit."""
        for name, file in made.record["files"].items():
            before = there.record["files"].get(name)
            if name.endswith(".safetensors") and before is not None and before["sha256"] != file["sha256"]:
                devices = [_device_of(segment.record) for segment in (there, made)]
                self.warn(
                    f"store: {made.name} was made twice, on {devices[0]} and on {devices[1]}, and {name} is not the "
                    "same: one of them is kept. On one device and number of threads that should not be: report it"
                )

    def mark(self, name: str, kind: str) -> str | None:
        """Let a state that is there live as long as this kind does, at least; returns what it was."""
        folder = self.folder(name)
        with lock(self.path, CHANGES):
            record = self.record(folder)
            if record and KINDS.index(record["kind"]) < KINDS.index(kind):
                self._write_record(folder, {**record, "kind": kind})
            return record.get("kind")

    def strip(self, name: str) -> None:
        """Remove a segment's weights, and keep the record of how they were made and what its steps measured; for who
        holds the lock on changes."""
        folder = self.folder(name)
        if not (record := self.record(folder)):
            return
        files = {file: entry for file, entry in record["files"].items() if not file.endswith(".safetensors")}
        if files != record["files"]:
            self._write_record(folder, {**record, "kind": "record", "files": files})
        for file in folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)

    def drop(self, name: str, kind: str) -> None:
        """Remove a state if it is of this kind: what has come to be kept for longer stays."""
        with lock(self.path, CHANGES):
            if self.record(self.folder(name)).get("kind") == kind:
                self._remove(self.folder(name))

    def _write_record(self, folder: Path, record: dict[str, Any]) -> Segment:
        self._seal(folder / "segment.json", record, indent=1)
        return Segment(folder, record)

    def _remove(self, folder: Path) -> None:
        # Renamed first: a segment is there as a whole or not at all, also while it goes.
        check_held()
        gone = self._new_aside() / "gone"
        folder.rename(gone)
        shutil.rmtree(gone.parent, ignore_errors=True)

    def _new_aside(self) -> Path:
        """A folder of this process's: the next run clears it if this one is killed."""
        return Path(tempfile.mkdtemp(dir=self.path / "writing", prefix=f"{this_process().owner}."))

    def segments(self) -> Iterator[Path]:
        """The folders of all segments, unverified."""
        yield from sorted((self.path / "segments").glob("*/*/"))

    def record(self, folder: Path) -> dict[str, Any]:
        """A segment's record unless it is damaged; the files are not looked at. Empty where it is, or lies outside."""
        if leads_out(folder / "segment.json", self.path / "segments"):
            return {}
        try:
            return _unsealed(folder / "segment.json") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def find(self, beginning: str) -> Segment:
        """The one segment whose name begins so; a StoreError where none does, or several do."""
        names = [folder.name for folder in self.segments() if folder.name.startswith(beginning)]
        if len(names) != 1 or not beginning:
            number = f"{len(names)} segments begin" if names else "no segment begins"
            raise StoreError(f"{number} with {quoted(beginning)} in {self.path}; `cola store ls` shows them all")
        segment = self.get(names[0])
        if segment is None:
            raise StoreError(f"segment {names[0]} is damaged; it is trained again when a run needs it")
        return segment

    def folder(self, name: str) -> Path:
        """Where the segment of a name lies, or would."""
        return self.path / "segments" / name[:2] / name

    def recall(self, circumstances: dict[str, Any]) -> Any:
        """What was measured under exactly these circumstances, the name of the state among them; None where nothing
        was."""
        path = self._measurement(circumstances)
        if not path.is_file() or self.set_aside_if_damaged(path):
            return None
        return load_json(path)["value"]

    def knows(self, circumstances: dict[str, Any]) -> bool:
        """Whether a measurement lies there; `recall` tells whether it is whole."""
        return self._measurement(circumstances).is_file()

    def remember(self, circumstances: dict[str, Any], value: Any) -> None:
        """Keep a measurement."""
        self._seal(self._measurement(circumstances), {"format": FORMAT, "what": circumstances, "value": value})

    def measurements(self) -> Iterator[Path]:
        """The files of all measurements, unverified."""
        yield from sorted((self.path / "measured").glob("*/*.json"))

    def _measurement(self, circumstances: dict[str, Any]) -> Path:
        key = digest(circumstances)
        return self.path / "measured" / key[:2] / f"{key}.json"

    def _seal(self, path: Path, record: dict[str, Any], indent: int | None = None) -> None:
        """Write a record with its checksum: aside where a killed process's left-overs are looked for, and no part of a
        segment."""
        check_held()
        write_text(path, json.dumps(record | {"sha256": digest(record)}, indent=indent), self.path / "writing")


def _format_of(note: Path) -> Any:
    return json.loads(note.read_text(encoding="utf-8"))["format"]


def _unsealed(path: Path) -> dict[str, Any] | None:
    """A record without its checksum; None where the two do not match."""
    record = load_json(path)
    checksum = record.pop("sha256")
    return record if digest(record) == checksum else None


def fault_of(path: Path) -> str | None:
    """What is wrong with a segment's folder or a measurement's file; None where every checksum and the name agree."""
    measured = path.suffix == ".json"
    file, called = (path, "it") if measured else (path / "segment.json", "segment.json")
    if leads_out(file, path.parents[1]):
        return f"{called} leads out of the store by a link"
    try:
        record = _unsealed(file)
        if record is None:
            return f"{called} does not match its checksum"
        if measured:
            return None if digest(record["what"]) == path.stem else "its circumstances do not hash to its name"
        if not record["name"] == path.name == state_name(record["causes"]):
            return "its causes do not hash to its name"
        for name, entry in record["files"].items():
            if leads_out(path / name, path):
                return f"{name} leads out of the store by a link"
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["bytes"] or file_digest(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
    # Any other failure to read (no permission, too many open files) says nothing about what is there.
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"{called} cannot be read: {type(error).__name__}"
    return None


def _device_of(record: dict[str, Any]) -> str:
    return (record.get("made") or {}).get("device") or "a device that is not noted"


def hand_out(file: Path, place: Path, large: bool) -> None:
    """Give a segment's file to a run folder, so that nothing that is done there changes the segment unseen.

    A copy, which is the user's to edit. Of a large file it is the file itself where that is on the same disk, since a
    copy would double a model's: read-only, and who writes into it all the same (root, or after chmod) changes the
    segment's too, which no longer matches its checksum then and is made anew.
    """
    if large:
        with contextlib.suppress(OSError):
            _protect(file)
            os.link(file, place)
            return
    with written_aside(place) as new:
        shutil.copyfile(file, new)


def _protect(file: Path) -> None:
    """Let nobody write into a file; it can still be moved and removed."""
    file.chmod(file.stat().st_mode & ~0o222)
