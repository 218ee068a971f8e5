"""The run folder: what is written where, and how a result says how it was made. No torch.

RUN/recipe.yaml            the resolved recipe; `cola run RUN/recipe.yaml` runs it again
RUN/provenance.json        versions, commit, machine, fingerprints of data and model
RUN/summary.json           every number of the tables
RUN/report.html            the page; its figures for a paper in RUN/figures/, its tables in RUN/tables/
RUN/arms/ARM/seed-S/       result.json, metrics.jsonl, ledger.jsonl (each knot's matrices), spectrum.json (what
                           each link added to them), scores/SPLIT.jsonl, knots/link-K/ (PEFT adapters)
RUN/trials/ARM/KEY=VALUE/seed-S/  the same for the trainings of a search (validation only); chosen.json: all of them,
                           chosen-seed-S.json: those of a seed that chooses for itself
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from cola.errors import RunFolderError, plain
from cola.files import load_json, write_text
from cola.recipe.plan import Job, choice_text
from cola.recipe.schema import TrackerName
from cola.tree import records
from cola.tree.made import Made, Provenance
from cola.tree.shapes import Record, fault_of

RESULTS = "arms/*/seed-*/result.json"
TRACKER_NOTES = {name: f"{name}.json" for name in get_args(TrackerName)}  # who a folder's run at the tracker is
FORMAT = 4  # of result.json and summary.json, see docs/results.md
MADE_WITH = tuple(Made.model_fields)  # what a state or a measurement says of its making

R = TypeVar("R", bound=Record)


class RunFolder:
    """One run's folder on disk. Every file is written aside and renamed, so none is ever half there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run; a RunFolderError where it is none, or another version's."""
        folder = cls(path)
        if not folder.recipe_file.is_file():
            raise RunFolderError(f"{path} is no run folder: it has no recipe.yaml")
        folder.check_readable()
        return folder

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe, by which a command knows its run."""
        return self.path / "recipe.yaml"

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
        """Whether its results are in this version's format; a run without any is."""
        provenance = read_json(self.path / "provenance.json", records.AnyFormat)
        return provenance is None or provenance.format == FORMAT

    def job(self, job: Job) -> Path:
        """Where a job's files lie."""
        if job.trial:
            values = re.sub(r"[^A-Za-z0-9.=+-]+", "_", choice_text(job.choice).replace(" ", ","))
            return self.path / "trials" / job.arm / values / f"seed-{job.seed}"
        return self.path / "arms" / job.arm / f"seed-{job.seed}"

    def status(self, job: Job) -> str | None:
        """How the job ended; None where it has no result yet."""
        path = self.job(job) / "result.json"
        result = self._result(path, records.TrialResult) if job.trial else self._result(path, records.Result)
        return result and result.status

    def result(self, job: Job) -> records.Result | None:
        """The result of an arm and seed; None where it has not come to its end."""
        result = self._result(self.job(job) / "result.json", records.Result)
        return None if isinstance(result, records.Ended) else result

    def trial(self, job: Job) -> records.TrialResult | None:
        """The result of a trial of a search; None where it has not come to its end."""
        result = self._result(self.job(job) / "result.json", records.TrialResult)
        return None if isinstance(result, records.Ended) else result

    def _result(self, path: Path, done: type[R]) -> R | records.Ended | None:
        """A result of whatever status."""
        ended = read_json(path, records.AnyStatus)
        return ended and read_json(path, done if ended.status == "ok" else records.Ended)

    def results(self, damaged: list[str] | None = None) -> Iterator[records.Result | records.Ended]:
        """The results of all arms and seeds (not of trials), as they were run. What is wrong with one that cannot be
        read is added to `damaged`; without such a list it is raised."""
        for path in sorted(self.path.glob(RESULTS)):
            try:
                result = self._result(path, records.Result)
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
        return read_json(self.path / "provenance.json", Provenance)

    def scores(self, arm: str, seed: int, split: str) -> list[records.ScoreRow]:
        """Results of one arm and seed, example by example; empty where there are none."""
        return read_rows(self.job(Job(arm=arm, seed=seed)) / "scores" / f"{split}.jsonl", records.ScoreRow)

    def trial_scores(self, trial: Job) -> list[records.ScoreRow]:
        """The same of a trial, on validation."""
        return read_rows(self.job(trial) / "scores" / "validation.jsonl", records.ScoreRow)

    def start_job(self, job: Job) -> Path:
        """The job's folder without what an unfinished attempt left, but for the identity of its run at a tracker."""
        path = self.job(job)
        path.mkdir(parents=True, exist_ok=True)
        for left in path.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name not in TRACKER_NOTES.values():
                left.unlink()
        return path

    def references(self) -> dict[str, set[str]]:
        """Names of the segments and measurements in the store that this run rests on so far; `weights`: of the fully
        fine-tuned states whose weights it keeps."""
        kept = read_json(self.path / "segments.json", records.References) or records.References()
        return {kind: set(getattr(kept, kind)) for kind in records.References.model_fields}

    def foreseen(self) -> records.Foreseen | None:
        """What the run was expected to take; None where an earlier version began it."""
        return read_json(self.path / "plan.json", records.Foreseen)

    def write(self, name: str | Path, record: Record) -> None:
        """Write a file of the run folder."""
        self.write_text(name, json.dumps(record.content(), indent=1) + "\n")

    def write_jsonl(self, name: str | Path, rows: Iterable[Any]) -> None:
        """Write a file of one JSON value per line."""
        self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_text(self, name: str | Path, text: str) -> None:
        """Write a text file atomically."""
        write_text(self.path / name, text)

    def choice(self, arm: str, seed: int | None) -> records.Chosen | None:
        """What an arm's search tried and chose, for all seeds (None) or for one; None where there was none."""
        return read_json(self.path / choice_file(arm, seed), records.Chosen)

    def state(self) -> records.RunState | None:
        """What summary.json says of each arm's seeds; None where there is none yet."""
        return read_json(self.path / "summary.json", records.RunState)

    @property
    def finished(self) -> bool:
        """Whether all of its last session came to its end, the page included, which is written last."""
        summary = self.state()
        return (
            summary is not None
            and (self.path / "report.html").is_file()
            and not summary.interrupted
            and not any(arm.errors for arm in summary.arms.values())
        )


