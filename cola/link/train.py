"""tune(): the optimizer steps of one link, or of a part of it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cola.clock import Clock
from cola.data.batches import MicroBatch
from cola.errors import IdeaError, NoGradient, NonFiniteLoss
from cola.link import adapters, wires
from cola.link.adapters import trainable
from cola.link.base import is_sharded
from cola.link.forward import logits_at
from cola.link.ideas import door
from cola.link.moments import Moments, check_cleared, first_moment, set_moments, share_cleared
from cola.link.targets import hidden_linear
from cola.recipe.methods import Lora
from cola.recipe.plan import Link, derived_seed

GRADIENT_SCALE = 2.0**12  # of the summed loss of a pass, under float16; training's begins at 2**16 for a mean
MAX_SKIPPED = 20  # steps in a row that fp16 gradient scaling may skip before the arm has diverged


@dataclass(frozen=True)
class Step:
    """One optimizer step, as it is logged."""

    step: int  # of the run, this one included
    loss: float  # nats per target token over the step's rows, before the update
    grad_norm: float  # L2, before clipping
    learning_rate: float
    tokens: int  # read, prompts included, padding not
    target_tokens: int  # those that the loss is taken on
    seconds: float
    cpu_seconds: float
    update_norm: float | None  # ||scale B A||_F over all matrices, after the update; None where there is no pair
    without_gradient: int  # trained tensors that have had none in this link yet (A of a pair at its first step)
    cleared: float | None  # share of the optimizer's moments that were zero as a link began; None at its other steps
    optimizer_bytes: int | None  # of what the optimizer remembers after a link's first step; None at its other steps
    rows: list[str]  # their ids, in the order of the micro-batches


def tune(
    model: PreTrainedModel,
    link: Link,
    batches: Iterable[list[MicroBatch]],
    accelerator: Accelerator,
    on_step: Callable[[Step, AcceleratedOptimizer], None],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float | None,
    done: int = 0,
    moments: Moments | None = None,
) -> AcceleratedOptimizer:
    """Train what is trainable, one optimizer step per batch; returns the optimizer as the last step left it.

    The loss of a step is the sum over all its target tokens divided by their number, however the rows are split
    into micro-batches and these over processes, each of which takes its own. Dropout is seeded anew at each step, so
    that a link which is stopped and goes on draws what it would have drawn. The model is left in eval mode.

    Args:
        batches: One list of micro-batches per step to be made now, those of all ranks.
        on_step: Called after each step; may evaluate the model and leave it in eval mode.
        done: Steps of the link that were made before.
        moments: The optimizer's state after those, from `read_moments`, or what a knot carries over, from `carried`.

    Raises:
        NonFiniteLoss, NoGradient: from `_Watch`; the weights are those of the step before.
        MomentsNotCleared: the knot before cleared less than it was to. RankFailed, RanksLost, ModelError: from `wires`.
        IdeaError: the optimizer is none, leaves something out, or could not go on from what is kept of it.
    """
    pairs = _trained_pairs(model)
    optimizer = _fresh_optimizer(
        model, link, accelerator, pairs, betas=betas, epsilon=epsilon, weight_decay=weight_decay
    )
    if moments is not None:
        set_moments(model, optimizer, accelerator, moments)
    parameters, own = trainable(model), _numbers_of(optimizer.optimizer)
    cleared = None if done else check_cleared(share_cleared(parameters, optimizer), link.knot)
    watch = _Watch(parameters, optimizer if done else None, may_skip=accelerator.scaler is not None)
    model.train()
    for place, micro_batches in enumerate(batches, start=done):
        if not model.training:  # a look was taken; to walk through all modules is a share of a short step
            model.train()
        clock, step = Clock(), link.first_step + place + 1
        learning_rate = _set_out(optimizer, link, place, accelerator.process_index)
        loss, norm = _gradient(model, micro_batches, accelerator, parameters, max_grad_norm)
        rows = [row for batch in micro_batches for row in batch.ids]
        silent = watch.look(step, loss, norm, rows)
        optimizer.step()
        wires.check_alike(parameters)
        optimizer.zero_grad(set_to_none=True)
        tokens, targets = sum(b.n_tokens for b in micro_batches), sum(b.n_targets for b in micro_batches)
        size, took = update_norm(pairs), clock.read()
        held = None if place else state_bytes(optimizer.optimizer)
        told = Step(step, loss, norm, learning_rate, tokens, targets, *took, size, silent, cleared, held, rows)
        on_step(told, optimizer)
        cleared = None
    model.eval()
    _check_kept(link, own, _numbers_of(optimizer.optimizer))
    return optimizer


def _set_out(optimizer: AcceleratedOptimizer, link: Link, place: int, rank: int) -> float:
    """Seed what is drawn in a step of the link, by each rank for its own rows and by the first as by a single process,
    and set its learning rate, which is returned."""
    torch.manual_seed(derived_seed("dropout", link.seed, place, *([rank] if rank else [])))
    for group in optimizer.param_groups:
        group["lr"] = link.learning_rates[place] * group["ratio"]
    return link.learning_rates[place]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer remembers; numbers are none."""
    held = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in held)


