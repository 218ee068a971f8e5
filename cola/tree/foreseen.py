"""What plan.json of a run folder holds: what the run was expected to take. No torch."""

from pydantic import Field

from cola.tree.shapes import Bytes, Record, Seconds, Text


class ForeseenArm(Record):
    memory: dict[str, Bytes] = Field(
        description="bytes of each part at the largest moment, which add up to `peak`",
        json_schema_extra={"key": "PART"},
    )
    peak: Bytes = Field(description="most that was expected, of the GPU where there is one, else of the process")
    seconds: Seconds | None = Field(description="of all optimizer steps of one seed; null: never calibrated here")


class Foreseen(Record):
    """What a run was expected to take as it began, by `cola plan`'s arithmetic."""

    device: Text = Field(description="`cpu` or `cuda`")
    times: Text | None = Field(description="where the times are from; null: they are not known")
    arms: dict[str, ForeseenArm] = Field(json_schema_extra={"key": "ARM"})
