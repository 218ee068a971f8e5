"""`optimizer: lora_muon`: Muon's step on the product s B A, made in the pair (LoRA-Muon, arXiv 2606.12921).

With m_A, m_B the means of the gradients (beta: the first of `training.betas`), msign(U S V^T) = U V^T, and

    R_A = (A A^T)^-1/2    dB = -1/2 msign(m_B R_A) R_A / s
    R_B = (B^T B)^-1/2    dA = -1/2 R_B msign(R_B m_A) / s

the step is A <- c A + lr dA / c and likewise B, with c = sqrt(1 - lr * weight_decay) (algorithm 1: a decay of the
product, split). s dB A and s B dA have no singular value above lr / 2 each, so that a step moves s B A by at most lr in
spectral norm, whatever rank, scale and factorization: the step is the same for every (B T, T^-1 A), and so a rate that
suits one rank suits others. There are no second moments. The paper takes msign and the roots by Newton-Schulz
iterations (appendix B); here both are exact up to float64's rounding, by what is of size rank x rank. DoRA's lengths,
which are no pair, are AdamW's.

Traps: a learning rate means another thing than AdamW's: the length of the step of a whole matrix (the paper's is 0.1).
Beside B = 0 there is no R_B: A stays until B has moved, then the two move each by as much, and a small B makes the
steps of A large. Where a gradient has fewer directions than the pair, only those move.
"""

from typing import Any

import torch
from torch import Tensor

from cola.link.ideas.adam import adam_direction
from cola.link.ideas.door import Trained
from cola.link.ideas.work import Shape, eigh, product

SMALLEST = 1e-10  # eigenvalue, of the largest: a singular value of 1e-5, below which float32's gradients are rounding


def lora_muon(trained: Trained) -> torch.optim.Optimizer:
    """A fresh LoRA-Muon, without means."""
    return LoRAMuon(trained)


def lora_muon_flops(shape: Shape, step: int) -> float:
    """Of each factor: the other's square, two roots, and the mean gradient between them."""
    n_out, n_in, rank, _ = shape
    root = eigh(rank) + product(rank, rank, rank)
    return sum(
        product(rank, other, rank) + 2 * root + 4 * product(own, rank, rank)
        for own, other in ((n_in, n_out), (n_out, n_in))
    )


class LoRAMuon(torch.optim.Optimizer):
    """Spectral steepest descent of each pair's product, AdamW for what is no pair."""

    def __init__(self, trained: Trained) -> None:
        super().__init__(trained.groups, {"lr": 0.0})
        self.trained = trained

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient."""
        directions = {}
        for pair in self.trained.pairs:  # of both factors before either moves
            A_RI, B_OR = pair.A_RI.double(), pair.B_OR.double()
            for factor, other_RR, side in ((pair.A_RI, B_OR.T @ B_OR, "left"), (pair.B_OR, A_RI @ A_RI.T, "right")):
                if factor.grad is not None:
                    mean = self._mean(self.state[factor], factor.grad)
                    tall_NR = mean.T if side == "left" else mean
                    along_NR = -0.5 / pair.scale * _whitened_sign(tall_NR.double(), other_RR).float()
                    directions[factor] = along_NR.T if side == "left" else along_NR
        for group in self.param_groups:
            rate, keep = group["lr"], (1 - group["lr"] * self.trained.weight_decay) ** 0.5
            for parameter in group["params"]:
                if parameter in directions:
                    parameter.mul_(keep).add_(directions[parameter], alpha=rate / keep)
                elif parameter.grad is not None:
                    direction = adam_direction(self.state[parameter], parameter.grad, self.trained)
                    parameter.mul_(keep**2).add_(direction, alpha=-rate)

    def _mean(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """The running mean of a factor's gradients."""
        state.setdefault("exp_avg", torch.zeros_like(gradient))
        return state["exp_avg"].lerp_(gradient, 1 - self.trained.betas[0])


def _whitened_sign(mean_NR: Tensor, gram_RR: Tensor) -> Tensor:
    """msign(m R) R for R = gram^-1/2."""
    root_RR = _inverse_root(gram_RR)
    white_NR = mean_NR @ root_RR
    return white_NR @ _inverse_root(white_NR.T @ white_NR) @ root_RR


def _inverse_root(gram_RR: Tensor) -> Tensor:
    """gram^-1/2, of directions that it has not: zero."""
    sizes, vectors = torch.linalg.eigh(gram_RR)
    there = sizes > SMALLEST * sizes[-1].clamp(min=torch.finfo(torch.float32).tiny)
    return vectors * torch.where(there, sizes, torch.inf).rsqrt() @ vectors.T
