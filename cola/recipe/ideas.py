"""Ideas: what fills a joint of a link, by a word for one of cola's own, by file and function for one of the user's.

    init: gradient                                    a word
    init: {lora_one: {gamma: 32}}                     a word and its options
    init: ./my_idea.py:fourier                        a function in a file
    init: {./my_idea.py:fourier: {frequencies: 8}}    the same with options

Here are the words of each joint and their options, all that a recipe has to know; what they do lies in
`cola/link/ideas`, a file each. A file's code runs only where a command is told that it may. No torch.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cola.errors import RecipeError, did_you_mean, listed, quoted
from cola.files import without_home
from cola.recipe.schema import LONGEST_PATH, MOST_STEPS, Positive, Section, Steps, Whole, Width

Scalar = bool | int | float | str
OWN = r"(?P<file>[^:]+\.py):(?P<function>[A-Za-z_][A-Za-z0-9_]*)"  # a file and a function in it


class Options(Section):
    """What can be set of an idea; by itself nothing."""


class LoraOne(Options):
    """Of `lora_one`."""

    gamma: Positive = 128.0  # one over the largest singular value of B A


class LoraGa(Options):
    """Of `lora_ga`."""

    gamma: Positive = 16.0  # the larger, the smaller the pair
    version: Literal["peft", "authors"] = "peft"  # whose formula


STARTS: dict[str, type[Options]] = {
    **dict.fromkeys(("default", "gaussian", "pissa", "orthogonal", "gradient"), Options),
    "lora_one": LoraOne,
    "lora_ga": LoraGa,
}
BY_PEFT = {"default", "gaussian"}  # starts that PEFT draws as it makes a pair
BY_GRADIENT = {"gradient", "lora_one", "lora_ga"}  # starts of cola's own that look at the full gradient
OF_SINGULAR_VECTORS = {"gradient": 1, "pissa": 1, "lora_one": 1, "lora_ga": 2}  # so many times the rank of them
TAKEN_OUT = {"pissa", "lora_ga"}  # whose pair is taken out of the frozen weight


class UpdateStops(Options):
    """Of `update_stops`."""

    tolerance: float = Field(default=0.01, gt=0, lt=1)  # change of the update's norm, as a share of it
    every: Steps = 10  # steps between two looks


ENDS: dict[str, type[Options]] = {"update_stops": UpdateStops}
HANDOVERS: dict[str, type[Options]] = {"reproject": Options}
PAIRS: dict[str, type[Options]] = {"keep_a": Options}
SHARES: dict[str, type[Options]] = {}  # none of cola's own but a number


class GaLore(Options):
    """Of `galore`."""

    rank: Width = 8  # of the subspace of each matrix
    refresh: Steps = 200  # steps from one subspace to the next
    scale: Positive = 0.25  # of the update


class RefLoRA(Options):
    """Of `reflora`."""

    warmup: Whole = Field(default=0, ge=0, le=MOST_STEPS)  # steps of plain AdamW before it


class Apollo(Options):
    """Of `apollo`."""

    rank: Width = 8  # of the sketch of each matrix
    refresh: Steps = 200  # steps from one sketch to the next
    scale: Positive = 1.0  # its square root multiplies the update


class Riemannian(Options):
    """Of `riemannian`."""

    damping: Positive = 0.01  # added to the diagonal of the other factor's product


class LoRARite(Options):
    """Of `lora_rite`."""

    clip: Positive = 1.0  # norm of all gradients together, without the other factor's size


OPTIMIZERS: dict[str, type[Options]] = {
    "adamw": Options,
    "galore": GaLore,
    "apollo": Apollo,
    "lora_muon": Options,
    "lora_rite": LoRARite,
    "reflora": RefLoRA,
    "riemannian": Riemannian,
}
OF_PAIRS = {"lora_muon", "lora_rite", "reflora", "riemannian"}  # optimizers of the two factors of a pair together
OF_WHOLE = {"galore", "apollo"}  # optimizers of whole weights, which a pair has no use for
# Of cola's own that have come to do something else: 2: embeddings and head are AdamW's, as in the authors' code.
REVISIONS = {"galore": 2, "apollo": 2}


@dataclass(frozen=True)
class Idea:
    """One idea, with the value of every option that it has."""

    name: str  # a word, or FILE.py:FUNCTION
    options: tuple[tuple[str, Scalar], ...] = ()

    def __str__(self) -> str:
        """As a table shows it: a file without its folders."""
        name = self.name.rpartition("/")[2]
        return f"{name}({', '.join(f'{key}={value}' for key, value in self.options)})" if self.options else name

    @property
    def file(self) -> str | None:
        """The file that it lies in; None for one of cola's own."""
        found = re.fullmatch(OWN, self.name)
        return found["file"] if found else None

    @property
    def function(self) -> str:
        """The function that it is."""
        return self.name.rpartition(":")[2]

    def found(self, find: Callable[[str], str]) -> "Idea":
        """The same with its file where `find` says that it lies."""
        return self if self.file is None else replace(self, name=f"{find(self.file)}:{self.function}")

    def spelled(self) -> str | dict[str, Any]:
        """As a recipe writes it."""
        name = without_home(self.name)
        return {name: dict(self.options)} if self.options else name

    def cause(self, code: Mapping[str, str]) -> str | dict[str, Any]:
        """What it does, as a cause of a state; `code`: SHA-256 of each file. Neither path nor time is among it."""
        if self.file is None:
            revision = REVISIONS.get(self.name)
            return {"idea": self.spelled(), "revision": revision} if revision else self.spelled()
        return {"function": self.function, "code": code[self.file], "options": dict(self.options)}


