"""`optimizer: apollo`: gradients whose rows are as long as Adam makes those of a sketch (APOLLO, arXiv 2412.05270).

Of each matrix W (O x I) with gradient G, its shorter side is sketched by a random P of entries N(0, 1 / rank), drawn
anew every `refresh` steps (algorithm 1). With R = G P^T where O >= I, and adam(R) AdamW's direction of it,

    s_i = |adam(R)_i| / |R_i|  of each row i        W <- W - lr * sqrt(scale) * diag(s) G

and with columns in place of rows where O < I. Only the two moments of R are remembered, and a norm: P is drawn again
at each step, from the number of the matrix and of the draw. So that no step is much larger than the one before, the
norm of diag(s) G, without Adam's correction of its bias, may grow by 1 % from step to step (the limiter of Fira,
2410.01623). sqrt(scale), the limiter and the side are those of the authors' package (apollo-torch 1.0.3,
`APOLLOAdamW`, `scale_type: channel`, `scale_front: false`). As in their scripts, which sketch the linear layers of
attention and MLP, all else is AdamW's: embeddings, head, and what is no matrix.

Traps: a random sketch of rank r makes s too small by about sqrt(r / I), for which `scale` is there: with a small rank
it must be large (the authors take 1 at a quarter of the width, 128 at rank 1). The limiter compares with the step
before, so a first batch of small gradients holds the later ones down.
"""

from typing import Any

import torch
from torch import Tensor

from cola.link.ideas.adam import adam_direction
from cola.link.ideas.door import Trained
from cola.link.ideas.work import Shape, product
from cola.recipe.plan import derived_seed

GROWTH = 1.01  # of the norm, from step to step
SMALL = 1e-8  # beside a norm that is divided by


def apollo(trained: Trained, *, rank: int, refresh: int, scale: float) -> torch.optim.Optimizer:
    """A fresh APOLLO, without moments."""
    return Apollo(trained, rank, refresh, scale)


def apollo_flops(shape: Shape, step: int, *, rank: int) -> float:
    """The sketch."""
    return product(shape.n_out, shape.n_in, rank)


class Apollo(torch.optim.Optimizer):
    """Scaled gradients for the linear layers' matrices, AdamW for the rest."""

    def __init__(self, trained: Trained, rank: int, refresh: int, scale: float) -> None:
        super().__init__(trained.groups, {"lr": 0.0})
        self.trained, self.rank, self.refresh, self.scale = trained, rank, refresh, scale
        self.sketched = set(trained.matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient."""
        rated = [(parameter, group["lr"]) for group in self.param_groups for parameter in group["params"]]
        for number, (parameter, rate) in enumerate(rated):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if parameter in self.sketched:
                direction = self.scale**0.5 * self._scaled(state, parameter.grad, number)
            else:
                direction = adam_direction(state, parameter.grad, self.trained)
            parameter.mul_(1 - rate * self.trained.weight_decay).add_(direction, alpha=-rate)

    def _scaled(self, state: dict[str, Any], gradient_OI: Tensor, number: int) -> Tensor:
        """The gradient with its rows, or columns, as long as Adam's would be, and no longer than the limit."""
        by_rows = gradient_OI.shape[0] >= gradient_OI.shape[1]
        tall = gradient_OI if by_rows else gradient_OI.T
        draw = torch.Generator().manual_seed(derived_seed("apollo", number, state.get("step", 0) // self.refresh))
        P = torch.randn(tall.shape[1], self.rank, generator=draw) / self.rank**0.5
        R, norm = tall @ P.to(tall), state.pop("norm", None)
        lengths = adam_direction(state, R, self.trained).norm(dim=1) / (R.norm(dim=1) + SMALL)
        scaled = tall * lengths[:, None]
        beta1, beta2 = (1 - beta ** state["step"] for beta in self.trained.betas)
        now = scaled.norm() * beta1 / beta2**0.5
        state["norm"] = now if norm is None else torch.minimum(now, GROWTH * norm)
        scaled *= state["norm"] / (now + SMALL)
        return scaled if by_rows else scaled.T
