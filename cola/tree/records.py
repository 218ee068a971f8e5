"""What the files of a job, of a search and of the store's users hold, key by key. No torch."""

from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, RootModel, model_validator

from cola.recipe.arms import OneLink
from cola.recipe.ideas import Idea
from cola.recipe.methods import METHODS, Settings
from cola.recipe.resolved import Rules
from cola.tree.made import Made, Provenance
from cola.tree.shapes import (
    Bytes,
    Count,
    Flag,
    Flops,
    Fraction,
    Loss,
    Name,
    Nats,
    Number,
    Parameters,
    Record,
    Relative,
    Rows,
    Seconds,
    Share,
    Step,
    Steps,
    Tensors,
    Text,
    TextLoss,
    Time,
    Tokens,
)

Status = Literal["ok", "failed", "interrupted"]


class AnyFormat(Record):
    """A file of any version."""

    format: int | None = None


class AnyStatus(Record):
    """A result of any kind."""

    status: Status


class RunInfo(Record):
    arm: Name = Field(description="which arm it is")
    seed: Count = Field(description="under which seed")
    choice: list[tuple[Text, Any]] = Field(
        default=[], description="the searched keys and their values, as a list of pairs"
    )
    trial: Flag = Field(
        default=False, description="whether it is a trial of a search: validation is scored and nothing else"
    )
    created_at: Time | None = Field(default=None, description="when it came to its end; absent where it did not")
    seconds: Seconds | None = Field(
        default=None, description="wall time of the session that ended it, loading and waiting included"
    )
    error: Text | None = Field(
        default=None, description="in one line, where it failed; `traceback.txt` beside it has the rest"
    )


class Base(Record):
    dtype: Text = Field(description="number format of the frozen weights and of the computation")
    quantization: Text | None = Field(description="`nf4`, `int8` or null")