def _check_kept(link: Link, before: dict[str, float], after: dict[str, float]) -> None:
    """IdeaError where an optimizer has counted in an attribute, which no checkpoint holds."""
    if loose := [key for key in after if before.get(key, 0) != after[key]]:
        raise IdeaError(
            f"optimizer: {link.settings.optimizer} keeps {loose[0]} outside of its state, so that a link which is "
            "stopped could not go on: keep it in state[parameter], or in a group of parameters"
        )


def _numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Numbers that an optimizer has as attributes."""
    return {key: value for key, value in vars(optimizer).items() if isinstance(value, int | float)}


def _trained_pairs(model: PreTrainedModel) -> list[door.TrainedPair]:
    layers = adapters.pair_layers(model).items()
    return [door.TrainedPair(n, *adapters.parameters_of(layer), adapters.scale_of(layer)) for n, layer in layers]


@torch.no_grad()
def update_norm(pairs: Sequence[door.TrainedPair]) -> float | None:
    """||scale B A||_F over all matrices, from the small products B^T B and A A^T, in one go for all of a shape; None
    where there is no pair. The device is waited for once."""
    alike: dict[tuple[torch.Size, torch.Size], list[door.TrainedPair]] = {}
    for pair in pairs:
        alike.setdefault((pair.A_RI.shape, pair.B_OR.shape), []).append(pair)
    squares = []
    for group in alike.values():
        A_NRI, B_NOR = torch.stack([pair.A_RI for pair in group]), torch.stack([pair.B_OR for pair in group])
        scales_N = torch.tensor([pair.scale for pair in group], device=A_NRI.device)
        of_each_N = ((A_NRI @ A_NRI.mT) * (B_NOR.mT @ B_NOR)).sum((1, 2)).clamp(min=0)
        squares.append((scales_N.square() * of_each_N).sum())
    return math.sqrt(torch.stack(squares).sum().item()) if squares else None


def _fresh_optimizer(
    model: PreTrainedModel,
    link: Link,
    accelerator: Accelerator,
    pairs: Sequence[door.TrainedPair],
    **settings: Any,
) -> AcceleratedOptimizer:
    """A new optimizer, the link's: it begins without moments (COLA, Figure 1), unless it is given some. IdeaError where
    it is none, or leaves out what the link trains."""
    # What an earlier part of the job prepared must not be unscaled and stepped along, nor its moments kept alive.
    accelerator.free_memory()
    if accelerator.scaler is not None:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)  # fresh, like the optimizer
    idea = link.settings.optimizer
    linear = hidden_linear(model) if link.settings.is_whole else []
    matrices = [weight for name in linear if (weight := model.get_parameter(f"{name}.weight")).requires_grad]
    trained = door.Trained(_groups(model, link), pairs, n_steps=len(link.learning_rates), matrices=matrices, **settings)
    made = door.function_of(idea)(trained)
    if not isinstance(made, torch.optim.Optimizer):
        raise IdeaError(f"optimizer: {idea} gave a {type(made).__name__}; a torch.optim.Optimizer is expected")
    taken = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]:
        raise IdeaError(f"optimizer: {idea} leaves out {len(left)} of the trained tensors, the first is {left[0]}")
    for group in made.param_groups:
        group.setdefault("ratio", 1.0)
    optimizer = accelerator.prepare_optimizer(made)
    assert isinstance(optimizer, AcceleratedOptimizer)
    return optimizer


def _gradient(
    model: PreTrainedModel,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    parameters: Sequence[nn.Parameter],
    max_norm: float | None,
) -> tuple[float, float]:
    """Give the parameters the gradient of the mean loss per target token, clipped; returns that loss and the L2 norm
    before clipping. The device is waited for once."""
    n_targets = sum(batch.n_targets for batch in micro_batches)
    loss_sum = torch.zeros((), device=accelerator.device)
    trouble = None
    try:
        for batch in _own(model, micro_batches, accelerator.process_index):
            loss = _loss_sum(model, batch, accelerator)
            accelerator.backward(loss / n_targets)
            loss_sum += loss.detach()
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        if is_sharded(model):
            raise wires.lost_in_a_pass(error) from error
        trouble = error
    if accelerator.num_processes > 1:
        wires.sum_gradients(parameters, trouble)
        wires.sum_over(loss_sum)
    norm = accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
    assert norm is not None  # nothing is sharded
    total, norm = torch.stack([loss_sum, norm.to(loss_sum)]).tolist()
    return total / n_targets, norm


def _own(model: PreTrainedModel, micro_batches: Sequence[MicroBatch], rank: int) -> list[MicroBatch]:
    """What a rank reads. Through a sharded model all pass equally often: who has less reads rows without targets."""
    own = [batch for batch in micro_batches if batch.rank == rank]
    if is_sharded(model):
        most = max(Counter(batch.rank for batch in micro_batches).values())
        own += [micro_batches[-1].last_targets(0)] * (most - len(own))
    return own


def _loss_sum(model: PreTrainedModel, batch: MicroBatch, accelerator: Accelerator) -> Tensor:
    """Nats of a micro-batch, summed over its targets."""
    batch = batch.to(accelerator.device)
    with accelerator.autocast():
        logits_NV = logits_at(model, batch.input_ids_BT, batch.predicts_BT)
        return cross_entropy(logits_NV, batch.targets_N, reduction="sum")


class _Watch:
    """Stops a link that diverges, or in which nothing is learned.

    Args:
        optimizer: Where the link has begun: a moment tells of a gradient, so that the count of those without one is the
            same wherever a link is cut.
        may_skip: Whether a gradient may overflow now and then, under fp16 gradient scaling.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: AcceleratedOptimizer | None, may_skip: bool
    ) -> None:
        state = {} if optimizer is None else optimizer.optimizer.state
        self.parameters = parameters
        self.silent = _where_zero(parameters, [first_moment(state.get(p, {})) for p in parameters])  # no gradient yet
        self.may_skip, self.skipped = may_skip, 0

    def look(self, step: int, loss: float, norm: float, rows: Sequence[str]) -> int:
        """Look at a step's gradient before it is taken; returns how many tensors have had none in this link yet.

        A tensor is looked at until it has had one, which nearly all have by the second step: later steps are spared a
        pass over all gradients.

        Raises:
            NonFiniteLoss: names the step and the rows of its batch.
            NoGradient: nothing that is trained depends on the loss.
        """
        # Under fp16 gradient scaling an overflowed gradient is skipped and the scale lowered, by design; not for ever.
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        passable = math.isfinite(norm) or (self.may_skip and self.skipped < MAX_SKIPPED)
        if not math.isfinite(loss) or not passable:
            trouble = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            raise NonFiniteLoss(
                f"step {step}: {trouble}; rows of the batch: {', '.join(rows)}; try a lower learning_rate"
            )
        if norm == 0 and all(p.grad is None or not p.grad.any() for p in self.parameters):
            raise NoGradient(
                f"step {step}: none of the {len(self.parameters)} trained tensors got a gradient: nothing would be "
                "learned"
            )
        self.silent = _where_zero(self.silent, [parameter.grad for parameter in self.silent])
        return len(self.silent)


