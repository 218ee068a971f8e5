"""A plan in words and tables."""

from collections.abc import Mapping

from cola.plan.fit import Fit
from cola.plan.memory import Memory
from cola.plan.plan import ArmPlan, LinkPlan, RecipePlan
from cola.report.numbers import count, duration, duration_if_known, number, size
from cola.report.table import NONE, Shown, Table

HEADS = {"quantization": "codes' scales", "residual": "earlier pairs"}


def work_table(plan: RecipePlan) -> Table:
    """Parameters, FLOPs, time and disk of each arm and link, under one seed."""
    rows: list[list[Shown]] = []
    for name, arm in plan.arms.items():
        base = arm.quantization or arm.dtype
        parts = [count(arm.parameters), count(arm.trainable), number(arm.trainable / arm.parameters, ".2%")]
        steps = str(sum(link.steps for link in arm.links))
        times = [duration_if_known(arm.training_seconds), duration_if_known(arm.seconds)]
        rows.append([name, base, *parts, steps, count(arm.flops), *times, size(arm.disk)])
        rows += [_link_row(name, n, len(arm.links), link) for n, link in enumerate(arm.links, 1) if len(arm.links) > 1]
    heads = ["arm", "base", "parameters", "trained", "share", "steps", "FLOPs", "training", "with scoring", "disk"]
    return Table(f"{plan.name}: work of one seed", heads, rows)


def _link_row(arm: str, number_: int, n_links: int, link: LinkPlan) -> list[Shown]:
    trained = [NONE, count(link.parameters), NONE, str(link.steps), count(link.flops)]
    return [f"{arm} {number_}/{n_links}", NONE, *trained, duration_if_known(link.seconds), NONE, NONE]


def memory_table(plan: RecipePlan, checkpointed: Mapping[str, Memory | None]) -> Table:
    """Memory by part at the largest moment of training; what a knot and scoring take beside what stays."""
    parts = [*next(iter(plan.arms.values())).memory.training, "gradients", "activations", "logits"]
    parts = list(dict.fromkeys(parts))
    some = any(arm.memory.libraries for arm in plan.arms.values())
    rows: list[list[Shown]] = []
    for name, arm in plan.arms.items():
        for label, memory in _memories(name, arm):
            own = [_bytes(memory.training.get(part, 0)) for part in parts]
            beside = checkpointed.get(label)
            less = NONE if beside is None else size(beside.peak)
            rest = [_bytes(memory.libraries)] if some else []
            rows.append([label, *own, _bytes(memory.knot), _bytes(memory.evaluation), *rest, size(memory.peak), less])
    heads = ["arm", *(HEADS.get(part, part) for part in parts), "knot", "evaluation", *(["libraries"] if some else [])]
    return Table(f"{plan.name}: memory on {plan.device.title}", [*heads, "peak", "if checkpointed"], rows)


def _memories(name: str, arm: ArmPlan) -> list[tuple[str, Memory]]:
    """An arm's memory; of each link, where they differ."""
    memories = [link.memory for link in arm.links]
    if len({memory.peak for memory in memories}) < 2:
        return [(name, arm.memory)]
    return [(f"{name} {n}/{len(memories)}", memory) for n, memory in enumerate(memories, 1)]


def _bytes(n_bytes: int) -> Shown:
    return size(n_bytes) if n_bytes else NONE


def fit_lines(plan: RecipePlan, fits: Mapping[str, Fit]) -> list[str]:
    """Of each arm whether it fits, and what would."""
    lines = []
    for arm, fit in fits.items():
        room = f"{size(fit.peak)} of {size(fit.room)}"
        if fit.fits:
            lines.append(f"{arm}: fits, {room}, most of it while {_moment(plan.arms[arm].memory)}")
        elif fit.words:
            lines.append(f"{arm}: does not fit, {room}; with {' '.join(fit.words)} it would, {size(fit.then)}")
        else:
            lines.append(
                f"{arm}: does not fit, {room}, nor with one row a pass: {size(fit.then)} at least, most of it "
                f"{fit.least}; take a smaller model or a larger device"
            )
    return lines


def _moment(memory: Memory) -> str:
    return {"training": "training", "knot": "tying a knot", "evaluation": "scoring", "loading": "loading"}[memory.when]


def total_lines(plan: RecipePlan) -> list[str]:
    """The whole recipe, and where the numbers are from."""
    totals = plan.totals
    lines = [f"model: {plan.model}, its config {plan.config}; rows: {plan.rows}"]
    steps = f"{totals.runs} runs and {totals.trials} trials: {totals.asked_steps} optimizer steps"
    if totals.steps is not None:
        steps += f", {totals.steps} with what they share counted once"
    if totals.found_steps is not None:
        steps += f", {totals.found_steps} of them in the store"
    lines.append(steps)
    if totals.flops is not None:
        took = "" if totals.seconds is None else f" and about {duration(totals.seconds)}"
        lines.append(f"left to be made: {count(totals.flops)} FLOPs{took}; up to {size(totals.disk)} on disk at once")
    else:
        lines.append(f"what arms share is not counted here; up to {size(totals.disk)} on disk at once")
    lines.append(
        f"times: {plan.rates}" if plan.rates else "times: not known here; cola plan RECIPE --calibrate measures"
    )
    return [*lines, *plan.notes]
