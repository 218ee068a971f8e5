"""What follows when a job has come to its end, whoever ends last: spectra are taken of what was learned, and fully
fine-tuned weights that nothing needs any more are let go."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cola.errors import ColaError, StoreError
from cola.files import digest
from cola.link import adapter_files
from cola.link.residual import LinkWeights, added
from cola.measure.learned import Learned
from cola.recipe.plan import Job, evaluation_steps, trials_of, tuned_as_a_whole
from cola.run.assignment import Bench
from cola.run.search import with_choice
from cola.tree.leases import CHANGES, lock
from cola.tree.prune import let_go
from cola.tree.records import Result, TrainInfo
from cola.tree.spectra import read_spectrum, spectrum_of, write_spectrum


@dataclass
class SpectrumFiles:
    """Keeps each arm's spectrum.json at what its run folder and the store allow to be said.

    An arm with pairs is compared with full fine-tuning under the same seed. Which of the two ends first, in which
    process and session, is chance; so each is looked at again when the other has ended.
    """

    bench: Bench
    _taken: dict[tuple[str, int], str | None] = field(default_factory=dict)  # with which state of full fine-tuning

    @cached_property
    def _learned(self) -> Learned:
        materials = self.bench.materials
        return Learned(materials.source, materials.skeleton, materials.recipe.pairs, materials.device)

    def update(self, jobs: Sequence[Job]) -> None:
        """Take the spectra of those of one seed's jobs, their searched values chosen, that have come to their end; in
        one process of a run at a time, so that what one has taken the next one finds."""
        run = {"spectra": str(self.bench.folder.path.resolve())}
        with lock(self.bench.store.path, digest(run)):
            self._update(jobs)

    def _update(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            result = self.bench.folder.result(job)
            if result is None or not result.train_info.scored_step:
                continue
            full, key = self._full(job.seed), (job.arm, job.seed)
            state = full and full.train_info.scored_state
            if key not in self._taken or self._taken[key] != state:
                self._taken[key] = state
                self._take(job, result, full)

    def awaits(self, arm: str, seed: int) -> bool:
        """Whether the weights of a fully fine-tuned arm and seed are still to be looked at here."""
        recipe = self.bench.recipe
        if (arm, seed) not in self._taken:
            return True
        if arm != recipe.full_arm:
            return False
        full = self._full(seed)
        state = full and full.train_info.scored_state
        others = [name for name in recipe.arms if any(link.is_pair for link in recipe.resolved(name).links)]
        return any(self._taken.get((name, seed)) != state for name in others)

    def _take(self, job: Job, result: Result, full: Result | None) -> None:
        info = result.train_info
        method = info.links[0].kind
        try:
            if method.is_pair:
                record = self._of_chain(job, info, full)
            elif method.is_whole:
                record = self._of_full(job, info)
            else:
                return
            # What `cola inspect` has added to a file that says the same stays.
            there = read_spectrum(self.bench.folder, job)
            if record is not None and (there is None or there.full != record["full"]):
                write_spectrum(self.bench.folder, job, spectrum_of(record))
        # Whatever goes wrong in looking at what was learned, the result it is of took far longer to make.
        except Exception as error:
            self.bench.progress.terminal.warn(
                f"{job.label}: no spectra, and nothing else is lost: {type(error).__name__}: {error}"
            )

    def _of_full(self, job: Job, info: TrainInfo) -> dict[str, Any] | None:
        learned, measured, step = self._learned, self.bench.measurements(job), info.scored_step
        beside = {"matrices": digest(learned.looked_at)}
        record = measured.known_spectrum(step, beside)
        if record is None and (folder := self._weights(info.scored_state)) is not None:
            self.bench.progress.stage("taking the spectra of all weights")
            record = learned.of_full(info.scored_state, folder, info.base.dtype) | {"made": self.bench.made}
            measured.keep_spectrum(step, beside, record)
        return record

    def _of_chain(self, job: Job, info: TrainInfo, full: Result | None) -> dict[str, Any]:
        learned, measured, step = self._learned, self.bench.measurements(job), info.scored_step
        beside, update = {"full": None}, None
        if full is not None:
            state = full.train_info.scored_state
            with_it = {"full": state, "matrices": digest(learned.looked_at)}
            if (record := measured.known_spectrum(step, with_it)) is not None:
                return record
            if update := learned.full(state, lambda: self._weights(state), full.train_info.base.dtype):
                beside = with_it
            else:
                self.bench.progress.terminal.warn(
                    f"{job.label}: not compared with full fine-tuning, whose weights an earlier run let go "
                    "(keep_full_weights: false)"
                )
        if update is None and (record := measured.known_spectrum(step, beside)) is not None:
            return record
        names = self.bench.tree.lineage(job).names
        ends = [link.last_step for link in info.links if link.last_step < step]
        rules = self.bench.recipe.resolved(job.arm, job.choice).rules
        pairs = [self._pair(names[end]) for end in (*ends, step)]
        links = added(pairs, info.shares(len(ends)), rules.keeps_pair)
        record = learned.of_links(links, update, beside["full"]) | {"made": self.bench.made}
        measured.keep_spectrum(step, beside, record)
        return record

    def _full(self, seed: int) -> Result | None:
        """The result of full fine-tuning under a seed, if it came to its end."""
        full = self.bench.folder.result(Job(arm=self.bench.recipe.full_arm, seed=seed))
        return full if full and any(link.kind.is_whole for link in full.train_info.links) else None

    def _pair(self, state: str) -> LinkWeights:
        if (folder := self._weights(state)) is None:
            raise FileNotFoundError(f"the state {state} has gone from the store")
        return adapter_files.load_pair(folder)

    def _weights(self, state: str) -> Path | None:
        """Where a state lies, its checksums verified; None where its weights are gone."""
        segment = self.bench.store.get(state)
        return segment.folder if segment is not None and segment.has_weights else None


def want_weights(bench: Bench, jobs: Iterable[Job], spectra: SpectrumFiles) -> None:
    """Note of which fully fine-tuned states this run needs the weights, before it looks for them.

    Who lets weights go reads these notes under the same lock: either this run's is among them, or this run does not
    find the weights and trains them.
    """
    wanted = _wanted_weights(bench, jobs, spectra)
    more = wanted - bench.used["weights"]
    bench.used["weights"] = wanted
    with lock(bench.store.path, CHANGES) if more else contextlib.nullcontext():
        bench.write_references()


def _wanted_weights(bench: Bench, jobs: Iterable[Job], spectra: SpectrumFiles) -> set[str]:
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
            for trained in (*trials_of(recipe, arm, seed), *([] if recipe.keep_full_weights else [chosen])):
                done.update(bench.tree.lineage(trained).names[1:])
    loose = {name for name in done - bench.used["weights"] if bench.store.has(name)}
    with contextlib.suppress(StoreError):  # what others need cannot be told
        let_go(bench.store, loose, bench.folder.path / bench.notes)
