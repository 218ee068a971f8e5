"""What recipes on one base and data would train: how many steps each arm gets, its states, and where it is cut."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

from transformers import PreTrainedModel

from cola.data.batches import batch_digests, batch_order
from cola.data.encode import Example
from cola.data.splits import Splits
from cola.errors import ColaError, RecipeError
from cola.link import adapters
from cola.link.model import Source
from cola.link.targets import target_names
from cola.measure.cost import Cost, Lengths, Meter
from cola.recipe.methods import Lora, Targets
from cola.recipe.plan import Job, Link, budget_steps, candidates_of, own_lengths, plan_arm
from cola.recipe.recipe import Recipe
from cola.recipe.schema import Choice
from cola.tree.segments import Causes, Code, Lineage, Tree, lineage, root_causes


@dataclass(frozen=True)
class Planner:
    """Plans recipes on one base and data: one row order and one list of module names for all of them."""

    source: Source
    skeleton: PreTrainedModel  # the base without weights
    splits: Splits
    device: str  # the kind that computes, `cpu` or `cuda`
    code: Code = field(default_factory=dict)  # SHA-256 of each file of the user's own code
    spread: Causes = field(default_factory=dict)  # how a link is spread over processes, as a name has it
    _orders: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)  # by rows of a step, and seed
    _modules: dict[Targets, list[str]] = field(default_factory=dict)

    def order(self, batch_size: int, seed: int, n_steps: int) -> list[list[int]]:
        """Indices of the training rows of each of the first steps, which are the same however many follow."""
        known = self._orders.get((batch_size, seed), [])
        if len(known) < n_steps:
            lengths = [example.n_tokens for example in self.splits.train_of(seed)]
            known = self._orders[batch_size, seed] = batch_order(lengths, batch_size, n_steps, seed)
        return known[:n_steps]

    def meter(self, recipe: Recipe) -> Meter:
        """Counts what the recipe's links cost."""
        redrawn = {seed: _lengths(examples) for seed, examples in self.splits.redrawn.items()}
        return Meter(self.skeleton, _lengths(self.splits.train), recipe.training.gradient_checkpointing, redrawn)

    def tree(self, recipe: Recipe, meter: Meter, siblings: Sequence[Recipe] = ()) -> Tree:
        """The recipe's tree, cut also where the other points of an ablation on the same base and data need it."""
        tree = self._uncut(recipe, meter)
        alike = [other for other in siblings if (other.model, other.data) == (recipe.model, recipe.data)]
        lineages, redrawn = [], self.splits.redrawn
        for asked, known in ((recipe, tree), *((other, self._uncut(other, self.meter(other))) for other in alike)):
            # An arm that cannot be planned, of another point, is said when its turn comes.
            with contextlib.suppress(ColaError):
                # Under another seed with rows of its own nothing is in common.
                jobs = [job for job in candidates_of(asked) if not redrawn or job.seed in redrawn]
                lineages += map(known.lineage, jobs)
        tree.plan(lineages)  # all at once: where two of them part shows only beside each other
        return tree

    def _uncut(self, recipe: Recipe, meter: Meter) -> Tree:
        training, n_train, digests = recipe.training, self.splits.sizes["train"], dict[int, list[str]]()
        order_of = partial(self.order, training.batch_size)
        budget, buffers = Budget(recipe, meter, order_of), adapters.kept_buffers(self.skeleton)

        def digests_of(seed: int, n_steps: int) -> list[str]:
            if len(digests.get(seed, [])) < n_steps:
                order, rows = order_of(seed, n_steps), self.splits.train_of(seed)
                digests[seed] = list(batch_digests(rows, order, training.micro_batch_tokens))
            return digests.get(seed, [])[:n_steps]

        @cache
        def lineage_of(job: Job) -> Lineage:
            links = plan_arm(recipe, job.arm, job.seed, n_train, job.choice, budget.steps(job), job.ended)
            base = recipe.resolved(job.arm).base
            root = root_causes(self.source.fingerprint(), base.dtype, self.device, base.quantization)
            of_steps = digests_of(job.seed, links[-1].last_step if links else 0)
            return lineage(root, links, training, self._modules_of, of_steps, buffers, self.code, self.spread)

        return Tree(lineage_of)

    def _modules_of(self, link: Link) -> list[str] | None:
        if not isinstance(link.settings, Lora):
            return None
        targets = link.settings.target_modules
        if targets not in self._modules:
            self._modules[targets] = target_names(self.skeleton, targets)
        return self._modules[targets]


