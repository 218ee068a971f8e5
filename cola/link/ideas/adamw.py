"""`optimizer: adamw`: AdamW (arXiv 1711.05101), PyTorch's."""

import torch

from cola.link.ideas.door import Trained


def adamw(trained: Trained) -> torch.optim.AdamW:
    """A fresh AdamW: no moments, and a step count of zero (COLA, Figure 1).

    Fused: one pass over each tensor. For all weights of a small model the plain one takes as long as a short batch.
    """
    betas, epsilon, decay = trained.betas, trained.epsilon, trained.weight_decay
    return torch.optim.AdamW(trained.groups, lr=0.0, fused=True, betas=betas, eps=epsilon, weight_decay=decay)
