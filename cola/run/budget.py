"""How many optimizer steps each arm gets, where arms are matched by tokens or FLOPs instead of steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cola.errors import RecipeError
from cola.measure.cost import Cost, Meter
from cola.recipe.plan import Job, budget_steps, own_lengths, plan_arm
from cola.recipe.recipe import Recipe
from cola.recipe.schema import Choice


@dataclass
class Budget:
    """Finds the steps of each job.

    Attributes:
        recipe: The resolved recipe.
        meter: Counts what links cost.
        order_of: The rows of the first n steps under a seed.
    """

    recipe: Recipe
    meter: Meter
    order_of: Callable[[int, int], Sequence[Sequence[int]]]
    _known: dict[tuple[str, int, Choice], int] = field(default_factory=dict)

    @cached_property
    def _without_warmup(self) -> Recipe:
        """Warm-ups cost nothing, and may be longer than the few steps that a search for the right number tries."""
        none = {"warmup_steps": 0}
        recipe = self.recipe
        arms = {
            name: arm.model_copy(update={"knot": arm.knot.model_copy(update=none)}) for name, arm in recipe.arms.items()
        }
        training, knot = recipe.training.model_copy(update=none), recipe.knot.model_copy(update=none)
        return recipe.model_copy(update={"training": training, "knot": knot, "arms": arms})

    def steps(self, job: Job) -> int | None:
        """A job's optimizer steps: as many as cost no more than the reference arm's; None where steps are the budget.

        Raises:
            RecipeError: not even its links' first steps fit.
        """
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
        order = self.order_of(job.seed, n_steps)
        steps = [self.meter.steps(link, order[link.first_step : link.last_step], job.seed) for link in links]
        return sum((cost for costs in steps for cost in costs), Cost(0.0, 0))
