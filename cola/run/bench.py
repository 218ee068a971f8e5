"""What all jobs of a run share."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from cola.data.encode import Example
from cola.data.splits import Splits
from cola.files import digest
from cola.link.adapters import count_parameters
from cola.link.model import Source
from cola.measure.cost import Meter
from cola.measure.evaluate import PROBE_ROWS, PROBE_TARGETS, Evaluator
from cola.measure.learned import Learned
from cola.recipe.arms import OneLink
from cola.recipe.plan import Job
from cola.recipe.recipe import Recipe
from cola.report.terminal import RunProgress
from cola.report.tracking import Tracker
from cola.run.interrupt import Signals
from cola.tree.locks import CHANGES, lock
from cola.tree.measured import Measurements, rows_digest
from cola.tree.run_folder import MADE_WITH, RunFolder
from cola.tree.segments import Tree, merge_of
from cola.tree.store import Store


@dataclass(frozen=True)
class Bench:
    """What all jobs of a run share.

    Attributes:
        skeleton: The base without weights.
        general: Passages of the general text; empty where none is scored.
        scoring: What a score of each of them depends on besides the state and the rows.
        meter: Counts what training costs.
        learned: Takes the spectra of what was learned.
        meta: What a result says of how it was made.
        tracked: Arms, seeds and final states that W&B has been sent.
        used: Names of the segments and measurements that the run's results rest on.
        ready: A base that was loaded to be tried, by dtype and quantization, for the first job that needs it.
    """

    recipe: Recipe
    folder: RunFolder
    source: Source
    skeleton: PreTrainedModel
    splits: Splits
    general: list[Example]
    evaluator: Evaluator
    scoring: dict[str, dict[str, Any]]
    store: Store
    tree: Tree
    signals: Signals
    progress: RunProgress
    tracker: Tracker
    tracked: set[str]
    meter: Meter
    learned: Learned
    meta: dict[str, Any]
    used: dict[str, set[str]]
    ready: dict[tuple[str, str | None], PreTrainedModel]
    _counts: dict[str, int] = field(default_factory=dict)
    _rows: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def probe_rows(self) -> list[Example]:
        """The rows whose logits tell what a knot changed."""
        return self.splits.validation[:PROBE_ROWS]

    def recipe_of(self, job: Job) -> Recipe:
        """The recipe with the job's searched values in their place."""
        return self.recipe.with_choice(job.arm, dict(job.choice))

    def measurements(self, job: Job) -> Measurements:
        """What was and will be measured of a job's states."""
        probe, recipe = digest([rows_digest(self.probe_rows), PROBE_TARGETS]), self.recipe_of(job)
        rules, quantized = recipe.knot_of(job.arm), recipe.base_of(job.arm)[1] is not None
        tie = {"merge": merge_of(rules, quantized), "fraction": rules.merge_fraction}
        lineage, rows, used = self.tree.lineage(job), self.rows_of(job.seed), self.used["measured"]
        return Measurements(self.store, lineage, rows, self.scoring, probe, tie, self.made, used)

    def rows_of(self, seed: int) -> dict[str, str]:
        """Digest of each split's examples under a seed, and of the general text."""
        if seed not in self._rows:
            parts = self.splits.of(seed) | {"general": self.general}
            self._rows[seed] = {name: rows_digest(examples) for name, examples in parts.items()}
        return self._rows[seed]

    @property
    def made(self) -> dict[str, Any]:
        """With what this session makes states and measurements."""
        return {key: self.meta[key] for key in MADE_WITH}

    def count_parameters(self, what: OneLink) -> int:
        """Parameters that a link trains, counted once."""
        key = what.model_dump_json()
        if key not in self._counts:
            self._counts[key] = count_parameters(self.skeleton, what)
        return self._counts[key]

    def want_weights(self, names: set[str]) -> None:
        """Note of which fully fine-tuned states this run needs the weights, before it looks for them.

        Who lets weights go reads these notes under the same lock: either this run's is among them, or this run does not
        find the weights and trains them.
        """
        more = names - self.used["weights"]
        self.used["weights"] = names
        with lock(self.store.path, CHANGES) if more else nullcontext():
            self.write_references()

    def write_references(self) -> None:
        """Note in the run folder what the store must not prune."""
        self.folder.write_json("segments.json", {kind: sorted(names) for kind, names in self.used.items()})
