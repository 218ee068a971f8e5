"""What a run's intervals speak of: what they let vary, and what they take as it is."""

from collections.abc import Sequence
from typing import Any

from cola.compare.records import Scope, ScopeSearch
from cola.recipe.recipe import Recipe


def scope_of(recipe: Recipe, n_train: int | None) -> Scope:
    """The facts; `n_train`: training rows of each seed, None where nothing has been run."""
    rules, search = recipe.search_rules, None
    if rules:
        search = ScopeSearch(
            per=next(iter(rules.values())).per,
            keys=sorted({key for arm in rules for key in recipe.searches_of(arm)}),
            seeds=recipe.trial_seeds,
            scored=[seed for seed in recipe.trial_seeds if seed in recipe.seeds],
        )
    return Scope(
        seeds=len(recipe.seeds),
        redraw=recipe.data.redraw,
        train_rows=n_train,
        by_validation=search is not None or recipe.evaluation.checkpoint == "best",
        search=search,
    )


def scope_sentence(scope: Scope) -> str:
    """The same in one sentence."""
    search, several, redrawn = scope.search, scope.seeds > 1, scope.redraw == "per_seed"
    keys = _listed([key.replace("_", " ") for key in search.keys]) if search else ""
    varied = ["other seeds"] if several else []
    if several and redrawn:
        rows = f" of {scope.train_rows} rows" if scope.train_rows else ""
        varied.append(f"other training sets{rows} from the same source")
    if several and search and search.per == "seed":
        varied[0] += f", each with its own choice of {keys},"
    rows = [] if several and redrawn else ["training"]
    rows += ["validation"] if scope.by_validation else []
    held = [] if several else ["the seed"]
    held += [f"the {' and '.join(rows)} rows"] if rows else []
    if search and (search.per == "arm" or not several):
        held.append(f"the choice of {keys}{_seeds_text(search)}")
    text = f"Intervals speak of {_listed([*varied, 'other test examples'])}"
    return f"{text}; held fixed: {_listed(held)}." if held else f"{text}."


def overlap_note(recipe: Recipe) -> str | None:
    """What is said where a search tries its values on seeds that are scored too; None where it does not."""
    if not (scored := [seed for seed in recipe.trial_seeds if seed in recipe.seeds]):
        return None
    return (
        f"a search's trials run on seeds that are scored too ({_listed(scored)}): what is chosen suits them more than "
        "another seed"
    )


def _seeds_text(search: ScopeSearch) -> str:
    if search.per == "seed":
        return ""
    seeds, scored = search.seeds, search.scored
    named = f" on seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"
    if not scored:
        return named
    which = "which is" if len(seeds) == 1 else "which are" if scored == seeds else f"of which {_listed(scored)} are"
    return f"{named} ({which} scored too)"


def _listed(parts: Sequence[Any]) -> str:
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last
