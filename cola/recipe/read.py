"""One YAML file, plus dotted overrides, read once into a frozen, fully resolved `Recipe`.

Unknown keys are errors that name the file, the line and the key that was probably meant.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cola.errors import QUOTED, RecipeError, did_you_mean, listed, plain, quoted
from cola.recipe.arms import Arm
from cola.recipe.checks import check_recipe
from cola.recipe.data_section import SOURCES
from cola.recipe.faults import explain, near_files
from cola.recipe.recipe import Recipe
from cola.recipe.write import resolved_values
from cola.recipe.yaml12 import DEEPEST, MOST_BYTES, Mark, Marks, dotted_key, is_unicode, parse_yaml


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML file, with overrides (`dotted.key=value`, the value in YAML), and resolve the recipe. Raises
    RecipeError with file, line and key of each fault, a line for each."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{near_files(path)}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read: it is no UTF-8 text at byte {error.start}") from None
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{path}: a recipe has {MOST_BYTES} characters at most; is this one?")
    raw, marks = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is a {type(raw).__name__}")
    for override in overrides or []:
        _override(raw, override, marks)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, raw, str(path), marks))) from None
    try:
        check_recipe(recipe)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    for override in overrides or []:
        _refuse_idle_override(recipe, override.partition("=")[0])
    return resolved_values(recipe, base=path.parent)


def _refuse_idle_override(recipe: Recipe, dotted: str) -> None:
    """An override for all arms that every arm says otherwise (as in a resolved recipe) would be passed over."""
    section, _, key = dotted.partition(".")
    if section != "link" and dotted != "training.learning_rate":
        return
    trained = recipe.trained_arms
    if key not in ("method", "learning_rate"):
        trained = [name for name in trained if key in type(recipe.resolved(name).links[0]).model_fields]

    def says(arm: Arm) -> bool:
        alone = getattr(arm, key) is not None or key in (arm.search or {})
        return alone or all(getattr(entry, key) is not None for entry in arm.entries)

    nearer = section == "training" and recipe.link.learning_rate is not None
    if trained and (nearer or all(says(recipe.arms[name]) for name in trained)):
        raise RecipeError(
            f"override {quoted(dotted)} has no effect, since every arm says its own; write arms.{trained[0]}.{key}=..."
        )


def _override(raw: dict, override: str, marks: Marks) -> None:
    dotted, equals, text = override.partition("=")
    shown = f"override {quoted(dotted)}"
    if not equals or not dotted:
        raise RecipeError(f"override {quoted(override)}: write dotted.key=value, for example training.epochs=2")
    keys = dotted.split(".")
    if not is_unicode(override) or len(keys) > DEEPEST:
        why = f"more than {DEEPEST} keys below each other" if len(keys) > DEEPEST else "it is no UTF-8 text"
        raise RecipeError(f"{shown}: {why}")
    try:
        value, told = parse_yaml(text, shown, tuple(keys)) if text.strip() else (None, {})
    except RecipeError as error:
        # The shell takes one pair of quotes away.
        hint = f"; text with braces or colons is quoted for YAML too: \"{plain(dotted)}='...'\""
        raise RecipeError(f"{error}{hint if 'not valid YAML' in str(error) else ''}") from None
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = node[_index(node, key, shown)]
        else:
            # A mapping's shorthand gives way to the mapping: files=a.jsonl, then files.test=b.jsonl.
            if isinstance(node.get(key), str) and key in SOURCES:
                node[key] = {SOURCES[key]: node[key]}
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise RecipeError(f"{shown}: {dotted_key(tuple(keys[: depth + 1]))} has no keys below it")
    last = keys[-1]
    if isinstance(node, list):
        node[_index(node, last, shown)] = value
    elif keys[:-1] == ["arms"] and value is None:
        if last not in node:
            there = f"the arms are {listed(node)}{did_you_mean(last[:QUOTED], map(plain, node))}"
            raise RecipeError(f"override {quoted(override)}: there is no such arm; {there}")
        del node[last]
    else:
        node[last] = value
    if len(keys) > 1 and keys[0] == "data" and keys[1] in SOURCES and value is not None:
        for other in SOURCES.keys() - {keys[1]}:
            raw["data"].pop(other, None)
    if last in ("steps", "epochs") and value is not None and isinstance(node, dict):
        node.pop("epochs" if last == "steps" else "steps", None)
    for path in [path for path in marks if path[: len(keys)] == tuple(keys)]:
        del marks[path]  # what the file says there is no longer what counts
    marks |= {path: Mark(0, mark.text) for path, mark in told.items()}
    marks.setdefault(tuple(keys), Mark(0))


def _index(node: list, key: str, shown: str) -> int:
    if re.fullmatch(r"[0-9]{1,6}", key) and int(key) < len(node):
        return int(key)
    raise RecipeError(f"{shown}: {plain(key)} is no place in a list of {len(node)}; they count from 0")
