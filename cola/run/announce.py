"""What the user is told before anything is trained."""

from cola.compare.scope import overlap_note
from cola.link.ideas.door import flops_of, may_run
from cola.measure.cost import Meter
from cola.recipe.arms import Prune
from cola.recipe.plan import Job, looking_steps
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.assignment import Bench
from cola.tree.segments import Tree, merge_of


def say_cautions(
    recipe: Recipe, tree: Tree, jobs: list[Job], meter: Meter, terminal: Terminal, of_ablation: bool
) -> None:
    """What may surprise, or cannot be counted."""
    if not of_ablation:  # a point of one may well be another arm: a chain of one link is LoRA
        _say_twins(recipe, tree, jobs, terminal)
    if note := overlap_note(recipe):
        terminal.warn(note)
    for arm in recipe.arms:
        rules = recipe.resolved(arm).rules
        several = recipe.arms[arm].n_links > 1 or "links" in recipe.searches_of(arm)
        if isinstance(rules.optimizer, Prune) and several and not rules.warmup_steps:
            terminal.warn(
                f"{arm}: pruning keeps Adam's step count, so entries that were cleared take steps of up to 6.6 times "
                "the learning rate after a knot; knot.warmup_steps softens that"
            )
    for link in [link for job in jobs for link in tree.lineage(job).links]:
        meter.steps(link, [], recipe.seeds[0])
    if meter.trouble:
        terminal.warn(f"FLOPs cannot be counted for this model: {meter.trouble}")
    if recipe.training.match == "flops":
        _say_uncounted(recipe, terminal)


def _say_uncounted(recipe: Recipe, terminal: Terminal) -> None:
    """Own code that says none of its FLOPs, where arms are given the same of them."""
    working = [f"arms.{arm}.{key}" for arm in recipe.arms for key in ("init", "optimizer")]
    for where in working:
        for idea in recipe.ideas.get(where, []):
            if idea.file and not (may_run(idea) and flops_of(idea)):
                terminal.warn(
                    f"{where}: the FLOPs of {idea} are not counted, so training.match: flops gives that arm more: say "
                    f"them in a function {idea.function}_flops"
                )


def _say_twins(recipe: Recipe, tree: Tree, jobs: list[Job], terminal: Terminal) -> None:
    """Arms that come to the same weights in the same way: what differs between them in the recipe has no effect."""
    ends: dict[tuple[str, str | None], str] = {}
    for job in jobs:
        if job.trial or job.seed != recipe.seeds[0]:
            continue
        lineage = tree.lineage(job)
        low_rank = lineage.links and lineage.links[0].settings.is_pair
        merge = merge_of(recipe.resolved(job.arm).rules, "quantization" in lineage.root) if low_rank else None
        twin = ends.setdefault((lineage.names[-1], merge), job.arm)
        if twin != job.arm and not recipe.searches_of(job.arm):
            terminal.warn(f"{job.arm} is the same training as {twin}: what the recipe says differently has no effect")


def say_plan(bench: Bench, known: list[Job], jobs: list[Job]) -> None:
    """How many segments are needed, found and to be trained; `known`: those jobs whose searched values are known."""
    needed, terminal = bench.tree.segments(known), bench.progress.terminal
    missing: dict[str, int] = {}
    begun: dict[str, int] = {}
    for job in known:
        lineage, first = bench.tree.lineage(job), 0
        names, measured = lineage.names, bench.measurements(job)
        points = looking_steps(bench.recipe, lineage.links, bench.materials.splits.sizes["train"])
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
