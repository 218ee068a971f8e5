"""What a knot does to a model's outputs, which should be nothing but rounding."""

from dataclasses import dataclass

from torch import Tensor

from cola.errors import KnotDrift


@dataclass(frozen=True)
class Drift:
    """Outputs on fixed inputs before and after a knot.

    Attributes:
        max_logit_change: Largest change of a logit.
        relative: The same divided by the largest logit.
        of_learned: ||after - before|| / ||before - start||, where start is the outputs before the link: the change by
            rounding as a share of the change by learning. None for a link that changed nothing.
    """

    max_logit_change: float
    relative: float
    of_learned: float | None

    @classmethod
    def between(cls, start: Tensor, before: Tensor, after: Tensor) -> "Drift":
        change = (after - before).abs().max().item()
        learned = (before - start).norm().item()
        return cls(
            change,
            change / max(before.abs().max().item(), 1e-30),
            (after - before).norm().item() / learned if learned > 0 else None,
        )

    def check(self, max_relative: float) -> None:
        """Refuse a knot that is not what was trained.

        Raises:
            KnotDrift: a logit moved by more than `max_relative` of the largest logit, or is no number.
        """
        if not self.relative <= max_relative:
            raise KnotDrift(
                f"a knot moved a logit by {self.relative:.2g} of the largest logit where {max_relative:.2g} is allowed "
                "(knot.max_drift); float32 keeps it near 1e-6"
            )
