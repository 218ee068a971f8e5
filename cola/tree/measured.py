"""What is measured of a job's states, each once: scores of examples, what a knot did, spectra of what was learned."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

from cola.files import digest, each_once
from cola.measure.scores import ExampleScore
from cola.tree.locks import lock
from cola.tree.segments import Lineage
from cola.tree.spectra import VERSION
from cola.tree.store import Store

KNOT_VERSION = 3  # of a knot's record: raise it when more is measured, or otherwise
# A pair beside the weights, or merged into them, which rounds: the scores are not the same to the last bit.
Form = Literal["attached", "tied"]


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
    _seconds: dict[str, float] = field(default_factory=dict)
    _made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """What these scores took to compute, whenever that was."""
        return sum(self._seconds.values())

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
                    started = perf_counter()
                    scores = list(map(asdict, compute()))
                    record = {"scores": scores, "seconds": perf_counter() - started, "made": self.made}
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
        self._seconds[name], self._made[name] = record["seconds"], record["made"]
        return [ExampleScore(**row) for row in record["scores"]]


def rows_digest(rows: Sequence[Any]) -> str:
    """What identifies examples, everything in them included."""
    return digest([asdict(row) for row in rows])
