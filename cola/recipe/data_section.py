"""The section `data` of a recipe: where rows come from and how they are read. No torch."""

import string
from contextlib import suppress
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from cola.errors import quoted
from cola.recipe.schema import LocalPath, OneOrMore, RowCount, Section, Seed, Tokens, optional

Scalar = str | int | float | bool
Labels = dict[str, Scalar] | list[Scalar] | str | None  # as a recipe may write them: each stands for its text
SOURCES = {"hub": "name", "files": "train", "reasoning_gym": "name"}  # and the key that a text alone stands for


class Hub(Section):
    """A data set on the Hugging Face hub."""

    name: str = Field(min_length=1, description="Data set id on the hub.")
    config: str | None = optional("Configuration name, where the data set has several.")
    revision: str | None = optional("Branch, tag or commit.")
    train: str = Field(default="train", description="Hub split that training rows are drawn from.")
    validation: str = Field(
        default="validation", description="Hub split for validation; equal splits are drawn disjointly."
    )
    test: str = Field(default="test", description="Hub split for test; equal splits are drawn disjointly.")


class Files(Section):
    """Local JSONL, JSON, CSV, TSV, Parquet or text files, also packed (.gz, .bz2, .xz, .zst). Splits that name the same
    file are drawn from it without overlap.

    A file is read as its own name says, also where it is a link. A row is a line of JSONL (`.jsonl`, `.ndjson`) and of
    text (`.txt`, the field `text`), a record of CSV and TSV (a cell in quotes may hold line ends), an item of a list in
    `.json` (or an object on lines of its own there), a row of Parquet. Blank lines are no rows; there are no comments.
    Text is UTF-8, or what its byte order mark says. Blanks around the names of a CSV header are taken off (where one
    follows every comma of the header, off the cells too), and columns without a name are passed over. An empty cell of
    CSV is an empty text; null and NaN are no value, and a row that lacks one is named. Two columns or keys of one name
    are an error. Bytes are text if they are UTF-8. `cola data RECIPE` shows what is read.
    """

    train: LocalPath = Field(min_length=1, description="File for training rows.")
    validation: LocalPath | None = optional("File for validation rows; default: the training file.")
    test: LocalPath | None = optional("File for test rows; default: the training file.")


class ReasoningGym(Section):
    """A procedural task of the `reasoning-gym` package; the splits use seeds ten million apart."""

    name: str = Field(min_length=1, description="Generator, for example `family_relationships`.")
    seed: Seed = Field(default=0, description="Seed of the generator.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the generator.")


def _alone(source: str, section: type[Section]) -> BeforeValidator:
    """Reads a text alone as the one key of a source that it stands for."""

    def mapping(value: Any) -> Any:
        return {SOURCES[source]: value} if isinstance(value, str) else value

    return BeforeValidator(mapping, json_schema_input_type=section | str | None)


class Rows(Section):
    """How many rows each split gets; none: all there are (only where the split has a source of its own)."""

    train: RowCount | None = optional("Training rows.")
    validation: RowCount | None = optional("Validation rows.")
    test: RowCount | None = optional("Test rows.")


def _a_day(said: str) -> str:
    with suppress(ValueError):
        if date.fromisoformat(said).isoformat() == said:
            return said
    raise ValueError("a day is written as 2024-07-26")


