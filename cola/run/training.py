"""What a job trains: from what was found in the store to the last knot, while other processes may do the same."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from cola.chain import Chain
from cola.clock import Clock
from cola.data.batches import training_batches, training_shares
from cola.link import adapters, wires
from cola.link.drift import Outputs
from cola.link.moments import Moments, carried, read_moments
from cola.link.residual import LinkWeights
from cola.link.shares import Logged
from cola.link.train import Step, full_gradients, tune
from cola.recipe.methods import Lora
from cola.recipe.plan import Link
from cola.run import ranks
from cola.run.assignment import Assignment
from cola.run.course import Course, LinkEnded, allowed_drift, check_drift, knot_record
from cola.run.find import deepest, recall
from cola.run.interrupt import Interrupted
from cola.run.laws import Laws
from cola.run.loaded import Loaded
from cola.run.scoring import score_attached
from cola.tree.leases import lock


class NothingLeft(Exception):
    """While this process waited, another one trained and scored it all, and let the weights go."""


def train(given: Assignment, course: Course, loaded: Loaded) -> None:
    """Make what the course lacks: the rest of the link at hand, and all links after it. Interrupted where the user
    stopped it, and a checkpoint is kept; a ColaError where the arm has diverged, or a knot moved what it should not."""
    trainer, tuned = Trainer(given, course, loaded, Keeper(given, course)), Clock()
    never_written = given.arm.rules.merge == "no" and given.arm.base.quantization is None
    laws = Laws(trainer.probe, never_written, allowed_drift(given))

    def tune_link(chain: Chain, link: Link) -> Logged:
        nonlocal tuned
        laws.check_start(chain.model, link)
        frozen = laws.frozen(chain.model, link)
        trainer.tune(link)
        laws.check_frozen(chain.model, link, frozen)
        tuned = Clock()
        return course.seen(link)

    try:
        for knot in loaded.run(len(course.knots), tune_link, laws.probe, trainer.gradients):
            number = len(course.knots)
            record = knot_record(given, number, knot, laws.moved, tuned.read())
            check_drift(given, record)
            given.measured.keep_knot(given.links[number].last_step, record)
            given.bench.write_references()
            course.note_knot(record)
    except NothingLeft:
        recall(given, course, given.n_steps, with_knot=True)


@dataclass(frozen=True)
class Trainer:
    """Brings a link's weights to its last step."""

    given: Assignment
    course: Course
    loaded: Loaded
    keeper: "Keeper"

    def probe(self, model: PreTrainedModel) -> Outputs:
        """What a model says on the rows that tell what a knot changed."""
        return self.given.evaluator.outputs(model, self.given.bench.probe_rows)

    def gradients(self, model: PreTrainedModel, link: Link, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Full gradients over the link's first batches, for a pair that is drawn along them."""
        given = self.given
        given.bench.progress.stage("taking the full gradient")
        ranks.tell_attached(given, link)
        assert isinstance(link.settings, Lora)
        rows = given.order[link.first_step : link.last_step][: link.settings.init_batches]
        batches = training_batches(given.train, rows, given.recipe.training.micro_batch_tokens)
        return full_gradients(model, names, batches, given.accelerator)

    def tune(self, link: Link) -> None:
        """Take the steps from the store as far as it has them, and make the others; NothingLeft where another process
        has come to the job's end."""
        given, course = self.given, self.course
        heads = [link.first_step, *given.cuts]  # where segments begin, those of other runs too that are come across
        moments = self._first_moments(link)
        while course.at < link.last_step:
            start = max(step for step in heads if step <= course.at)
            stop = min(step for step in given.cuts if step > course.at)
            waiting = f"waiting for another process that trains steps {start + 1} to {stop}"
            say = partial(given.bench.progress.stage, waiting)
            with lock(given.bench.store.path, given.lineage.names[start + 1], say):
                # Another process may have trained all or a part of it, by now or before it was killed.
                if found := deepest(given, course, range(course.at + 1, stop + 1)):
                    if not given.states.has_weights(found):
                        raise NothingLeft
                    try:
                        moments = self.loaded.put_back(found)
                    except FileNotFoundError:
                        given.states.forget(found)  # a run that cuts elsewhere has dropped it
                        continue
                    kind = given.states.there(found).kind
                    self.keeper.go_on_from(found, kind)
                    recall(given, course, found, with_knot=False)
                    self._look_if_due()
                    if kind == "segment":
                        heads.append(found)  # from here on the lock is another one
                        continue
                if course.at < stop:
                    moments = self._advance(link, stop, moments)

    def _first_moments(self, link: Link) -> Moments | None:
        """The optimizer's state where this process takes up a link; None: a fresh one."""
        if self.course.at > link.first_step:
            moments = self.loaded.put_back(self.course.at)
            self._look_if_due()
            return moments
        if link.knot is not None and link.knot.hands_on:
            moments = self.given.states.moments(link.first_step)
            return carried(moments, link.knot, link.seed, partial(self._pairs_before, link))
        return None

    def _pairs_before(self, link: Link) -> tuple[LinkWeights, LinkWeights]:
        """At the knot before a link: the pair of the one before it, and the one that was drawn for it, both as they are
        trained, without what a start took out of the weights for them."""
        assert isinstance(link.settings, Lora)
        before, after = self.given.states.pair(link.first_step), adapters.read_pair(self.loaded.chain.model)
        rank = link.settings.rank  # of both: a knot that hands moments on is between equal ones
        own = [{name: pair.split(rank)[0] for name, pair in pairs.items()} for pairs in (before, after)]
        return own[0], own[1]

    def _advance(self, link: Link, stop: int, moments: Moments | None) -> Moments | None:
        """Make the optimizer steps up to `stop`; returns the optimizer's state where the link goes on."""
        given, at, training = self.given, self.course.at, self.given.recipe.training
        model = self.loaded.chain.model
        done = at - link.first_step
        steps = training_shares(given.train, given.order[at:stop], training.micro_batch_tokens, wires.count())
        with (
            given.bench.signals.deferred(),
            ranks.beside(given, self.loaded.chain, link, done, moments, steps) as batches,
        ):
            optimizer = tune(
                model,
                link,
                batches,
                given.accelerator,
                partial(self._on_step, stop),
                betas=training.betas,
                epsilon=training.epsilon,
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                done=done,
                moments=moments,
            )
        return read_moments(model, optimizer, given.accelerator) if stop < link.last_step else None

    def _on_step(self, stop: int, step: Step, optimizer: AcceleratedOptimizer) -> None:
        bench, course, model = self.given.bench, self.course, self.loaded.chain.model
        try:
            course.note_step(asdict(step), made=True)
        except LinkEnded:
            self.keeper.keep_end(model, optimizer)
            raise
        if course.at == stop:
            self.keeper.keep_end(model, optimizer)
        elif self.given.states.checkpoint_due():
            self.keeper.keep_checkpoint(model, optimizer, stop)
        try:
            with bench.signals.at_once():
                self._look_if_due()
        except Interrupted:
            if course.at < stop:
                bench.progress.stage(f"keeping a checkpoint at step {course.at}")
                self.keeper.keep_checkpoint(model, optimizer, stop)
            raise

    def _look_if_due(self) -> None:
        """Score validation at an evaluation point, and keep the weights if they are the best so far."""
        course, model = self.course, self.loaded.chain.model
        if course.at not in self.given.points or course.at in course.looks:
            return
        before = course.best
        course.note_look(course.at, score_attached(self.given, model, course.at))
        self.given.bench.write_references()
        if course.best is not before:
            self.keeper.keep_best(model, before.step if before else None)


@dataclass
class Keeper:
    """Keeps ends of segments for good, a checkpoint until a later state, the best look until it is outdone."""

    given: Assignment
    course: Course
    _checkpoint: int | None = None
    _outdone: list[int] = field(default_factory=list)  # former bests: needed until a later state can be gone on from

    def go_on_from(self, step: int, kind: str) -> None:
        """Training goes on from a state that was found, of that kind."""
        self._checkpoint = step if kind == "checkpoint" else None

    def keep_end(self, model: PreTrainedModel, optimizer: AcceleratedOptimizer) -> None:
        """The end of a segment."""
        goes_on = self._link.settings.is_pair or self.given.bench.tree.goes_on(self.given.lineage.names[self.course.at])
        self._keep("segment", model, optimizer if goes_on else None, None)
        self._leave()

    def keep_checkpoint(self, model: PreTrainedModel, optimizer: AcceleratedOptimizer, stop: int) -> None:
        """A state on the way to `stop`, from which training can go on."""
        if self._checkpoint != self.course.at:
            self._keep("checkpoint", model, optimizer, self.given.lineage.names[stop])
            self._leave()
            self._checkpoint = self.course.at

    def keep_best(self, model: PreTrainedModel, before: int | None) -> None:
        """The best look so far; `before`: the one that it outdoes."""
        if self.given.states.has_weights(self.course.at):
            self.given.states.keep_as_point(self.course.at)
        else:
            self._keep("point", model, None, self.given.lineage.names[-1])
        if before is not None:
            self._outdone.append(before)

    @property
    def _link(self) -> Link:
        return self.given.links[self.given.lineage.link_of(self.course.at)]

    def _keep(
        self, kind: str, model: PreTrainedModel, optimizer: AcceleratedOptimizer | None, towards: str | None
    ) -> None:
        moments = read_moments(model, optimizer, self.given.accelerator) if optimizer is not None else None
        rows = self.course.steps[self._link.first_step :]
        self.given.states.keep(self.course.at, kind, model, moments, rows, towards)

    def _leave(self) -> None:
        """A later state is kept: the checkpoint before it has served, and the bests that were outdone."""
        if self._checkpoint is not None:
            self.given.states.drop(self._checkpoint, "checkpoint")
        self._checkpoint = None
        for step in self._outdone:
            self.given.states.drop(step, "point")
        self._outdone = []
