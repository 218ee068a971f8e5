"""tune(): the optimizer steps of one link, or of a part of it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeAlias

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cola.adapters import trainable
from cola.batches import MicroBatch
from cola.errors import NonFiniteLoss
from cola.forward import logits_at
from cola.plan import Link, derived_seed

Moments: TypeAlias = dict[str, Tensor]  # AdamW's state: NAME.exp_avg, NAME.exp_avg_sq and NAME.step of each parameter

MAX_SKIPPED = 20  # steps in a row that fp16 gradient scaling may skip before the arm has diverged


@dataclass(frozen=True)
class Step:
    """One optimizer step, as it is logged.

    Attributes:
        step: Steps of the run so far, this one included.
        loss: Nats per target token over the step's rows, before the update.
        grad_norm: L2 norm of the gradient before clipping.
        learning_rate: Of this step.
        tokens: Tokens read, prompts included, padding not.
        target_tokens: Tokens that the loss is taken on.
        seconds: Wall time of the step.
        rows: Ids of the rows, in the order of the micro-batches.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    target_tokens: int
    seconds: float
    rows: list[str]


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
    """Train what is trainable, one optimizer step per batch, with an AdamW of its own.

    The loss of a step is the sum over all its target tokens divided by their number, however the rows are split
    into micro-batches. The optimizer is built here, so a link begins without moments and with Adam's step count
    at zero (COLA, Figure 1); zeroing the moments alone would make the first update 3.2 times too large. Dropout is
    seeded anew at each step, so that a link which is stopped and goes on draws what it would have drawn.

    Args:
        model: Carries the trainable weights; left in eval mode.
        link: Gives the learning rate of each step and the seed of the dropout.
        batches: One list of micro-batches per step to be made now.
        accelerator: Carries device, precision and gradient scaling.
        on_step: Called after each step; may evaluate the model and leave it in eval mode.
        done: Steps of the link that were made before.
        moments: The optimizer's state after those, from `read_moments`.

    Returns:
        The optimizer, as it is after the last step.

    Raises:
        NonFiniteLoss: names the step and the rows of its batch; the weights are those of the step before.
    """
    parameters = trainable(model)
    skipped = 0
    # What an earlier part of the job prepared must not be unscaled and stepped along, nor its moments kept alive.
    accelerator.free_memory()
    if accelerator.scaler is not None:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)  # fresh, like the optimizer
    adamw = torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay)
    optimizer = accelerator.prepare_optimizer(adamw)
    assert isinstance(optimizer, AcceleratedOptimizer)
    if moments is not None:
        _set_moments(model, optimizer, accelerator, moments)
    for place, micro_batches in enumerate(batches, start=done):
        started = perf_counter()
        step, learning_rate = link.first_step + place + 1, link.learning_rates[place]
        torch.manual_seed(derived_seed("dropout", link.seed, place))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        model.train()
        n_targets = sum(batch.n_targets for batch in micro_batches)
        loss_sum = torch.zeros((), device=accelerator.device)
        for batch in micro_batches:
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                logits_NV = logits_at(model, batch.input_ids_BT, batch.predicts_BT)
                loss = cross_entropy(logits_NV, batch.targets_N, reduction="sum")
            accelerator.backward(loss / n_targets)
            loss_sum += loss.detach()
        mean = loss_sum.item() / n_targets
        norm = accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        norm = float(norm) if norm is not None else math.nan
        # Under fp16 gradient scaling an overflowed gradient is skipped and the scale lowered, by design; not for ever.
        skipped = 0 if math.isfinite(norm) else skipped + 1
        may_skip = accelerator.scaler is not None and skipped < MAX_SKIPPED
        if not math.isfinite(mean) or not (math.isfinite(norm) or may_skip):
            rows = ", ".join(row for batch in micro_batches for row in batch.ids)
            what = f"the loss is {mean}" if not math.isfinite(mean) else f"the gradient's norm is {norm}"
            raise NonFiniteLoss(f"step {step}: {what}; rows of the batch: {rows}; try a lower learning_rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens, rows = sum(batch.n_tokens for batch in micro_batches), [row for b in micro_batches for row in b.ids]
        on_step(Step(step, mean, norm, learning_rate, tokens, n_targets, perf_counter() - started, rows), optimizer)
    model.eval()
    return optimizer


def read_moments(model: PreTrainedModel, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> Moments:
    """The optimizer's state, and the gradient scaler's under fp16, as tensors on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value.detach().cpu().contiguous()
    if accelerator.scaler is not None:
        scaler = accelerator.scaler.state_dict()
        found |= {f"scaler/{key}": torch.tensor(value, dtype=torch.float64) for key, value in scaler.items()}
    return found


def _set_moments(
    model: PreTrainedModel, optimizer: AcceleratedOptimizer, accelerator: Accelerator, moments: Moments
) -> None:
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := moments.get(f"{name}.{key}")) is not None:
                # AdamW keeps its step count on the CPU.
                where = value.device if key == "step" else parameter.device
                optimizer.optimizer.state[parameter][key] = value.to(where, copy=True)
    if accelerator.scaler is not None:
        scaler = accelerator.scaler.state_dict()
        # Whole numbers come back from their tensors as such: PyTorch insists on it.
        known = {key: type(value)(moments[f"scaler/{key}"].item()) for key, value in scaler.items()}
        accelerator.scaler.load_state_dict(known)
