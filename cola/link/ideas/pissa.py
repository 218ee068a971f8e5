"""`init: pissa`: B A is the top singular part of W, which is taken out of the frozen weight (arXiv 2404.02948)."""

import torch

from cola.link.ideas.door import Factors, Matrix


def pissa(matrix: Matrix) -> Factors:
    """A = sqrt(S / s) V^T and B = U sqrt(S / s) of the first singular values, as PEFT's `pissa_init` computes them."""
    U_OK, S_K, V_KI = torch.linalg.svd(matrix.weight_OI, full_matrices=False)
    root_RR = torch.diag(torch.sqrt(S_K[: matrix.rank] / matrix.scale))
    return Factors(root_RR @ V_KI[: matrix.rank], U_OK[:, : matrix.rank] @ root_RR)
