"""What the files of a run folder hold, as far as anything is read from it, so that a damaged one is refused as a whole
and by name before any of its numbers is used. No torch.

docs/results.md has every key; what is not here may be missing or be anything.
"""

import math
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cola.errors import plain


def _of_a_run(number: float) -> float:
    # Larger is no number of a run, and its square is none of a computer.
    if math.isfinite(number) and abs(number) > 1e30:
        raise ValueError("a number that no run has")
    return number


Number = Annotated[float, Field(strict=True), AfterValidator(_of_a_run)]  # or infinite, or not a number
Count = Annotated[int, Field(strict=True, ge=0, le=10**24)]
Text = Annotated[str, Field(strict=True, max_length=100_000)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=300)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Commit(Shape):
    hash: Text | None
    dirty: bool | None


class Machine(Shape):
    cpu: Text


class AnyFormat(Shape):
    """A file of any version."""

    format: int | None = None


class Made(Shape):
    """With what something was made."""

    cola: Text | None
    python: Text
    commit: Commit
    packages: dict[str, Text | None]
    machine: Machine
    device: Text


class Digest(Shape):
    sha256: Text


class NamedDigest(Digest):
    name: Text | None


class Data(Digest):
    notes: list[Text]


class Provenance(Made):
    """provenance.json."""

    format: int
    started: Text
    recipe: Digest
    model: NamedDigest
    data: Data
    rows: dict[str, Count]
    general_text: NamedDigest


class Meta(Shape):
    """`meta_info` of a result, of which no more is read: the rest is in provenance.json."""

    rows: dict[str, Count]


class RunInfo(Shape):
    arm: Name
    seed: Count
    error: Text | None = None


class Base(Shape):
    dtype: Text
    quantization: Text | None


class Rules(Shape):
    merge_fraction: Number


class Link(Shape):
    cleared: Number


class Knot(Shape):
    merge: Text | None
    relative_size_median: Number | None
    relative_size_max: Number | None
    unchanged_median: Number | None
    error_max: Number | None
    cosine_min: Number | None
    drift_max_logit_change: Number
    drift_relative: Number
    drift_of_learned: Number | None
    drift_kl: Number
    drift_loss_change: Number


class TrainInfo(Shape):
    base: Base
    rules: Rules | None
    learning_rate: Number | None
    scored_step: Count
    steps: Count
    reused_steps: Count
    tokens: Count
    positions: Count
    flops: Number
    num_trainable_params: Count
    without_gradient: Count
    train_seconds: Number
    total_seconds: Number
    at_grid_edge: list[Text]
    final_state: Text
    scored_state: Text
    accelerator_memory_max: Count | None = None
    process_memory_max: Count | None = None
    links: list[Link]
    knots: list[Knot]
    segments_made: list[Made] = []
    measured_made: list[Made] = []

    @model_validator(mode="after")
    def _a_link_for_each_knot(self) -> Self:
        if len(self.knots) > len(self.links) or (self.knots and self.rules is None):
            raise ValueError("more knots than links")
        return self


class Scored(Shape):
    loss: Number
    score: Number | None


class General(Shape):
    forgetting: Number


class Evaluation(Shape):
    validation: Scored
    train: Scored | None = None
    test: Scored | None = None
    gap_loss: Number | None = None
    gap_acc: Number | None = None
    general: General | None = None


class Result(Shape):
    """result.json."""

    status: Literal["ok", "failed", "interrupted"]
    run_info: RunInfo
    train_info: TrainInfo | None = None
    evaluation: Evaluation | None = None
    meta_info: Meta | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status == "failed" and self.run_info.error is None:
            raise ValueError("it failed and does not say how")
        if self.status == "ok" and None in (self.train_info, self.evaluation, self.meta_info):
            raise ValueError("it lacks train_info, evaluation or meta_info")
        return self


class ScoreRow(Shape):
    """A row of scores/SPLIT.jsonl."""

    id: Name
    nats: Number
    tokens: Annotated[int, Field(strict=True, gt=0, le=10**12)]
    score: Number | None
    group: Text | None


class MetricRow(Shape):
    """A row of metrics.jsonl."""

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


class Trial(Shape):
    values: dict[str, Any]
    failed: bool
    loss: Number | None
    score: Number | None


class Chosen(Shape):
    """chosen.json."""

    chosen: Count
    seeds: Annotated[list[Count], Field(min_length=1)]
    trials: list[Trial]

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.chosen >= len(self.trials):
            raise ValueError(f"chosen: there are {len(self.trials)} trials")
        return self


class References(Shape):
    """segments.json."""

    segments: list[Name] = []
    measured: list[Name] = []
    weights: list[Name] = []


class ArmState(Shape):
    n_seeds: Count
    states: dict[str, Text]
    errors: dict[str, Text]


class Summary(Shape):
    """summary.json, as far as others than its own page read it; that is written anew before it is read."""

    interrupted: bool
    arms: dict[str, ArmState]


class Update(Shape):
    rank: Number | None
    relative_size: Number | None
    effective_rank: Number | None
    rank_90: Number | None
    stable_rank: Number | None
    intruders: Number | None
    values: list[Annotated[float, Field(strict=True, ge=0, le=1e30)]]


class Sides(Shape):
    left: Number
    right: Number
    random: Number


class Overlap(Sides):
    links: list[Text]


class WithFull(Shape):
    updates: dict[str, Sides]


class Matrix(Shape):
    updates: dict[str, Update]
    overlap: list[Overlap]
    with_full: WithFull | None


class Spectrum(Shape):
    """spectrum.json of the version that is read."""

    version: int
    full: Any
    left_out: Any
    matrices: dict[str, Matrix]


class SpectrumVersion(Shape):
    """spectrum.json of any version."""

    version: int


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def fault_of(value: Any, shape: Any) -> str | None:
    """What is wrong with a file's content, in a few words; None where it has the shape.

    Args:
        value: As JSON gives it.
        shape: A class above, or a list of one.
    """
    try:
        _adapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(plain(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        return f"{place}: {reason}" if place else reason
    return None