def read_json(path: Path, shape: type[R]) -> R | None:
    """A file of one record; None where there is no such file, and a RunFolderError where it is damaged."""
    try:
        return shape.model_validate(load_json(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged_file(path, error.strerror or "it cannot be read") from None
    except ValueError as error:
        raise damaged_file(path, fault_of(error)) from None


def place_of(result: records.Result | records.Ended) -> Path:
    """Where a result lies below `arms`."""
    return Path(result.run_info.arm) / f"seed-{result.run_info.seed}"


def damaged_file(path: Path, why: str) -> RunFolderError:
    """What is said of a file of a run that cannot be used."""
    return RunFolderError(f"{path} is damaged ({why}); delete it and go on with `cola run --resume`")


def choice_file(arm: str, seed: int | None) -> Path:
    """Where a run folder says what an arm's search chose, for all seeds (None) or for one."""
    return Path("trials") / arm / ("chosen.json" if seed is None else f"chosen-seed-{seed}.json")


def read_rows(path: Path, shape: type[R]) -> list[R]:
    """The rows of a JSONL file, as `read_jsonl`, each of them a record."""
    try:
        return TypeAdapter(list[shape]).validate_python(read_jsonl(path))  # pyright: ignore[reportInvalidTypeForm]
    except ValidationError as error:
        raise damaged_file(path, f"row {fault_of(error)}") from None


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSONL file; empty where there is none, and a RunFolderError where it is damaged. A last line that
    was cut off is left out."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise damaged_file(path, str(error)) from None
