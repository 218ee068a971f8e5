"""What workers are to do: runs that are prepared, and the jobs that are left of them."""

from dataclasses import dataclass, field

from cola.recipe.plan import Job, jobs_of, trials_of
from cola.run.announce import say_plan
from cola.run.assignment import Bench
from cola.run.ended import SpectrumFiles, let_full_weights_go, want_weights
from cola.run.search import chosen_jobs, known_jobs
from cola.run.worker import Point


@dataclass(eq=False)
class Asked:
    """A run that is prepared, and what of it is to be done."""

    point: Point
    bench: Bench
    left: list[Job] = field(default_factory=list)  # neither ended nor failed; those at hand among them
    error: str | None = None  # what keeps all that is left from being done

    def __post_init__(self) -> None:
        self.jobs = jobs_of(self.bench.recipe)
        self.files = SpectrumFiles(self.bench)
        self.bench.ready.clear()  # the workers load their own

    def begin(self) -> None:
        """Say the plan, and note what is needed of the store."""
        bench, self.left = self.bench, list(self.jobs)
        known = known_jobs(bench, self.jobs)
        want_weights(bench, self.jobs, self.files)
        bench.folder.forget_workers()  # of an earlier session: what they have noted is noted here
        say_plan(bench, known, self.left)
        self.searching = len(known) < len(self.left)
        for job in [job for job in self.jobs if bench.folder.status(job) == "ok"]:
            bench.progress.skip(bench.tree.lineage(job).n_steps)
            self.end(job)

    def is_open(self, job: Job) -> bool:
        """Whether the trials that a job chooses among have ended."""
        return bool(job.trial) or not set(self.left).intersection(trials_of(self.bench.recipe, job.arm, job.seed))

    def end(self, job: Job) -> None:
        """What follows when a job has come to its end, whoever did it."""
        bench = self.bench
        self.left.remove(job)
        self.files.update(chosen_jobs(bench, [mate for mate in self.jobs if mate.seed == job.seed and not mate.trial]))
        known = known_jobs(bench, self.jobs)
        want_weights(bench, self.jobs, self.files)
        let_full_weights_go(bench, job.seed)
        if self.searching and not any(other.trial for other in self.left):
            say_plan(bench, known, known)
            self.searching = False


@dataclass(eq=False)
class Task:
    """A job of a run, until it has ended."""

    run: Asked
    job: Job
    deaths: int = 0  # of workers that were at it
    not_before: float = 0.0
