"""What all records share: a file is read and written by a model, so that a damaged one is refused as a whole and by
name before any of its numbers is used. No torch.
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from cola.errors import plain


class Record(BaseModel):
    """What a file, or a part of one, holds. The order of its fields is that of the file's keys; docs/results.md and
    docs/schema are made of their descriptions."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def content(self) -> dict[str, Any]:
        """What the file holds: the keys that were given."""
        return self.model_dump(exclude_unset=True)

    def given(self) -> dict[str, Any]:
        """The same, its parts as records."""
        return {key: value for key, value in self if key in self.model_fields_set}


def _number(value: Any) -> float:
    # As it is: a whole number stays one in the file, and what is infinite or not a number is read too.
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("Input should be a valid number")
    # Larger is no number of a run, and its square is none of a computer.
    if math.isfinite(value) and abs(value) > 1e30:
        raise ValueError("a number that no run has")
    return value


def _unit(unit: str) -> Any:
    return Field(json_schema_extra={"unit": unit})


Number = Annotated[float, PlainValidator(_number), WithJsonSchema({"type": "number"})]
Count = Annotated[int, Field(strict=True, ge=0, le=10**24)]
Text = Annotated[str, Field(strict=True, max_length=100_000)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=300)]
Flag = Annotated[bool, Field(strict=True)]

Seconds = Annotated[Number, _unit("s")]
Time = Annotated[Text, _unit("ISO 8601")]
Bytes = Annotated[Count, _unit("bytes")]
Step = Annotated[Count, _unit("step")]
Steps = Annotated[Count, _unit("steps")]
Tokens = Annotated[Count, _unit("tokens")]
Tensors = Annotated[Count, _unit("tensors")]
Rows = Annotated[Count, _unit("rows")]
Parameters = Annotated[Count, _unit("parameters")]
Flops = Annotated[Number, _unit("FLOPs")]
Nats = Annotated[Number, _unit("nats")]
Loss = Annotated[Number, _unit("nats per target token")]
TextLoss = Annotated[Number, _unit("nats per token")]
Fraction = Annotated[Number, _unit("fraction")]
Share = Annotated[Number, _unit("share")]
Relative = Annotated[Number, _unit("relative")]
Spread = Annotated[Number, _unit("of the logits' spread")]


def fault_of(error: ValueError) -> str:
    """What is wrong with a file's content, in a few words."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(plain(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
