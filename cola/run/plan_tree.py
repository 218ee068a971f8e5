"""Which states recipes on one base and data would train, and where their paths are cut into segments."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedModel

from cola.data.batches import batch_digests, batch_order
from cola.data.encode import Example
from cola.data.splits import Splits
from cola.errors import ColaError
from cola.link import adapters
from cola.link.model import Source
from cola.link.targets import target_names
from cola.measure.cost import Lengths, Meter
from cola.recipe.methods import Lora, Targets
from cola.recipe.plan import Job, Link, candidates_of, plan_arm
from cola.recipe.recipe import Recipe
from cola.run.budget import Budget
from cola.tree.segments import Causes, Tree, root_causes


@dataclass(frozen=True)
class Planner:
    """Plans recipes on one base and data: one row order and one list of module names for all of them.

    Attributes:
        source: The base.
        skeleton: The base without weights.
        splits: The data.
        device: Kind of device that computes.
    """

    source: Source
    skeleton: PreTrainedModel
    splits: Splits
    device: str
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
        training, fingerprint, digests = recipe.training, self.source.fingerprint(), dict[int, list[str]]()
        order_of = partial(self.order, training.batch_size)

        def digests_of(seed: int, n_steps: int) -> list[str]:
            if len(digests.get(seed, [])) < n_steps:
                order, rows = order_of(seed, n_steps), self.splits.train_of(seed)
                digests[seed] = list(batch_digests(rows, order, training.micro_batch_tokens))
            return digests.get(seed, [])[:n_steps]

        def root_of(arm: str) -> Causes:
            dtype, quantization = recipe.resolved(arm).base
            return root_causes(fingerprint, dtype, self.device, quantization)

        budget = Budget(recipe, meter, order_of)

        def links_of(job: Job) -> list[Link]:
            return plan_arm(recipe, job.arm, job.seed, self.splits.sizes["train"], job.choice, budget.steps(job))

        buffers = adapters.kept_buffers(self.skeleton)
        return Tree(training, links_of, root_of, self._modules_of, digests_of, buffers)

    def _modules_of(self, link: Link) -> list[str] | None:
        if not isinstance(link.settings, Lora):
            return None
        targets = link.settings.target_modules
        if targets not in self._modules:
            self._modules[targets] = target_names(self.skeleton, targets)
        return self._modules[targets]


def _lengths(examples: Sequence[Example]) -> Lengths:
    return [(example.n_tokens, len(example.answers[example.gold])) for example in examples]
