"""`init: orthogonal`: rows of A orthogonal to those of all earlier links, B = 0, so that a link looks where none before
it did."""

import torch
from torch import Generator, Tensor

from cola.link.ideas.door import Matrix
from cola.link.ideas.gradient import ROW_LENGTH
from cola.link.ideas.work import Shape, product, qr


def orthogonal(matrix: Matrix) -> Tensor | None:
    """A of random orthogonal directions; PEFT's draw for the first link, which has none before it."""
    if not matrix.earlier:
        return None
    used_KI = torch.cat([pair.A_RI for pair in matrix.earlier])
    return ROW_LENGTH * orthogonal_rows(used_KI, matrix.rank, matrix.generator)


def orthogonal_flops(shape: Shape) -> float:
    """The span of the rows before, taken out of random ones twice."""
    _, n_in, rank, used = shape
    if not used:
        return 0.0
    return qr(n_in, used) + 2 * (2 * product(used, n_in, rank) + qr(n_in, rank))


def orthogonal_rows(used_KI: Tensor, rank: int, generator: Generator) -> Tensor:
    """Random orthonormal rows (R, I) that are orthogonal to every row of `used_KI`."""
    used_IK = torch.linalg.qr(used_KI.double().T).Q
    fresh_IR = torch.randn(used_KI.shape[1], rank, generator=generator, dtype=torch.float64)
    for _ in range(2):  # once leaves a rounding error of the size of what was taken away
        fresh_IR = fresh_IR - used_IK @ (used_IK.T @ fresh_IR)
        fresh_IR = torch.linalg.qr(fresh_IR).Q
    return fresh_IR.T.float()