class Data(Section):
    """Where rows come from and how a row becomes a prompt and its answer."""

    hub: Annotated[Hub | None, _alone("hub", Hub)] = optional(
        "A hub data set: its id, or a mapping. Exactly one source is given."
    )
    files: Annotated[Files | None, _alone("files", Files)] = optional(
        "Local files: one path, or a mapping of splits to paths."
    )
    reasoning_gym: Annotated[ReasoningGym | None, _alone("reasoning_gym", ReasoningGym)] = optional(
        "A generator's name, or a mapping."
    )
    rows: Rows = Field(default_factory=Rows, description="Rows per split, sampled reproducibly with `data.seed`.")
    seed: Seed = Field(default=0, description="Seed of the sampling; the same rows serve every arm.")
    redraw: Literal["none", "per_seed"] = Field(
        default="none",
        description="Training rows under the seeds. `none`: the same for all; `per_seed`: each seed draws its own from "
        "what test and validation, which stay, have left, so that intervals speak of other training sets too.",
    )
    task: Literal["multiple_choice", "answer", "text"] = Field(
        description="`multiple_choice`: the choice with the highest summed log-likelihood; `answer`: greedy decoding "
        "and exact match; `text`: perplexity of plain text."
    )
    prompt: str | None = optional("Template over the row's fields: `{question}`, nested `{meta.title}`.")
    answer: str | None = optional("Template of the right answer (task `answer`).")
    text: str | None = optional("Template of the text (task `text`).")
    choices: dict[str, str] | list[str] | str | None = optional(
        "Task `multiple_choice`: a mapping from label to answer text, a list of answer texts, or the name of a field "
        "that holds each row's own list."
    )
    label: str | None = optional("Field with the right choice; `label_is` says what it holds.")
    label_is: Literal["index", "text", "name"] | None = optional(
        "What the label is: the `index` of a choice, from 0; the `text` of a choice; its `name`, a label of the "
        "mapping or one of `choice_labels`. Default: the name where there are names; else whichever of index and text "
        "fits every row, and an error at the first row where both fit and mean different choices."
    )
    choice_labels: list[str] | str | None = optional(
        "Names of a row's own choices: a list of them (`[A, B, C, D]`), or the field that holds them (`choices.label` "
        "of ARC)."
    )
    group: str | None = optional(
        "Field that says which rows belong together (a shared passage): they stay in one split, and intervals draw "
        "them together."
    )
    chat: bool = Field(
        default=False, description="Put the prompt through the tokenizer's chat template as a user's message."
    )
    system: str | None = optional("System message, with `chat: true`.")
    today: Annotated[str, AfterValidator(_a_day)] | None = optional(
        "What a chat template that asks for the date is told, on whatever day it is asked. Default: `2024-07-26`."
    )
    answer_prefix: str | None = optional(
        "Text between prompt and answer. Default: one space; nothing after a prompt that ends in white space, and "
        "nothing with `chat: true`."
    )
    normalize: list[Literal["whitespace", "lowercase", "punctuation"]] | None = optional(
        "What exact match (task `answer`) ignores; default `[whitespace]`: `whitespace` at the ends and its amount "
        "inside, `lowercase` the case, `punctuation` every character of string.punctuation."
    )
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], OneOrMore] | None = optional(
        "Strings that end an answer (task `answer`): what is decoded counts up to the first of them. Default: a "
        "newline; where that would cut a right answer of the data short, an empty line; where that would too, nothing. "
        "`[]`: only an end token ends an answer."
    )
    max_length: Tokens = Field(default=512, description="Longest prompt and answer together, in tokens.")
    too_long: Literal["drop", "truncate", "error", "split"] | None = optional(
        "Rows over `max_length`: `drop` takes the next row instead, `truncate` cuts the beginning of the prompt (the "
        "end of a text), `error` stops, `split` cuts a text into pieces. Default: `drop`; `split` for task `text`."
    )
    overlap: Literal["drop", "error", "allow"] = Field(
        default="drop",
        description="Rows whose prompt, or group where one is named, occurs in another split: `drop` keeps them in "
        "test, then validation; `error` stops; `allow` keeps them and says so.",
    )

    @field_validator("prompt", "answer", "text", mode="before")
    @classmethod
    def _template(cls, value: Any) -> Any:
        # An unquoted {question}, or one whose quotes the shell took, is a mapping to YAML; here it can mean one thing.
        alone = isinstance(value, dict) and len(value) == 1 and None in value.values()
        return f"{{{next(iter(value))}}}" if alone else value

    @field_validator("prompt", "answer", "text")
    @classmethod
    def _names_fields(cls, value: str | None) -> str | None:
        try:
            pieces = list(string.Formatter().parse(value or ""))
        except ValueError as error:
            raise ValueError(f"{quoted(value)}: {error}; a brace of the text itself is written twice") from None
        for _, field, spec, conversion in pieces:
            if field is not None and (spec or conversion or not field):
                raise ValueError(
                    f"{quoted(value)}: between braces stands a field's name, as in {{question}}, with no : or ! in it; "
                    "rename the field in the data"
                )
        return value

    @field_validator("choices", "choice_labels", mode="before", json_schema_input_type=Labels)
    @classmethod
    def _choices_as_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {label_text(key): label_text(text) for key, text in value.items()}
        return [label_text(text) for text in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        sources = [name for name in SOURCES if getattr(self, name) is not None]
        if len(sources) != 1:
            given = f"given are {' and '.join(sources)}" if sources else "none is given"
            raise ValueError(f"give exactly one source, hub, files or reasoning_gym; {given}")
        if self.redraw == "per_seed" and self.rows.train is None:
            raise ValueError("redraw: per_seed needs rows.train, the number of rows that each seed draws")
        needed = {"multiple_choice": ["prompt", "choices", "label"], "answer": ["prompt", "answer"], "text": ["text"]}
        if lacking := next((key for key in needed[self.task] if getattr(self, key) is None), None):
            raise ValueError(f"task {self.task} needs the key {lacking!r}")
        taken = [*needed[self.task], *(("label_is", "choice_labels") if self.task == "multiple_choice" else ())]
        for key in ("prompt", "answer", "text", "choices", "label", "label_is", "choice_labels"):
            if getattr(self, key) is not None and key not in taken:
                raise ValueError(f"{key!r} has no effect with task {self.task}: remove it")
        if isinstance(self.choices, list | dict) and len(self.choices) < 2:
            raise ValueError("choices needs two answers or more")
        if self.choice_labels is not None and not isinstance(self.choices, str):
            raise ValueError("choice_labels goes with choices that name a field of the row")
        if self.label_is == "name" and not isinstance(self.choices, dict) and self.choice_labels is None:
            raise ValueError("label_is: name needs names: choices as a mapping, or choice_labels")
        if self.label_is in ("index", "text") and self.choice_labels is not None:
            raise ValueError(f"choice_labels has no effect with label_is: {self.label_is}: remove it")
        for key in ("normalize", "stop"):
            if getattr(self, key) is not None and self.task != "answer":
                raise ValueError(f"{key} has no effect with task {self.task}: remove it")
        for key in ("system", "today"):
            if getattr(self, key) is not None and not self.chat:
                raise ValueError(f"{key} has no effect without chat: true")
        if self.task == "text" and self.chat:
            raise ValueError("chat has no effect with task text: remove it")
        if self.too_long == "split" and self.task != "text":
            raise ValueError("too_long: split is for task text; use drop, truncate or error")
        return self


def label_text(value: Any) -> str:
    """A label as text, the same from YAML, JSON, CSV and Parquet: true, 1 and 1.0 have one spelling each."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
