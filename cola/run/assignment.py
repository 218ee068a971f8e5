"""What all jobs of a run share, and what one of them is given: made before it begins, the same until it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from cola.data.encode import Example
from cola.files import digest
from cola.link.accelerator import make_accelerator
from cola.measure.cost import Meter
from cola.measure.evaluate import PROBE_ROWS, PROBE_TARGETS, Evaluator
from cola.measure.memory import peaks, restart_peaks
from cola.recipe.bounds import SPLITS
from cola.recipe.plan import Job, Link, evaluation_steps
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import BaseFormat, ResolvedArm
from cola.report.terminal import RunProgress, Terminal
from cola.report.tracking import NoTracker, Tracker
from cola.run.interrupt import Signals
from cola.run.materials import Materials
from cola.run.plan_tree import Planner
from cola.tree.made import Provenance
from cola.tree.measured import Measurements, rows_digest
from cola.tree.records import References
from cola.tree.run_folder import MADE_WITH, RunFolder
from cola.tree.segments import Lineage, Tree, merge_of
from cola.tree.states import States
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
    tracked: set[str]  # arms, seeds and final states that it has been sent
    signals: Signals
    progress: RunProgress
    _rows: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.materials.recipe

    @property
    def terminal(self) -> Terminal:
        """Where the user is told."""
        return self.progress.terminal

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

    def write_references(self) -> None:
        """Note in the run folder what the store must not prune."""
        self.folder.write("segments.json", References(**{kind: sorted(names) for kind, names in self.used.items()}))


def tracked_state(arm: str, seed: int, final_state: str) -> str:
    """What identifies a training to W&B."""
    return f"{arm} {seed} {final_state}"


@dataclass(frozen=True)
class Assignment:
    """One arm and seed, with all that its training and scoring go by.

    A step is counted from 1 and stands for the state after it.
    """

    bench: Bench
    job: Job  # its searched values chosen
    arm: ResolvedArm
    path: Path  # the job's folder
    rows: dict[str, list[Example]]  # the examples of each split
    lineage: Lineage
    cuts: list[int]  # steps whose states are kept
    points: frozenset[int]  # steps at which validation is looked at
    accelerator: Accelerator  # its own: an arm that fails must not leave its optimizer or gradient scale to the next
    evaluator: Evaluator  # in the base's precision
    states: States
    measured: Measurements
    tracker: Tracker | NoTracker
    n_trained: int  # parameters of the largest link

    @classmethod
    def of(cls, bench: Bench, job: Job) -> "Assignment":
        """Clear the job's folder, and count memory from now on."""
        recipe, arm = bench.recipe, bench.recipe.resolved(job.arm, job.choice)
        path = bench.folder.start_job(job)
        lineage, rows = bench.tree.lineage(job), bench.materials.splits.of(job.seed)
        accelerator = make_accelerator(arm.base.dtype)
        n_trained = max((bench.materials.counts[link.settings] for link in lineage.links), default=0)
        process = restart_peaks(accelerator.device)
        states = States(
            bench.store,
            lineage,
            bench.materials.skeleton,
            bench.materials.source.name,
            recipe.checkpoint_seconds,
            {**bench.made, "recipe": recipe.name, "arm": job.arm, "seed": job.seed},
            n_trained,
            partial(peaks, accelerator.device, process),
        )
        return cls(
            bench=bench,
            job=job,
            arm=arm,
            path=path,
            rows=rows,
            lineage=lineage,
            cuts=bench.tree.cuts(job),
            points=frozenset(evaluation_steps(recipe, lineage.links, len(rows["train"])) if lineage.links else ()),
            accelerator=accelerator,
            evaluator=replace(bench.materials.evaluator, autocast=accelerator.autocast),
            states=states,
            measured=bench.measurements(job),
            tracker=bench.tracker_for(job),
            n_trained=n_trained,
        )

    @property
    def recipe(self) -> Recipe:
        """The run's."""
        return self.bench.recipe

    @property
    def links(self) -> list[Link]:
        """What is trained."""
        return self.lineage.links

    @property
    def n_steps(self) -> int:
        """Optimizer steps in all."""
        return self.lineage.n_steps

    @property
    def ends(self) -> list[int]:
        """The last step of each link."""
        return [link.last_step for link in self.links]

    @property
    def splits(self) -> Sequence[str]:
        """What is scored at the end."""
        return ("validation",) if self.job.trial else SPLITS

    @property
    def general(self) -> list[Example]:
        """The passages of the general text that are scored before and after."""
        return [] if self.job.trial else self.bench.materials.general

    @property
    def order(self) -> list[list[int]]:
        """Indices of the rows of each step."""
        return self.bench.order(self.job.seed, self.n_steps)

    def file(self, name: str) -> Path:
        """A file of the job's, as the run folder calls it."""
        return (self.path / name).relative_to(self.bench.folder.path)
