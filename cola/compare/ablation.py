"""An ablation: one recipe at several values of some keys, each point a run of its own that shares what is trained.

ABLATION/ablation.json       the keys, the points, and every number of the table
ABLATION/ablation.html       the table and the figure; their files for a paper in ABLATION/tables/ and figures/
ABLATION/points/NN-VALUES/   a run folder

No torch.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cola.compare.contrasts import METRICS
from cola.compare.records import (
    Ablation,
    AblationNote,
    AblationPoint,
    AblationRow,
    AblationSeed,
    ArmSummary,
    Matched,
    Summary,
)
from cola.errors import RecipeError, RunFolderError
from cola.files import make_new
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.write import dump_recipe
from cola.recipe.yaml12 import values_of
from cola.tree.records import Result
from cola.tree.run_folder import RunFolder, read_json
from cola.tree.run_holder import last_unfinished, lock_run, take_run

N = TypeVar("N", bound=AblationNote)

MOST_POINTS = 1_000  # each of them a run
FORMAT = 4  # of ablation.json, and raised with that of the points' runs


@dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
        values: What each ablated key is set to, as it was written.
        recipe: The resolved recipe.
        folder: Name of its run folder.
    """

    values: dict[str, str]
    recipe: Recipe
    folder: str

    @property
    def label(self) -> str:
        return ", ".join(f"{short(key)}={value}" for key, value in self.values.items())


def points_of(recipe_path: Path, assignments: list[str], paired: bool) -> list[Point]:
    """Every point of the grid (or of the paired lists), its recipe read and checked.

    Args:
        recipe_path: The recipe.
        assignments: `dotted.key=value,value,...`; one with a single value is an override of all points.
        paired: Whether the n-th values of all keys belong together, instead of a grid of all combinations.

    Raises:
        RecipeError: a recipe does not hold, no key has two values, or two points are the same.
    """
    common, lists = [], {}
    for assignment in assignments:
        key, values = values_of(assignment)
        if key in lists:
            raise RecipeError(f"{key} is given twice")
        if len(values) > 1:
            lists[key] = [value.strip() for value in values]
        else:
            common.append(assignment)
    if not lists:
        raise RecipeError("no key has several values; write for example arms.chain3.links=1,2,3,4")
    lengths = {key: len(values) for key, values in lists.items()}
    if paired and len(set(lengths.values())) > 1:
        raise RecipeError(f"--paired: the lists must be of one length; they have {lengths}")
    number = max(lengths.values()) if paired else math.prod(lengths.values())
    if number > MOST_POINTS:
        raise RecipeError(f"the lists make {number} points; {MOST_POINTS} are the most: give fewer values")
    combinations = zip(*lists.values(), strict=True) if paired else itertools.product(*lists.values())
    points: list[Point] = []
    for number, values in enumerate(combinations, 1):
        settings = dict(zip(lists, values, strict=True))
        overrides = [f"{key}={value}" for key, value in settings.items()]
        recipe = read_recipe(recipe_path, [*common, *overrides])
        slug = re.sub(r"[^A-Za-z0-9.=-]+", "_", ",".join(f"{short(k)}={v}" for k, v in settings.items()))
        point = Point(settings, recipe, f"{number:02d}-{slug[:80]}")
        if twin := next((other for other in points if other.recipe == recipe), None):
            raise RecipeError(f"{point.label} and {twin.label} are the same recipe; give each value once")
        points.append(point)
    return points


def short(key: str) -> str:
    """The last two parts of a dotted key: `chain3.links`."""
    return ".".join(key.split(".")[-2:])


