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
from cola.recipe.ideas import BY_PEFT, OF_SINGULAR_VECTORS, TAKEN_OUT
from cola.recipe.methods import Lora, Settings
from cola.recipe.plan import Link

Gradients = Callable[[PreTrainedModel, Link, Sequence[str]], dict[str, Tensor]]


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
    """Redraw the attached pair as the link's `init` says; what PEFT has drawn already is left.

    Args:
        base: Whose weights a pair may be taken out of.
        learned: The links tied before.
        gradients: Gives the full gradient (O, I) of the named modules' weights, float32, over the link's first batches.
        kept: The pair of the link before, where it goes on in place of a fresh one.

    Raises:
        IdeaError: the start's function gave what is no pair.
    """
    if kept is not None:
        adapters.set_pair(model, kept)
        hold_out(model, base, learned)
        return
    if not isinstance(link.settings, Lora) or link.settings.init.name in BY_PEFT:
        return
    idea, rank, layers = link.settings.init, link.settings.rank, adapters.pair_layers(model)
    start, generator = door.function_of(idea), torch.Generator().manual_seed(link.seed)
    full_gradients: dict[str, Tensor] = {}
    if link.settings.init_batches:
        with torch.enable_grad():
            full_gradients = gradients(model, link, list(layers))
    for name in full_gradients or layers:
        layer, scale = layers[name], adapters.scale_of(layers[name])
        A_RI, B_OR = adapters.factors_of(layer)
        earlier = [links[name] for links in learned if name in links]
        weight = partial(_weight, layer, base, name, earlier)
        matrix = door.Matrix(name, scale, rank, earlier, generator, weight, full_gradients.get(name))
        factors = door.factors_of(start(matrix), idea, matrix, len(B_OR), A_RI.shape[1])
        if factors is None:
            continue
        A_RI.copy_(factors.A_RI)
        if factors.B_OR is not None:
            B_OR.copy_(factors.B_OR)
            if not factors.moves:
                copies = A_RI.to("cpu", copy=True), B_OR.to("cpu", copy=True)
                adapters.take_out(layer, residual.Pair(*copies, scale))
    hold_out(model, base, learned)


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
