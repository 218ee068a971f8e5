"""`init: pissa`: B A is the top singular part of W, which is taken out of the frozen weight (arXiv 2404.02948)."""

import torch

from cola.link.ideas.door import Factors, Matrix
from cola.link.ideas.work import Shape, product, svd


def pissa(matrix: Matrix) -> Factors:
    """A = sqrt(S / s) V^T and B = U sqrt(S / s) of the first singular values, as PEFT's `pissa_init` computes them."""
    U_OK, S_K, V_KI = torch.linalg.svd(matrix.weight_OI, full_matrices=False)
    root_RR = torch.diag(torch.sqrt(S_K[: matrix.rank] / matrix.scale))
    return Factors(root_RR @ V_KI[: matrix.rank], U_OK[:, : matrix.rank] @ root_RR)


def pissa_flops(shape: Shape) -> float:
    """The SVD of the weight, and what makes the factors of it."""
    n_out, n_in, rank, _ = shape
    return svd(n_out, n_in) + product(rank, rank, n_in) + product(n_out, rank, rank)
