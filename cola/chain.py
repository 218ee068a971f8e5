"""Chain of LoRA: residual learning on weights (Xia, Qin & Hazan, arXiv 2401.04151).

    W_k = W_0 + Σ_{i<=k} s_i B_i A_i          s_i = alpha_i / rank_i

    extend     put a fresh pair beside the frozen weights; B A = 0, so the function is unchanged
    tune       train that pair and nothing else
    tie_knot   fold the pair into the weights, from the untouched W_0; the function is unchanged again

and again: the sum of k pairs of rank r has rank up to k r, and never more than one pair is trained. A chain of one
link is LoRA, of none the base; full fine-tuning is a link whose method is `full`, which leaves no pair to tie.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from cola import adapters, residual
from cola.drift import Drift
from cola.plan import Link
from cola.residual import Base, LinkWeights, Residual


@dataclass
class Chain:
    """A model, the base it came from, and the links tied so far."""

    model: PreTrainedModel
    base: Base
    learned: Residual = field(default_factory=list)


@dataclass(frozen=True)
class Knot:
    """What tying one link did.

    Attributes:
        weights: The link's pairs; empty for full fine-tuning.
        drift: What the knot did to the outputs, which should be nothing but rounding.
        relative_size: ||s B A||_F / ||W_0||_F of each matrix.
    """

    weights: LinkWeights
    drift: Drift
    relative_size: dict[str, float]


def run_chain(
    chain: Chain,
    links: Sequence[Link],
    tune: Callable[[PreTrainedModel, Link], None],
    probe: Callable[[PreTrainedModel], Tensor],
    max_drift: float,
) -> Iterator[Knot]:
    """Train the links that are not tied yet, one after the other.

    Args:
        chain: The model to train, in place.
        links: What to train, in order.
        tune: Trains what `extend` attached.
        probe: The model's logits on fixed inputs, in eval mode.
        max_drift: Largest relative change of a logit that rounding can explain.

    Raises:
        KnotDrift: a knot changed the outputs by more than that, so it is not what was trained.
    """
    for link in links[len(chain.learned) :]:
        start = probe(chain.model)
        extend(chain, link)
        tune(chain.model, link)
        knot = tie_knot(chain, start, probe)
        knot.drift.check(max_drift)
        yield knot


def extend(chain: Chain, link: Link) -> None:
    """Attach a fresh pair, drawn from the link's seed. The model's outputs do not change."""
    if link.method == "lora":
        chain.base.remember(adapters.target_names(chain.model, link))
    adapters.attach(chain.model, link)


def retie(chain: Chain, learned: Residual) -> None:
    """Set the chain to links that were trained before, whatever it has tied now."""
    names = residual.modules_of([*chain.learned, *learned])
    chain.base.remember(names)
    chain.learned = list(learned)
    residual.write(chain.model, chain.base, chain.learned, names)


def tie_knot(chain: Chain, start: Tensor, probe: Callable[[PreTrainedModel], Tensor]) -> Knot:
    """Merge the pair: W <- cast(float32(W_0) + Σ s B A), rounded once. `start`: the outputs before the link."""
    before = probe(chain.model)
    weights = adapters.detach(chain.model)
    chain.learned.append(weights)
    residual.write(chain.model, chain.base, chain.learned, list(weights))
    after = probe(chain.model)
    return Knot(weights, Drift.between(start, before, after), residual.relative_size(chain.base, weights))
