"""What ablation.json holds, key by key. No torch."""

from pydantic import Field

from cola.compare.records import ArmNumbers, Interval, Matched
from cola.tree.shapes import Count, Flag, Fraction, Loss, Record, Rows, Seconds, Text


class AblationSeed(Record):
    seed: Count = Field(description="which one")
    test_loss: Loss
    test_score: Fraction | None
    gap_loss: Loss
    gap_acc: Fraction | None
    steps: Count
    total_seconds: Seconds


class AblationArm(Record):
    values: dict[str, Text] | None = Field(description="of the ablated keys; null where they are not about this arm")
    label: Text = Field(description="the same in words")
    arm: Text = Field(description="as in the recipe")


class AblationRow(ArmNumbers[AblationSeed], AblationArm):
    """An arm of a point."""

    difference: Interval | None = Field(
        default=None,
        description="on test from the arm's first point, paired by seed and example; of a loss its negative; absent of "
        "the first point, and where the examples are not the same",
    )


class AblationPoint(Record):
    label: Text = Field(description="its values in words")
    values: dict[str, Text] = Field(description="of the ablated keys")
    folder: Text = Field(description="its run in ABLATION/points")


class AblationNote(Record):
    """ablation.json as far as it says whose it is."""

    format: int = Field(description="of this file")
    causes: Text = Field(description="digest of the points and their recipes")
    finished: Flag = Field(description="whether all came to their end")


class Ablation(AblationNote):
    """What the table and the figure of an ablation show."""

    interrupted: Flag = Field(description="whether the user stopped it")
    failed: Flag = Field(description="whether a point or one of its seeds failed")
    errors: dict[str, Text] = Field(description="what kept a point from being run at all, by its folder")
    name: Text = Field(description="of the ablation's folder")
    keys: list[Text] = Field(description="that are ablated")
    protocol: Text = Field(description="as in the recipe")
    matched: Matched
    train_sample: Rows | None = Field(
        default=None, description="of train that are scored at every point, where those are not all"
    )
    metric: Text = Field(description="name of the score")
    points: list[AblationPoint]
    trained_steps: Count = Field(description="optimizer steps that were made for it")
    recalled_steps: Count = Field(description="that were found in the store")
    damaged: list[Text] = Field(description="what is wrong with results that cannot be read")
    rows: list[AblationRow] = Field(description="arms as in summary.json, those that the keys are not about first")
