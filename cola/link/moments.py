"""AdamW's state: read, put back, and what a knot does to it.

The traps that a knot must not fall into (arXiv 2307.05695's code and its descendants): zeroing the moments and leaving
Adam's step count makes the next updates up to 6.6 times too large, since the bias correction is gone; pruning the two
moments by masks of their own leaves first moments without second ones; and a reset that clears nothing looks like any
other. So a fresh optimizer is a new one, pruning has one mask for both, and what is really zero is counted.
"""

import math

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from cola.errors import MomentsNotCleared, MomentsNotKept
from cola.recipe.arms import Prune
from cola.recipe.resolved import Rules

Moments = dict[str, Tensor]  # NAME.exp_avg, NAME.exp_avg_sq and NAME.step of each parameter; scaler/KEY under fp16


def read_moments(model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> Moments:
    """The optimizer's state, and the gradient scaler's under fp16, as tensors on the CPU."""
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{key}"] = value.detach().cpu().contiguous()
    if accelerator.scaler is not None:
        scaler = accelerator.scaler.state_dict()
        moments |= {f"scaler/{key}": torch.tensor(value, dtype=torch.float64) for key, value in scaler.items()}
    return moments


def set_moments(model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator, moments: Moments) -> None:
    """Give the optimizer a state that was read before."""
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := moments.get(f"{name}.{key}")) is not None:
                # The fused AdamW keeps its step count where its weights are.
                optimizer.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
    if accelerator.scaler is not None:
        scaler = accelerator.scaler.state_dict()
        # Whole numbers come back from their tensors as such: PyTorch insists on it.
        known = {key: type(value)(moments[f"scaler/{key}"].item()) for key, value in scaler.items()}
        accelerator.scaler.load_state_dict(known)


def carried(moments: Moments | None, rules: Rules, seed: int) -> Moments | None:
    """What the next link's optimizer begins with, after a link of the same weights that ended with `moments`; None: a
    fresh one. `seed`: of the next link, for random pruning. Raises MomentsNotKept where there is nothing to be handed
    on."""
    if not rules.hands_on:
        return None
    if moments is None:
        raise MomentsNotKept(
            "the optimizer's state at the end of the link before, which the knot hands on, is not there"
        )
    if not isinstance(rules.optimizer, Prune):
        return moments
    kept = dict(moments)
    generator = torch.Generator().manual_seed(seed)
    for key in sorted(moments):
        if key.endswith(".exp_avg"):
            first, second = moments[key], moments[f"{key}_sq"]
            size = first.abs() if rules.optimizer.prune_magnitude else torch.rand(first.shape, generator=generator)
            # An exact number of entries, ties included: a quantile can clear none of a tensor, or refuse a large one.
            order = size.flatten().argsort(stable=True)
            mask = torch.ones(first.numel(), dtype=torch.bool)
            mask[order[: math.ceil(rules.optimizer.share * first.numel())]] = False
            kept[key], kept[f"{key}_sq"] = first * mask.view_as(first), second * mask.view_as(second)
    return kept


def share_cleared(parameters: list[nn.Parameter], optimizer: AcceleratedOptimizer) -> float:
    """The share of the entries whose two moments are both zero, or not there yet."""
    zero = torch.zeros((), dtype=torch.long)
    for parameter in parameters:
        state = optimizer.optimizer.state.get(parameter, {})
        some = "exp_avg" in state
        zero = zero + (((state["exp_avg"] == 0) & (state["exp_avg_sq"] == 0)).sum() if some else parameter.numel())
    return int(zero) / sum(parameter.numel() for parameter in parameters)  # the device is waited for once


def check_cleared(cleared: float, rules: Rules | None) -> float:
    """The share that is cleared; raises MomentsNotCleared where that is less than the knot was to clear."""
    least = 1.0
    if rules is not None and rules.hands_on:
        least = rules.optimizer.share if isinstance(rules.optimizer, Prune) else 0.0
    if cleared < least:
        raise MomentsNotCleared(
            f"a knot was to clear {least:.1%} of the optimizer's moments and {cleared:.1%} are zero"
        )
    return cleared
