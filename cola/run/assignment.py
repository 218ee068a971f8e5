"""What one job is given: made before it begins, and the same until it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from cola.data.encode import Example
from cola.link.accelerator import make_accelerator
from cola.measure.evaluate import Evaluator
from cola.measure.memory import peaks, restart_peaks
from cola.recipe.plan import Job, Link, evaluation_steps
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import ResolvedArm
from cola.recipe.schema import SPLITS
from cola.report.tracking import NoTracker, Tracker
from cola.run.bench import Bench
from cola.tree.measured import Measurements
from cola.tree.segments import Lineage
from cola.tree.states import States


@dataclass(frozen=True)
class Assignment:
    """One arm and seed, with all that its training and scoring go by.

    A step is counted from 1 and stands for the state after it.

    Attributes:
        bench: What the run's jobs share.
        job: Its searched values chosen.
        arm: What the recipe makes of it, its rules at knots and the format of its base among it.
        path: The job's folder.
        rows: The examples of each split.
        lineage: Names of all states.
        cuts: Steps whose states are kept.
        points: Steps at which validation is looked at.
        accelerator: The job's own: an arm that fails must not leave its optimizer or gradient scale to the next.
        evaluator: Scores in the base's precision.
        states: The store's, of this job.
        measured: What is known of them.
        tracker: Silent for a trial, and for what another point of an ablation has sent.
        n_trained: Parameters of the largest link.
    """

    bench: Bench
    job: Job
    arm: ResolvedArm
    path: Path
    rows: dict[str, list[Example]]
    lineage: Lineage
    cuts: list[int]
    points: frozenset[int]
    accelerator: Accelerator
    evaluator: Evaluator
    states: States
    measured: Measurements
    tracker: Tracker | NoTracker
    n_trained: int

    @classmethod
    def of(cls, bench: Bench, job: Job) -> "Assignment":
        """Clear the job's folder, and count memory from now on."""
        recipe, arm = bench.recipe, bench.recipe.resolved(job.arm, job.choice)
        path = bench.folder.start_job(job)
        lineage, rows = bench.tree.lineage(job), bench.materials.splits.of(job.seed)
        accelerator = make_accelerator(arm.base.dtype)
        n_trained = max((bench.materials.count_parameters(link.settings) for link in lineage.links), default=0)
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

    def has_weights(self, step: int) -> bool:
        """Whether a state is in the store with its weights."""
        segment = self.states.get(step)
        return segment is not None and segment.has_weights
