"""LoRA-RITE against its formula in the whole matrix. Run: pytest tests/link/ideas/test_lora_rite.py"""

import pytest
import torch
from cut import of
from test_lora_muon import some
from torch import Tensor, nn

from cola.link.ideas.door import TrainedPair
from cola.link.ideas.lora_rite import lora_rite

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, BETAS = 1e-3, (0.9, 0.999)


def walk(A: Tensor, B: Tensor, scale: float, gradients: list[Tensor], clip: float = 1e9) -> list[tuple[Tensor, Tensor]]:
    """A and B before each step along these gradients of the product, and after the last."""
    pair = TrainedPair("w", nn.Parameter(A.float()), nn.Parameter(B.float()), scale)
    optimizer = lora_rite(of(pair.A_RI, pair.B_OR, pairs=[pair], weight_decay=0.0), clip=clip)
    optimizer.param_groups[0]["lr"], places = RATE, []
    for G in [*gradients, None]:
        A_RI, B_OR = pair.A_RI.detach().clone(), pair.B_OR.detach().clone()
        places.append((A_RI.double(), B_OR.double()))
        if G is not None:
            pair.A_RI.grad, pair.B_OR.grad = scale * B_OR.T @ G.float(), scale * G.float() @ A_RI.T
            optimizer.step()
    return places


def test_b_moves_as_the_formula_says_in_the_whole_matrix() -> None:
    """With the projector on the rows of A in the place of bases and turns: V is I x I, M is O x I, and dB A = -lr M."""
    A, B, _ = some(3)
    gradients = [some(3, seed)[2] for seed in range(4)]
    places = walk(A, B, 2.0, gradients)
    mean, square = torch.zeros(11, 9).double(), torch.zeros(9, 9).double()
    for step, (G, (A_t, B_t), (_, B_next)) in enumerate(zip(gradients, places, places[1:], strict=False), 1):
        onto = torch.linalg.pinv(A_t) @ A_t
        keep1, keep2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in BETAS)
        bare = 2.0 * G @ onto
        square = keep2 * onto @ square @ onto + (1 - keep2) * bare.T @ bare / 11
        sizes, vectors = torch.linalg.eigh(square)
        root = vectors[:, -3:] / sizes[-3:].sqrt() @ vectors[:, -3:].T
        mean = keep1 * mean @ onto + (1 - keep1) * bare @ root
        moved = (B_next - B_t) @ A_t
        assert torch.allclose(moved, -RATE * mean, atol=2e-3 * RATE * mean.abs().max().item()), step


def test_no_step_depends_on_how_the_update_is_factored() -> None:
    A, B, _ = some(3)
    gradients = [some(3, seed)[2] for seed in range(4)]
    T = torch.tensor([[3.0, 0.5, 0.0], [0.0, 0.4, 0.1], [0.0, 0.0, 2.0]]).double()
    ends = [walk(a, b, 2.0, gradients)[-1] for a, b in ((A, B), (torch.linalg.inv(T) @ A, B @ T))]
    one, two = (b @ a for a, b in ends)
    assert (one - B @ A).abs().max() > RATE
    assert torch.allclose(one, two, atol=1e-2 * RATE)


def test_beside_b_of_zero_b_moves_alone_and_large_gradients_are_scaled_together() -> None:
    A, B, G = some(3)
    (_, zero), (A_1, B_1), (A_2, B_2) = walk(A, torch.zeros_like(B), 1.0, [G, G])
    assert not zero.any()
    assert torch.equal(A_1, A.float().double())
    assert B_1.any()
    assert not torch.equal(A_2, A_1)
    assert torch.isfinite(B_2).all()
    # A first step is the same at any size of the gradient; later ones are not, where a large one is scaled down.
    free, held = (walk(A, B, 1.0, [G, 100 * G], clip)[-1][1] for clip in (1e9, 1.0))
    assert not torch.allclose(free, held, atol=1e-2 * RATE)
