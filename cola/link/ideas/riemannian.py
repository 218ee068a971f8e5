"""`optimizer: riemannian`: AdamW on gradients that are preconditioned by the other factor (arXiv 2402.02347), PEFT's.

    g_A <- (B^T B + damping I)^-1 g_A        g_B <- g_B (A A^T + damping I)^-1

which is the gradient under a metric of the product B A: B g_A and g_B A are then, but for the damping, the same for B T
and T^-1 A. The scale alpha / rank is not among it: it is one factor of both, and AdamW does not see it.

Traps: AdamW's entrywise division comes after it, so the step itself still goes by how the product is split. Gradients
are clipped (`max_grad_norm`) before it. And a fresh pair has B = 0, where the damping is all there is: while B is small
g_A grows by 1 / damping.
"""

import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from cola.link.ideas.door import Trained
from cola.link.ideas.work import Shape, pinv, product


def riemannian(trained: Trained, *, damping: float) -> torch.optim.Optimizer:
    """PEFT's preconditioned AdamW; what is no pair (DoRA's lengths) is trained by plain AdamW."""
    # PEFT takes a model and finds its pairs by name, in one group: it is given such a model, and then cola's groups.
    pairs = nn.ModuleList(
        nn.ModuleDict({"lora_A": _Weight(pair.A_RI), "lora_B": _Weight(pair.B_OR)}) for pair in trained.pairs
    )
    optimizer = create_riemannian_optimizer(
        pairs,  # pyright: ignore[reportArgumentType] - whose names are all that is asked for
        torch.optim.AdamW,
        lr=0.0,
        reg=damping,
        fused=True,
        betas=trained.betas,
        eps=trained.epsilon,
        weight_decay=trained.weight_decay,
    )
    optimizer.param_groups.clear()
    for group in trained.groups:
        optimizer.add_param_group(group)
    return optimizer


def riemannian_flops(shape: Shape, step: int) -> float:
    """Of each factor: the other's square, its inverse, and a product with the gradient."""
    n_out, n_in, rank, _ = shape
    return 2 * pinv(rank) + 2 * (product(rank, n_in, rank) + product(rank, n_out, rank))


class _Weight(nn.Module):
    """A module that is one weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
