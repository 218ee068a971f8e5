"""tune(): the optimizer steps of one link."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cola.adapters import trainable
from cola.batches import MicroBatch
from cola.errors import NonFiniteLoss
from cola.forward import logits_at
from cola.plan import Link

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
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    target_tokens: int
    seconds: float


def tune(
    model: PreTrainedModel,
    link: Link,
    batches: Iterable[list[MicroBatch]],
    accelerator: Accelerator,
    on_step: Callable[[Step], None],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float | None,
) -> None:
    """Train what is trainable, one optimizer step per batch and learning rate, with an AdamW of its own.

    The loss of a step is the sum over all its target tokens divided by their number, however the rows are split
    into micro-batches. The optimizer is built here, so a link begins without moments and with Adam's step count
    at zero (COLA, Figure 1); zeroing the moments alone would make the first update 3.2 times too large.

    Args:
        model: Carries the trainable weights; left in eval mode.
        link: Gives the learning rate of each step and the seed of the dropout.
        batches: One list of micro-batches per step.
        accelerator: Carries device, precision and gradient scaling.
        on_step: Called after each step; may evaluate the model and leave it in eval mode.

    Raises:
        NonFiniteLoss: names the step and the rows of its batch; the weights are those of the step before.
    """
    parameters = trainable(model)
    skipped = 0
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    torch.manual_seed(link.seed)  # dropout; a link's noise depends on the link alone
    for step, (micro_batches, learning_rate) in enumerate(
        zip(batches, link.learning_rates, strict=True), start=link.first_step + 1
    ):
        started = perf_counter()
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
        tokens = sum(batch.n_tokens for batch in micro_batches)
        on_step(Step(step, mean, norm, learning_rate, tokens, n_targets, perf_counter() - started))
    model.eval()
