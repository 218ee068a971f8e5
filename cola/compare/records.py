"""What summary.json and ablation.json hold, key by key. No torch."""

from typing import Generic, Literal, TypeVar

from pydantic import Field

from cola.tree.foreseen import Foreseen
from cola.tree.made import Provenance
from cola.tree.records import ArmState, Base, Trial
from cola.tree.shapes import (
    Bytes,
    Count,
    Flag,
    Fraction,
    Loss,
    Number,
    Record,
    Relative,
    Rows,
    Seconds,
    Share,
    Step,
    Tensors,
    Text,
    TextLoss,
)

Role = Literal["primary", "secondary", "later"]


class Spread(Record):
    """`{mean, sd}` over seeds; `sd` is null with one."""

    mean: Number
    sd: Number | None


class Interval(Record):
    """`{value, low, high, se}`: an estimate, its 95 % interval and its standard error, null where there are none."""

    value: Number
    low: Number | None
    high: Number | None
    se: Number | None = None


class Matched(Record):
    by: Text = Field(description="what all trained arms were given the same of: steps, tokens or flops")
    per_link: Flag = Field(description="whether each link was given it")
    used: list[Number] | None = Field(default=None, description="smallest and largest of the trained arms")


class OfSeed(Record):
    seed: Count
    loss: Loss
    score: Fraction | None


class SummaryTrial(Trial):
    each: list[OfSeed] = Field(description="`seed`, `loss` and `score` of every seed of it")
    share: Share | None = Field(description="of resampled trials that choose it; null: scores have gone, or it failed")


class SummaryChoice(Record):
    seed: Count | None = Field(description="whose choice it is; null: for all")
    chosen: Count = Field(description="as in chosen.json")
    seeds: list[Count] = Field(description="as in chosen.json")
    trials: list[SummaryTrial]


class Search(Record):
    per: Text = Field(description="`arm` or `seed`: what chooses for itself")
    select_by: Text = Field(description="`loss` or `score`")
    choices: list[SummaryChoice]


class ScopeSearch(Record):
    per: Text = Field(description="as in `trials`")
    keys: list[Text] = Field(description="what is searched")
    seeds: list[Count] = Field(description="the trials' own seeds")
    scored: list[Count] = Field(description="those of them that are scored too")


class Scope(Record):
    """What a run's intervals speak of."""

    seeds: Count = Field(description="their number")
    redraw: Text = Field(description="as `data.redraw`")
    train_rows: Rows | None = Field(description="training rows of each seed")
    by_validation: Flag = Field(description="whether validation rows decided anything")
    search: ScopeSearch | None


class SeedNumbers(Record):
    seed: Count = Field(description="which one")
    train_loss: Loss = Field(description="as in its result, and so are the rest")
    train_score: Fraction | None
    validation_loss: Loss
    validation_score: Fraction | None
    test_loss: Loss
    test_score: Fraction | None
    gap_loss: Loss
    gap_acc: Fraction | None
    forgetting: TextLoss | None


class KnotLedger(Record):
    """One knot that tied a pair, over seeds: the mean of what was learned, the worst of what was lost."""

    link: Count = Field(description="from 1")
    merge: Text = Field(description="as in `train_info.knots[]`, as are the rest: means of sizes, the worst of losses")
    fraction: Share | None = Field(description="share of the pair that was kept")
    cleared: Share = Field(description="of AdamW's moments that were zero as the link began")
    relative_size_median: Relative
    unchanged_median: Share
    relative_size_max: Relative | None
    error_max: Relative | None
    cosine_min: Number | None
    drift_max_logit_change: Number
    drift_relative: Relative
    drift_of_learned: Relative | None
    drift_kl: Loss
    drift_loss_change: Loss


S = TypeVar("S")


