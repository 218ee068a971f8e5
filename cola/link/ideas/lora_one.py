"""`init: lora_one`: the pair begins with a step along the full gradient, which the function takes (LoRA-One, arXiv
2502.01235, "LoRA-One" in the authors' README).

With G the full gradient of the mean loss, -G = U S V^T:

    B = U_r (S_r / S_1)^1/2 / sqrt(gamma)        A = (S_r / S_1)^1/2 V_r^T / sqrt(gamma)

so that B A is the best step of rank r along -G, whose largest singular value is 1 / gamma however large G is. Nothing
is taken out of the weight: the function moves by scale * B A, at every link that begins so.

Traps: the scale alpha / rank multiplies that step, so a larger one needs a larger gamma. And where G has less than r
singular values above zero, a row of A and its column of B are both zero and are never trained.
"""

import torch

from cola.errors import IdeaError
from cola.link.ideas.door import Factors, Matrix
from cola.link.ideas.gradient import top_right_flops, top_right_vectors
from cola.link.ideas.work import Shape, product


def lora_one(matrix: Matrix, *, gamma: float) -> Factors:
    """A and B of the first singular vectors of minus the full gradient; IdeaError where that is zero."""
    if not matrix.gradient_OI.any():
        raise IdeaError(f"init: lora_one: the full gradient of {matrix.name} is zero and has no direction")
    V_RI = top_right_vectors(matrix.gradient_OI, matrix.rank, matrix.generator).double()
    US_OR = -matrix.gradient_OI.double() @ V_RI.T
    S_R = US_OR.norm(dim=0)
    root_R = (S_R / S_R.max() / gamma).sqrt()
    U_OR = torch.nn.functional.normalize(US_OR, dim=0, eps=torch.finfo(torch.float64).tiny)
    return Factors((root_R[:, None] * V_RI).float(), (U_OR * root_R).float(), moves=True)


def lora_one_flops(shape: Shape) -> float:
    """The singular vectors, and the gradient along them."""
    return top_right_flops(shape, shape.rank) + product(shape.n_out, shape.n_in, shape.rank)