class AblationFolder:
    """The folder of an ablation and of its points' runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def take(cls, points: list[Point]) -> Iterator["AblationFolder"]:
        """Hold the folder of the last ablation of exactly these points that no other process is at, if it did not come
        to its end; else a new one.

        Raises:
            RunFolderError: no new one can be made.
        """
        recipe = points[0].recipe
        parent = Path(recipe.output).expanduser()
        causes = _causes(points)
        folders = [note.parent for note in parent.glob(f"{recipe.name}-ablation-*/ablation.json")]
        same = [path for path in folders if (note := cls(path).note()) is not None and note.causes == causes]
        with last_unfinished(same, lambda path: cls(path).finished) as before:
            if before is not None:
                yield cls(before)
                return
        stamp = f"{recipe.name}-ablation-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder = cls(make_new(parent, stamp))
        except OSError as error:
            raise RunFolderError(f"{recipe.output}: the folder cannot be made: {error.strerror}") from None
        with lock_run(folder.path):  # before its note is there, by which others find it
            folder.write(AblationNote(format=FORMAT, causes=causes, finished=False))
            yield folder

    def run_folder(self, point: Point) -> AbstractContextManager[tuple[RunFolder, bool]]:
        """As `take_run`, of the point's run."""
        return take_run(dump_recipe(point.recipe), self.path / "points" / point.folder)

    @property
    def finished(self) -> bool:
        """Whether all of its points came to their end."""
        note = self.note()
        return note is not None and note.finished

    def note(self) -> AblationNote | None:
        """Whose ablation.json is; None where it is damaged, or of another version."""
        return self._read(AblationNote)

    def summary(self) -> Ablation | None:
        """What ablation.json holds; None where it is damaged, of another version, or not written in full yet."""
        return self._read(Ablation)

    def _read(self, shape: type[N]) -> N | None:
        try:
            note = read_json(self.path / "ablation.json", shape)
        except RunFolderError:
            return None
        return note if note is not None and note.format == FORMAT else None

    def write(self, record: AblationNote) -> None:
        """Write ablation.json."""
        RunFolder(self.path).write("ablation.json", record)


def _causes(points: list[Point]) -> str:
    text = json.dumps([[point.values, point.folder, dump_recipe(point.recipe)] for point in points])
    return hashlib.sha256(text.encode()).hexdigest()


def summarize_ablation(
    folder: AblationFolder, points: list[Point], errors: dict[str, str], interrupted: bool
) -> Ablation:
    """Everything that the table and the figure show, from the points' run folders.

    Args:
        folder: Holds the runs.
        points: All of them.
        errors: What kept a point from being run at all, by its folder's name.
        interrupted: Whether the user stopped it.
    """
    rows, states, damaged = [], set(), []
    reused: dict[str, tuple[int, int]] = {}  # of each last state: the fewest steps found, and all
    for number, point in enumerate(points):
        run = RunFolder(folder.path / "points" / point.folder)
        summary = read_json(run.path / "summary.json", Summary)
        results = [r for r in run.results(damaged) if isinstance(r, Result)] if summary else []
        for result in results:
            info = result.train_info
            mine = (info.reused_steps, info.steps)
            reused[info.final_state] = min(mine, reused.get(info.final_state, mine))
        for arm in point.recipe.arms:
            about = summary.arms[arm] if summary else ArmSummary(states={}, errors={}, n_seeds=0)
            states |= set(about.states.values()) or {"missing"}
            if not concerned(points, arm) and number:
                continue
            mine = [r for r in results if r.run_info.arm == arm]
            values = point.values if concerned(points, arm) else None
            numbers = {**about.given(), "seeds": _by_seed(mine)}
            rows.append(AblationRow(values=values, label=point.label, arm=arm, **numbers))
    training = points[0].recipe.training
    return Ablation(
        format=FORMAT,
        causes=_causes(points),
        finished=states == {"ok"} and not errors,
        interrupted=interrupted,
        failed="failed" in states or bool(errors),
        errors=errors,
        name=folder.path.name,
        keys=list(points[0].values),
        protocol=training.protocol,
        matched=Matched(by=training.match, per_link=training.protocol == "grow"),
        metric=METRICS[points[0].recipe.data.task],
        points=[AblationPoint(label=p.label, values=p.values, folder=p.folder) for p in points],
        trained_steps=sum(steps - found for found, steps in reused.values()),
        recalled_steps=sum(found for found, _ in reused.values()),
        damaged=list(dict.fromkeys(damaged)),
        rows=sorted(rows, key=lambda row: row.values is not None),  # what the values are not about comes first
    )


def concerned(points: list[Point], arm: str) -> bool:
    """Whether the ablated keys are about this arm: all of them may be another arm's own."""
    named = [key.split(".")[1] for key in points[0].values if key.startswith("arms.")]
    return arm in named or len(named) < len(points[0].values)


def _by_seed(results: list[Result]) -> list[AblationSeed]:
    """One seed's numbers for the figure's dots."""
    return [
        AblationSeed(
            seed=r.run_info.seed,
            test_loss=r.evaluation.test.loss,
            test_score=r.evaluation.test.score,
            gap_loss=r.evaluation.gap_loss,
            gap_acc=r.evaluation.gap_acc,
            steps=r.train_info.steps,
            total_seconds=r.train_info.total_seconds,
        )
        for r in results
    ]
