"""How a pair is drawn when a link begins. Every start leaves the function as it is.

    default      A Kaiming-uniform, B = 0 (PEFT's)               gaussian     A ~ N(0, 1/r), B = 0
    orthogonal   rows of A orthogonal to those of all earlier links, B = 0
    gradient     rows of A the top right singular vectors of the full gradient G, B = 0
    pissa        B A the top singular part of W, which is taken out of the frozen weight (arXiv 2404.02948)

`gradient` is the linear minimization step of Frank-Wolfe, on which COLA's theory rests (arXiv 2401.04151, section 4):
over the matrices of rank r and bounded norm, <G, X> is least at X = -U_r V_r^T. With A = V_r^T and B = 0 the first
gradient of B is s G A^T = s U_r S_r, so the first step of B goes along -U_r; LoRA-GA (2407.05000) and LoRA-One
(2502.01235) put a step of it into B too and change, or take out of the weight, what that does to the function.

`orthogonal` and `gradient` choose directions only: their rows have the length that PEFT's rows have in expectation,
so that a learning rate means the same.

Axes: I input features, O output features, R rank.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola.errors import ModelError
from cola.link import adapters, residual
from cola.link.base import Base, shape_of
from cola.link.residual import LinkWeights, Residual
from cola.link.targets import target_names
from cola.recipe.methods import Lora, Settings
from cola.recipe.plan import Link

# E|a|^2 = 1/3 for a row of a Kaiming-uniform A (a = sqrt 5): entries U(-1/sqrt I, 1/sqrt I)
ROW_LENGTH = 1 / math.sqrt(3)

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
        base: Where `pissa` takes the pair out of.
        learned: The links tied before.
        gradients: Gives the full gradient (O, I) of the named modules' weights, float32, over the link's first batches.
        kept: The pair of the link before, where it goes on in place of a fresh one.
    """
    if kept is not None:
        adapters.set_pair(model, kept)
        hold_out(model, base, learned)
        return
    if not isinstance(link.settings, Lora):
        return
    layers = adapters.pair_layers(model)
    init, rank = link.settings.init, link.settings.rank
    generator, rows = torch.Generator().manual_seed(link.seed), {}
    if init == "gradient":
        with torch.enable_grad():
            full_gradients = gradients(model, link, list(layers))
        rows = {name: top_right_vectors(G_OI, rank, generator) for name, G_OI in full_gradients.items()}
    elif init == "orthogonal":
        used = {name: [links[name].A_RI for links in learned if name in links] for name in layers}
        rows = {name: orthogonal_rows(torch.cat(rows_of), rank, generator) for name, rows_of in used.items() if rows_of}
    elif init == "pissa":
        for layer in layers.values():
            layer.pissa_init(adapters.ADAPTER, "pissa")
            A_RI, B_OR = (factor.detach().to("cpu", copy=True) for factor in adapters.factors_of(layer))
            adapters.take_out(layer, residual.Pair(A_RI, B_OR, float(layer.scaling[adapters.ADAPTER])))
        hold_out(model, base, learned)
    for name, rows_RI in rows.items():
        A_RI, _ = adapters.factors_of(layers[name])
        A_RI.copy_(ROW_LENGTH * rows_RI)


def hold_out(model: PreTrainedModel, base: Base, learned: Residual) -> None:
    """Set the frozen weights under the attached pair to base + learned - what its start took out of them."""
    if taken := adapters.taken_out(model):
        residual.write(model, base, [*learned, taken], list(taken))


def top_right_vectors(matrix_OI: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The first right singular vectors as rows (R, I), each with its largest entry positive.

    By subspace iteration with a few vectors to spare, seeded, where the matrix is much larger than the rank.
    """
    matrix_OI = matrix_OI.double()
    width = rank + 8
    if min(matrix_OI.shape) <= 4 * width:
        rows_RI = torch.linalg.svd(matrix_OI, full_matrices=False).Vh[:rank]
    else:
        guess_IK = torch.randn(matrix_OI.shape[1], width, generator=generator, dtype=torch.float64)
        for _ in range(8):
            basis_OK = torch.linalg.qr(matrix_OI @ guess_IK).Q
            guess_IK = torch.linalg.qr(matrix_OI.T @ basis_OK).Q
        basis_OK = torch.linalg.qr(matrix_OI @ guess_IK).Q
        rows_RI = torch.linalg.svd(basis_OK.T @ matrix_OI, full_matrices=False).Vh[:rank]
    largest_R1 = rows_RI.gather(1, rows_RI.abs().argmax(dim=1, keepdim=True))
    return (rows_RI * largest_R1.sign()).float()


def orthogonal_rows(used_KI: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows (R, I) that are orthogonal to every row of `used_KI`."""
    used_IK = torch.linalg.qr(used_KI.double().T).Q
    fresh_IR = torch.randn(used_KI.shape[1], rank, generator=generator, dtype=torch.float64)
    for _ in range(2):  # once leaves a rounding error of the size of what was taken away
        fresh_IR = fresh_IR - used_IK @ (used_IK.T @ fresh_IR)
        fresh_IR = torch.linalg.qr(fresh_IR).Q
    return fresh_IR.T.float()


def check_room(skeleton: PreTrainedModel, links: Sequence[Settings]) -> None:
    """Raise ModelError where a matrix of the model has no room for the directions that the starts of these links ask
    for."""
    used: dict[str, int] = {}
    for number, pair in enumerate(links, 1):
        if not isinstance(pair, Lora):
            continue
        for name in target_names(skeleton, pair.target_modules):
            n_out, n_in = shape_of(skeleton, name)
            before, room = used.get(name, 0), n_in if pair.init == "orthogonal" else min(n_in, n_out)
            if pair.init == "orthogonal" and before and before + pair.rank > room:
                raise ModelError(
                    f"init: orthogonal: link {number} has rank {pair.rank} and the links before it take {before} of "
                    f"the {room} input directions of {name}; lower rank or the number of links"
                )
            if pair.init in ("gradient", "pissa") and pair.rank > room:
                raise ModelError(
                    f"init: {pair.init}: {name} is {n_out} x {n_in} and has {room} singular vectors, so rank "
                    f"{pair.rank} is too large; lower it, or use init: default"
                )
            used[name] = before + pair.rank * (2 if pair.init == "pissa" else 1)  # with what was taken out
