"""An idea of one's own for the joints of a chain: rows of A that are waves, so that each link listens to a band of
features. recipes/my_idea.yaml compares it; docs/your-own-idea.md says what else may stand in such a file."""

import math

import torch


def waves(matrix, *, band: int = 16):
    """A_rj = a cos(2 pi (f_r j / I + p_r)), B = 0: frequencies f from the link's own band, phases p at random, rows as
    long as PEFT's are on average (|a|^2 = 1/3)."""
    n_in = matrix.weight_OI.shape[1]
    first = 1 + band * len(matrix.earlier)  # a band for each link
    frequency_R1 = torch.randint(first, first + band, (matrix.rank, 1), generator=matrix.generator)
    phase_R1 = torch.rand(matrix.rank, 1, generator=matrix.generator)
    A_RI = torch.cos(2 * math.pi * (frequency_R1 * torch.arange(n_in) / n_in + phase_R1))
    return A_RI / A_RI.norm(dim=1, keepdim=True) / math.sqrt(3)
