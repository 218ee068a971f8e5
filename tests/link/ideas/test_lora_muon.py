"""LoRA-Muon against Muon's step in the whole matrix. Run: pytest tests/link/ideas/test_lora_muon.py"""

import pytest
import torch
from cut import of, trained
from torch import Tensor, nn

from cola.link.ideas.door import TrainedPair
from cola.link.ideas.lora_muon import lora_muon

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, DECAY, BETA = 0.1, 0.1, 0.9  # the last two as `of` has them


def product_after(A: Tensor, B: Tensor, scale: float, gradients: list[Tensor], decay: float = DECAY) -> Tensor:
    """scale * B @ A after a step along each of these gradients of the product."""
    pair = TrainedPair("w", nn.Parameter(A.float()), nn.Parameter(B.float()), scale)
    optimizer = lora_muon(of(pair.A_RI, pair.B_OR, pairs=[pair], weight_decay=decay))
    optimizer.param_groups[0]["lr"] = RATE
    for G in gradients:
        A_RI, B_OR = pair.A_RI.detach(), pair.B_OR.detach()
        pair.A_RI.grad, pair.B_OR.grad = scale * B_OR.T @ G.float(), scale * G.float() @ A_RI.T
        optimizer.step()
    return scale * pair.B_OR.detach().double() @ pair.A_RI.detach().double()


def sign(matrix: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    return U @ V


def some(rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    A, B, G = (torch.randn(*shape, generator=draw).double() for shape in ((rank, 9), (11, rank), (11, 9)))
    return A, B, G


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_step_is_muons_of_the_gradient_in_the_spaces_of_the_factors(scale: float) -> None:
    """With Q_B and Q_A orthonormal bases of the columns of B and rows of A, the product moves to first order by
    -lr / 2 (msign(G Q_A) Q_A^T + Q_B msign(Q_B^T G)); no root of a Gram matrix is taken here."""
    A, B, G = some(4)
    Q_A, Q_B = torch.linalg.qr(A.T).Q, torch.linalg.qr(B).Q
    right, left = sign(G @ Q_A) @ Q_A.T, Q_B @ sign(Q_B.T @ G)
    # The step of both factors at once, and its second order: dB A = -lr / 2 right, B dA = -lr / 2 left, over c each.
    c = 1 - RATE * DECAY
    inverse = torch.linalg.pinv(scale * B @ A)
    expected = c * scale * B @ A - RATE / 2 * (right + left) + (RATE / 2) ** 2 / c * right @ inverse @ left
    ours = product_after(A, B, scale, [G])
    assert torch.allclose(ours, expected, atol=1e-5 * expected.abs().max().item())


def test_no_step_depends_on_how_the_update_is_factored() -> None:
    A, B, G = some(3)
    gradients = [G, some(3, 1)[2], some(3, 2)[2]]
    T = torch.tensor([[3.0, 0.5, 0.0], [0.0, 0.4, 0.1], [0.0, 0.0, 2.0]]).double()
    one = product_after(A, B, 2.0, gradients)
    two = product_after(torch.linalg.inv(T) @ A, B @ T, 2.0, gradients)
    assert torch.allclose(one, two, atol=1e-4)
    assert torch.allclose(one, product_after(2 * A, B, 1.0, gradients), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_a_step_moves_the_product_by_the_rate_at_any_rank(rank: int) -> None:
    A, B, G = some(rank)
    A, B = 30 * A, 30 * B  # so that the second order is next to nothing
    moved = product_after(A, B, 1.0, [G], decay=0.0) - B.float().double() @ A.float().double()
    assert RATE / 2 < torch.linalg.matrix_norm(moved, 2).item() < RATE * 1.01
    zero = product_after(A, torch.zeros_like(B), 1.0, [G])
    assert torch.linalg.svdvals(zero)[:rank].numpy() == pytest.approx(RATE / 2, rel=1e-3)
    assert torch.isfinite(product_after(A, torch.zeros_like(B), 1.0, [G, G, torch.zeros_like(G)])).all()


def test_a_link_goes_on_as_if_it_had_not_stopped_and_remembers_half_of_adamws_state() -> None:
    for settings in ({}, {"use_dora": True, "loraplus_lr_ratio": 2.0}):
        straight, moments = trained("lora", optimizer="lora_muon", **settings)
        cut, _ = trained("lora", 1, 3, optimizer="lora_muon", **settings)
        assert all(torch.equal(straight[name], cut[name]) for name in straight)
        assert all(weight.isfinite().all() for weight in straight.values())
        _, adamw = trained("lora", **settings)
        pairs = {key: value for key, value in adamw.items() if "exp_avg" in key and "magnitude" not in key}
        assert 2 * sum(m.nbytes for key, m in moments.items() if key in pairs) == sum(m.nbytes for m in pairs.values())
