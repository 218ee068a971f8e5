"""cola compare A B: what differs between two runs, in their recipes and in their numbers. No torch."""

import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from cola.compare.contrasts import Comparer, across
from cola.compare.statistics import Table as Scores
from cola.compare.statistics import estimate
from cola.compare.summary import summarize
from cola.compare.tasks import causes_of, made_apart, open_runs
from cola.recipe.recipe import Recipe
from cola.report.numbers import interval, spread
from cola.report.table import NONE, Shown, Table
from cola.tree.run_folder import MADE_WITH


def compare_runs(first: Path, second: Path) -> tuple[list[Table], list[str]]:
    """Tables of what differs between two runs, and what is to be said beside them.

    Raises:
        RunFolderError: a folder is no run, or has no results.
    """
    runs, notes = open_runs([first, second])
    a, b = runs
    paths = [run.folder.path for run in runs]
    titles = [path.resolve().name for path in paths]
    titles = list(map(str, paths)) if titles[0] == titles[1] else titles
    common = a.recipe.arms.keys() & b.recipe.arms.keys()
    tables = [
        Table("Recipes: what differs", ["key", *titles], _rows(*(_asked(run.recipe, common) for run in runs))),
        Table("How they were made: what differs", ["", *titles], _rows(*map(_made, runs))),
    ]
    notes += [f"{table.title.split(':')[0]}: nothing differs" for table in tables if not table.rows]
    (data, _, metric), (other_data, _, other_metric) = map(causes_of, runs)
    if data != other_data:
        notes.append("the data is not the same, so the two are set beside each other and not paired")
    if metric != other_metric:
        notes.append(f"the metrics are not the same ({metric} and {other_metric}), so no scores are compared")
    notes += made_apart(zip(titles, runs, strict=True))
    # Test loss and score of the arms by name, and the paired difference of those that both runs have.
    whole = [summarize(run.recipe, run.folder) for run in runs]
    summaries = [summary.arms for summary in whole]
    sampled = [(title, summary.train_sample) for title, summary in zip(titles, whole, strict=True)]
    notes += [f"{title}: its gaps stand on a sample of {n} training rows" for title, n in sampled if n]
    same = data == other_data and metric == other_metric
    by_loss = metric == "perplexity" or metric != other_metric
    key, name = ("test_loss", "test loss") if by_loss else ("test_score", metric)
    columns = ["arm", *(f"{of}, {title}" for of in (name, "gap_loss") for title in titles), "second − first [95 %]"]
    numbers = Table(f"Arms: test, {metric if same else 'not paired'}", columns, [])
    for arm in dict.fromkeys([*summaries[0], *summaries[1]]):
        of_arm = [summary.get(arm) for summary in summaries]
        cells: list[Shown] = [spread(getattr(about, key, None)) for about in of_arm]
        cells += [spread(about and about.gap_loss, signed=True) for about in of_arm]
        scores = _pair(a, b, arm, notes) if same else None
        numbers.rows.append([arm, *cells, interval(scores and estimate((1, -1), [scores]))])
    return [table for table in (*tables, numbers) if table.rows], list(dict.fromkeys(notes))


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


def _made(run: Comparer) -> dict[str, Any]:
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


def _pair(a: Comparer, b: Comparer, arm: str, notes: list[str]) -> Scores | None:
    """The arm's scores in the second run and in the first, under the seeds that both have."""
    if arm not in a.ok or arm not in b.ok:
        notes.append(f"{arm} is in one of the two alone")
        return None
    if not set(a.ok[arm]) & set(b.ok[arm]):
        notes.append(f"{arm}: no seed in common")
    return across([b, a], arm, by_loss=False)