def _lengths(examples: Sequence[Example]) -> Lengths:
    return [(example.n_tokens, len(example.answers[example.gold])) for example in examples]


@dataclass
class Budget:
    """Finds the steps of each job, where arms are matched by tokens or FLOPs."""

    recipe: Recipe
    meter: Meter
    order_of: Callable[[int, int], Sequence[Sequence[int]]]  # the rows of the first n steps under a seed
    _known: dict[tuple[str, int, Choice], int] = field(default_factory=dict)

    @cached_property
    def _without_warmup(self) -> Recipe:
        """Warm-ups cost nothing, and may be longer than the few steps that a search for the right number tries."""
        recipe, none = self.recipe, {"warmup_steps": 0}
        knots = {name: arm.knot.model_copy(update=none) for name, arm in recipe.arms.items()}
        arms = {name: arm.model_copy(update={"knot": knots[name]}) for name, arm in recipe.arms.items()}
        training, knot = recipe.training.model_copy(update=none), recipe.knot.model_copy(update=none)
        return recipe.model_copy(update={"training": training, "knot": knot, "arms": arms})

    def steps(self, job: Job) -> int | None:
        """A job's optimizer steps: as many as cost no more than the reference arm's; None where steps are the budget. A
        RecipeError where not even its links' first steps fit."""
        training, reference = self.recipe.training, self.recipe.reference_arm
        if training.match == "steps" or reference is None or not self.recipe.arms[job.arm].n_links:
            return None
        budget = budget_steps(training, self.meter.n_train)
        if job.arm == reference:
            return budget
        key = (job.arm, job.seed, job.choice)
        if key not in self._known:
            allowed = self.cost(Job(arm=reference, seed=job.seed), budget).of(training.match)
            self._known[key] = self._most(job, allowed, budget)
        return self._known[key]

    def _most(self, job: Job, allowed: float, budget: int) -> int:
        """The most steps of a job that cost no more than is allowed to it: what the reference's budget costs."""
        match, reference = self.recipe.training.match, self.recipe.reference_arm
        # Links that say their own lengths leave nothing to be found, or the rest of them.
        own = own_lengths(self.recipe.with_choice(job.arm, job.choice), job.arm, self.meter.n_train)
        low = sum(steps or 1 for steps in own)
        least = self.cost(job, low).of(match)
        if not math.isfinite(allowed + least):
            raise RecipeError(
                f"training.match: the FLOPs of this model cannot be counted ({self.meter.trouble}); match "
                "steps or tokens"
            )
        if least > allowed:
            raise RecipeError(
                f"arms.{job.arm}: {low} steps of it cost more than training.match: {match} allows, which is what "
                f"{budget} steps of {reference} cost"
            )
        high = low + 1 if None not in own else 2 * max(low, budget)
        while None in own and self.cost(job, high).of(match) <= allowed:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cost(job, middle).of(match) <= allowed else (low, middle)
        return low

    def cost(self, job: Job, n_steps: int) -> Cost:
        """What a job costs if it is trained for so many steps."""
        links = plan_arm(self._without_warmup, job.arm, job.seed, self.meter.n_train, job.choice, n_steps)
        return cost_of(self.meter, links, self.order_of(job.seed, n_steps), job.seed)


def cost_of(meter: Meter, links: Sequence[Link], order: Sequence[Sequence[int]], seed: int) -> Cost:
    """FLOPs and positions of all the links' steps; `order`: the rows of each step."""
    steps = [
        meter.steps(link, order[link.first_step : link.last_step], seed, links[:number])
        for number, link in enumerate(links)
    ]
    return sum((cost for costs in steps for cost in costs), Cost(0.0, 0))
