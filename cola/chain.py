"""Chain of LoRA: residual learning on weights (Xia, Qin & Hazan, arXiv 2401.04151).

    W_k = W_0 + Σ_{i<=k} s_i B_i A_i          s_i = alpha_i / rank_i

    extend     put a fresh pair beside the frozen weights; B A = 0, so the function is unchanged
    tune       train that pair and nothing else
    tie_knot   fold the pair into the weights, from the untouched W_0; the function is unchanged again

and again: the sum of k pairs of rank r has rank up to k r, and never more than one pair is trained. A chain of one
link is LoRA, of none the base; full fine-tuning is a link whose method is `full`, which leaves no pair to tie.
recipes/flat_loop.py is the same loop in one function of plain peft.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from cola.link import adapters, residual, shares, starts
from cola.link.base import Base
from cola.link.drift import Drift, Outputs, Probe
from cola.link.residual import Applied, LinkWeights, Residual, Share
from cola.link.targets import target_names
from cola.recipe.methods import Lora
from cola.recipe.plan import Link
from cola.recipe.resolved import Rules


@dataclass
class Chain:
    """A model, the base it came from, the rules at its knots, the links tied so far."""

    model: PreTrainedModel
    base: Base
    rules: Rules
    learned: Residual = field(default_factory=list)


@dataclass(frozen=True)
class Knot:
    """What tying one link did."""

    weights: LinkWeights  # empty for a method that leaves no pair
    outputs: Outputs  # once it was tied
    drift: Drift  # of the outputs, which should be nothing but rounding
    applied: dict[str, Applied]  # what each of the link's matrices was given, against what was learned
    share: Share  # of the pair that was kept


def run_chain(
    chain: Chain,
    links: Sequence[Link],
    tune: Callable[[Chain, Link], shares.Logged | None],
    probe: Probe,
    gradients: starts.Gradients = starts.no_gradients,
) -> Iterator[Knot]:
    """Train the links that are not tied yet, in order: `tune` trains what `extend` attached, and may return its log.

    Args:
        probe: Asks the model, in eval mode.
        gradients: Full gradients of matrices, for a start along them.
    """
    start = probe(chain.model)
    for link in links[len(chain.learned) :]:
        extend(chain, link, gradients)
        logged = tune(chain, link) or ()
        knot = tie_knot(chain, start, probe, link is not links[-1], logged)
        yield knot
        start = knot.outputs


def extend(chain: Chain, link: Link, gradients: starts.Gradients = starts.no_gradients) -> None:
    """Attach a fresh pair, drawn from the link's seed. The model's outputs do not change."""
    if isinstance(link.settings, Lora):
        chain.base.remember(target_names(chain.model, link.settings.target_modules))
    last = chain.learned[-1] if link.keeps_pair else None
    if last is not None:
        retie(chain, [*chain.learned[:-1], {}])  # a control: the pair before, untied, goes on in its place
    chain.model = adapters.attach(chain.model, link.settings, link.seed)
    starts.draw(chain.model, link, chain.base, chain.learned, gradients, last)


def retie(chain: Chain, learned: Residual, account: bool = False) -> dict[str, Applied]:
    """Set the chain to links that were trained before, whatever it has tied now; `account`: say what that did."""
    before, chain.learned = chain.learned, list(learned)
    names = residual.modules_of([*before, *learned])
    chain.base.remember(names)
    return residual.write(chain.model, chain.base, learned, names, chain.rules.merge, before if account else None)


def tie_knot(chain: Chain, start: Outputs, probe: Probe, more_to_come: bool, logged: shares.Logged = ()) -> Knot:
    """Merge the pair: W <- cast(float32(W_0) + Σ s B A), rounded once. `start`: the outputs before the link."""
    before, taken = probe(chain.model), adapters.taken_out(chain.model)
    weights = adapters.detach(chain.model)
    if taken:  # by PiSSA out of the weights; the pair holds it
        residual.write(chain.model, chain.base, chain.learned, list(taken), chain.rules.merge)
    share = shares.kept(chain.rules, chain.learned, weights, logged) if more_to_come else 1.0
    applied = retie(chain, [*chain.learned, residual.times(weights, share)], account=True)
    after = probe(chain.model)
    return Knot(weights, after, Drift.between(start, before, after), {name: applied[name] for name in weights}, share)
