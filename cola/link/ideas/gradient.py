"""`init: gradient`: rows of A are the top right singular vectors of the full gradient G, B = 0.

This is the linear minimization step of Frank-Wolfe, on which COLA's theory rests (arXiv 2401.04151, section 4): over
the matrices of rank r and bounded norm, <G, X> is least at X = -U_r V_r^T. With A = V_r^T and B = 0 the first gradient
of B is s G A^T = s U_r S_r, so the first step of B goes along -U_r; LoRA-GA (2407.05000) and LoRA-One (2502.01235) put
a step of it into B too and change, or take out of the weight, what that does to the function.
"""

import math

import torch
from torch import Generator, Tensor

from cola.link.ideas.door import Matrix
from cola.link.ideas.work import Shape, product, qr, svd

# Directions only: rows have the length that PEFT's have in expectation, so that a learning rate means the same.
# E|a|^2 = 1/3 for a row of a Kaiming-uniform A (a = sqrt 5): entries U(-1/sqrt I, 1/sqrt I)
ROW_LENGTH = 1 / math.sqrt(3)

SPARE, LARGE, ITERATIONS = 8, 4, 8  # vectors of a subspace beyond the rank; so many times as large is much larger


def gradient(matrix: Matrix) -> Tensor:
    """A along the gradient."""
    return ROW_LENGTH * top_right_vectors(matrix.gradient_OI, matrix.rank, matrix.generator)


def gradient_flops(shape: Shape) -> float:
    """The singular vectors."""
    return top_right_flops(shape, shape.rank)


def top_right_flops(shape: Shape, rank: int) -> float:
    """Of `top_right_vectors`."""
    n_out, n_in, *_ = shape
    width = rank + SPARE
    if min(n_out, n_in) <= LARGE * width:
        return svd(n_out, n_in)
    there, back = product(n_out, n_in, width) + qr(n_out, width), product(n_in, n_out, width) + qr(n_in, width)
    return (ITERATIONS + 1) * there + ITERATIONS * back + product(width, n_out, n_in) + svd(width, n_in)


def top_right_vectors(matrix_OI: Tensor, rank: int, generator: Generator) -> Tensor:
    """The first right singular vectors as rows (R, I), each with its largest entry positive.

    By subspace iteration with a few vectors to spare, seeded, where the matrix is much larger than the rank.
    """
    matrix_OI = matrix_OI.double()
    width = rank + SPARE
    if min(matrix_OI.shape) <= LARGE * width:
        rows_RI = torch.linalg.svd(matrix_OI, full_matrices=False).Vh[:rank]
    else:
        guess_IK = torch.randn(matrix_OI.shape[1], width, generator=generator, dtype=torch.float64)
        for _ in range(ITERATIONS):
            basis_OK = torch.linalg.qr(matrix_OI @ guess_IK).Q
            guess_IK = torch.linalg.qr(matrix_OI.T @ basis_OK).Q
        basis_OK = torch.linalg.qr(matrix_OI @ guess_IK).Q
        rows_RI = torch.linalg.svd(basis_OK.T @ matrix_OI, full_matrices=False).Vh[:rank]
    largest_R1 = rows_RI.gather(1, rows_RI.abs().argmax(dim=1, keepdim=True))
    return (rows_RI * largest_R1.sign()).float()