class ArmNumbers(ArmState, Generic[S]):
    """Of an arm without a seed that came to its end, the numbers are absent."""

    train_loss: Spread | None = Field(default=None, description="nats per target token")
    train_score: Spread | None = Field(default=None, description="fraction")
    validation_loss: Spread | None = Field(default=None, description="likewise")
    validation_score: Spread | None = Field(default=None, description="likewise")
    test_loss: Spread | None = Field(default=None, description="likewise")
    test_score: Spread | None = Field(default=None, description="likewise")
    gap_loss: Spread | None = Field(default=None, description="test − train")
    gap_acc: Spread | None = Field(default=None, description="train − test")
    seeds: list[S] = Field(default=[], description="the numbers of each seed")
    forgetting: Spread | None = Field(default=None, description="`evaluation.general.forgetting`; null: not measured")
    num_trainable_params: Number = Field(default=0, description="mean over seeds of the key of `train_info`")
    steps: Number = Field(default=0, description="likewise")
    tokens: Number = Field(default=0, description="likewise")
    positions: Number = Field(default=0, description="likewise")
    flops: Number = Field(default=0, description="likewise")
    optimizer_flops: Number | None = Field(default=None, description="likewise; null where a seed has none")
    start_flops: Number | None = Field(default=None, description="likewise; null where a seed has none")
    optimizer_bytes: Bytes | None = Field(default=None, description="the largest over seeds; null where one has none")
    train_seconds: Seconds = Field(default=0, description="likewise")
    total_seconds: Seconds = Field(default=0, description="likewise")
    train_cpu_seconds: Seconds | None = Field(default=None, description="likewise; absent where a seed has none")
    total_cpu_seconds: Seconds | None = Field(default=None, description="likewise; absent where a seed has none")
    scored_step: list[Step] = Field(default=[], description="of each seed")
    learning_rate: list[Number | None] = Field(default=[], description="of each seed")
    peak_memory: Number | None = Field(
        default=None,
        description="`accelerator_memory_max` or `process_memory_max`",
        json_schema_extra={"unit": "bytes"},
    )
    base: Base | None = Field(default=None, description="as in `train_info`")
    without_gradient: Tensors = Field(default=0, description="the largest over seeds")
    at_grid_edge: dict[str, list[Count]] = Field(
        default={}, description="the seeds whose chosen number is at an edge", json_schema_extra={"key": "KEY"}
    )
    knots: list[KnotLedger] = Field(default=[], description="one row for each knot")
    max_drift: Relative | None = Field(default=None, description="the largest `drift_relative`")
    max_lost: Relative | None = Field(default=None, description="the largest `drift_of_learned`")
    ft_gap: Interval | None = Field(default=None, description="score of full fine-tuning − the arm's, on test")
    closed: Interval | Text | None = Field(
        default=None, description="share of the gap of LoRA that the arm closes, or why there is none"
    )
    gap_loss_interval: Interval | None = Field(
        default=None,
        description="over seeds and test examples, of what was trained on as it is; absent where there is none",
    )
    gap_acc_interval: Interval | None = Field(default=None, description="likewise")


class ArmSummary(ArmNumbers[SeedNumbers]):
    """An arm's numbers over seeds."""


class Named(Record):
    first: Text = Field(description="the arm")
    second: Text = Field(description="whose score is subtracted")
    role: Role = Field(description="`primary`, `secondary`; `later`: not named before")
    metric: Text = Field(description="`score` or `loss`; of a loss its negative, so that more is better")


class Difference(Record):
    value: Number = Field(description="mean of the paired differences")
    low: Number | None = Field(description="lower end of its 95 % interval")
    high: Number | None = Field(description="upper end")
    se: Number | None = Field(default=None, description="standard error")
    p: Number | None = Field(description="for other seeds and examples: the interval inverted")
    p_holm: Number | None = Field(description="of a secondary contrast, corrected for their number (Holm)")
    p_rows: Number | None = Field(description="sign flips over runs, for other seeds on these rows; null with one")
    p_rows_smallest: Number | None = Field(description="the smallest that these flips can give")
    p_rows_error: Number | None = Field(description="of `p_rows`; null where all patterns were gone through")
    minimum_detectable: Number | None = Field(
        description="the smallest true difference that would be found in four of five such experiments"
    )
    n_seeds: Count = Field(description="runs")
    n_examples: Count = Field(description="test examples")
    n_groups: Count = Field(description="groups of them")


class Contrast(Difference, Named):
    """Two arms, paired by seed and test example."""

    claim: Flag = Field(description="whether it was named beforehand, and is told from 0")


class SpectrumRow(Record):
    what: Text
    rank: Number | None
    relative_size: Relative | None
    effective_rank: Number | None
    rank_90: Number | None
    stable_rank: Number | None
    intruders: Number | None


class OverlapTable(Record):
    labels: list[Text]
    matrix: list[list[Number | None]]
    random: Number | None


class WithFullRow(Record):
    labels: list[Text]
    values: list[Number | None]
    random: Number | None


class ArmSpectra(Record):
    rows: list[SpectrumRow] = Field(description="of each link and the chain: medians over matrices, means over seeds")
    values: dict[str, list[Number]] = Field(description="singular values by the largest")
    overlap: OverlapTable | None = Field(description="of each two links; null with one")
    with_full: WithFullRow | None = Field(description="of each update with full fine-tuning's; null without it")


