"""`until: update_stops`: a link ends when its update has stopped growing (AROMA, arXiv 2504.05343: a pair is merged and
a fresh one begun once the change of the norm of its update between two checks is below a threshold).

Every `every` steps the Frobenius norm of scale * B A over all matrices is compared with what it was `every` steps
before: the link ends where it has changed by less than `tolerance` of itself.

Trap: the norm stands still where the learning rate is zero, so at the end of a schedule every link has converged.
"""

from collections.abc import Sequence

from cola.errors import IdeaError
from cola.link.ideas.door import Seen


def update_stops(steps: Sequence[Seen], *, tolerance: float, every: int) -> bool:
    """Whether the update has changed by less than `tolerance` of itself over the last `every` steps."""
    if len(steps) <= every or len(steps) % every:
        return False
    now, before = steps[-1].update_norm, steps[-1 - every].update_norm
    if now is None or before is None:
        raise IdeaError("update_stops goes by the norm of a pair's update, which these steps did not log")
    return abs(now - before) < tolerance * now
