"""The record of a knot, and whether what it moved is no more than rounding."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cola.chain import Knot
from cola.link.drift import Drift
from cola.link.residual import Applied
from cola.run.assignment import Assignment

MAX_DRIFT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}  # what rounding can explain, see knot.max_drift


def knot_record(given: Assignment, number: int, knot: Knot, seconds: float) -> dict[str, Any]:
    """What result.json and ledger.jsonl say of a knot.

    Args:
        given: The job's assignment.
        number: Of the link that was tied, from 0.
        knot: What tying it did.
        seconds: It took.
    """
    link = given.links[number]
    return {
        "link": number + 1,
        "step": link.last_step,
        "seed": link.seed,
        "merge": given.measured.tie["merge"] if knot.applied else None,
        **{f"drift_{name}": value for name, value in asdict(knot.drift).items()},
        **_over_matrices(list(knot.applied.values())),
        "matrices": {name: asdict(applied) for name, applied in knot.applied.items()},
        "seconds": seconds,
    }


def check_drift(given: Assignment, record: dict[str, Any]) -> None:
    """What a knot moved must be within what rounding can explain, unless its rules move the outputs themselves.

    Raises:
        KnotDrift: it moved more.
    """
    (rules, base), followed = (given.arm.rules, given.arm.base), record["link"] < len(given.links)
    moves = rules.merge == "naive" or (rules.merge_fraction < 1 and followed)
    # On a GPU int8 products round the activations too, so that rounding moves codes.
    coarse = base.quantization == "int8" and given.accelerator.device.type == "cuda"
    allowed = rules.max_drift or (math.inf if moves else MAX_DRIFT["float16" if coarse else base.dtype])
    Drift(**{key: record[f"drift_{key}"] for key in Drift.__dataclass_fields__}).check(allowed)


def _over_matrices(entries: Sequence[Applied]) -> dict[str, float | None]:
    """Median and worst of what the matrices were given."""
    numbers: dict[str, float | None] = {}
    for key, worst in (("relative_size", max), ("unchanged", max), ("error", max), ("cosine", min)):
        values = [value for entry in entries if (value := getattr(entry, key)) is not None]
        numbers[f"{key}_median"] = float(np.median(values)) if values else None
        numbers[f"{key}_{worst.__name__}"] = worst(values, default=None)
    return numbers
