"""An ablation: one recipe at several values of some keys, each point a run of its own that shares what is trained.

ABLATION/ablation.json       the keys, the points, and every number of the table
ABLATION/ablation.html       the table and the figure; their files for a paper in ABLATION/tables/ and figures/
ABLATION/points/NN-VALUES/   a run folder

No torch.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cola.compare import ablation_records, records
from cola.compare.contrasts import METRICS, Comparer, across, interval_of
from cola.compare.statistics import estimate
from cola.errors import RecipeError, RunFolderError
from cola.files import make_new, sha256
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.write import dump_recipe
from cola.recipe.yaml12 import values_of
from cola.tree.records import Result
from cola.tree.run_folder import FORMAT, RunFolder
from cola.tree.run_holder import last_unfinished, lock_run

N = TypeVar("N", bound=ablation_records.AblationNote)

MOST_POINTS = 1_000  # each of them a run


@dataclass(frozen=True)
class Point:
    """One combination of values of the ablated keys, as they were written; its recipe, and the name of its folder."""

    values: dict[str, str]
    recipe: Recipe
    folder: str

    @property
    def label(self) -> str:
        return ", ".join(f"{short(key)}={value}" for key, value in self.values.items())


def points_of(recipe_path: Path, assignments: list[str], paired: bool) -> list[Point]:
    """Every point of the grid, its recipe read and checked.

    Args:
        recipe_path: The recipe.
        assignments: `dotted.key=value,value,...`; one with a single value is an override of all points. Where none has
            several, the first is what is ablated, at one point.
        paired: Whether the n-th values of all keys belong together, instead of a grid of all combinations.

    Raises:
        RecipeError: a recipe does not hold, no key has a value, or two points are the same.
    """
    given = [values_of(assignment) for assignment in assignments]
    most = max(len(values) for _, values in given)
    if not most:
        raise RecipeError("no key has a value; write for example arms.chain3.links=1,2,3,4")
    # Of keys with a value each the first is ablated: one point, which others may join later.
    alone = next(n for n, (_, values) in enumerate(given) if len(values) == most)
    common, lists = [], {}
    for number, (assignment, (key, values)) in enumerate(zip(assignments, given, strict=True)):
        if key in lists:
            raise RecipeError(f"{key} is given twice")
        if len(values) > 1 or (most == 1 and number == alone):
            lists[key] = [value.strip() for value in values]
        else:
            common.append(assignment)
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


@contextmanager
def take_ablation(points: list[Point]) -> Iterator[Path]:
    """Hold the folder of the last ablation of exactly these points that no other process is at, if it did not come to
    its end; else a new one.

    Raises:
        RunFolderError: no new one can be made.
    """
    recipe, causes = points[0].recipe, _causes(points)
    parent = Path(recipe.output).expanduser()
    notes = {path.parent: read_ablation(path.parent) for path in parent.glob(f"{recipe.name}-ablation-*/ablation.json")}
    same = [path for path, note in notes.items() if note is not None and note.causes == causes]
    with last_unfinished(same, lambda path: (note := read_ablation(path)) is not None and note.finished) as before:
        if before is not None:
            yield before
            return
    try:
        folder = make_new(parent, f"{recipe.name}-ablation-{datetime.now():%Y%m%d-%H%M%S}")
    except OSError as error:
        raise RunFolderError(f"{recipe.output}: the folder cannot be made: {error.strerror}") from None
    with lock_run(folder):  # before its note is there, by which others find it
        note = ablation_records.AblationNote(format=FORMAT, causes=causes, finished=False)
        RunFolder(folder).begin("ablation.json", note)
        yield folder


def read_ablation(folder: Path, shape: type[N] = ablation_records.AblationNote) -> N | None:
    """What ablation.json holds; None where it is damaged, of another version, or has not so much in it yet."""
    try:
        note = RunFolder(folder).read("ablation.json", shape)
    except RunFolderError:
        return None
    return note if note is not None and note.format == FORMAT else None


def _causes(points: list[Point]) -> str:
    return sha256(json.dumps([[point.values, point.folder, dump_recipe(point.recipe)] for point in points]))


def summarize_ablation(
    folder: Path, points: list[Point], errors: dict[str, str], interrupted: bool
) -> ablation_records.Ablation:
    """Everything that the table and the figure show, from the runs of all points in the ablation's folder; `errors`:
    what kept a point from being run at all, by its folder's name."""
    rows, states, damaged = [], set(), []
    named = [key.split(".")[1] for key in points[0].values if key.startswith("arms.")]
    samples: set[int | None] = set()
    runs = [Comparer(point.recipe, RunFolder(folder / "points" / point.folder), []) for point in points]
    reused: dict[str, tuple[int, int]] = {}  # of each last state: the fewest steps found, and all
    for number, point in enumerate(points):
        run = RunFolder(folder / "points" / point.folder)
        summary = run.read("summary.json", records.Summary)
        results = [r for r in run.results(damaged) if isinstance(r, Result)] if summary else []
        samples |= {summary.train_sample} if summary and results else set()
        for result in results:
            info = result.train_info
            steps = (info.reused_steps, info.steps)
            reused[info.final_state] = min(steps, reused.get(info.final_state, steps))
        for arm in point.recipe.arms:
            about = summary.arms[arm] if summary else records.ArmSummary(states={}, errors={}, n_seeds=0)
            states |= set(about.states.values()) or {"missing"}
            mine = arm in named or len(named) < len(points[0].values)  # the values may be about other arms alone
            if mine or not number:
                seeds = [_of_seed(result) for result in results if result.run_info.arm == arm]
                own = {"values": point.values if mine else None, "label": point.label, "arm": arm, "seeds": seeds}
                if mine and number and (table := across([runs[number], runs[0]], arm, by_loss=False)):
                    own["difference"] = interval_of(estimate((1, -1), [table]))
                rows.append(ablation_records.AblationRow(**(about.given() | own)))
    training = points[0].recipe.training
    return ablation_records.Ablation(
        format=FORMAT,
        causes=_causes(points),
        finished=states == {"ok"} and not errors,
        interrupted=interrupted,
        failed="failed" in states or bool(errors),
        errors=errors,
        name=folder.name,
        keys=list(points[0].values),
        protocol=training.protocol,
        matched=records.Matched(by=training.match, per_link=training.protocol == "grow"),
        train_sample=samples.pop() if len(samples) == 1 else None,  # of several it is one of the keys
        metric=METRICS[points[0].recipe.data.task],
        points=[ablation_records.AblationPoint(label=p.label, values=p.values, folder=p.folder) for p in points],
        trained_steps=sum(steps - found for found, steps in reused.values()),
        recalled_steps=sum(found for found, _ in reused.values()),
        damaged=list(dict.fromkeys(damaged)),
        rows=sorted(rows, key=lambda row: row.values is not None),  # what the values are not about comes first
    )


def _of_seed(result: Result) -> ablation_records.AblationSeed:
    """One seed's numbers for the figure's dots."""
    numbers, info = result.evaluation, result.train_info
    return ablation_records.AblationSeed(
        seed=result.run_info.seed,
        test_loss=numbers.test.loss,
        test_score=numbers.test.score,
        gap_loss=numbers.gap_loss,
        gap_acc=numbers.gap_acc,
        steps=info.steps,
        total_seconds=info.total_seconds,
    )
