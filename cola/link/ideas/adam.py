"""Adam's direction, for optimizers that take AdamW's steps along something else than a gradient."""

from typing import Any

import torch
from torch import Tensor

from cola.link.ideas.door import Trained


def adam_direction(state: dict[str, Any], gradient: Tensor, trained: Trained) -> Tensor:
    """m / (sqrt(v) + epsilon), both moments corrected for their bias, as PyTorch's AdamW has it; the state goes on.

    The first moment comes first in the state: by it `moments.first_moment` tells whether there was a gradient.
    """
    if not state:
        state |= {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient), "step": 0}
    beta1, beta2 = trained.betas
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    second = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_()
    return state["exp_avg"] / (1 - beta1 ** state["step"]) / second.add_(trained.epsilon)
