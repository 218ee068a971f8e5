"""The states of one arm and seed: which are in the store, keeping one, putting one back into a model; and what is
measured of them, each once: scores of examples, what a knot did, spectra of what was learned."""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cola.clock import Clock, Took, cpu_total
from cola.files import digest, each_once
from cola.link import adapter_files
from cola.link.moments import Moments
from cola.link.residual import LinkWeights
from cola.measure.scores import ExampleScore
from cola.recipe.methods import Settings
from cola.tree.leases import lock
from cola.tree.segments import Lineage
from cola.tree.spectra import VERSION
from cola.tree.store import Segment, Store

CHECKPOINT_SHARE = 0.02  # of the time that checkpoints may take
BYTES_PER_SECOND = 400e6  # what writing, syncing and hashing is taken to reach until a checkpoint has been timed
KNOT_VERSION = 3  # of a knot's record: raise it when more is measured, or otherwise
# A pair beside the weights, or merged into them, which rounds: the scores are not the same to the last bit.
Form = Literal["attached", "tied"]


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
        return adapter_files.load_pair(self.there(step).folder) if self._settings(step).is_pair else {}

    def put_back(self, model: PreTrainedModel, step: int) -> Moments | None:
        """Give the attached weights the values of a state that is there; returns the optimizer's state, if kept."""
        adapter_files.put_back(self.there(step).folder, model, self._settings(step))
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
            adapter_files.save(folder, model, link.settings, self.base_name, self.skeleton)
            if moments is not None:
                save_file(moments, folder / "optimizer.safetensors")
            (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        notes = {
            "link_number": number + 1,
            "first_step": link.first_step,
            "last_step": step,
            "towards": towards,
            "seconds": sum(row["seconds"] for row in rows),
            "cpu_seconds": cpu_total(rows),
            "memory": self.peaks(),
            "made": self.made,
        }
        try:
            segment, new = self.store.put(kind, lineage.causes(step), lineage.root, notes, write)
        except SafetensorError as error:
            if code := re.search(r"os error (\d+)", str(error)):  # safetensors writes without Python, and says it so
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(self.store.path)) from error
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

    def drop_checkpoints(self, steps: Iterable[int]) -> None:
        """Remove those that are there after these steps, since a later state has come to be kept."""
        for step in steps:
            if self.store.has(self.lineage.names[step]):
                self.drop(step, "checkpoint")

    def _settings(self, step: int) -> Settings:
        return self.lineage.links[self.lineage.link_of(step)].settings


@dataclass
class Measurements:
    """Measurements of the states of one arm and seed; a step stands for the state after it."""

    store: Store
    lineage: Lineage
    rows: dict[str, str]  # digest of each split's examples, the passages of `general` among them
    scoring: dict[str, dict[str, Any]]  # what a score of each split depends on besides the state and the rows
    probe: str  # digest of the positions whose logits tell what a knot changed
    tie: dict[str, Any]  # what tying a link means: merged how, and which share of it where another link follows
    made: dict[str, Any]  # with what this session makes them
    used: set[str]  # names of all that were asked for; shared with the run's other jobs
    _took: dict[str, dict[str, Any]] = field(default_factory=dict)
    _made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def took(self) -> list[dict[str, Any]]:
        """How long each of these scores took to compute, whenever that was: `seconds`, and `cpu_seconds` if noted."""
        return list(self._took.values())

    @property
    def made_with(self) -> list[dict[str, Any]]:
        """With what the scores and knots were made, in whatever session; what they agree in is said once."""
        return each_once(self._made.values())

    def has_scores(self, split: str, step: int, form: Form) -> bool:
        """Whether a split's scores lie in the store, whole or not."""
        return self.store.knows(self._scores_of(split, step, form))

    def known_scores(self, split: str, step: int, form: Form) -> list[ExampleScore] | None:
        """A split's scores, if they were computed before."""
        circumstances = self._scores_of(split, step, form)
        record = self.store.recall(circumstances)
        return None if record is None else self._read(circumstances, record)

    def scores(
        self, split: str, step: int, form: Form, compute: Callable[[], list[ExampleScore]]
    ) -> list[ExampleScore]:
        """A split's scores, computed now unless they were before."""
        circumstances = self._scores_of(split, step, form)
        if (record := self.store.recall(circumstances)) is None:
            with lock(self.store.path, digest(circumstances)):
                if (record := self.store.recall(circumstances)) is None:
                    clock = Clock()
                    scores = list(map(asdict, compute()))
                    record = {"scores": scores, **clock.read()._asdict(), "made": self.made}
                    self.store.remember(circumstances, record)
        return self._read(circumstances, record)

    def known_knot(self, step: int) -> dict[str, Any] | None:
        """The record of the knot after a link's last step, if it was tied before."""
        circumstances = self._used(self._knot_of(step))
        if (record := self.store.recall(circumstances)) is not None:
            self._made[digest(circumstances)] = record.pop("made")
        return record

    def keep_knot(self, step: int, record: dict[str, Any]) -> None:
        """Keep the record of a knot."""
        circumstances = self._used(self._knot_of(step))
        self._made[digest(circumstances)] = self.made
        self.store.remember(circumstances, {**record, "made": self.made})

    def known_spectrum(self, step: int, beside: dict[str, Any]) -> dict[str, Any] | None:
        """The spectra of what led to a state, if they were taken before; `beside`: what they depend on besides it."""
        return self.store.recall(self._used(self._spectrum_of(step, beside)))

    def keep_spectrum(self, step: int, beside: dict[str, Any], record: dict[str, Any]) -> None:
        """Keep the spectra of what led to a state."""
        self.store.remember(self._used(self._spectrum_of(step, beside)), {"version": VERSION, **record})

    def _scores_of(self, split: str, step: int, form: Form) -> dict[str, Any]:
        of_state = {"measured": "scores", "state": self.lineage.names[step], "form": form, "rows": self.rows[split]}
        return of_state | self.scoring[split] | ({"merge": self.tie["merge"]} if form == "tied" else {})

    def _spectrum_of(self, step: int, beside: dict[str, Any]) -> dict[str, Any]:
        return {"measured": "spectrum", "version": VERSION, "state": self.lineage.names[step], **beside}

    def _knot_of(self, step: int) -> dict[str, Any]:
        tie = {**self.tie, "fraction": 1.0} if step == self.lineage.n_steps else self.tie
        state = {"state": self.lineage.names[step], "rows": self.probe}
        return {"measured": "knot", "version": KNOT_VERSION, **state, **tie}

    def _used(self, circumstances: dict[str, Any]) -> dict[str, Any]:
        self.used.add(digest(circumstances))
        return circumstances

    def _read(self, circumstances: dict[str, Any], record: dict[str, Any]) -> list[ExampleScore]:
        name = digest(self._used(circumstances))
        self._took[name] = {key: record[key] for key in Took._fields if key in record}
        self._made[name] = record["made"]
        return [ExampleScore(**row) for row in record["scores"]]


def rows_digest(rows: Sequence[Any]) -> str:
    """What identifies examples, everything in them included."""
    return digest([asdict(row) for row in rows])