@dataclass(frozen=True, eq=False)  # pydantic asks for its hash, and a mapping has none
class OneOf:
    """Reads an idea of a joint, and refuses what is none: `kind` in words, the options of each of cola's own."""

    kind: str
    words: Mapping[str, type[Options]]
    beside: tuple[str, ...] = ()  # words of the same key that are no ideas

    def read(self, value: Any) -> Idea:
        """An idea as a recipe writes it; a ValueError says what is wrong with it."""
        if isinstance(value, Idea):
            return value
        options: Any = {}
        if isinstance(value, dict) and len(value) == 1:
            ((value, options),) = value.items()
        if not isinstance(value, str):
            # Where a number or a list may stand too, this is the fault of who tried the wrong kind.
            told = f"a {self.kind} is a word, or a word with its options below it ({{word: {{key: value}}}})"
            raise PydanticCustomError("idea_type", "{told}", {"told": told})
        if not isinstance(options, dict | None):
            raise ValueError(f"{value}: its options are a mapping of keys, not {quoted(options)}")
        if re.fullmatch(OWN, value):
            return Idea(name=value, options=_plain(value, options or {}))
        if value.endswith(".py") or ".py:" in value:
            raise ValueError(
                f"a {self.kind} of your own is a file and a function in it, ./my_idea.py:name; got {value!r}"
            )
        if value not in self.words:
            words = [*self.beside, *self.words]
            known = f"these are: {listed(words)}{did_you_mean(value, words)}"
            known = known if words else "your own is ./my_idea.py:name"
            raise ValueError(f"{quoted(value)} is no {self.kind}; {known}")
        try:
            read = self.words[value].model_validate(options or {})
        except ValidationError as error:
            fault = error.errors()[0]
            where, what = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
            known = listed(self.words[value].model_fields) or "it has none"
            more = f" ({known})" if fault["type"] == "extra_forbidden" else ""
            raise ValueError(f"{value}: {where}: {what[0].lower()}{what[1:]}{more}") from None
        return Idea(name=value, options=tuple(read))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read by `read`, written as it is spelled."""
        written = core_schema.plain_serializer_function_ser_schema(Idea.spelled)
        return core_schema.no_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A word, a function in a file, or either with options."""
        with_options = {word: kind.model_json_schema() for word, kind in self.words.items() if kind.model_fields}
        mapping = {"properties": with_options, "patternProperties": {f"^{_ANY_OWN}$": {"type": "object"}}}
        return {
            "anyOf": [
                *([{"enum": list(self.words), "type": "string"}] if self.words else []),
                {"type": "string", "pattern": f"^{_ANY_OWN}$"},
                {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False, **mapping},
            ]
        }


_ANY_OWN = re.sub(r"\?P<\w+>", "", OWN)  # as JSON Schema writes it


def read_code(file: str, where: str) -> bytes:
    """What a file of the user's own says, which the key `where` names; RecipeError where it cannot be read."""
    try:
        source = Path(file).read_bytes()
        source.decode()
    except OSError as error:
        raise RecipeError(f"{where}: {file}: {(error.strerror or 'cannot be read').lower()}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{where}: {file}: Python code is UTF-8 text, and this is none") from None
    return source


def _plain(name: str, options: dict[Any, Any]) -> tuple[tuple[str, Scalar], ...]:
    """Options of a user's own idea, which its function checks as it is loaded."""
    if len(name) > LONGEST_PATH:
        raise ValueError(f"a path has {LONGEST_PATH} characters at most")
    for key, value in options.items():
        if not (isinstance(key, str) and key.isidentifier() and isinstance(value, Scalar)):
            raise ValueError(
                f"{name}: an option is a name and a number, a text, true or false; got {quoted({key: value})}"
            )
    return tuple(sorted(options.items()))


Init = Annotated[Idea, OneOf("start", STARTS)]
Optimizer = Annotated[Idea, OneOf("optimizer", OPTIMIZERS)]
Handover = Annotated[Idea, OneOf("rule for the optimizer at a knot", HANDOVERS, ("fresh", "keep", "zero"))]
PairRule = Annotated[Idea, OneOf("rule for the pair at a knot", PAIRS, ("fresh", "keep"))]
SHARE = OneOf("rule for the share that a knot keeps", SHARES)
ShareRule = Annotated[Idea, SHARE]
Until = Annotated[Idea, OneOf("rule for the end of a link", ENDS)]
DEFAULT, ADAMW = Idea(name="default"), Idea(name="adamw")
