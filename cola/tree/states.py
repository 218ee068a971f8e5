"""The states of one arm and seed: which are in the store, keeping one, and putting one back into a model."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cola.link import adapters
from cola.link.moments import Moments
from cola.link.residual import LinkWeights
from cola.recipe.methods import Settings
from cola.tree.segments import Lineage
from cola.tree.store import Segment, Store

CHECKPOINT_SHARE = 0.02  # of the time that checkpoints may take
BYTES_PER_SECOND = 400e6  # what writing, syncing and hashing is taken to reach until a checkpoint has been timed


@dataclass
class States:
    """The kept states of a job; a step stands for the state after it."""

    store: Store
    lineage: Lineage
    skeleton: PreTrainedModel  # the model without weights
    base_name: str  # of the model, as the recipe says it
    seconds: float  # least time between two checkpoints; 0: one after each step
    made: dict[str, Any]  # what a kept state says of how it was made
    n_trained: int  # parameters of the largest link
    peaks: Callable[[], dict[str, int | None]]  # how much memory the job has taken so far, at most
    _verified: dict[int, Segment] = field(default_factory=dict)
    _kept_at: float = field(default_factory=monotonic)
    _cost: float = 0.0
    _own: set[int] = field(default_factory=set)  # what no run had kept before this one

    def __post_init__(self) -> None:
        self._cost = 3 * 4 * self.n_trained / BYTES_PER_SECOND  # float32 weights and two moments

    def get(self, step: int) -> Segment | None:
        """The state as it is in the store, verified once; None where it is not there."""
        if step not in self._verified and (segment := self.store.get(self.lineage.names[step])) is not None:
            self._verified[step] = segment
        return self._verified.get(step)

    def has_weights(self, step: int) -> bool:
        """Whether a state is in the store with its weights."""
        segment = self.get(step)
        return segment is not None and segment.has_weights

    def there(self, step: int) -> Segment:
        """A state that `get` has found or `keep` has kept."""
        return self._verified[step]

    def pair(self, step: int) -> LinkWeights:
        """The low-rank pair of a state that is there; empty for another method."""
        return adapters.load_pair(self.there(step).folder) if self._settings(step).is_pair else {}

    def put_back(self, model: PreTrainedModel, step: int) -> Moments | None:
        """Give the attached weights the values of a state that is there; returns the optimizer's state, if kept."""
        adapters.put_back(self.there(step).folder, model, self._settings(step))
        return self.moments(step)

    def moments(self, step: int) -> Moments | None:
        """The optimizer's state of a state that is there; None where it was not kept."""
        segment = self.there(step)
        return load_file(segment.folder / "optimizer.safetensors") if segment.resumable else None

    def forget(self, step: int) -> None:
        """Look again when it is asked for next: another process has removed it."""
        self._verified.pop(step, None)

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint now keeps their cost within its share of the time."""
        least = max(self.seconds, self._cost / CHECKPOINT_SHARE) if self.seconds else 0.0
        return monotonic() - self._kept_at >= least

    def keep(
        self,
        step: int,
        kind: str,
        model: PreTrainedModel,
        moments: Moments | None,
        rows: list[dict[str, Any]],
        towards: str | None,
    ) -> None:
        """Keep what the model's attached weights are after `step`.

        Args:
            moments: The optimizer's state; None where its link will not go on from here.
            rows: The metrics of each of the link's steps so far.
            towards: For a checkpoint: the name of the end of its segment; for a point: of its arm.
        """
        started, lineage = monotonic(), self.lineage
        number = lineage.link_of(step)
        link = lineage.links[number]

        def write(folder: Path) -> None:
            adapters.save(folder, model, link.settings, self.base_name, self.skeleton)
            if moments is not None:
                save_file(moments, folder / "optimizer.safetensors")
            (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        notes = {
            "link_number": number + 1,
            "first_step": link.first_step,
            "last_step": step,
            "towards": towards,
            "seconds": sum(row["seconds"] for row in rows),
            "memory": self.peaks(),
            "made": self.made,
        }
        try:
            segment, new = self.store.put(kind, lineage.causes(step), lineage.root, notes, write)
        except SafetensorError as error:
            if "os error 28" in str(error):  # safetensors writes without Python, and says it in its own way
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.store.path)) from error
            raise
        self._verified[step] = segment
        if new:
            self._own.add(step)
        self._kept_at = monotonic()
        if kind == "checkpoint":
            self._cost = self._kept_at - started

    def keep_as_point(self, step: int) -> None:
        """Let a state that is there live as long as it is the best."""
        if self.store.mark(self.lineage.names[step], "point") == "checkpoint":
            self._own.add(step)

    def drop(self, step: int, kind: str) -> None:
        """Remove what nothing will ask for again: a checkpoint, or a point that this run was the first to keep."""
        if kind == "checkpoint" or step in self._own:
            self._verified.pop(step, None)
            self.store.drop(self.lineage.names[step], kind)

    def _settings(self, step: int) -> Settings:
        return self.lineage.links[self.lineage.link_of(step)].settings
