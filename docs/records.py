"""The tables of docs/results.md and the schemas of docs/schema/, from the models of a run's files."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cola.compare.ablation_records import Ablation
from cola.compare.records import Interval, Spread, Summary, TasksSummary
from cola.recipe.arms import OneLink
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import Rules
from cola.tree.foreseen import Foreseen
from cola.tree.made import Provenance
from cola.tree.manifest import Manifest
from cola.tree.records import Chosen, EvaluationFile, References, Result, ScoreRow
from cola.tree.spectra import Spectrum

DOCS = Path(__file__).parent
RESULTS = DOCS / "results.md"
RECORDS: dict[str, type[BaseModel]] = {
    "result.json": Result,
    "provenance.json": Provenance,
    "scores/SPLIT.jsonl": ScoreRow,
    "chosen.json": Chosen,
    "segments.json": References,
    "plan.json": Foreseen,
    "manifest.json": Manifest,
    "spectrum.json": Spectrum,
    "summary.json": Summary,
    "summary.json of several runs": TasksSummary,
    "ablation.json": Ablation,
    "eval.json": EvaluationFile,
}
WHOLE = {Spread, Interval, Provenance, Rules}  # shown as one key, where they are a part of another


def table(model: type[BaseModel]) -> str:
    """The keys of a file, each with its unit and meaning."""
    # A key that holds others is in italics: the test that compares this page with files looks for the rest.
    rows = [
        f"| {f'*`{key}`*' if meaning.startswith('*') else f'`{key}`'} | {unit} | {meaning.strip('*')} |"
        for key, unit, meaning in _rows(model, "")
    ]
    return "\n".join(["| key | unit | meaning |", "| :-- | :-- | :-- |", *rows]) + "\n"


def schemas() -> dict[Path, str]:
    """The JSON Schema of each file of a run, and of the recipe, by which editors complete and check one."""
    found = {DOCS / "schema/recipe.json": _text_of(Recipe)}
    for name, model in RECORDS.items():
        path = DOCS / "schema" / f"{name.replace('/', '-').replace(' ', '-').partition('.json')[0]}.json"
        if "several" in name:
            path = path.with_name("summary-of-several-runs.json")
        found[path] = _text_of(model)
    return found


def _text_of(model: type[BaseModel]) -> str:
    return json.dumps(model.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def _rows(model: type[BaseModel], above: str) -> Iterator[tuple[str, str, str]]:
    own = model.model_fields
    if issubclass(model, OneLink):
        yield f"{above}SETTING", "", "what it trained: keys of `link` in [recipe.md](recipe.md), those of its method"
        own = {key: field for key, field in own.items() if key not in OneLink.model_fields}
    for key, field in own.items():
        place, part = _place(field), _part(field.annotation)
        name = above if key == "root" else above + key
        name = f"{name}{'.' if name else ''}{place}" if place else name
        if part is None or part in WHOLE:
            yield name, _unit(field), (field.description or "").replace("|", "\\|")
        else:
            name += "[]" if _is_list(field.annotation) else ""
            if field.description:
                yield name, "", f"*{field.description}:*"
            yield from _rows(part, f"{name}.")


def _place(field: FieldInfo) -> str:
    """What stands for the keys of a mapping, in capital letters."""
    extra = field.json_schema_extra
    return str(extra["key"]) if isinstance(extra, dict) and "key" in extra else ""


def _inner(annotation: Any) -> Iterator[Any]:
    """A type and what it is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _inner(inner)


def _part(annotation: Any) -> type[BaseModel] | None:
    """The record in a type."""
    return next((t for t in _inner(annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _is_list(annotation: Any) -> bool:
    """Whether it is a list of records, or of mappings of them."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_list(inner) for inner in get_args(annotation))
    return get_origin(annotation) is list


def _unit(field: FieldInfo) -> str:
    """The unit, from the field or from its type."""
    for extra in [field.json_schema_extra, *(getattr(t, "json_schema_extra", None) for t in _metadata(field))]:
        if isinstance(extra, dict) and "unit" in extra:
            return str(extra["unit"])
    return ""


def _metadata(field: FieldInfo) -> Iterator[Any]:
    for inner in _inner(field.annotation):
        yield from getattr(inner, "__metadata__", ())
