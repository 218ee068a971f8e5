"""`init: lora_ga`: A looks along the first r right singular vectors of the full gradient G = U S V^T, B along the next
r left ones, and the pair is taken out of the frozen weight (LoRA-GA, arXiv 2407.05000, section 3). With O rows of W:

    version: peft       A = V_[1..r]^T                            B = O^1/4 / sqrt(gamma) U_[r+1..2r] S_[r+1..2r]
    version: authors    A = O^1/4 / sqrt(gamma) V_[1..r]^T        B = O^1/4 / sqrt(gamma) U_[r+1..2r]

The first is PEFT's (`LoraConfig(init_lora_weights="lora_ga")`, directions ArB2r, scale stable), the second the paper's
and its authors' code (Outsider565/LoRA-GA). They are not the same start: under PEFT's, B is as small as the gradient.

Traps: it needs 2 r singular vectors. Under `authors` gamma alone says how large the pair is: a small one takes out more
than the weight holds, and half precision rounds what is left. And the sign of each direction is a matter of the SVD:
here the largest entry of each right singular vector is positive.
"""

from typing import Literal

from torch.nn.functional import normalize

from cola.link.ideas.door import Factors, Matrix
from cola.link.ideas.gradient import top_right_flops, top_right_vectors
from cola.link.ideas.work import Shape, product


def lora_ga(matrix: Matrix, *, gamma: float, version: Literal["peft", "authors"]) -> Factors:
    """A of the first r singular vectors, B of the next r."""
    rank, gradient_OI = matrix.rank, matrix.gradient_OI.double()
    V_KI = top_right_vectors(gradient_OI, 2 * rank, matrix.generator).double()
    A_RI, B_OR = V_KI[:rank], gradient_OI @ V_KI[rank:].T  # G V = U S
    size = len(gradient_OI) ** 0.25 / gamma**0.5
    if version == "authors":
        A_RI, B_OR = size * A_RI, normalize(B_OR, dim=0)
    return Factors(A_RI.float(), (size * B_OR).float())


def lora_ga_flops(shape: Shape) -> float:
    """Twice as many singular vectors as the rank, and the gradient along the second half of them."""
    return top_right_flops(shape, 2 * shape.rank) + product(shape.n_out, shape.n_in, shape.rank)
