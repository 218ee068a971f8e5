"""How a pair is drawn when a link begins: PEFT's draw stays (`default`, `gaussian`), or an idea's takes its place.

    default      A Kaiming-uniform, B = 0 (PEFT's)        gaussian     A ~ N(0, 1/r), B = 0 (PEFT's)
    others       a function of each matrix, `cola/link/ideas` or a user's file

A start leaves the function as it is, unless it says otherwise (`door.Factors`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola.errors import ModelError
from cola.link import adapters, residual
from cola.link.base import Base, as_stored, shape_of, weight_of
from cola.link.ideas import door
from cola.link.residual import LinkWeights, Residual
from cola.link.targets import target_names
from cola.recipe.ideas import BY_PEFT, OF_SINGULAR_VECTORS, TAKEN_OUT, Idea
from cola.recipe.methods import Lora, Settings
from cola.recipe.plan import Link

Gradients = Callable[[PreTrainedModel, Link, Sequence[str]], dict[str, Tensor]]
Layers = dict[str, adapters.LoraLayer]  # that carry the attached pair, by module


def no_gradients(model: PreTrainedModel, link: Link, names: Sequence[str]) -> dict[str, Tensor]:
    """Of whoever draws no pair along gradients: raises ModelError."""
    raise ModelError("init: gradient needs a function that computes full gradients, and none is given")


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    link: Link,
    base: Base,
    learned: Residual,
    gradients: Gradients,
    kept: LinkWeights | None = None,
) -> None:
    """Redraw the attached pair as the link's `init` says, and the rule for the pair at the knot before it; what PEFT
    has drawn already is left.

    Args:
        base: Whose weights a pair may be taken out of.
        learned: The links tied before.
        gradients: Gives the full gradient (O, I) of the named modules' weights, float32, over the link's first batches.
        kept: The pair of the link before, where it goes on in place of a fresh one.

    Raises:
        IdeaError: the start's or the rule's function gave what is no pair.
    """
    if kept is not None:
        adapters.set_pair(model, kept)
        hold_out(model, base, learned)
        return
    if not isinstance(link.settings, Lora):
        return
    layers, generator = adapters.pair_layers(model), torch.Generator().manual_seed(link.seed)
    drawn: dict[str, door.Factors] = {}
    if link.settings.init.name not in BY_PEFT:
        drawn = _by_start(model, link, link.settings, base, learned, gradients, layers, generator)
    if link.pair_rule is not None:
        drawn |= _by_rule(link.pair_rule, learned[-1], drawn, layers, generator)
    for name, factors in drawn.items():
        layer = layers[name]
        A_RI, B_OR = adapters.factors_of(layer)
        A_RI.copy_(factors.A_RI)
        if factors.B_OR is not None:
            B_OR.copy_(factors.B_OR)
            if not factors.moves:
                copies = A_RI.to("cpu", copy=True), B_OR.to("cpu", copy=True)
                adapters.take_out(layer, residual.Pair(*copies, adapters.scale_of(layer)))
    hold_out(model, base, learned)


def _by_start(
    model: PreTrainedModel,
    link: Link,
    settings: Lora,
    base: Base,
    learned: Residual,
    gradients: Gradients,
    layers: Layers,
    generator: torch.Generator,
) -> dict[str, door.Factors]:
    """What the link's start gives for the matrices that it draws itself."""
    start, full_gradients = door.function_of(settings.init), dict[str, Tensor]()
    if settings.init_batches:
        with torch.enable_grad():
            full_gradients = gradients(model, link, list(layers))
    drawn = {}
    for name in full_gradients or layers:
        earlier = [links[name] for links in learned if name in links]
        weight, scale = partial(_weight, layers[name], base, name, earlier), adapters.scale_of(layers[name])
        matrix = door.Matrix(name, scale, settings.rank, earlier, generator, weight, full_gradients.get(name))
        factors = door.factors_of(start(matrix), f"init: {settings.init}", name, *_shapes(layers[name]))
        if factors is not None:
            drawn[name] = factors
    return drawn


def _by_rule(
    idea: Idea, before: LinkWeights, drawn: dict[str, door.Factors], layers: Layers, generator: torch.Generator
) -> dict[str, door.Factors]:
    """What a rule makes of the pairs before and the drawn ones, which are of the same matrices and ranks."""
    rule, made = door.function_of(idea), {}
    for name, layer in layers.items():
        A_RI, B_OR = (factor.to("cpu", torch.float32, copy=True) for factor in adapters.factors_of(layer))
        if (start := drawn.get(name)) is not None:
            A_RI, B_OR = start.A_RI.cpu(), B_OR if start.B_OR is None else start.B_OR.cpu()
        own, _ = before[name].split(len(A_RI))
        passed = door.PassedOn(name, own, residual.Pair(A_RI, B_OR, adapters.scale_of(layer)), generator)
        factors = door.factors_of(rule(passed), f"knot.pair: {idea}", name, *_shapes(layer))
        if factors is not None:
            made[name] = factors
    return made


def _shapes(layer: adapters.LoraLayer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B of an attached pair."""
    A_RI, B_OR = adapters.factors_of(layer)
    return (len(A_RI), A_RI.shape[1]), (len(B_OR), B_OR.shape[1])


def _weight(layer: adapters.LoraLayer, base: Base, name: str, earlier: Sequence[residual.Pair]) -> Tensor:
    """The weight that a layer goes by as (O, I), a float32 copy."""
    module = layer.get_base_layer()
    if not base.keeps_beside(name) and not base.sharded:
        return as_stored(module, weight_of(module, "")).to(torch.float32, copy=True)
    weight_OI = as_stored(module, base.weight(name)).to(torch.float32, copy=True)
    for pair in earlier:
        weight_OI += pair.scale * (pair.B_OR @ pair.A_RI)
    return weight_OI


def hold_out(model: PreTrainedModel, base: Base, learned: Residual) -> None:
    """Set the frozen weights under the attached pair to base + learned - what its start took out of them."""
    if taken := adapters.taken_out(model):
        residual.write(model, base, [*learned, taken], list(taken))


def check_room(skeleton: PreTrainedModel, links: Sequence[Settings]) -> None:
    """Raise ModelError where a matrix of the model has no room for the directions that the starts of these links ask
    for."""
    used: dict[str, int] = {}
    for number, pair in enumerate(links, 1):
        if not isinstance(pair, Lora):
            continue
        for name in target_names(skeleton, pair.target_modules):
            n_out, n_in = shape_of(skeleton, name)
            before, orthogonal = used.get(name, 0), pair.init.name == "orthogonal"
            room = n_in if orthogonal else min(n_in, n_out)
            if orthogonal and before and before + pair.rank > room:
                raise ModelError(
                    f"init: orthogonal: link {number} has rank {pair.rank} and the links before it take {before} of "
                    f"the {room} input directions of {name}; lower rank or the number of links"
                )
            times = OF_SINGULAR_VECTORS.get(pair.init.name, 0)
            if times * pair.rank > room:
                twice = f", of which it takes {times} for each rank" if times > 1 else ""
                raise ModelError(
                    f"init: {pair.init}: {name} is {n_out} x {n_in} and has {room} singular vectors{twice}, so rank "
                    f"{pair.rank} is too large; lower it, or use init: default"
                )
            used[name] = before + pair.rank * (2 if pair.init.name in TAKEN_OUT else 1)  # with what was taken out
