"""The value that a search chooses, by its trials' scores on validation."""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from cola.compare.choice import choose
from cola.errors import ColaError
from cola.files import digest
from cola.recipe.plan import Job, trials_of
from cola.run.assignment import Bench
from cola.tree.records import Chosen, Trial
from cola.tree.run_folder import NOTES, choice_file


def with_choice(bench: Bench, job: Job) -> Job:
    """The job with the values that were best on validation over its trials' seeds, where any are searched.

    The choice is made once and written down, so that a trial which is tried again cannot change it between seeds.
    A ColaError where not all trials have ended, or none of them came to its end.
    """
    return with_ends(bench, _chosen(bench, job))


def with_ends(bench: Bench, job: Job) -> Job:
    """The job with what is known of where its links have ended by their rules."""
    if not any(link.until for link in bench.tree.lineage(job).links):
        return job
    circumstances = _ends_of(bench, job)
    bench.used["measured"].add(digest(circumstances))
    known = bench.store.recall(circumstances)
    return replace(job, ended=tuple(known["ended"])) if known else job


def note_end(bench: Bench, job: Job, step: int) -> Job:
    """The job of which one more link has ended, after this step; the store remembers it."""
    job = replace(job, ended=(*job.ended, step))
    bench.store.remember(_ends_of(bench, job), {"ended": list(job.ended)})
    return job


def _ends_of(bench: Bench, job: Job) -> dict[str, Any]:
    """What the ends of a job's links depend on: all that it would train without any rule, and the rules."""
    path = bench.tree.lineage(replace(job, ended=()))
    rules = [link.until and link.until.cause(bench.materials.code) for link in path.links]
    return {
        "measured": "ends",
        "state": path.names[-1],
        "ends": [link.last_step for link in path.links],
        "until": rules,
    }


def _chosen(bench: Bench, job: Job) -> Job:
    search = None if job.trial else bench.recipe.search_of(job.arm)
    if search is None:
        return job
    trials, seed = trials_of(bench.recipe, job.arm, job.seed), job.seed if search.per == "seed" else None
    choices = list(dict.fromkeys(trial.choice for trial in trials))
    if (written := bench.folder.choice(job.arm, seed)) is not None:
        return replace(job, choice=choices[written.chosen])
    table = []
    for choice in choices:
        mine = [trial for trial in trials if trial.choice == choice]
        if any(bench.folder.status(trial) in (None, "interrupted") for trial in mine):
            raise ColaError(f"{job.arm}: its search is not at its end")
        looks = [result.evaluation.validation for trial in mine if (result := bench.folder.trial(trial)) is not None]
        # A choice at which some seed failed is no candidate: its mean would be over other seeds than the rest.
        failed = len(looks) < len(mine)
        means = {key: None if failed else _mean([getattr(look, key) for look in looks]) for key in ("loss", "score")}
        table.append(Trial(values=dict(choice), **means, failed=failed))
    candidates = [number for number, row in enumerate(table) if not row.failed]
    where = choice_file(job.arm, seed)
    if not candidates:
        raise ColaError(f"every trial of the search failed; see {bench.folder.path / where.parent}")
    losses_C, scores_C = (np.array([[getattr(table[n], key)] for n in candidates], float) for key in ("loss", "score"))
    chosen = candidates[int(choose(losses_C, scores_C if search.select_by == "score" else None)[0])]
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    if bench.notes == NOTES:  # a worker leaves that to the command
        bench.folder.write(where, Chosen(chosen=chosen, seeds=seeds, trials=table))
    return replace(job, choice=choices[chosen])


def _mean(numbers: list[Any]) -> float | None:
    return None if numbers[0] is None else float(np.mean(numbers))  # plain text has no score


def chosen_jobs(bench: Bench, jobs: Iterable[Job]) -> list[Job]:
    """Those jobs whose searched values are known by now, with these."""
    known = []
    for job in jobs:
        with contextlib.suppress(ColaError):  # said when its turn comes
            known.append(with_choice(bench, job))
    return known


def known_jobs(bench: Bench, jobs: Iterable[Job]) -> list[Job]:
    """The same; what they rest on is noted for the store."""
    known = chosen_jobs(bench, jobs)
    bench.refer(bench.tree.segments(known))
    return known