class TrainedLink(OneLink):
    """A setting of a link: the keys of `link` in recipe.md, those of its method."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    first_step: Step = Field(description="before its first step")
    last_step: Step = Field(description="its last")
    learning_rate_first: Number = Field(description="of its first step")
    learning_rate_peak: Number = Field(description="the largest of its steps")
    learning_rate_last: Number = Field(description="of its last step")
    seed: Count = Field(description="of its draw and its dropout")
    cleared: Share = Field(description="of AdamW's moments that were zero as it began")

    @property
    def kind(self) -> type[Settings]:
        """Its method."""
        return METHODS[str(self.method)]


class Knot(Record):
    link: Count = Field(description="the link that was tied, from 1")
    step: Step = Field(description="its last step")
    seed: Count = Field(description="of the link")
    merge: Text | None = Field(description="`exact`, `naive` or `no`; null for a method that leaves no pair")
    drift_max_logit_change: Number = Field(description="largest change of a logit across the knot")
    drift_relative: Relative = Field(description="the same by the largest logit")
    drift_of_learned: Relative | None = Field(description="by what the link had learned")
    drift_kl: Loss = Field(description="KL(before ‖ after)")
    drift_loss_change: Loss = Field(description="after − before")
    relative_size_median: Relative | None = Field(description="‖ΔW‖/‖W‖, median over matrices")
    relative_size_max: Relative | None = Field(description="likewise, the largest")
    unchanged_median: Share | None = Field(description="entries that the knot left as they were")
    unchanged_max: Share | None = Field(description="likewise")
    error_median: Relative | None = Field(description="‖applied − learned‖ / ‖learned‖")
    error_max: Relative | None = Field(description="likewise")
    cosine_median: Number | None = Field(description="between the two")
    cosine_min: Number | None = Field(description="likewise, the smallest")
    start_moved: Relative | None = Field(
        default=None, description="change of the outputs by a start that says that it moves them, by the largest logit"
    )
    fraction: Share | dict[Text, Share] | None = Field(
        default=None, description="share of the pair that was kept, or of each matrix's, where a function says it"
    )
    seconds: Seconds = Field(description="that tying took")
    cpu_seconds: Seconds | None = Field(
        default=None,
        description="CPU time of the process meanwhile, all its threads together and no GPU's; absent where a version "
        "of cola that did not note it tied the link",
    )


class Look(Record):
    step: Step = Field(
        description="after which validation was looked at, the link attached; the last time tied, where none is chosen "
        "(`checkpoint: last`)"
    )
    link: Count = Field(description="which link it was, from 1")
    loss: Loss = Field(description="what it saw")
    score: Fraction | None = Field(description="likewise; null for plain text")


class TrainInfo(Record):
    learning_rate: Number | None = Field(description="the largest of any step; null without links")
    choice: dict[str, Any] = Field(
        description="the searched keys again, as a mapping", json_schema_extra={"key": "KEY"}
    )
    at_grid_edge: list[Text] = Field(
        description="searched keys whose chosen number is the smallest or largest that was tried"
    )
    base: Base
    rules: Rules | None = Field(
        description="the arm's `knot` rules ([recipe.md](recipe.md)); `train_info.rules` is null without links",
        json_schema_extra={"key": "RULE"},
    )
    checkpoint: Text = Field(description="`last` or `best`: which step is scored")
    scored_step: Step = Field(description="the one that was scored; 0: the base")
    looked_loss: Loss | None = Field(
        description="validation loss there, as it was looked at while training; null where it was not"
    )
    steps: Steps = Field(description="optimizer steps of all links")
    reused_steps: Steps = Field(description="of them, found in the store")
    segments: list[Name] = Field(description="names in the store of the states that the arm is made of, in order")
    segments_made: list[Made] = Field(description="with what those states were made, once for all that agree")
    measured_made: list[Made] = Field(
        default=[],
        description="the same of what the scores and knots were made with, in this session or an earlier one; "
        "spectrum.json has its own `made`",
    )
    final_state: Text = Field(description="name of the last state: equal names are equal weights, from equal causes")
    scored_state: Text = Field(description="name of the scored state")
    tokens: Tokens = Field(description="read while training, prompts included, padding not")
    flops: Flops = Field(description="of training: forward, backward, optimizer and starts")
    optimizer_flops: Flops | None = Field(
        default=None, description="of them, the optimizer's; null where code of the user's own says none: not counted"
    )
    start_flops: Flops | None = Field(default=None, description="of them, those of the pairs' starts; null likewise")
    positions: Tokens = Field(description="`tokens` with virtual tokens")
    without_gradient: Tensors = Field(
        description="trained tensors that got no gradient at any step: the smallest number of any step"
    )
    num_trainable_params: Parameters = Field(description="of the largest link")
    num_total_params: Parameters = Field(description="of the base")
    train_seconds: Seconds = Field(description="of all steps, whichever session made them")
    total_seconds: Seconds = Field(description="the same with scoring and knots; loading and writing not included")
    train_cpu_seconds: Seconds | None = Field(
        default=None,
        description="of all steps the CPU time of the process, all its threads together and no GPU's: other load on "
        "the machine is not in it; null, or absent, where a part is from a version of cola that did not note it",
    )
    total_cpu_seconds: Seconds | None = Field(default=None, description="the same with scoring and knots")
    optimizer_bytes: Bytes | None = Field(
        default=None, description="of all that the optimizer keeps after a link's first step, the largest of any link"
    )
    accelerator_memory_max: Bytes | None = Field(
        default=None,
        description="most that was allocated on the GPU from the job's start to the last state that was kept, in "
        "whichever session: loading, training, looks at validation, and all knots but the last; null without a GPU",
    )
    process_memory_max: Bytes | None = Field(
        default=None,
        description="the same of the process's resident memory as Linux counts it (`VmHWM`, reset at the job's start): "
        "Python, the libraries (about 0.5 GB) and what an earlier job has not given back are in it; null on another "
        "system, or where nothing was trained",
    )
    links: list[TrainedLink] = Field(description="what each link trained")
    knots: list[Knot]
    evaluations: list[Look]

    def shares(self, n: int) -> list[float | dict[str, float]]:
        """Which share of its pair each of the first n knots kept, another link following."""
        said = self.rules.merge_fraction if self.rules else 1.0
        number = 1.0 if isinstance(said, Idea) else said  # of the last knot no rule is asked
        return [number if knot.fraction is None else knot.fraction for knot in self.knots[:n]]

    @model_validator(mode="after")
    def _a_link_for_each_knot(self) -> Self:
        if len(self.knots) > len(self.links) or (self.knots and self.rules is None):
            raise ValueError("more knots than links")
        return self


class Scored(Record):
    loss: Loss = Field(description="at the scored step, all links tied")
    score: Fraction | None = Field(description="accuracy or exact match; null for plain text")
    n: Rows = Field(description="scored")


class General(Record):
    loss: TextLoss = Field(
        description="of the general text by the scored model; `evaluation.general` is null where the recipe leaves it "
        "out, and absent in trials"
    )
    before: TextLoss = Field(description="by the arm's own base, untouched")
    forgetting: TextLoss = Field(description="loss − before: what training has cost elsewhere")
    n: Count = Field(description="passages that it is a mean over")
    tokens: Tokens = Field(description="that it is a mean over")


class TrialEvaluation(Record):
    """What a trial of a search is scored on."""

    validation: Scored


class Evaluation(Record):
    train: Scored
    validation: Scored
    test: Scored
    gap_loss: Loss = Field(description="test − train")
    gap_acc: Fraction | None = Field(description="train − test")
    general: General | None = None


E = TypeVar("E", Evaluation, TrialEvaluation)


class Done(Record, Generic[E]):
    """A result of what came to its end."""

    format: int | None = Field(default=None, description="of this file and of summary.json")
    status: Literal["ok"] = Field(
        description="`ok`, `failed` or `interrupted`; what is not `ok` has `format`, `status` and `run_info` only"
    )
    run_info: RunInfo
    train_info: TrainInfo
    evaluation: E
    meta_info: Provenance = Field(description="what provenance.json held as the session began, key by key")


class Result(Done[Evaluation]):
    """Three blocks as in the results of PEFT's `method_comparison` (what was run; what training took and did; with
    what), and what was measured."""


class TrialResult(Done[TrialEvaluation]):
    """result.json of a trial."""


class Ended(Record):
    """result.json of what did not come to its end."""

    format: int | None = None
    status: Literal["failed", "interrupted"]
    run_info: RunInfo

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status == "failed" and self.run_info.error is None:
            raise ValueError("it failed and does not say how")
        return self


class ScoreRow(Record):
    """One row for each example of `train`, `validation`, `test`, and for each passage of `general` (by the scored
    model). The keys `prompt` and `choices` are there under `evaluation.keep_prompts: true`. Arms, seeds and runs on the
    same data (`data.sha256`) are paired by `id`."""

    id: Name = Field(
        description="file and line of the row, `test.jsonl:17`: where it begins in JSONL, CSV, TSV and text, and in "
        "JSON with an object a line; its number in a JSON list, a Parquet file, a hub set or a generator. From 1, as "
        "an editor counts, blank lines and the header too. `.2` behind it: the second piece of a text that was cut. "
        "Two files of one name are told apart by their paths"
    )
    nats: Nats = Field(description="−log p of the right answer (of the text), summed over its target tokens")
    tokens: Annotated[int, Field(strict=True, gt=0, le=10**12)] = Field(
        description="their number", json_schema_extra={"unit": "tokens"}
    )
    score: Number | None = Field(description="1 or 0; null for plain text")
    prediction: int | str | None = Field(
        default=None, description="index of the chosen answer, or the decoded one, up to the first stop string"
    )
    group: Text | None = Field(
        description="what the example shares with others; null where the recipe names no such field. The pieces of a "
        "cut text share its `id`"
    )
    answer: str | None = Field(default=None, description="text of the right answer; null for plain text")
    gold: Count | None = Field(default=None, description="index of the right choice; null for other tasks")
    prompt: str | None = Field(
        default=None,
        description="what the model read, tokens turned back into text, special ones included: the prompt, or all of a "
        "plain text",
    )
    choices: list[str] | None = Field(default=None, description="texts of all choices; null for other tasks")


class Trial(Record):
    values: dict[str, Any] = Field(description="what the searched keys were", json_schema_extra={"key": "KEY"})
    loss: Loss | None = Field(description="on validation, mean over `seeds`")
    score: Fraction | None = Field(description="likewise")
    failed: Flag = Field(description="whether a seed of it failed, so that it could not be chosen")


class Chosen(Record):
    """What a search tried, and which it chose."""

    chosen: Count = Field(description="which of the trials, from 0")
    seeds: Annotated[list[Count], Field(min_length=1)] = Field(
        description="of the trials; of chosen-seed-S.json the seed itself"
    )
    trials: list[Trial]

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.chosen >= len(self.trials):
            raise ValueError(f"chosen: there are {len(self.trials)} trials")
        return self


class References(Record):
    """What the run rests on in the store."""

    segments: list[Name] = Field(default=[], description="names of the states")
    measured: list[Name] = Field(default=[], description="of the measurements")
    weights: list[Name] = Field(
        default=[],
        description="of the fully fine-tuned states whose weights the run keeps or still needs there",
    )
    sha256: Text | None = Field(
        default=None, description="of the other keys, as canonical JSON: its first 32 hex digits"
    )


class MetricRow(Record):
    """A row of metrics.jsonl, as far as it is drawn."""

    kind: Literal["step", "validation", "knot"]
    step: Count
    link: Count
    loss: Number | None = None
    learning_rate: Number | None = None

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if (self.kind != "knot" and self.loss is None) or (self.kind == "step" and self.learning_rate is None):
            raise ValueError("a step or a look without its loss or learning rate")
        return self


class ArmState(Record):
    links: Count = Field(default=0, description="number of links")
    states: dict[int, Text] = Field(description="of each seed: a result's `status`, or `missing`")
    errors: dict[int, Text] = Field(description="what failed, by seed")
    n_seeds: Count = Field(description="seeds that came to their end")


class RunState(Record):
    """summary.json, as far as it says whether a run is finished."""

    interrupted: bool
    arms: dict[str, ArmState]


class SplitScores(Record):
    """What was found of the splits that were asked for."""

    train: Scored | None = None
    validation: Scored | None = None
    test: Scored | None = None
    gap_loss: Loss | None = Field(default=None, description="test − train, where both were asked for")
    gap_acc: Fraction | None = Field(default=None, description="train − test, likewise")


class EvaluationFile(RootModel[dict[str, SplitScores]]):
    """What `cola eval` found of each model, by its name."""

    root: dict[str, SplitScores] = Field(json_schema_extra={"key": "MODEL"})
