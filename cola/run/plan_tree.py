"""Which segments a recipe needs, where they are cut, and how much of them is there."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from cola.data.batches import batch_digests, batch_order
from cola.data.encode import Example
from cola.data.splits import Splits
from cola.errors import ColaError
from cola.link import adapters
from cola.link.model import Source
from cola.measure.cost import Budget, Meter
from cola.recipe.methods import Lora, Targets
from cola.recipe.plan import Job, Link, candidates_of, evaluation_steps
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.bench import Bench
from cola.run.search import with_choice
from cola.tree.segments import Causes, Tree, root_causes


def meter_of(recipe: Recipe, skeleton: PreTrainedModel, splits: Splits) -> Meter:
    def lengths(examples: Sequence[Example]) -> list[tuple[int, int]]:
        return [(example.n_tokens, len(example.answers[example.gold])) for example in examples]

    redrawn = {seed: lengths(examples) for seed, examples in splits.redrawn.items()}
    return Meter(skeleton, lengths(splits.train), recipe.training.gradient_checkpointing, redrawn)


def shared_tree(
    recipe: Recipe, siblings: Sequence[Recipe], source: Source, meter: Meter, splits: Splits, device: str
) -> Tree:
    """The recipe's tree, cut also where the other points of an ablation on the same base and data need it."""
    fingerprint, skeleton = source.fingerprint(), meter.skeleton
    modules: dict[Targets, list[str]] = {}
    buffers = adapters.kept_buffers(skeleton)

    def modules_of(link: Link) -> list[str] | None:
        if not isinstance(link.settings, Lora):
            return None
        said = link.settings.target_modules
        if said not in modules:
            modules[said] = adapters.target_names(skeleton, said)
        return modules[said]

    def tree_of(one: Recipe) -> Tree:
        known: dict[int, list[str]] = {}
        orders: dict[int, list[list[int]]] = {}

        # The first n steps of a seed's order are the same however many follow.
        def order_of(seed: int, n_steps: int) -> list[list[int]]:
            if len(orders.get(seed, [])) < n_steps:
                lengths = [example.n_tokens for example in splits.train_of(seed)]
                orders[seed] = batch_order(lengths, one.training.batch_size, n_steps, seed)
            return orders[seed][:n_steps] if n_steps else []

        def digests_of(seed: int, n_steps: int) -> list[str]:
            if len(known.get(seed, [])) < n_steps:
                order = order_of(seed, n_steps)
                known[seed] = list(batch_digests(splits.train_of(seed), order, one.training.micro_batch_tokens))
            return known.get(seed, [])[:n_steps]

        def root_of(arm: str) -> Causes:
            dtype, quantization = one.resolved(arm).base
            return root_causes(fingerprint, dtype, device, quantization)

        budget = Budget(one, replace(meter, checkpointing=one.training.gradient_checkpointing), order_of)
        return Tree(one, splits.sizes["train"], root_of, modules_of, digests_of, budget.steps, buffers)

    tree = tree_of(recipe)
    alike = [tree_of(other) for other in siblings if (other.model, other.data) == (recipe.model, recipe.data)]
    lineages = []
    for one in (tree, *alike):
        # An arm that cannot be planned, of another point, is said when its turn comes.
        with contextlib.suppress(ColaError):
            # Under another seed with rows of its own nothing is in common.
            known = [job for job in candidates_of(one.recipe) if not splits.redrawn or job.seed in splits.redrawn]
            lineages += map(one.lineage, known)
    tree.plan(lineages)  # all at once: where two of them part shows only beside each other
    return tree


def known_jobs(bench: Bench, jobs: list[Job]) -> list[Job]:
    """The jobs whose searched values are known by now; what the run refers to is noted for the store."""
    known = []
    for job in jobs:
        with contextlib.suppress(ColaError):  # said when its turn comes
            known.append(with_choice(bench, job))
    bench.used["segments"] |= set(bench.tree.segments(known))
    bench.write_references()
    return known


def say_plan(bench: Bench, known: list[Job], jobs: list[Job], terminal: Terminal) -> None:
    """How many segments are needed, found and to be trained."""
    needed = bench.tree.segments(known)
    missing: dict[str, int] = {}
    begun: dict[str, int] = {}
    for job in known:
        lineage, first = bench.tree.lineage(job), 0
        names, measured = lineage.names, bench.measurements(job)
        points = evaluation_steps(bench.recipe, lineage.links, bench.splits.sizes["train"])
        # From a point on where validation is to be looked at for the first time, the steps have to be made again.
        sure = next((p for p in points if not measured.has_scores("validation", p, "attached")), len(names))
        there = {n for n in bench.tree.cuts(job) if bench.store.has(names[n])}
        ends = [link.last_step for link in lineage.links]
        known_to = [n for n in there if n <= sure and there.issuperset(end for end in ends if end < n)]
        for cut in bench.tree.cuts(job):
            if cut > max(known_to, default=0):
                steps = [n for n in range(first + 1, min(sure, cut) + 1) if bench.store.has(names[n])]
                missing[names[cut]] = cut - first
                begun[names[cut]] = max(steps, default=first) - first
            first = cut
    made = sum(begun.values())
    terminal.say(
        f"segments: {len(needed)} needed, {len(needed) - len(missing)} found in {bench.store.path}, {len(missing)} to "
        f"be trained: {sum(missing.values()) - made} of {sum(map(len, needed.values()))} optimizer steps"
        + (f" ({made} more are in checkpoints)" if made else "")
    )
    if later := len(jobs) - len(known):
        terminal.say(f"segments: those of {later} more runs are known when the searches are at their end")
