"""The numbers of a plan: of each link and arm under one seed, and of the whole recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cola.plan.devices import Device
from cola.plan.memory import Memory
from cola.recipe.methods import Settings


@dataclass(frozen=True)
class LinkPlan:
    """One link of an arm."""

    settings: Settings
    parameters: int  # that it trains
    steps: int
    flops: float
    memory: Memory
    step_seconds: float | None  # of one optimizer step; None where the device's rates are not known

    @property
    def seconds(self) -> float | None:
        """Of all its steps."""
        return None if self.step_seconds is None else self.steps * self.step_seconds

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "settings": self.settings.record(),
            "trainable_parameters": self.parameters,
            "steps": self.steps,
            "flops": self.flops,
            "memory_bytes": self.memory.record(),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class ArmPlan:
    """One arm, under one seed."""

    dtype: str
    quantization: str | None
    parameters: int  # of the base
    links: list[LinkPlan]
    memory: Memory  # of the link that takes most, or of the base where there is none
    knot_seconds: float | None  # of all its knots
    scoring_seconds: float | None  # of looks at validation and of all splits at the end
    disk: int  # bytes that one job keeps in the store and in the run folder

    @property
    def trainable(self) -> int:
        """By the largest link."""
        return max((link.parameters for link in self.links), default=0)

    @property
    def flops(self) -> float:
        """Of training."""
        return sum(link.flops for link in self.links)

    @property
    def training_seconds(self) -> float | None:
        """Of all steps."""
        return total([link.seconds for link in self.links])

    @property
    def seconds(self) -> float | None:
        """Of one job of it, nothing found in the store."""
        return total([self.training_seconds, self.knot_seconds, self.scoring_seconds])

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "dtype": self.dtype,
            "quantization": self.quantization,
            "total_parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "links": [link.record() for link in self.links],
            "memory_bytes": self.memory.record(),
            "flops": self.flops,
            "training_seconds": self.training_seconds,
            "knot_seconds": self.knot_seconds,
            "scoring_seconds": self.scoring_seconds,
            "disk_bytes": self.disk,
        }


@dataclass(frozen=True)
class Totals:
    """Of the whole recipe."""

    runs: int
    trials: int
    asked_steps: int  # of all jobs, one by one
    steps: int | None  # what is shared counted once; None where names were not worked out
    found_steps: int | None  # of them, in the store; None where the store cannot be asked
    flops: float | None  # of the steps that are to be made
    seconds: float | None
    disk: int  # bytes at most at once


@dataclass(frozen=True)
class RecipePlan:
    """All of it."""

    name: str
    model: str
    config: str  # where the model's config is from
    device: Device
    rows: str  # where the rows are from
    rates: str | None  # where the times are from
    arms: dict[str, ArmPlan]
    totals: Totals
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "recipe": self.name,
            "model": self.model,
            "config": self.config,
            "device": {"name": self.device.name, "title": self.device.title, "memory_bytes": self.device.memory},
            "rows": self.rows,
            "times": self.rates,
            "arms": {name: arm.record() for name, arm in self.arms.items()},
            "totals": vars(self.totals),
            "notes": self.notes,
        }


def total(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
