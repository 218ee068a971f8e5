"""`knot.pair: keep_a`: the next pair begins with A of the one before, and with B = 0.

The pair before is merged as ever, so the function is unchanged. All links then look at the features through one A, as
long as it does not move much: a control that has a chain's merges and resets without its fresh directions. It is no
paper's.

Trap: the sum of such links hardly has a larger rank than one of them, which is what a chain is for.
"""

from torch import Tensor

from cola.link.ideas.door import PassedOn


def keep_a(matrix: PassedOn) -> Tensor:
    """A as the link before left it."""
    return matrix.before.A_RI
