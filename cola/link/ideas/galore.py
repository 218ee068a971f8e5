"""`optimizer: galore`: full weights whose AdamW works in a subspace of the gradient (GaLore, arXiv 2403.03507).

Of each matrix W (O x I) with gradient G the top `rank` singular vectors P of the side that is shorter are taken from
G at the first step and every `refresh` steps after it (section 4.2, algorithm 2):

    O >= I:  P (rank x I) from the right,  R = G P^T,  W <- W - lr * scale * adam(R) P
    O <  I:  P (O x rank) from the left,   R = P^T G,  W <- W - lr * scale * P adam(R)

adam(R) is AdamW's direction, whose two moments are of R's shape: that and P is all that is remembered, in place of two
matrices of W's. The side, the scale of 0.25 and the 200 steps are those of the authors' code
(https://github.com/jiaweizzhao/GaLore/blob/1317b5f7/galore_torch/galore_projector.py). As there (torchrun_main.py: the
linear layers of attention and MLP) all else is AdamW's: embeddings, head, and what is no matrix.

Traps: the rate counts times `scale`, and an entry of W moves by a small part of what an entry of R does, so a rate that
suits AdamW is too small. In a small model the moments of the embeddings are most of what is left to be remembered
(`freeze` leaves them out). Gradients are of W's size still: what is saved is the moments. And the moments stay as they
are when P is taken anew, though they belong to the directions before (as in the authors' code).
"""

from typing import Any

import torch
from torch import Tensor

from cola.link.ideas.adam import adam_direction
from cola.link.ideas.door import Trained
from cola.link.ideas.work import Shape, product, svd


def galore(trained: Trained, *, rank: int, refresh: int, scale: float) -> torch.optim.Optimizer:
    """A fresh GaLore, without subspaces and moments."""
    return GaLore(trained, rank, refresh, scale)


def galore_flops(shape: Shape, step: int, *, rank: int, refresh: int) -> float:
    """Into the subspace and back; every `refresh` steps the SVD of the gradient."""
    n_out, n_in, *_ = shape
    there_and_back = 2 * product(n_out, n_in, min(rank, n_out, n_in))
    return there_and_back + (svd(n_out, n_in) if step % refresh == 0 else 0.0)


class GaLore(torch.optim.Optimizer):
    """AdamW in a subspace for the linear layers' matrices, AdamW for the rest."""

    def __init__(self, trained: Trained, rank: int, refresh: int, scale: float) -> None:
        super().__init__(trained.groups, {"lr": 0.0})
        self.trained, self.rank, self.refresh, self.scale = trained, rank, refresh, scale
        self.projected = set(trained.matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step = self._projected if parameter in self.projected else adam_direction
                direction = step(self.state[parameter], parameter.grad, self.trained)
                parameter.mul_(1 - group["lr"] * self.trained.weight_decay).add_(direction, alpha=-group["lr"])

    def _projected(self, state: dict[str, Any], gradient_OI: Tensor, trained: Trained) -> Tensor:
        """The direction of a matrix, from that in the subspace."""
        P, from_right = state.pop("projection", None), gradient_OI.shape[0] >= gradient_OI.shape[1]
        if P is None or state["step"] % self.refresh == 0:
            U, _, V = torch.linalg.svd(gradient_OI, full_matrices=False)
            P = (V[: self.rank] if from_right else U[:, : self.rank]).contiguous()
        inside = adam_direction(state, gradient_OI @ P.T if from_right else P.T @ gradient_OI, trained)
        state["projection"] = P
        return self.scale * (inside @ P if from_right else P @ inside)
