"""Several runs in one report: each data set is a task, and runs on the same data are more seeds of it. No torch.

A contrast over tasks is the equal-weight mean of the tasks' means of paired differences, the tasks held fixed: its
interval speaks of other seeds and examples on these tasks. Per task it is what a single run has, digit by digit. From
eight tasks on the interquartile mean of the paired differences stands beside it. Nothing is averaged over tasks that
are measured in different units, and an arm's own scores are not averaged: how hard the tasks are would decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cola.compare import statistics
from cola.compare.contrasts import METRICS, Comparer, check_arms, difference_of, paired, settle
from cola.compare.iqm import iqm_estimate
from cola.compare.records import (
    ArmOfTasks,
    Difference,
    Interval,
    Named,
    Role,
    Spread,
    TaskContrast,
    TaskRuns,
    TasksSummary,
)
from cola.compare.scope import scope_of, scope_sentence
from cola.compare.statistics import Table as Scores
from cola.compare.summary import made_differently
from cola.errors import RunFolderError
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.tree.records import Result
from cola.tree.run_folder import FORMAT, RunFolder

# Of a contrast where nothing is averaged over tasks.
NOTHING = {**dict.fromkeys(Difference.model_fields), "n_seeds": 0, "iqm": None}


@dataclass
class Run:
    """One run of a report.

    Attributes:
        taken: The seeds of each arm that are not another run's already.
    """

    folder: RunFolder
    recipe: Recipe
    comparer: Comparer
    taken: dict[str, list[int]]

    @property
    def causes(self) -> tuple[str, str, str]:
        """What makes runs comparable seed by seed: data, base and metric."""
        provenance = self.folder.provenance()
        assert provenance is not None  # open_runs refuses a run without one
        return provenance.data.sha256, provenance.model.sha256, METRICS[self.recipe.data.task]

    @property
    def results(self) -> list[tuple[str, int, Result]]:
        """What is taken of it: arm, seed and result."""
        return [(arm, seed, self.comparer.done[arm, seed]) for arm, seeds in self.taken.items() for seed in seeds]


@dataclass
class Task:
    """Runs on the same data, from the same base."""

    label: str
    runs: list[Run] = field(default_factory=list)

    @property
    def metric(self) -> str:
        return METRICS[self.runs[0].recipe.data.task]

    @property
    def arms(self) -> list[str]:
        """With a result each."""
        return list(dict.fromkeys(arm for run in self.runs for arm, seeds in run.taken.items() if seeds))

    def scores(self, arms: Sequence[str], by_loss: bool) -> Scores | None:
        """The arms' scores over the seeds that all of them have, of all runs; None where there are none."""
        rows: list[list[Any]] = [[] for _ in arms]
        for run in self.runs:
            if any(arm not in run.taken for arm in arms):
                continue
            for seed in run.recipe.seeds:
                if all(seed in run.taken[arm] for arm in arms):
                    of_seed = [run.comparer.rows(arm, seed) for arm in arms]
                    if all(one is not None for one in of_seed):
                        for column, one in zip(rows, of_seed, strict=True):
                            column.append(one)
        return paired(rows, by_loss) if rows[0] else None


