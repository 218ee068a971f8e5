"""cola compare A B: what differs between two runs, in their recipes and in their numbers. No torch."""

import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from cola.compare.contrasts import METRICS, Rows, paired
from cola.compare.statistics import Table as Scores
from cola.compare.statistics import estimate
from cola.compare.summary import made_differently, summarize
from cola.compare.tasks import Run, open_runs
from cola.recipe.recipe import Recipe
from cola.report.numbers import interval, spread
from cola.report.table import NONE, Shown, Table
from cola.tree.run_folder import MADE_WITH, RunFolder


def compare_runs(first: Path, second: Path) -> tuple[list[Table], list[str]]:
    """Tables of what differs between two runs, and what is to be said beside them.

    Raises:
        RunFolderError: a folder is no run, or has no results.
    """
    runs, notes = open_runs([first, second])
    a, b = runs
    titles = _titles(a.folder, b.folder)
    common = a.recipe.arms.keys() & b.recipe.arms.keys()
    tables = [
        Table("Recipes: what differs", ["key", *titles], _rows(*(_asked(one.recipe, common) for one in runs))),
        Table("How they were made: what differs", ["", *titles], _rows(*(_made(one) for one in runs))),
    ]
    for table in tables:
        if not table.rows:
            notes.append(f"{table.title.split(':')[0]}: nothing differs")
    if a.causes[0] != b.causes[0]:
        notes.append("the data is not the same, so the two are set beside each other and not paired")
    if a.causes[2] != b.causes[2]:
        notes.append(f"the metrics are not the same ({a.causes[2]} and {b.causes[2]}), so no scores are compared")
    results = {(f"{title}: {arm}", s): r for run, title in zip(runs, titles, strict=True) for arm, s, r in run.results}
    notes += made_differently(results)
    tables.append(_numbers(a, b, titles, notes))
    return [table for table in tables if table.rows], list(dict.fromkeys(notes))


def _titles(a: RunFolder, b: RunFolder) -> tuple[str, str]:
    names = a.path.resolve().name, b.path.resolve().name
    return names if names[0] != names[1] else (str(a.path), str(b.path))


def _asked(recipe: Recipe, common: Set[str]) -> dict[str, Any]:
    """The recipe with every setting of its arms explicit, so that a default and the same value written out agree. Of an
    arm that is not in both runs no more than what it is."""
    said = recipe.model_dump(mode="json", exclude={"link", "knot", "arms", "output", "store"})
    arms = {}
    for arm in recipe.arms:
        resolved = recipe.resolved(arm)
        links = [link.record() for link in resolved.links]
        if arm not in common:
            arms[arm] = {"links": len(links), **{key: links[0].get(key) for key in ("method", "rank") if links}}
            continue
        alike = all(link == links[0] for link in links)
        each = (links[0] if links else {}) if alike else {str(n): link for n, link in enumerate(links, 1)}
        rules = resolved.rules.model_dump(mode="json") if len(links) > 1 else None
        rate = recipe.learning_rate_of(arm) if links else None
        searched = {key: search.search for key, search in recipe.searches_of(arm).items()}
        arms[arm] = {"links": len(links), **each, "knot": rules, "search": searched}
        arms[arm] |= {"learning_rate": rate} if isinstance(rate, float | int) else {}
    return said | {"arms": arms}


def _made(run: Run) -> dict[str, Any]:
    provenance = run.folder.provenance()
    assert provenance is not None  # open_runs refuses a run without one
    made = provenance.model_dump(include=set(MADE_WITH))
    return made | {"model.sha256": provenance.model.sha256, "data.sha256": provenance.data.sha256}


def _rows(a: Any, b: Any) -> list[list[Shown]]:
    left, right = dict(_leaves(a)), dict(_leaves(b))
    keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    return [[key, left.get(key, NONE), right.get(key, NONE)] for key in keys]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value by its dotted key; what is not set is no value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif value is not None:
        yield key, value if isinstance(value, str) else json.dumps(value)


def _numbers(a: Run, b: Run, titles: tuple[str, str], notes: list[str]) -> Table:
    """Test loss and score of the arms by name, and the paired difference of those that both runs have."""
    summaries = [summarize(run.recipe, run.folder).arms for run in (a, b)]
    same = a.causes[0] == b.causes[0] and a.causes[2] == b.causes[2]
    by_loss = METRICS[a.recipe.data.task] == "perplexity"
    key, what = ("test_loss", "test loss") if by_loss or a.causes[2] != b.causes[2] else ("test_score", a.causes[2])
    columns = ["arm", *(f"{name}, {title}" for name in (what, "gap_loss") for title in titles), "second − first [95 %]"]
    table = Table(f"Arms: test, {a.causes[2] if same else 'not paired'}", columns, [])
    for arm in dict.fromkeys([*summaries[0], *summaries[1]]):
        of_arm = [summary.get(arm) for summary in summaries]
        cells: list[Shown] = [spread(getattr(numbers, key, None)) for numbers in of_arm]
        cells += [spread(numbers and numbers.gap_loss, signed=True) for numbers in of_arm]
        scores = _pair(a, b, arm, notes) if same else None
        table.rows.append([arm, *cells, interval(scores and estimate((1, -1), [scores]))])
    return table


def _pair(a: Run, b: Run, arm: str, notes: list[str]) -> Scores | None:
    """The arm's scores in the second run and in the first, under the seeds that both have."""
    if arm not in a.taken or arm not in b.taken:
        notes.append(f"{arm} is in one of the two alone")
        return None
    seeds = [seed for seed in a.taken[arm] if seed in b.taken[arm]]
    if not seeds:
        notes.append(f"{arm}: no seed in common")
        return None
    columns: list[list[Rows]] = [[], []]
    for seed in seeds:
        of_seed = [run.comparer.rows(arm, seed) for run in (b, a)]
        if of_seed[0] is not None and of_seed[1] is not None:
            columns[0].append(of_seed[0])
            columns[1].append(of_seed[1])
    return paired(columns, by_loss=False) if columns[0] else None
