"""`optimizer: reflora`: AdamW on the gradients of the optimal factorization (RefLoRA, arXiv 2505.18877).

Every (B T, T^-1 A) is the same update, but a step of each is another. RefLoRA steps as that factorization would whose
bound on the loss is lowest, which is the one where both factors weigh the same. With M = A A^T and N = B^T B it is
told by the symmetric S that solves S M S = N,

    S = M^-1/2 (M^1/2 N M^1/2)^1/2 M^-1/2        g_B <- g_B S        g_A <- S^-1 g_A

and AdamW takes its step along these in place of the gradients; A and B themselves stay as they are. So does the
authors' code (https://github.com/zhangyilang/RefLoRA/blob/7dacea51/reflora/reflora.py, `dummy_step`).

Traps: beside B = 0 there is no such factorization, S is 0 and nothing would ever move. So a pair whose M or N is as
good as singular is left to plain AdamW at that step; the authors do that for the first 100 steps of a run, which is
`warmup` here, of each link. And with Adam's division behind it the step does not keep what plain gradient descent along
these would have: to be the same for every (B T, T^-1 A).
"""

from typing import Any

import torch
from torch import Tensor

from cola.link.ideas.adamw import adamw
from cola.link.ideas.door import Trained, TrainedPair
from cola.link.ideas.work import Shape, eigh, eigvalsh, product

SMALLEST = 1e-6  # eigenvalue of M or N, of its largest: float32 holds no less of a product


def reflora(trained: Trained, *, warmup: int) -> torch.optim.AdamW:
    """A fresh AdamW that is given the other gradients, after `warmup` steps."""
    optimizer = adamw(trained)

    def refactor(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for pair in trained.pairs:
            if int(optimizer.state[pair.B_OR].get("step", 0)) >= warmup:
                _refactor(pair)

    optimizer.register_step_pre_hook(refactor)
    return optimizer


def reflora_flops(shape: Shape, step: int, *, warmup: int) -> float:
    """The squares of both factors, four powers of r x r, and a product with each gradient, as if no pair were singular:
    a fresh one is at its first step."""
    n_out, n_in, rank, _ = shape
    if step < warmup:
        return 0.0
    square = product(rank, rank, rank)
    small = 2 * eigvalsh(rank) + 4 * (eigh(rank) + square) + 6 * square
    return small + 2 * (product(rank, n_in, rank) + product(rank, n_out, rank))


@torch.no_grad()
def _refactor(pair: TrainedPair) -> None:
    """Put the gradients of the optimal factorization, as steps of this one, in the place of a pair's own."""
    if pair.A_RI.grad is None or pair.B_OR.grad is None:
        return
    A_RI, B_OR = pair.A_RI.double(), pair.B_OR.double()
    M_RR, N_RR = A_RI @ A_RI.T, B_OR.T @ B_OR
    if _singular(M_RR) or _singular(N_RR):
        return
    root_RR = _power(M_RR, 0.5)
    unroot_RR, middle_RR = _power(M_RR, -0.5), root_RR @ N_RR @ root_RR
    S_RR = unroot_RR @ _power(middle_RR, 0.5) @ unroot_RR
    inverse_RR = root_RR @ _power(middle_RR, -0.5) @ root_RR
    pair.A_RI.grad = (inverse_RR @ pair.A_RI.grad.double()).float()
    pair.B_OR.grad = (pair.B_OR.grad.double() @ S_RR).float()


def _singular(gram_RR: Tensor) -> bool:
    sizes = torch.linalg.eigvalsh(gram_RR)
    return bool(sizes[0] <= SMALLEST * sizes[-1])


def _power(gram_RR: Tensor, exponent: float) -> Tensor:
    """Of a symmetric positive matrix."""
    sizes, vectors = torch.linalg.eigh(gram_RR)
    return vectors * sizes**exponent @ vectors.T
