"""An optimizer's state: read, put back, and what a knot does to it.

The traps that a knot must not fall into (arXiv 2307.05695's code and its descendants): zeroing the moments and leaving
Adam's step count makes the next updates up to 6.6 times too large, since the bias correction is gone; pruning the two
moments by masks of their own leaves first moments without second ones; and a reset that clears nothing looks like any
other. So a fresh optimizer is a new one, pruning has one mask for both, and what is really zero is counted.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from cola.errors import IdeaError, MomentsNotCleared, MomentsNotKept
from cola.link import adapters
from cola.link.ideas import door
from cola.link.residual import LinkWeights
from cola.recipe.arms import Prune
from cola.recipe.ideas import Idea
from cola.recipe.resolved import Rules

# NAME.KEY of each parameter, of AdamW exp_avg, exp_avg_sq and step; number/NAME.KEY where it is a plain number, and
# group/I.KEY of a group of parameters; scaler/KEY under fp16.
Moments = dict[str, Tensor]


SET_ANEW = {"lr", "ratio"}  # of a group of parameters: by the schedule, and by the link


def read_moments(model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> Moments:
    """The optimizer's state, and the gradient scaler's under fp16, as tensors on the CPU. IdeaError where it holds what
    is neither tensor nor number."""
    moments, adam = {}, optimizer.optimizer
    for name, parameter in model.named_parameters():
        for key, value in adam.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"{name}.{key}"] = value.detach().cpu().contiguous()
            elif isinstance(value, bool | int | float):
                moments[f"number/{name}.{key}"] = torch.tensor(value, dtype=_exact(value))
            elif value is not None:
                raise IdeaError(
                    f"optimizer: {type(adam).__name__} remembers {key} as a {type(value).__name__}, which cannot be "
                    "kept: tensors and numbers can"
                )
    for number, group in enumerate(adam.param_groups):
        for key, value in group.items():
            counts = isinstance(value, bool | int | float) and key not in SET_ANEW
            if counts and value != adam.defaults.get(key):
                moments[f"group/{number}.{key}"] = torch.tensor(value, dtype=_exact(value))
    if accelerator.scaler is not None:
        scaler = accelerator.scaler.state_dict()
        moments |= {f"scaler/{key}": torch.tensor(value, dtype=torch.float64) for key, value in scaler.items()}
    return moments


def set_moments(model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator, moments: Moments) -> None:
    """Give the optimizer a state that was read before."""
    adam, parameters = optimizer.optimizer, dict(model.named_parameters())
    for where, value in moments.items():
        kind, slash, rest = where.partition("/")
        name, _, key = (rest if slash else where).rpartition(".")
        if kind == "group":
            adam.param_groups[int(name)][key] = value.item()
        elif kind == "number":
            adam.state[parameters[name]][key] = value.item()
        elif name in parameters:
            # The fused AdamW keeps its step count where its weights are.
            adam.state[parameters[name]][key] = value.to(parameters[name].device, copy=True)
    if accelerator.scaler is not None:
        scaler = accelerator.scaler.state_dict()
        # Whole numbers come back from their tensors as such: PyTorch insists on it.
        known = {key: type(value)(moments[f"scaler/{key}"].item()) for key, value in scaler.items()}
        accelerator.scaler.load_state_dict(known)


def carried(
    moments: Moments | None, rules: Rules, seed: int, pairs: Callable[[], tuple[LinkWeights, LinkWeights]] | None = None
) -> Moments | None:
    """What the next link's optimizer begins with, after a link of the same matrices that ended with `moments`; None: a
    fresh one.

    Args:
        seed: Of the next link, for random pruning.
        pairs: For a rule of its own: the pair of the link before, and the one that was drawn for the next, as they are
            trained.

    Raises:
        MomentsNotKept: there is nothing to be handed on.
        IdeaError: a rule gave what is no state.
    """
    if not rules.hands_on:
        return None
    if moments is None:
        raise MomentsNotKept(
            "the optimizer's state at the end of the link before, which the knot hands on, is not there"
        )
    if isinstance(rules.optimizer, Idea):
        assert pairs is not None
        return moments | _by_rule(moments, rules.optimizer, *pairs())
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


def _by_rule(moments: Moments, idea: Idea, before: LinkWeights, after: LinkWeights) -> Moments:
    """The states of all pairs as a rule makes them anew."""
    rule, made = door.function_of(idea), {}
    for name, pair in after.items():
        places = [f"{parameter}." for parameter in adapters.parameter_names(name)]
        A, B = (
            {key.removeprefix(place): value for key, value in moments.items() if key.startswith(place)}
            for place in places
        )
        matrix = door.HandedOn(name, before[name], pair, A, B)
        for place, state in zip(places, door.states_of(rule(matrix), idea, matrix), strict=True):
            made |= {f"{place}{key}": value.contiguous() for key, value in state.items()}
    return made


def _exact(number: bool | float) -> torch.dtype:
    """A tensor's dtype that gives the number back as it was."""
    return torch.bool if isinstance(number, bool) else torch.int64 if isinstance(number, int) else torch.float64


def first_moment(state: Mapping[str, Any]) -> Tensor | None:
    """What an optimizer remembers of a parameter's gradients; None where that is nothing."""
    return next((value for value in state.values() if isinstance(value, Tensor) and value.ndim), None)


def share_cleared(parameters: list[nn.Parameter], optimizer: AcceleratedOptimizer) -> float:
    """The share of the entries whose moments are all zero, or not there yet. Where a moment has another shape than its
    parameter, all of the parameter's entries go by whether it is zero throughout."""
    zero = torch.zeros((), dtype=torch.long)
    for parameter in parameters:
        state = optimizer.optimizer.state.get(parameter, {})
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.ndim]
        if all(moment.shape == parameter.shape for moment in moments):
            clear = torch.stack([moment == 0 for moment in moments]).all(0).sum() if moments else parameter.numel()
        else:
            clear = parameter.numel() * (torch.stack([moment.any() for moment in moments]).sum() == 0)
        zero = zero + clear
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