def open_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs and what is wrong with some of their files.

    Raises:
        RunFolderError: a folder is no run, or has no results.
    """
    runs: list[Run] = []
    notes: list[str] = []
    for path in paths:
        folder = RunFolder.open(path)
        recipe = read_recipe(folder.recipe_file)
        folder.check_results()
        if any(folder.path.resolve() == run.folder.path.resolve() for run in runs):
            raise RunFolderError(f"{path} is given twice")
        results = {(r.run_info.arm, r.run_info.seed): r for r in folder.results(notes)}
        comparer = Comparer(recipe, folder, results, notes)
        runs.append(Run(folder, recipe, comparer, dict(comparer.ok)))
    return runs, notes


def tasks_of(runs: Sequence[Run], notes: list[str]) -> list[Task]:
    """The runs by what they were run on. A seed that two runs have in common counts once, which is told."""
    tasks: dict[tuple[str, str, str], Task] = {}
    for run in runs:
        task = tasks.setdefault(run.causes, Task(run.recipe.name))
        for arm, seeds in run.taken.items():
            there = {seed for other in task.runs for seed in other.taken.get(arm, ())}
            if again := sorted(there.intersection(seeds)):
                notes.append(
                    f"{run.folder.path.name}: {arm} seed {', '.join(map(str, again))} is in an earlier run on the same "
                    "data and is left out here: it is no second observation"
                )
            run.taken[arm] = [seed for seed in seeds if seed not in there]
        task.runs.append(run)
    labels = [task.label for task in tasks.values()]
    for task in tasks.values():
        if labels.count(task.label) > 1:
            task.label = task.runs[0].folder.path.name
    return list(tasks.values())


def summarize_tasks(paths: Sequence[Path], later: Sequence[tuple[str, str]] = ()) -> TasksSummary:
    """Everything that the report of several runs shows.

    Args:
        paths: The runs' folders.
        later: Contrasts that are asked for now and that no recipe names: shown, and nothing is claimed of them.

    Raises:
        RunFolderError: a folder is no run, has no results, or none has an arm that is asked for.
    """
    runs, notes = open_runs(paths)
    tasks = tasks_of(runs, notes)
    notes += _scopes(tasks)
    notes += made_differently({(f"{run.folder.path.name}: {arm}", s): r for run in runs for arm, s, r in run.results})
    metrics = {run.recipe.metric for run in runs}
    alike = len(metrics) == 1 and (len({task.metric == "perplexity" for task in tasks}) == 1 or metrics == {"loss"})
    if not alike:
        told = ", ".join(
            f"{run.folder.path.name}: {METRICS[run.recipe.data.task]}, {run.recipe.metric}" for run in runs
        )
        notes.append(f"the runs are not about the same metric ({told}), so nothing is averaged over tasks")
    by_loss = metrics == {"loss"}
    contrasts = []
    for role, first, second in _named(runs, later, notes):
        scores = {task.label: one for task in tasks if (one := task.scores([first, second], by_loss)) is not None}
        if missing := [task.label for task in tasks if task.label not in scores]:
            notes.append(f"{first} − {second}: not both are there, under one seed, for {', '.join(missing)}")
        found = {label: difference_of([one]) for label, one in scores.items()}
        named = Named(first=first, second=second, role=role, metric="loss" if by_loss else "score")
        if scores:
            numbers = _over_tasks(list(scores.values())) if alike else NOTHING
            contrasts.append(TaskContrast(**dict(named), **numbers, tasks=found))
    arms = {}
    for arm in dict.fromkeys(arm for task in tasks for arm in task.arms):
        scores = {task.label: one for task in tasks if (one := task.scores([arm], by_loss)) is not None}
        arms[arm] = ArmOfTasks(tasks={label: _spread(one.means_AS[0]) for label, one in scores.items()})
    return TasksSummary(
        format=FORMAT,
        metric=next(iter({task.metric for task in tasks})) if len({task.metric for task in tasks}) == 1 else "score",
        by_loss=by_loss,
        averaged=alike,
        tasks=[
            TaskRuns(
                label=task.label,
                metric=task.metric,
                runs=[str(run.folder.path) for run in task.runs],
                seeds={arm: sum(len(run.taken.get(arm, ())) for run in task.runs) for arm in task.arms},
            )
            for task in tasks
        ],
        arms=arms,
        contrasts=settle(contrasts) if alike else contrasts,
        notes=list(dict.fromkeys(notes)),
    )


def _scopes(tasks: Sequence[Task]) -> list[str]:
    """What the intervals of each task speak of, said once where it is the same for all."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        seeds = {seed for run in task.runs for of_arm in run.taken.values() for seed in of_arm}
        for run in task.runs:
            provenance = run.folder.provenance()
            rows = provenance and provenance.rows.get("train")
            said = found.setdefault(
                scope_sentence(scope_of(run.recipe, rows).model_copy(update={"seeds": len(seeds)})), []
            )
            said += [task.label] if task.label not in said else []
    alone = len(found) == 1
    return [sentence if alone else f"{', '.join(labels)}: {sentence}" for sentence, labels in found.items()]


def _over_tasks(scores: list[Scores]) -> dict[str, Any]:
    middle = iqm_estimate(scores)
    iqm = middle and Interval(value=middle.value, low=middle.low, high=middle.high)
    return {**dict(difference_of(scores)), "iqm": iqm}


def _named(runs: Sequence[Run], later: Sequence[tuple[str, str]], notes: list[str]) -> list[tuple[Role, str, str]]:
    """The contrasts that the recipes name, then those that are asked for now. One that is not every recipe's primary
    one is a secondary one here."""
    primaries = {run.recipe.comparison.primary for run in runs}
    if len(primaries) > 1:
        told = "; ".join(f"{run.folder.path.name}: {_said(run.recipe.comparison.primary)}" for run in runs)
        notes.append(f"the recipes do not name the same primary contrast ({told}), so all are secondary here")
    found: dict[tuple[str, str], Role] = {}
    for run in runs:
        comparison = run.recipe.comparison
        if comparison.primary:
            found.setdefault(comparison.primary, "primary" if len(primaries) == 1 else "secondary")
        for pair in comparison.secondary:
            if pair[::-1] not in found:
                found.setdefault(pair, "secondary")
    known = {arm for run in runs for arm in run.recipe.arms}
    for pair in later:
        check_arms(pair, known)
        if pair[::-1] not in found:
            found.setdefault(pair, "later")
    return [(role, *pair) for pair, role in found.items()]


def _said(pair: tuple[str, str] | None) -> str:
    return " − ".join(pair) if pair else "none"


def _spread(values_S: statistics.Array) -> Spread:
    return Spread(mean=float(values_S.mean()), sd=float(values_S.std(ddof=1)) if len(values_S) > 1 else None)
