"""What all jobs of a run share."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from cola.data.encode import Example
from cola.files import digest
from cola.measure.cost import Meter
from cola.measure.evaluate import PROBE_ROWS, PROBE_TARGETS
from cola.recipe.plan import Job
from cola.recipe.recipe import Recipe
from cola.recipe.schema import SPLITS
from cola.report.terminal import RunProgress
from cola.report.tracking import NoTracker, Tracker
from cola.run.interrupt import Signals
from cola.run.materials import Materials
from cola.run.plan_tree import Planner
from cola.tree.locks import CHANGES, lock
from cola.tree.made import Provenance
from cola.tree.measured import Measurements, rows_digest
from cola.tree.records import References
from cola.tree.run_folder import MADE_WITH, RunFolder
from cola.tree.segments import Tree, merge_of
from cola.tree.store import Store


@dataclass(frozen=True)
class Bench:
    """What all jobs of a run share.

    Attributes:
        materials: What the recipe is run with.
        folder: The run's.
        store: Has what was trained and measured before.
        planner: Draws the rows of each step.
        meter: Counts what training costs.
        tree: Names the states of each job.
        meta: What a result says of how it was made.
        used: Names of the segments and measurements that the run's results rest on.
        ready: A base that was loaded to be tried, by dtype and quantization, for the first job that needs it.
        tracker: Sends to W&B.
        tracked: Arms, seeds and final states that it has been sent.
        signals: Of the user's wish to stop.
        progress: Shown to the user.
    """

    materials: Materials
    folder: RunFolder
    store: Store
    planner: Planner
    meter: Meter
    tree: Tree
    meta: Provenance
    used: dict[str, set[str]]
    ready: dict[tuple[str, str | None], PreTrainedModel]
    tracker: Tracker | NoTracker
    tracked: set[str]
    signals: Signals
    progress: RunProgress
    _rows: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.materials.recipe

    @property
    def probe_rows(self) -> list[Example]:
        """The rows whose logits tell what a knot changed."""
        return self.materials.splits.validation[:PROBE_ROWS]

    def measurements(self, job: Job) -> Measurements:
        """What was and will be measured of a job's states."""
        probe = digest([rows_digest(self.probe_rows), PROBE_TARGETS])
        arm = self.recipe.resolved(job.arm, job.choice)
        tie = {"merge": merge_of(arm.rules, arm.base.quantization is not None), "fraction": arm.rules.merge_fraction}
        lineage, rows, evaluator = self.tree.lineage(job), self.rows_of(job.seed), self.materials.evaluator
        # What a score depends on besides the state and the rows.
        scoring = {**dict.fromkeys(SPLITS, evaluator.causes()), "general": evaluator.of_text().causes()}
        return Measurements(self.store, lineage, rows, scoring, probe, tie, self.made, self.used["measured"])

    def tracker_for(self, job: Job) -> Tracker | NoTracker:
        """Of an arm, a seed and a final state W&B is told once, and of a trial nothing."""
        state = tracked_state(job.arm, job.seed, self.tree.lineage(job).names[-1])
        silent = job.trial or state in self.tracked
        self.tracked.add(state)
        return NoTracker() if silent else self.tracker

    def rows_of(self, seed: int) -> dict[str, str]:
        """Digest of each split's examples under a seed, and of the general text."""
        if seed not in self._rows:
            parts = self.materials.splits.of(seed) | {"general": self.materials.general}
            self._rows[seed] = {name: rows_digest(examples) for name, examples in parts.items()}
        return self._rows[seed]

    @property
    def made(self) -> dict[str, Any]:
        """With what this session makes states and measurements."""
        return self.meta.model_dump(include=set(MADE_WITH))

    def order(self, seed: int, n_steps: int) -> list[list[int]]:
        """Indices of the training rows of each of the first steps under a seed."""
        return self.planner.order(self.recipe.training.batch_size, seed, n_steps)

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
        self.folder.write("segments.json", References(**{kind: sorted(names) for kind, names in self.used.items()}))


def tracked_state(arm: str, seed: int, final_state: str) -> str:
    """What identifies a training to W&B."""
    return f"{arm} {seed} {final_state}"
