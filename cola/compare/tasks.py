"""Several runs in one report: each data set is a task, and runs on the same data are more seeds of it. No torch.

A contrast over tasks is the equal-weight mean of the tasks' means of paired differences, the tasks held fixed: its
interval speaks of other seeds and examples on these tasks. Per task it is what a single run has, digit by digit. From
eight tasks on the interquartile mean of the paired differences stands beside it. Nothing is averaged over tasks that
are measured in different units, and an arm's own scores are not averaged: how hard the tasks are would decide.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cola.compare import records
from cola.compare.contrasts import METRICS, Comparer, check_arms, difference_of, paired, settle
from cola.compare.scope import scope_of, scope_sentence
from cola.compare.statistics import Table as Scores
from cola.compare.statistics import iqm_estimate
from cola.compare.summary import made_differently, over_seeds
from cola.errors import RunFolderError
from cola.recipe.read import read_recipe
from cola.tree.run_folder import FORMAT, RunFolder

# Of a contrast where nothing is averaged over tasks.
NOTHING = {**dict.fromkeys(records.Difference.model_fields), "n_seeds": 0}


def causes_of(run: Comparer) -> tuple[str, str, str]:
    """What makes runs comparable seed by seed: data, base and metric."""
    provenance = run.folder.provenance()
    assert provenance is not None  # open_runs refuses a run without one
    return provenance.data.sha256, provenance.model.sha256, METRICS[run.recipe.data.task]


def made_apart(runs: Iterable[tuple[str, Comparer]]) -> list[str]:
    """As `made_differently`, of runs by name."""
    return made_differently(
        {(f"{name}: {arm}", s): run.done[arm, s] for name, run in runs for arm, seeds in run.ok.items() for s in seeds}
    )


@dataclass
class Task:
    """Runs on the same data, from the same base."""

    label: str
    metric: str
    runs: list[Comparer] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """With a result each."""
        return list(dict.fromkeys(arm for run in self.runs for arm, seeds in run.ok.items() if seeds))

    def scores(self, arms: Sequence[str], by_loss: bool) -> Scores | None:
        """The arms' scores over the seeds that all of them have, of all runs; None where there are none."""
        rows = [of_arms for run in self.runs for of_arms in run.scored(arms).values()]
        return paired(list(zip(*rows, strict=True)), by_loss) if rows else None


def open_runs(paths: Sequence[Path]) -> tuple[list[Comparer], list[str]]:
    """The runs and what is wrong with some of their files.

    Raises:
        RunFolderError: a folder is no run, or has no results.
    """
    runs: list[Comparer] = []
    notes: list[str] = []
    for path in paths:
        folder = RunFolder.open(path)
        recipe = read_recipe(folder.recipe_file)
        folder.check_results()
        if any(folder.path.resolve() == run.folder.path.resolve() for run in runs):
            raise RunFolderError(f"{path} is given twice")
        runs.append(Comparer(recipe, folder, notes))
    return runs, notes


def tasks_of(runs: Sequence[Comparer], notes: list[str]) -> list[Task]:
    """The runs by what they were run on. A seed that two runs have in common counts once, which is told."""
    tasks: dict[tuple[str, str, str], Task] = {}
    for run in runs:
        causes = causes_of(run)
        task = tasks.setdefault(causes, Task(run.recipe.name, causes[2]))
        for arm, seeds in run.ok.items():
            there = {seed for other in task.runs for seed in other.ok.get(arm, ())}
            if again := sorted(there.intersection(seeds)):
                notes.append(
                    f"{run.folder.path.name}: {arm} seed {', '.join(map(str, again))} is in an earlier run on the same "
                    "data and is left out here: it is no second observation"
                )
            run.ok[arm] = [seed for seed in seeds if seed not in there]
        task.runs.append(run)
    labels = [task.label for task in tasks.values()]
    for task in tasks.values():
        if labels.count(task.label) > 1:
            task.label = task.runs[0].folder.path.name
    return list(tasks.values())