def _where_zero(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor | None]) -> list[nn.Parameter]:
    """The parameters whose tensor is missing or zero throughout. The device is waited for once, not for each."""
    told = [tensor.any() for tensor in tensors if tensor is not None]
    some = iter(torch.stack(told).tolist() if told else [])
    return [p for p, tensor in zip(parameters, tensors, strict=True) if tensor is None or not next(some)]


def _groups(model: PreTrainedModel, link: Link) -> list[dict[str, Any]]:
    """Parameter groups: all alike, or LoRA+'s, in which B and whatever is a vector learn faster than A."""
    ratio = link.settings.loraplus_lr_ratio if isinstance(link.settings, Lora) else 1.0
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in named if ratio != 1 and ("lora_B" in name or p.ndim == 1)]
    known = set(map(id, fast))
    slow = [p for _, p in named if id(p) not in known]
    return [{"params": params, "ratio": r} for params, r in ((slow, 1.0), (fast, ratio)) if params]


def full_gradients(
    model: PreTrainedModel, names: Sequence[str], batches: Iterable[list[MicroBatch]], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Gradient of the mean loss per target token with respect to the whole weight of some modules, frozen or not.

    It is taken from what goes into a module and the gradient of what comes out of it, so it can be had of quantized
    codes as well, and of the weight as it is with everything that is attached to it. The model is left in eval mode,
    its parameters and their gradients as they were.

    float16 holds nothing below 6e-8: what passes through it is scaled by a power of two, which is lowered where
    something overflows, and divided out again in float32. Training has accelerate's GradScaler for that, on a GPU; this
    serves a CPU as well.

    Args:
        names: Modules that map features to features, the last axis.
        batches: One list of micro-batches per step.

    Returns:
        float32 (O, I) for each name, on the CPU. NonFiniteLoss is raised where it is not finite at any scale.
    """
    micro_batches = [batch for step in batches for batch in step]
    scale = GRADIENT_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
    while (gradients := _scaled_gradients(model, names, micro_batches, accelerator, scale)) is None:
        scale /= 8
        if scale < 1:
            raise NonFiniteLoss("init: gradient: the full gradient of the link's first batches is not finite")
    return gradients


def _scaled_gradients(
    model: PreTrainedModel,
    names: Sequence[str],
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    scale: float,
) -> dict[str, Tensor] | None:
    """The gradients, from a loss that is multiplied by the scale; None where they are not finite under it."""
    sums: dict[str, Tensor] = {}
    finite = torch.ones((), dtype=torch.bool, device=accelerator.device)

    def watch(name: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x_NI = args[0].detach().flatten(0, -2)

        def add(grad: Tensor) -> None:
            finite.logical_and_(grad.isfinite().all())
            product = grad.flatten(0, -2).float().T @ x_NI.float()
            sums[name] = sums[name] + product if name in sums else product

        if output.requires_grad:
            output.register_hook(add)

    model.eval()
    handles = [model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in names]
    try:
        for batch in micro_batches:
            loss = _loss_sum(model, batch, accelerator)
            torch.autograd.backward(loss * scale, inputs=trainable(model))
            if not finite:
                return None
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    n_targets = sum(batch.n_targets for batch in micro_batches)
    return {name: (total / (n_targets * scale)).cpu() for name, total in sums.items()}
