"""Ideas as a user writes them, in a file of their own."""

import torch

from cola import Factors


def along(matrix, *, length: float = 1.0):
    """Rows of A along the sum of the weight's rows."""
    row_I = matrix.weight_OI.sum(0)
    return length * (row_I / row_I.norm()).repeat(matrix.rank, 1)


def step(matrix):
    """A step of gradient descent, in the pair."""
    U_OK, _, V_KI = torch.linalg.svd(matrix.gradient_OI, full_matrices=False)
    return Factors(V_KI[: matrix.rank], -0.1 * U_OK[:, : matrix.rank], moves=True)


def out_of_weight(matrix):
    """Random factors, both of them, taken out of the weight."""
    n_out, n_in = matrix.weight_OI.shape
    A = torch.randn(matrix.rank, n_in, generator=matrix.generator) / n_in**0.5
    return A, torch.randn(n_out, matrix.rank, generator=matrix.generator)


class Slowing(torch.optim.SGD):
    """SGD with momentum whose steps grow smaller, by a count in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] /= group["count"] ** 0.5
        super().step(closure)


def heavy_ball(trained, *, momentum: float = 0.9):
    return Slowing(trained.groups, lr=0.0, momentum=momentum)


def counted_ball(trained):
    return torch.optim.SGD(trained.groups, lr=0.0, momentum=0.9)


def counted_ball_flops(shape, step):
    """One for each number of a pair, and one more after its first step."""
    return shape.rank * (shape.n_out + shape.n_in) * (1 + (step > 0))


def half(matrix, *, share: float = 0.5):
    """The next pair begins with a part of the one before, which is taken out of the weight it was merged into."""
    return matrix.before.A_RI, share * matrix.before.B_OR


def shrinking(link, *, by: float = 2.0):
    """The longer the chain, the less of a pair is kept."""
    return 1 / (1 + by * len(link.earlier))


def by_size(link):
    """Of each matrix the more, the larger its update is beside the largest."""
    sizes = {name: float((pair.B_OR @ pair.A_RI).norm()) for name, pair in link.pairs.items()}
    return {name: 0.5 + 0.5 * size / max(sizes.values()) for name, size in sizes.items()}
