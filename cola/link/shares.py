"""Which share of a link's pairs its knot keeps, where another link follows."""

from collections.abc import Sequence
from typing import TypeAlias

from cola.link.ideas import door
from cola.link.residual import LinkWeights, Residual, Share
from cola.recipe.ideas import Idea
from cola.recipe.resolved import Rules

Logged: TypeAlias = Sequence[door.Seen]  # of a link's steps, in order


def kept(rules: Rules, learned: Residual, pairs: LinkWeights, logged: Logged) -> Share:
    """The share of all pairs, or of each by its module: the number of the rules, or what their function says.

    Args:
        learned: The links tied before.
        pairs: Of the link that is to be tied.

    Raises:
        IdeaError: the function gave what is no share.
    """
    idea = rules.merge_fraction
    if not isinstance(idea, Idea):
        return idea
    link = door.Tied(len(learned) + 1, logged, pairs, learned)
    return door.share_of(door.function_of(idea)(link), idea, link)
