"""What all jobs of a run share, and what one of them is given: made before it begins, the same until it ends."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cola.data.encode import Example
from cola.files import digest, without_home
from cola.link.accelerator import make_accelerator
from cola.measure.cost import Meter
from cola.measure.evaluate import PROBE_ROWS, PROBE_TARGETS
from cola.measure.memory import peaks, restart_peaks
from cola.plan.tree import Planner
from cola.recipe.plan import Job, looking_steps
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import BaseFormat
from cola.recipe.schema import SPLITS
from cola.report.terminal import RunProgress
from cola.report.tracking import NoTracker, Tracker
from cola.run.interrupt import Signals
from cola.run.materials import Materials
from cola.tree.made import Provenance
from cola.tree.run_folder import MADE_WITH, NOTES, RunFolder
from cola.tree.segments import Tree, fraction_of, merge_of
from cola.tree.states import Measurements, States, rows_digest
from cola.tree.store import Store


@dataclass(frozen=True)
class Bench:
    """What all jobs of a run share."""

    materials: Materials
    folder: RunFolder
    store: Store
    planner: Planner
    meter: Meter
    tree: Tree
    meta: Provenance  # what a result says of how it was made
    used: dict[str, set[str]]  # names of the segments and measurements that the run's results rest on
    ready: dict[BaseFormat, PreTrainedModel]  # a base that was loaded to be tried, for the first job that needs it
    tracker: Tracker | NoTracker
    tracked: set[tuple[str, int, str]]  # arms, seeds and final states that it has been sent
    signals: Signals
    progress: RunProgress
    notes: str = NOTES  # where this process says what it needs of the store
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
        share = fraction_of(arm.rules, self.materials.code)
        tie = {"merge": merge_of(arm.rules, arm.base.quantization is not None), "fraction": share}
        lineage, rows, evaluator = self.tree.lineage(job), self.rows_of(job.seed), self.materials.evaluator
        # What a score depends on besides the state and the rows.
        scoring = {**dict.fromkeys(SPLITS, evaluator.causes(arm.base.dtype)), "general": evaluator.of_text().causes()}
        return Measurements(self.store, lineage, rows, scoring, probe, tie, self.made, self.used["measured"])

    def scored(self, seed: int) -> dict[str, list[Example]]:
        """What is scored of each split under a seed."""
        return self.materials.splits.scored(seed, self.recipe.evaluation.train_rows)

    def rows_of(self, seed: int) -> dict[str, str]:
        """Digest of what is scored of each split under a seed, and of the general text."""
        if seed not in self._rows:
            parts = self.scored(seed) | {"general": self.materials.general}
            self._rows[seed] = {name: rows_digest(examples) for name, examples in parts.items()}
        return self._rows[seed]

    @property
    def made(self) -> dict[str, Any]:
        """With what this session makes states and measurements."""
        return self.meta.model_dump(include=set(MADE_WITH))

    def refer(self, segments: Iterable[str]) -> None:
        """Note in the run folder which states its results rest on."""
        self.used["segments"].update(segments)
        self.write_references()

    def write_references(self) -> None:
        """Note in the run folder what the store must not prune."""
        self.folder.write_references(self.used, self.notes)


class Assignment:
    """One arm and seed, with all that its training and scoring go by.

    A step is counted from 1 and stands for the state after it.
    """

    def __init__(self, bench: Bench, job: Job) -> None:
        """Clear the job's folder, and count memory from now on."""
        recipe, materials = bench.recipe, bench.materials
        self.bench, self.recipe, self.job = bench, recipe, job  # its searched values chosen
        self.arm = recipe.resolved(job.arm, job.choice)
        self.path = bench.folder.start_job(job)
        general = [] if job.trial else materials.general
        self.train = materials.splits.train_of(job.seed)  # the examples that it trains on
        self.rows = bench.scored(job.seed) | {"general": general}  # those of each split that are scored
        self.splits = ("validation",) if job.trial else SPLITS  # what is scored at the end
        self.lineage = bench.tree.lineage(job)
        self.links, self.n_steps = self.lineage.links, self.lineage.n_steps
        self.ends = [link.last_step for link in self.links]
        self.order = bench.planner.order(recipe.training.batch_size, job.seed, self.n_steps)  # the rows of each step
        self.cuts = bench.tree.cuts(job)  # steps whose states are kept
        looks = looking_steps(recipe, self.links, len(self.train)) if self.links else ()
        self.points = frozenset(looks)  # steps at which validation is looked at, a link attached
        # The job's own: an arm that fails must not leave its optimizer or gradient scale to the next.
        self.accelerator = make_accelerator(self.arm.base.dtype)
        self.evaluator = replace(materials.evaluator, autocast=self.accelerator.autocast)
        self.n_trained = max((materials.counts[link.settings] for link in self.links), default=0)  # by the largest link
        process = restart_peaks(self.accelerator.device)
        self.states = States(
            bench.store,
            self.lineage,
            materials.skeleton,
            without_home(materials.source.name),
            recipe.checkpoint_seconds,
            {**bench.made, "recipe": recipe.name, "arm": job.arm, "seed": job.seed},
            self.n_trained,
            partial(peaks, self.accelerator.device, process),
        )
        self.measured = bench.measurements(job)
        # Of an arm, a seed and a final state the tracker is told once, and of a trial nothing.
        state = job.arm, job.seed, self.lineage.names[-1]
        self.tracker = NoTracker() if job.trial or state in bench.tracked else bench.tracker
        bench.tracked.add(state)

    def file(self, name: str) -> Path:
        """A file of the job's, as the run folder calls it."""
        return (self.path / name).relative_to(self.bench.folder.path)
