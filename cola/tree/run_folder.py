"""The run folder: what is written where, and how a result says how it was made. No torch.

RUN/recipe.yaml            the resolved recipe; `cola run RUN/recipe.yaml` runs it again
RUN/provenance.json        versions, commit, machine, fingerprints of data and model
RUN/summary.json           every number of the tables
RUN/report.html            the page; its figures for a paper in RUN/figures/, its tables in RUN/tables/
RUN/arms/ARM/seed-S/       result.json, metrics.jsonl, ledger.jsonl (each knot's matrices), spectrum.json (what
                           each link added to them), scores/SPLIT.jsonl, knots/link-K/ (PEFT adapters)
RUN/workers/               a log of each worker's (`--workers`), and while it works what it needs of the store
RUN/trials/ARM/KEY=VALUE/seed-S/  the same for the trainings of a search (validation only); chosen.json: all of them,
                           chosen-seed-S.json: those of a seed that chooses for itself
RUN/manifest.json          SHA-256 of the run's own files; one beside each result.json: of that arm's and seed's
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from cola.errors import FolderGone, RunFolderError, plain
from cola.files import digest, each_once, load_json, parse_json, remove_all, sha256, write_bytes
from cola.recipe.plan import Job, choice_text
from cola.recipe.schema import TrackerName
from cola.tree import manifest, records
from cola.tree.foreseen import Foreseen
from cola.tree.leases import check_held
from cola.tree.links import need_inside
from cola.tree.made import Made, Provenance
from cola.tree.manifest import Entry, damaged_file
from cola.tree.shapes import Record, fault_of

NOTES = "segments.json"  # what a run needs of the store
WORKERS = f"workers/*/{NOTES}"
RESULTS = "arms/*/seed-*/result.json"
TRACKER_NOTES = {name: f"{name}.json" for name in get_args(TrackerName)}  # who a folder's run at the tracker is
FORMAT = 4  # of result.json and summary.json, see docs/results.md
MADE_WITH = tuple(Made.model_fields)  # what a state or a measurement says of its making

LONGEST_NAME = 200  # of a trial's folder, in bytes; disks take 255
NAMED = ("segments", "measured", "weights")  # what segments.json names
COME_LAST = ("result.json", "summary.json")  # a kill before them leaves a manifest that has them

R = TypeVar("R", bound=Record)


class RunFolder:
    """One run's folder on disk. Every file is written aside and renamed, so none is ever half there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, to_mend: bool = False) -> "RunFolder":
        """An existing run; a RunFolderError where it is none, or another version's, or its recipe is not the one that
        it began with, or something in it leads elsewhere. `to_mend`: it goes on, and `mend` says so."""
        folder = cls(path)
        if not folder.recipe_file.is_file():
            raise RunFolderError(f"{path} is no run folder: it has no recipe.yaml")
        need_inside(path)
        folder.check_readable()
        if not to_mend:
            folder.bytes_of("recipe.yaml")
        return folder

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe, by which a command knows its run."""
        return self.path / "recipe.yaml"

    @property
    def page(self) -> Path:
        """Where its results can be looked at, once they are there."""
        return self.path / "report.html"

    def check_readable(self) -> None:
        """Raise a RunFolderError where another version wrote the results."""
        if not self.readable:
            raise RunFolderError(
                f"{self.path} was written by another version of cola, whose results this one does not read; run its "
                f"recipe anew: cola run {self.recipe_file}"
            )

    def check_results(self) -> None:
        """Raise a RunFolderError where nothing was run yet, or what was run has gone: a report would be made of
        nothing, in place of one that there may be."""
        if self.provenance() is None:
            raise RunFolderError(f"{self.path} holds no results; go on with it by `cola run --resume {self.path}`")
        if any(self.path.glob(RESULTS)):
            return
        told = self.state()
        if told and any(arm.n_seeds for arm in told.arms.values()):
            raise RunFolderError(
                f"{self.path}/summary.json tells of results that have gone from {self.path}/arms; a report made anew "
                "would be empty (where a run is packed beside it, unpack that and name its folder)"
            )

    @property
    def readable(self) -> bool:
        """Whether its results are in this version's format; a run without any is, and one that is damaged may be."""
        try:
            provenance = self.read("provenance.json", records.AnyFormat)
        except RunFolderError:
            return True  # it is said where what it holds is asked for
        return provenance is None or provenance.format == FORMAT

    def job(self, job: Job) -> Path:
        """Where a job's files lie."""
        if job.trial:
            values = re.sub(r"[^A-Za-z0-9.=+-]+", "_", choice_text(job.choice).replace(" ", ","))
            if len(values) > LONGEST_NAME:
                values = f"{values[: LONGEST_NAME - 13]}-{sha256(values)[:12]}"
            return self.path / "trials" / job.arm / values / f"seed-{job.seed}"
        return self.path / "arms" / job.arm / f"seed-{job.seed}"

    def status(self, job: Job) -> str | None:
        """How the job ended; None where it has no result yet."""
        path = self.job(job) / "result.json"
        result = self.result_at(path, records.TrialResult) if job.trial else self.result_at(path, records.Result)
        return result and result.status

    def result(self, job: Job) -> records.Result | None:
        """The result of an arm and seed; None where it has not come to its end."""
        result = self.result_at(self.job(job) / "result.json", records.Result)
        return None if isinstance(result, records.Ended) else result

    def trial(self, job: Job) -> records.TrialResult | None:
        """The result of a trial of a search; None where it has not come to its end."""
        result = self.result_at(self.job(job) / "result.json", records.TrialResult)
        return None if isinstance(result, records.Ended) else result

    def result_at(self, path: Path, done: type[R]) -> R | records.Ended | None:
        """A result of whatever status in a file; a RunFolderError where it is damaged."""
        ended = self.read(path, records.AnyStatus)
        return ended and self.read(path, done if ended.status == "ok" else records.Ended)

    def results(self, damaged: list[str] | None = None) -> Iterator[records.Result | records.Ended]:
        """The results of all arms and seeds (not of trials), as they were run. What is wrong with one that cannot be
        read is added to `damaged`; without such a list it is raised."""
        for path in sorted(self.path.glob(RESULTS)):
            try:
                result = self.result_at(path, records.Result)
                if result is not None and path.parent != self.path / "arms" / place_of(result):
                    raise damaged_file(path, f"it is the result of {plain(place_of(result))}")
            except RunFolderError as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
            else:
                if result is not None:
                    yield result

    def provenance(self) -> Provenance | None:
        """What provenance.json holds; None before the first session has written it."""
        self.check_readable()
        return self.read("provenance.json", Provenance)

    def scores(self, arm: str, seed: int, split: str) -> list[records.ScoreRow]:
        """Results of one arm and seed, example by example; empty where there are none."""
        return self.rows(self.job(Job(arm=arm, seed=seed)) / "scores" / f"{split}.jsonl", records.ScoreRow)

    def trial_scores(self, trial: Job) -> list[records.ScoreRow]:
        """The same of a trial, on validation."""
        return self.rows(self.job(trial) / "scores" / "validation.jsonl", records.ScoreRow)

    def start_job(self, job: Job) -> Path:
        """The job's folder without what an unfinished attempt left, but for the identity of its run at a tracker."""
        self._need()
        path = self.job(job)
        path.mkdir(parents=True, exist_ok=True)
        remove_all(left for left in path.iterdir() if left.name not in TRACKER_NOTES.values())
        return path

    def end_job(
        self, job: Job, record: records.Result | records.TrialResult | records.Ended, handed_out: Mapping[str, Entry]
    ) -> None:
        """Write the result of a job whose other files are there, and before it its manifest. `handed_out`: entries of
        the files that the store has given, whose digests it knows."""
        self._need()
        folder, data = self.job(job), _text(record).encode()
        own = [path for path in sorted(folder.rglob("*")) if path.relative_to(folder).as_posix() not in handed_out]
        files = manifest.entries_of(folder, [path for path in own if path.name not in TRACKER_NOTES.values()])
        info = record.train_info if not isinstance(record, records.Ended) else None
        states = [] if info is None else [*info.segments, *([info.scored_state] if info.scored_step else [])]
        unit = folder.relative_to(self.path)
        all_of_them = manifest.Manifest(
            place=unit.as_posix(),
            arm=job.arm,
            seed=job.seed,
            states=each_once(states),
            files={**dict(files), **handed_out, "result.json": manifest.entry_of(data)},
        )
        manifest.write(self.path, unit, all_of_them)
        self._write(unit / "result.json", data)

    def references(self) -> dict[str, set[str]]:
        """Names of the segments and measurements in the store that this run rests on so far; `weights`: of the fully
        fine-tuned states whose weights it keeps."""
        return references_in(self.path)

    def forget_workers(self) -> None:
        """Remove what workers that are gone have noted of the store: whoever holds the run refers to it now."""
        for path in self.path.glob(WORKERS):
            path.unlink()

    def write_references(self, names: Mapping[str, Iterable[str]], to: str = NOTES) -> None:
        """Write these down, with their checksum: they change too often for a manifest. `to`: where a worker has its
        own."""
        record = {kind: sorted(names[kind]) for kind in NAMED}
        self._write(to, (json.dumps({**record, "sha256": digest(record)}, indent=1) + "\n").encode())

    def begin(self, name: str, record: Record) -> None:
        """Write the first file of a run, or of an ablation, beside its recipe; it has a manifest from then on."""
        self._need()
        manifest.begin(self.path, {name: _text(record).encode()})
        self.write(name, record)

    def foreseen(self) -> Foreseen | None:
        """What the run was expected to take; None where an earlier version began it."""
        return self.read("plan.json", Foreseen)

    def write(self, name: str | Path, record: Record) -> None:
        """Write a file of the run folder."""
        self.write_text(name, _text(record))

    def write_jsonl(self, name: str | Path, rows: Iterable[Any]) -> None:
        """Write a file of one JSON value per line."""
        self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_text(self, name: str | Path, text: str) -> None:
        """Write a text file atomically; FolderGone where the run's folder was removed, LeaseLost where this process has
        lost what it was at."""
        self._need()
        manifest.note(self.path, Path(name), text.encode())
        self._write(name, text.encode())

    def _write(self, name: str | Path, data: bytes) -> None:
        self._need()
        write_bytes(self.path / name, data)

    def _need(self) -> None:
        self.need_there()
        check_held()

    def need_there(self) -> None:
        """FolderGone where the run's folder was removed."""
        if not self.path.is_dir():
            raise FolderGone(
                f"{self.path} was removed while the run went on; what was trained is in the store, and the same "
                "command finds it there"
            )

    def bytes_of(self, name: str | Path) -> bytes:
        """What a file of the run holds. A RunFolderError where it is not what its manifest says, or has gone, and a
        FileNotFoundError where there is none of which a manifest knows."""
        name = Path(name)
        if name.is_relative_to(self.path):  # as `job` names it, be it from the root or from where one works
            name = name.relative_to(self.path)
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise damaged_file(path, error.strerror or "it cannot be read") from None
            if path.name not in COME_LAST and manifest.has(self.path, name):
                raise damaged_file(path, "it has gone") from None
            raise
        manifest.check(self.path, name, data)
        return data

    def read(self, name: str | Path, shape: type[R]) -> R | None:
        """A file of one record; None where there is no such file, and a RunFolderError where it is damaged."""
        try:
            return shape.model_validate(parse_json(self.bytes_of(name)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise damaged_file(self.path / name, fault_of(error)) from None

    def rows(self, name: str | Path, shape: type[R]) -> list[R]:
        """The rows of a JSONL file, as `lines`, each of them a record."""
        try:
            return TypeAdapter(list[shape]).validate_python(self.lines(name))  # pyright: ignore[reportInvalidTypeForm]
        except ValidationError as error:
            raise damaged_file(self.path / name, f"row {fault_of(error)}") from None

    def lines(self, name: str | Path) -> list[Any]:
        """The values of a JSONL file; empty where there is none, and a RunFolderError where it is damaged. A last line
        that was cut off is left out."""
        try:
            return [parse_json(line) for line in self.bytes_of(name).split(b"\n")[:-1]]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise damaged_file(self.path / name, str(error)) from None

    def choice(self, arm: str, seed: int | None) -> records.Chosen | None:
        """What an arm's search tried and chose, for all seeds (None) or for one; None where there was none."""
        return self.read(choice_file(arm, seed), records.Chosen)

    def state(self) -> records.RunState | None:
        """What summary.json says of each arm's seeds; None where there is none yet."""
        return self.read("summary.json", records.RunState)

    @property
    def finished(self) -> bool:
        """Whether all of its last session came to its end, the page included, which is written last."""
        try:
            summary = self.state()
        except RunFolderError:
            return False  # going on writes it anew
        return (
            summary is not None
            and self.page.is_file()
            and not summary.interrupted
            and not any(arm.errors for arm in summary.arms.values())
        )


def _text(record: Record) -> str:
    return json.dumps(record.content(), indent=1) + "\n"


def references_in(path: Path, but: Path | None = None) -> dict[str, set[str]]:
    """Names by kind of a run folder's segments.json and of those of its workers, or of all of these files `but` one;
    none where it has no such file. A RunFolderError where one is damaged."""
    kept = [_references(file) for file in (path / NOTES, *path.glob(WORKERS)) if file != but]
    return {kind: set().union(*(getattr(one, kind) for one in kept)) for kind in NAMED}


def _references(path: Path) -> records.References:
    try:
        found = load_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        checksum = found.pop("sha256", None)
        if checksum is not None and checksum != digest(found):
            raise ValueError("it does not match its own checksum")
        return records.References.model_validate(found)
    except FileNotFoundError:
        return records.References()
    except (OSError, ValueError, AttributeError) as error:
        why = fault_of(error) if isinstance(error, ValueError) else f"it cannot be read: {type(error).__name__}"
        raise damaged_file(path, why) from None


def place_of(result: records.Result | records.Ended) -> Path:
    """Where a result lies below `arms`."""
    return Path(result.run_info.arm) / f"seed-{result.run_info.seed}"


def choice_file(arm: str, seed: int | None) -> Path:
    """Where a run folder says what an arm's search chose, for all seeds (None) or for one."""
    return Path("trials") / arm / ("chosen.json" if seed is None else f"chosen-seed-{seed}.json")
