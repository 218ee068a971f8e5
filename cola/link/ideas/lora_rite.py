"""`optimizer: lora_rite`: an adaptive step of s B A that no factorization of it changes (LoRA-RITE, arXiv 2410.20625).

For the step of B let A^T = U T with orthonormal columns U and triangular T (QR), and with it the gradient without the
size of the other factor, in whose column space the moments live; they follow that space as it turns:

    g = g_B T^-1            P = U^T U_before
    V <- b2 P V P^T + (1 - b2) g^T g / O
    M <- b1 M P^T + (1 - b1) g V^-1/2
    B <- B - lr (M T^-T + weight_decay B)

and likewise A, with B = U T. So B A moves by -lr M U^T, which is the same for every (B T, T^-1 A). b1 and b2 are
`training.betas`, corrected for their bias as they decay (arXiv 1804.04235, section 7.1). As in the authors' code
(https://github.com/gkevinyen5418/LoRA-RITE/blob/67fd532e/lora_rite.py) V is a mean over rows, where a summary of the
paper has a sum, all g together are scaled to a norm of `clip` at most, and the mass of V that leaves with the turning
space is not made up for (there an option that is off, and does not run). They also skip a g whose entries are above 1
in the mean, which is not here. DoRA's lengths, which are no pair, are AdamW's.

Traps: V^-1/2 takes whole directions to size one, so the first step of a factor has all R singular values alike, the
smallest too. Beside B = 0 nothing is known of g_A: A stays until B has moved. `max_grad_norm` clips before all this, by
the size of the factors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cola.link.ideas.adam import adam_direction
from cola.link.ideas.door import Trained
from cola.link.ideas.work import Shape, eigh, pinv, product, qr


def lora_rite(trained: Trained, *, clip: float) -> torch.optim.Optimizer:
    """A fresh LoRA-RITE, without moments."""
    return LoRARite(trained, clip)


def lora_rite_flops(shape: Shape, step: int) -> float:
    """Of each factor: the other's QR, the inverse of its size, the turn of both moments, a root, and five products of a
    gradient's size."""
    n_out, n_in, rank, _ = shape
    square = product(rank, rank, rank)
    return sum(
        qr(other, rank)
        + (pinv(rank) + eigh(rank) + 3 * square)
        + (product(rank, other, rank) if step else 0.0)
        + 5 * product(own, rank, rank)
        for own, other in ((n_in, n_out), (n_out, n_in))
    )


class Bare(NamedTuple):
    """A factor's gradient without the size of the other factor, float64."""

    gradient_NR: Tensor
    basis_KR: Tensor  # U of the other factor
    inverse_RR: Tensor  # T^-1


class LoRARite(torch.optim.Optimizer):
    """Steps of each pair that go by its product, AdamW's for what is no pair."""

    def __init__(self, trained: Trained, clip: float) -> None:
        super().__init__(trained.groups, {"lr": 0.0})
        self.trained, self.clip = trained, clip

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient."""
        bare: dict[nn.Parameter, Bare] = {}
        for pair in self.trained.pairs:  # of both factors before either moves
            if pair.A_RI.grad is not None and pair.B_OR.grad is not None:
                bare[pair.A_RI] = _bare(pair.A_RI.grad.T, pair.B_OR)
                bare[pair.B_OR] = _bare(pair.B_OR.grad, pair.A_RI.T)
        norm = torch.stack([one.gradient_NR.norm() for one in bare.values()]).norm() if bare else torch.ones(())
        share = (self.clip / norm).clamp(max=1)
        tall = {pair.B_OR for pair in self.trained.pairs}
        for group in self.param_groups:
            rate, decay = group["lr"], self.trained.weight_decay
            for parameter in group["params"]:
                if parameter in bare:
                    along_NR = self._along(self.state[parameter], bare[parameter], share).float()
                    along = along_NR if parameter in tall else along_NR.T
                elif parameter.grad is not None:
                    along = adam_direction(self.state[parameter], parameter.grad, self.trained)
                else:
                    continue
                parameter.mul_(1 - rate * decay).sub_(along, alpha=rate)

    def _along(self, state: dict[str, Any], bare: Bare, share: Tensor) -> Tensor:
        """M T^-T; the state goes on."""
        gradient_NR, basis_KR, inverse_RR = bare.gradient_NR * share, bare.basis_KR, bare.inverse_RR
        rank = len(inverse_RR)
        if not state:
            mean_NR, square_RR = torch.zeros_like(gradient_NR), torch.zeros(rank, rank).to(gradient_NR)
            turn_RR, state["step"] = torch.eye(rank).to(gradient_NR), 0
        else:
            mean_NR, square_RR = state["exp_avg"].double(), state["exp_avg_sq"].double()
            turn_RR = basis_KR.T @ state["other_basis"].double()
        state["step"] += 1
        keep1, keep2 = (_corrected(beta, state["step"]) for beta in self.trained.betas)
        now_RR = gradient_NR.T @ gradient_NR / len(gradient_NR)
        square_RR = keep2 * turn_RR @ square_RR @ turn_RR.T + (1 - keep2) * now_RR
        sizes_R, vectors_RR = torch.linalg.eigh(square_RR)
        root_RR = vectors_RR / (sizes_R.clamp(min=0).sqrt() + self.trained.epsilon) @ vectors_RR.T
        mean_NR = keep1 * mean_NR @ turn_RR.T + (1 - keep1) * gradient_NR @ root_RR
        # The mean comes first, by name too: it tells whether there was a gradient (`moments.first_moment`).
        state |= {"exp_avg": mean_NR.float(), "exp_avg_sq": square_RR.float(), "other_basis": basis_KR.float()}
        return mean_NR @ inverse_RR.T


def _bare(gradient_NR: Tensor, other_KR: Tensor) -> Bare:
    basis_KR, size_RR = torch.linalg.qr(other_KR.double())
    inverse_RR = torch.linalg.pinv(size_RR)
    return Bare(gradient_NR.double() @ inverse_RR, basis_KR, inverse_RR)


def _corrected(beta: float, step: int) -> float:
    """A moment's decay at a step, counted from 1, that makes it a mean of what there was."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)
