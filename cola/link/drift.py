"""What a knot does to a model's outputs, which should be nothing but rounding."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from cola.errors import KnotDrift


@dataclass(frozen=True)
class Outputs:
    """What a model says on fixed inputs."""

    logits_NV: Tensor  # float32, at N positions
    targets_N: Tensor  # the tokens that stand there


Probe = Callable[[PreTrainedModel], Outputs]  # asks a model on fixed inputs


@dataclass(frozen=True)
class Drift:
    """Outputs on fixed inputs before and after a knot; means are over positions."""

    max_logit_change: float
    relative: float  # the same divided by the largest logit
    # ||after - before|| / ||before - start||, where start is the outputs before the link: the change by rounding as a
    # share of the change by learning. None for a link that changed nothing.
    of_learned: float | None
    kl: float  # mean of KL(before || after), nats
    loss_change: float  # mean of loss after - loss before, nats per target token

    @classmethod
    def between(cls, start: Outputs, before: Outputs, after: Outputs) -> "Drift":
        change_NV = after.logits_NV - before.logits_NV
        change = change_NV.abs().max().item()
        learned = (before.logits_NV - start.logits_NV).norm().item()
        kl, loss_change = 0.0, 0.0
        for logits_V, moved_V, target in zip(before.logits_NV, after.logits_NV, before.targets_N, strict=True):
            # In float64: the divergence of distributions this close is smaller than float32's rounding of it.
            log_p_V, log_q_V = logits_V.double().log_softmax(-1), moved_V.double().log_softmax(-1)
            kl += (log_p_V.exp() * (log_p_V - log_q_V)).sum().item()
            loss_change += (log_p_V[target] - log_q_V[target]).item()
        n = len(before.targets_N)
        return cls(
            change,
            change / max(before.logits_NV.abs().max().item(), 1e-30),
            change_NV.norm().item() / learned if learned > 0 else None,
            kl / n,
            loss_change / n,
        )

    def check(self, max_relative: float) -> None:
        """Raise KnotDrift where a logit moved by more than `max_relative` of the largest logit, or is no number."""
        if not self.relative <= max_relative:
            raise KnotDrift(
                f"a knot moved a logit by {self.relative:.2g} of the largest logit where {max_relative:.2g} is allowed "
                "(knot.max_drift); float32 keeps it near 1e-6"
            )
