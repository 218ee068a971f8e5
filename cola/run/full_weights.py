"""Fully fine-tuned weights: which are still needed, and which are let go."""

import contextlib
from collections.abc import Iterable

from cola.errors import ColaError, StoreError
from cola.recipe.plan import Job, evaluation_steps, trials_of
from cola.recipe.recipe import Recipe
from cola.run.bench import Bench
from cola.run.search import with_choice
from cola.run.spectrum_files import SpectrumFiles
from cola.tree.prune import let_go


def wanted_weights(bench: Bench, jobs: Iterable[Job], spectra: SpectrumFiles) -> set[str]:
    """The fully fine-tuned states of which the run needs the weights: those that it keeps, and until a job is scored,
    and all spectra are taken that its weights are looked at for, whatever it may come to score."""
    recipe, wanted = bench.recipe, set()
    tuned, best = tuned_as_a_whole(recipe), recipe.evaluation.checkpoint == "best"
    for job in jobs:
        if job.arm not in tuned:
            continue
        with contextlib.suppress(ColaError):  # said when its turn comes
            ended, chosen = bench.folder.status(job), with_choice(bench, job)
            lineage = bench.tree.lineage(chosen)
            if ended != "ok":
                points = evaluation_steps(recipe, lineage.links, bench.materials.splits.sizes["train"]) if best else ()
                wanted |= {lineage.names[step] for step in (*bench.tree.cuts(chosen), *points)}
            elif job.trial:
                # Where a seed is scored too, one of its trials may be what it chooses.
                scored = job.seed not in recipe.seeds or bench.folder.status(Job(arm=job.arm, seed=job.seed)) == "ok"
                wanted |= set() if scored else {lineage.names[-1]}
            elif recipe.keep_full_weights or spectra.awaits(job.arm, job.seed):
                wanted |= {result.train_info.scored_state} if (result := bench.folder.result(job)) else set()
    return wanted


def tuned_as_a_whole(recipe: Recipe) -> list[str]:
    """The arms that train all weights."""
    return [arm for arm in recipe.arms if any(link.is_whole for link in recipe.resolved(arm).links)]


def let_full_weights_go(bench: Bench, seed: int) -> None:
    """Fully fine-tuned weights are as large as the model: where nothing will ask for them, their record is enough.

    That is once all of their seed's arms are scored and compared, unless the recipe keeps them; and in any case the
    trials' weights, as soon as the chosen value's are scored, but for what is still to be scored or kept.
    """
    recipe, done = bench.recipe, set()
    for arm in tuned_as_a_whole(recipe):
        job = Job(arm=arm, seed=seed)
        if bench.folder.status(job) != "ok":
            continue
        with contextlib.suppress(ColaError):  # what is needed cannot be told, so nothing goes
            chosen = with_choice(bench, job)
            # The chosen one's trial too: on a seed of its own it is nothing that is scored.
            for one in (*trials_of(recipe, arm, seed), *([] if recipe.keep_full_weights else [chosen])):
                done.update(bench.tree.lineage(one).names[1:])
    loose = {name for name in done - bench.used["weights"] if bench.store.has(name)}
    with contextlib.suppress(StoreError):  # what others need cannot be told
        let_go(bench.store, loose, bench.folder.path)
