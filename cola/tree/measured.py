"""What is measured of a job's states, each once: scores of examples, what a knot did, spectra of what was learned."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

from cola.files import digest, each_once
from cola.measure.scores import ExampleScore
from cola.tree.locks import lock
from cola.tree.run_folder import VERSION
from cola.tree.segments import Lineage
from cola.tree.store import Store

KNOT_VERSION = 3  # of a knot's record: raise it when more is measured, or otherwise
# A pair beside the weights, or merged into them, which rounds: the scores are not the same to the last bit.
Form = Literal["attached", "tied"]


@dataclass
class Measurements:
    """Measurements of the states of one arm and seed; a step stands for the state after it.

    Attributes:
        store: Where they are kept.
        lineage: Gives each state its name.
        rows: Digest of each split's examples, the passages of `general` among them.
        scoring: What a score of each split depends on besides the state and the rows.
        probe: Digest of the positions whose logits tell what a knot changed.
        tie: What tying a link means: merged how, and which share of it where another link follows.
        made: With what this session makes them: versions, commit, machine, device.
        used: Names of all measurements that were asked for; shared with the run's other jobs.
    """

    store: Store
    lineage: Lineage
    rows: dict[str, str]
    scoring: dict[str, dict[str, Any]]
    probe: str
    tie: dict[str, Any]
    made: dict[str, Any]
    used: set[str]
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
        what = self._scores_of(split, step, form)
        value = self.store.recall(what)
        return None if value is None else self._read(what, value)

    def scores(
        self, split: str, step: int, form: Form, compute: Callable[[], list[ExampleScore]]
    ) -> list[ExampleScore]:
        """A split's scores, computed now unless they were before."""
        what = self._scores_of(split, step, form)
        value = self.store.recall(what)
        if value is None:
            with lock(self.store.path, digest(what)):
                value = self.store.recall(what)
                if value is None:
                    started = perf_counter()
                    scores = compute()
                    value = {"scores": list(map(asdict, scores)), "seconds": perf_counter() - started}
                    value["made"] = self.made
                    self.store.remember(what, value)
        return self._read(what, value)

    def known_knot(self, step: int) -> dict[str, Any] | None:
        """The record of the knot after a link's last step, if it was tied before."""
        what = self._knot_of(step)
        self.used.add(digest(what))
        if (value := self.store.recall(what)) is None:
            return None
        self._made[digest(what)] = value["made"]
        return {key: number for key, number in value.items() if key != "made"}

    def keep_knot(self, step: int, record: dict[str, Any]) -> None:
        """Keep the record of a knot."""
        what = self._knot_of(step)
        self.used.add(digest(what))
        self._made[digest(what)] = self.made
        self.store.remember(what, {**record, "made": self.made})

    def known_spectrum(self, step: int, beside: dict[str, Any]) -> dict[str, Any] | None:
        """The spectra of what led to a state, if they were taken before.

        Args:
            step: The state's.
            beside: What they depend on besides it.
        """
        what = self._spectrum_of(step, beside)
        self.used.add(digest(what))
        return self.store.recall(what)

    def keep_spectrum(self, step: int, beside: dict[str, Any], record: dict[str, Any]) -> None:
        """Keep the spectra of what led to a state."""
        what = self._spectrum_of(step, beside)
        self.used.add(digest(what))
        self.store.remember(what, {"version": VERSION, **record})

    def _scores_of(self, split: str, step: int, form: Form) -> dict[str, Any]:
        state = self.lineage.names[step]
        causes = {"measured": "scores", "state": state, "form": form, "rows": self.rows[split]}
        causes |= self.scoring[split]
        return causes | ({"merge": self.tie["merge"]} if form == "tied" else {})

    def _spectrum_of(self, step: int, beside: dict[str, Any]) -> dict[str, Any]:
        return {"measured": "spectrum", "version": VERSION, "state": self.lineage.names[step], **beside}

    def _knot_of(self, step: int) -> dict[str, Any]:
        last = step == len(self.lineage.steps)
        tie = {**self.tie, "fraction": 1.0} if last else self.tie
        return {
            "measured": "knot",
            "version": KNOT_VERSION,
            "state": self.lineage.names[step],
            "rows": self.probe,
            **tie,
        }

    def _read(self, what: dict[str, Any], value: dict[str, Any]) -> list[ExampleScore]:
        self._seconds[digest(what)] = value["seconds"]
        self._made[digest(what)] = value["made"]
        self.used.add(digest(what))
        return [ExampleScore(**row) for row in value["scores"]]


def rows_digest(rows: Sequence[Any]) -> str:
    """What identifies examples, everything in them included."""
    return digest([asdict(row) for row in rows])