class Tracked(Record):
    tracker: Text = Field(description="`wandb`, `trackio` or `mlflow`")
    mode: Text | None = Field(
        description="W&B's `online`, `offline` or `off`; `local`, or `MLFLOW_TRACKING_URI`; `off` too where the "
        "tracker failed; null where the command that wrote this sent nothing"
    )
    command: Text | None = Field(description="sends to W&B what was kept offline, or shows what another tracker keeps")


class StoreUse(Record):
    path: Text = Field(description="of the store")
    bytes: Count = Field(description="that it takes", json_schema_extra={"unit": "bytes"})


class Summary(Record):
    """What the tables and the page show, over the seeds that came to their end."""

    meta: Provenance | None = Field(description="provenance.json")
    interrupted: Flag = Field(description="whether there is more to run")
    metric: Text = Field(description="name of the score")
    checkpoint: Text = Field(description="`last` or `best`: which step is scored")
    select_by: Text = Field(description="the rule of the scored step; of searches: in `trials`")
    seeds: list[Count] = Field(description="the recipe's")
    matched: Matched
    trials: dict[str, Search] = Field(description="of each arm that was searched", json_schema_extra={"key": "ARM"})
    intervals: Scope
    same_outputs: list[tuple[Text, Text, Count]] = Field(
        description="pairs of arms whose test losses agree to the bit, with the seed"
    )
    rows: dict[str, Rows] | None = Field(description="of each split", json_schema_extra={"key": "SPLIT"})
    train_sample: Rows | None = Field(
        default=None, description="of train that are scored, and make the gaps, where those are not all"
    )
    arms: dict[str, ArmSummary] = Field(json_schema_extra={"key": "ARM"})
    foreseen: Foreseen | None = Field(default=None, description="plan.json; null: of an earlier version")
    spectra: dict[str, ArmSpectra] = Field(
        description="of each arm with pairs, and of full fine-tuning; `cola inspect` makes them",
        json_schema_extra={"key": "ARM"},
    )
    contrasts: list[Contrast] = Field(description="the primary one first")
    unpaired: list[Text] = Field(description="what kept arms from being compared as the recipe asks, in words")
    notes: list[Text] = Field(
        description="what is to be said beside the tables, arms that were not made with the same versions, device or "
        "dtype among it"
    )
    tracking: Tracked | None = None
    store: StoreUse | None = None


class TaskContrast(Named):
    """A contrast over tasks; of runs that are not about the same metric it has no numbers but those of each task."""

    value: Number | None = Field(description="as in `contrasts` of one run, over the tasks, and so are the rest")
    low: Number | None
    high: Number | None
    se: Number | None
    p: Number | None
    p_holm: Number | None
    p_rows: Number | None
    p_rows_smallest: Number | None
    p_rows_error: Number | None
    minimum_detectable: Number | None
    n_seeds: Count = Field(description="runs of all tasks")
    n_examples: Count | None
    n_groups: Count | None
    iqm: Interval | None = Field(description="interquartile mean over tasks and seeds, from eight tasks on")
    tasks: dict[str, Difference] = Field(description="the same of each task", json_schema_extra={"key": "TASK"})
    claim: Flag = Field(default=False, description="whether it was named beforehand, and is told from 0")


class TaskRuns(Record):
    label: Text = Field(description="the name of its recipe, or of its first run")
    metric: Text = Field(description="name of its score")
    runs: list[Text] = Field(description="folders")
    seeds: dict[str, Count] = Field(description="number of seeds of each arm", json_schema_extra={"key": "ARM"})


class ArmOfTasks(Record):
    links: Count = Field(default=1, description="number of links, in the first run that has it")
    tasks: dict[str, Spread] = Field(description="its test score on each task", json_schema_extra={"key": "TASK"})
    seeds: dict[str, list[Number]] = Field(
        default={}, description="the same of every seed", json_schema_extra={"key": "TASK"}
    )


class TasksSummary(Record):
    """What the report of several runs shows."""

    format: int = Field(description="of this file")
    metric: Text = Field(description="name of the score, where the tasks have one")
    by_loss: Flag = Field(description="whether contrasts are of losses")
    averaged: Flag = Field(description="whether anything is averaged over tasks")
    tasks: list[TaskRuns]
    arms: dict[str, ArmOfTasks] = Field(json_schema_extra={"key": "ARM"})
    contrasts: list[TaskContrast]
    holds: list[Text] = Field(default=[], description="what the intervals speak of, and what is held fixed, in words")
    notes: list[Text] = Field(description="what is to be said beside the tables")
