"""Work of dense decompositions in FLOPs, by the leading terms of Golub and Van Loan (Matrix Computations, 4th edition).

What an implementation takes is another number, and on small matrices time is not work at all. A multiply and add are
two, as in torch's counter; what is done entry by entry is not counted, there as here.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """One matrix, as an idea's count of its work is given it."""

    n_out: int
    n_in: int
    rank: int = 0  # of the pair; 0 where the whole matrix is trained
    earlier: int = 0  # ranks of the links before, together


def product(m: int, k: int, n: int) -> float:
    """(m x k) times (k x n)."""
    return 2.0 * m * k * n


def qr(m: int, n: int) -> float:
    """Householder QR of m x n with its thin Q (section 5.2)."""
    m, n = max(m, n), min(m, n)
    return 2 * (2 * m * n**2 - 2 / 3 * n**3)


def svd(m: int, n: int) -> float:
    """Thin SVD of m x n, both sides' vectors (figure 8.6.1, R-SVD)."""
    m, n = max(m, n), min(m, n)
    return 6.0 * m * n**2 + 20.0 * n**3


def eigh(n: int) -> float:
    """Eigenvalues and vectors of a symmetric n x n (section 8.3)."""
    return 9.0 * n**3


def eigvalsh(n: int) -> float:
    """Its eigenvalues alone."""
    return 4 / 3 * n**3


def pinv(n: int) -> float:
    """Pseudo-inverse of n x n: its SVD, and one product."""
    return svd(n, n) + product(n, n, n)
