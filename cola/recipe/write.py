"""A recipe written out: resolved, with every value that a run goes by."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from cola.files import without_home
from cola.recipe.arms import Arm, LinkSettings
from cola.recipe.data_section import Files
from cola.recipe.ideas import Idea
from cola.recipe.methods import Settings
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import resolve
from cola.recipe.schema import SAMPLE, SPLITS, Search, is_remote
from cola.recipe.yaml12 import RecipeDumper


def resolved_values(recipe: Recipe, base: Path) -> Recipe:
    """Every default that depends on another key made explicit, and relative paths made absolute."""
    data = recipe.data
    update: dict[str, Any] = {}
    if data.answer_prefix is None and data.task != "text":
        update["answer_prefix"] = "" if data.chat or (data.prompt or "")[-1:].isspace() else " "
    if data.label_is is None and (isinstance(data.choices, dict) or data.choice_labels is not None):
        update["label_is"] = "name"
    if data.normalize is None and data.task == "answer":
        update["normalize"] = ["whitespace"]
    if data.too_long is None:
        update["too_long"] = "split" if data.task == "text" else "drop"
    if data.files is not None:
        named = {split: getattr(data.files, split) or data.files.train for split in SPLITS}
        update["files"] = Files(**{split: find_path(file, base) for split, file in named.items()})
    evaluation, general = recipe.evaluation, recipe.evaluation.general_text
    if general not in (None, SAMPLE):
        evaluation = evaluation.model_copy(update={"general_text": find_path(general, base)})
    name = recipe.model.name_or_path
    model = recipe.model.model_copy(update={"name_or_path": name if is_remote(name) else find_path(name, base)})
    # Without an arm's own rules, what holds at every knot.
    rules = resolve(Arm(), recipe.link, recipe.knot, recipe.model, recipe.training).rules
    keys = ("merge", "pair", "merge_fraction", "optimizer", "schedule")
    said = {key: getattr(rules, key) for key in keys}
    said = {
        key: value.found(partial(find_path, base=base)) if isinstance(value, Idea) else value
        for key, value in said.items()
    }
    knot = recipe.knot.model_copy(update=said)
    training = recipe.training
    if isinstance(rate := training.learning_rate, Search):
        training = training.model_copy(update={"learning_rate": _with_seeds(rate, [recipe.unscored_seed])})
    arms = {name: _explicit_arm(recipe, name, partial(find_path, base=base)) for name in recipe.arms}
    # The arms now say all of it: keeping it for all arms too would be a second place to change, without effect.
    parts = {"data": data.model_copy(update=update), "model": model, "knot": knot, "training": training}
    parts |= {"arms": arms, "link": LinkSettings(), "evaluation": evaluation}
    return recipe.model_copy(update=parts)


def _explicit_arm(recipe: Recipe, name: str, find: Callable[[str], str]) -> Arm:
    """An arm that says every setting of its links itself, but those that a search is still to choose; `find`: where a
    file of the user's own lies."""
    arm, resolved, searches = recipe.arms[name], recipe.resolved(name), recipe.searches_of(name)
    if not resolved.links:
        return arm
    # What is searched has no value yet, nor has what follows from it.
    follows = {"rank": "alpha", "init": "init_batches"}
    unknown = {*searches, *(follows[key] for key in follows.keys() & searches)}
    known = [_said_by(link, find) for link in resolved.links]
    known = [{key: value for key, value in said.items() if key not in unknown} for said in known]
    update: dict[str, Any] = known[0]
    if isinstance(arm.links, list):
        links = [entry.model_copy(update=said) for entry, said in zip(arm.links, known, strict=True)]
        links = [e.model_copy(update={"until": e.until.found(find)}) if e.until else e for e in links]
        update = {"links": links}
    if "rank" in searches and "alpha" not in searches:
        # Written beside the rank that is still to be chosen, or as a multiple of any.
        shared = recipe.link.alpha
        update["alpha"] = arm.alpha or (shared if isinstance(shared, str) else None)
    seeds = recipe.search_seeds(name)
    update["search"] = {key: _with_seeds(_found(search, find), seeds) for key, search in searches.items()} or None
    update["learning_rate"] = None if "learning_rate" in searches else recipe.learning_rate_of(name)
    update["quantization"] = resolved.base.quantization or arm.quantization
    if (until := arm.until or recipe.link.until) is not None and "until" not in searches:
        update["until"] = until.found(find)
    if rules := {key: value.found(find) for key, value in arm.knot if isinstance(value, Idea)}:
        update["knot"] = arm.knot.model_copy(update=rules)
    return arm.model_copy(update=update)


def _said_by(link: Settings, find: Callable[[str], str]) -> dict[str, Any]:
    """The settings of a link as an arm says them."""
    ideas = {key: value.found(find) for key, value in link if isinstance(value, Idea)}
    return {key: ideas.get(key, value) for key, value in link.record().items()}


def _found(search: Search, find: Callable[[str], str]) -> Search:
    """A search whose files of the user's own are named by where they lie."""
    named = [value if not isinstance(value, str) else Idea(name=value).found(find).name for value in search.search]
    return search.model_copy(update={"search": named})


def _with_seeds(search: Search, seeds: list[int]) -> Search:
    """A search whose trials' seeds are explicit, unless each scored seed is its own trials'."""
    return search if search.per == "seed" or search.seeds else search.model_copy(update={"seeds": seeds})


def find_path(name: str, base: Path) -> str:
    """An existing path as absolute, looked for from the working directory, then beside the recipe.

    A link keeps its own name: what it leads to, in a hub's cache, may have no suffix that says how to read it.
    """
    path = Path(name).expanduser()
    for candidate in (path, base / path):
        if candidate.exists():
            return str(candidate.parent.resolve() / candidate.name)
    return str(path.absolute())


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to the same recipe."""
    # A null that has no other default says nothing; one that overrides a default (max_grad_norm) must stay.
    tree = _said(recorded(recipe), recipe)
    for arm in tree["arms"].values():
        arm |= arm.pop("search", {})  # each in the place of the value, where an override replaces it
    return yaml.dump(tree, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)


def recorded(recipe: Recipe, exclude_none: bool = False) -> dict[str, Any]:
    """A recipe as JSON for a record, its paths `without_home`."""
    tree = recipe.model_dump(mode="json", exclude_none=exclude_none)
    # The rest of `data` is texts that a model reads, which may look like a path.
    texts = {key: value for key, value in tree["data"].items() if key != "files"}
    return _from_home(tree) | {"data": _from_home(tree["data"]) | texts}


def _from_home(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_from_home(key): _from_home(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_from_home(value) for value in tree]
    return without_home(tree) if isinstance(tree, str) else tree


def _said(tree: Any, value: Any) -> Any:
    """The JSON of a value without idle nulls, and without the sections that are then empty."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = {key: inner for key, inner in value if inner is not None or fields[key].default is not None}
        said = {key: _said(tree[key], inner) for key, inner in kept.items()}
        return {key: inner for key, inner in said.items() if inner or not isinstance(kept[key], BaseModel)}
    if isinstance(value, dict):
        return {key: _said(tree[key], inner) for key, inner in zip(tree, value.values(), strict=True)}
    return [_said(*pair) for pair in zip(tree, value, strict=True)] if isinstance(value, list | tuple) else tree
