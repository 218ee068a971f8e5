"""The chain of a job, loaded when something is first asked of it."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedModel

from cola.chain import Chain, Knot, retie, run_chain
from cola.errors import ModelError
from cola.link import adapters
from cola.link.base import Base
from cola.link.drift import Probe
from cola.link.moments import Moments
from cola.link.residual import Residual, Share, left_behind
from cola.link.shares import Logged
from cola.link.starts import Gradients, hold_out
from cola.recipe.ideas import Idea
from cola.recipe.plan import Link
from cola.run import shards
from cola.run.assignment import Assignment


class Loaded:
    """A model in memory, with the links that are trained and tied in it; nothing until it is needed."""

    def __init__(self, given: Assignment) -> None:
        self.needed = False  # whether anything was loaded
        self._given = given
        self._placed: int | None = None  # the step whose tied weights the model has

    def _load(self) -> PreTrainedModel:
        """The base; a ModelError where it is not the one that this run began with."""
        given, bench, source = self._given, self._given.bench, self._given.bench.materials.source
        bench.progress.stage("loading the model")
        self.needed = True
        # Its name in the store says what the base was as the run began.
        if source.fingerprint() != bench.meta.model.sha256:
            raise ModelError(
                f"model.name_or_path: {source.name} has changed since this run began; put it back and go on "
                "with the same command, or start a new run"
            )
        ready = bench.ready.pop(given.arm.base, None)
        bench.ready.clear()  # nor is a second one kept in memory
        if ready is not None:
            return ready
        return shards.load(source, given.arm.base, given.accelerator.device, given.recipe.model.shard)

    @cached_property
    def chain(self) -> Chain:
        """The base with what was tied to it."""
        given, model = self._given, self._load()
        if given.recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        base = Base(model, given.bench.materials.source.files, quantized=given.arm.base.quantization is not None)
        if base.sharded:
            base.told = shards.tell_write
        return Chain(model, base, given.arm.rules)

    def run(
        self, n_tied: int, tune: Callable[[Chain, Link], Logged], probe: Probe, gradients: Gradients
    ) -> Iterator[Knot]:
        """Train the links that are not tied yet, all but `n_tied`; the rest as in `run_chain`."""
        given = self._given
        retie(self.chain, self._tied(given.ends[:n_tied], gone_on=False))
        yield from run_chain(self.chain, given.links, tune, probe, gradients)
        self._placed = given.n_steps

    def put_back(self, step: int) -> Moments | None:
        """Give the attached link the weights of a state that is there; returns the optimizer's state, if kept. A
        FileNotFoundError where it has gone from the store."""
        moments = self._given.states.put_back(self.chain.model, step)
        hold_out(self.chain.model, self.chain.base, self.chain.learned)
        return moments

    def model_after(self, step: int) -> PreTrainedModel:
        """The model with the links up to a step tied; a FileNotFoundError where a state that it takes has gone."""
        given, chain = self._given, self.chain
        if step in (0, self._placed):
            return chain.model
        number = given.lineage.link_of(step)
        ends, link = given.ends[:number], given.links[number]
        for needed in (*ends, step):
            if not given.states.has_weights(needed):
                raise FileNotFoundError(f"{given.job.label}: the state after step {needed} has gone from the store")
        if link.settings.is_pair:
            retie(chain, [*self._tied(ends, gone_on=True), given.states.pair(step)])
        else:
            chain.model = adapters.attach(chain.model, link.settings, link.seed)
            given.states.put_back(chain.model, step)
            adapters.detach(chain.model)
        self._placed = step
        return chain.model

    def untouched(self) -> PreTrainedModel:
        """The base as it was loaded. The chain is taken apart: pairs are merged nowhere any more, and what else was
        trained is let go."""
        links = self._given.links
        if "chain" in vars(self) and links and not all(link.settings.is_pair for link in links):
            del self.chain
        retie(self.chain, [])
        self._placed = 0
        return self.chain.model

    def _tied(self, ends: Sequence[int], gone_on: bool) -> Residual:
        """What the links with these last steps, which others follow, have left in the chain, from the store. `gone_on`:
        whether the link after them has begun; a pair that is kept is in that link's then."""
        pairs, rules = [self._given.states.pair(end) for end in ends], self._given.arm.rules
        shares = [self._share(end) for end in ends]
        if rules.keeps_pair and pairs and not gone_on:
            return [*left_behind(pairs[:-1], shares[:-1], True), pairs[-1]]
        return left_behind(pairs, shares, rules.keeps_pair)

    def _share(self, end: int) -> Share:
        """Which share of its pair the knot after a link's last step has kept, another link following; a
        FileNotFoundError where a rule said it and its record has gone from the store."""
        given = self._given
        if not isinstance(given.arm.rules.merge_fraction, Idea):
            return given.arm.rules.merge_fraction
        if (knot := given.measured.known_knot(end)) is None:
            raise FileNotFoundError(f"{given.job.label}: the knot after step {end} has gone from the store")
        return knot["fraction"]