def summarize_tasks(paths: Sequence[Path], later: Sequence[tuple[str, str]] = ()) -> records.TasksSummary:
    """Everything that the report of several runs shows. `later`: contrasts that are asked for now and that no recipe
    names: shown, and nothing is claimed of them.

    Raises:
        RunFolderError: a folder is no run, has no results, or none has an arm that is asked for.
    """
    runs, notes = open_runs(paths)
    tasks = tasks_of(runs, notes)
    notes += made_apart((run.folder.path.name, run) for run in runs)
    metrics, names = {run.recipe.metric for run in runs}, {task.metric for task in tasks}
    alike = len(metrics) == 1 and (len({name == "perplexity" for name in names}) == 1 or metrics == {"loss"})
    if not alike:
        told = _of_each(runs, lambda run: f"{METRICS[run.recipe.data.task]}, {run.recipe.metric}", ", ")
        notes.append(f"the runs are not about the same metric ({told}), so nothing is averaged over tasks")
    by_loss = metrics == {"loss"}
    contrasts = []
    for (first, second), role in _named(runs, later, notes).items():
        scores = {task.label: one for task in tasks if (one := task.scores([first, second], by_loss)) is not None}
        if missing := [task.label for task in tasks if task.label not in scores]:
            notes.append(f"{first} − {second}: not both are there, under one seed, for {', '.join(missing)}")
        if scores:
            named = {"first": first, "second": second, "role": role, "metric": "loss" if by_loss else "score"}
            tables = list(scores.values())
            middle = iqm_estimate(tables) if alike else None
            iqm = middle and records.Interval(value=middle.value, low=middle.low, high=middle.high)
            numbers = dict(difference_of(tables)) if alike else NOTHING
            of_each = {label: difference_of([one]) for label, one in scores.items()}
            contrasts.append(records.TaskContrast(**named, **numbers, iqm=iqm, tasks=of_each))
    arms = {}
    for arm in dict.fromkeys(arm for task in tasks for arm in task.arms):
        scores = {task.label: one for task in tasks if (one := task.scores([arm], by_loss)) is not None}
        arms[arm] = records.ArmOfTasks(
            links=next(run.recipe.arms[arm].n_links for run in runs if arm in run.recipe.arms),
            tasks={label: spread for label, one in scores.items() if (spread := over_seeds(one.means_AS[0]))},
            seeds={label: one.means_AS[0].tolist() for label, one in scores.items()},
        )
    return records.TasksSummary(
        format=FORMAT,
        metric=names.pop() if len(names) == 1 else "score",
        by_loss=by_loss,
        averaged=alike,
        tasks=[
            records.TaskRuns(
                label=task.label,
                metric=task.metric,
                runs=[str(run.folder.path) for run in task.runs],
                seeds={arm: sum(len(run.ok.get(arm, ())) for run in task.runs) for arm in task.arms},
            )
            for task in tasks
        ],
        arms=arms,
        contrasts=settle(contrasts) if alike else contrasts,
        holds=_scopes(tasks),
        notes=list(dict.fromkeys(notes)),
    )


def _of_each(runs: Sequence[Comparer], said: Callable[[Comparer], str], between: str) -> str:
    return between.join(f"{run.folder.path.name}: {said(run)}" for run in runs)


def _scopes(tasks: Sequence[Task]) -> list[str]:
    """What the intervals of each task speak of, said once where it is the same for all."""
    labels: dict[str, dict[str, None]] = {}  # of the tasks of which a sentence is true
    for task in tasks:
        seeds = {seed for run in task.runs for of_arm in run.ok.values() for seed in of_arm}
        for run in task.runs:
            provenance = run.folder.provenance()
            scope = scope_of(run.recipe, provenance and provenance.rows.get("train"))
            sentence = scope_sentence(scope.model_copy(update={"seeds": len(seeds)}))
            labels.setdefault(sentence, {})[task.label] = None
    return [s if len(labels) == 1 else f"{', '.join(of)}: {s}" for s, of in labels.items()]


def _named(
    runs: Sequence[Comparer], later: Sequence[tuple[str, str]], notes: list[str]
) -> dict[tuple[str, str], records.Role]:
    """The contrasts that the recipes name, then those that are asked for now. One that is not every recipe's primary
    one is a secondary one here."""
    comparisons = [run.recipe.comparison for run in runs]
    if differ := len({comparison.primary for comparison in comparisons}) > 1:
        told = _of_each(runs, lambda run: " − ".join(run.recipe.comparison.primary or ["none"]), "; ")
        notes.append(f"the recipes do not name the same primary contrast ({told}), so all are secondary here")
    roles: dict[tuple[str, str], records.Role] = {}
    for comparison in comparisons:
        if comparison.primary:
            roles.setdefault(comparison.primary, "secondary" if differ else "primary")
        for pair in comparison.secondary:
            if pair[::-1] not in roles:
                roles.setdefault(pair, "secondary")
    known = {arm for run in runs for arm in run.recipe.arms}
    for pair in later:
        check_arms(pair, known)
        if pair[::-1] not in roles:
            roles.setdefault(pair, "later")
    return roles
