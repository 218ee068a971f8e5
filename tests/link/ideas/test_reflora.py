"""RefLoRA against the factorization that it stands for. Run: pytest tests/link/ideas/test_reflora.py"""

from pathlib import Path

import pytest
import torch
from cut import of, trained
from torch import Tensor, nn

from cola.errors import RecipeError
from cola.link.ideas.door import TrainedPair
from cola.link.ideas.reflora import reflora
from cola.recipe.read import read_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_after(A: Tensor, B: Tensor, G: Tensor, warmup: int = 0) -> tuple[Tensor, Tensor]:
    """What AdamW is given in place of G's gradients, in double: the first moments after one step, over 1 - beta1."""
    pair = TrainedPair("w", nn.Parameter(A.float()), nn.Parameter(B.float()), 1.0)
    optimizer = reflora(of(pair.A_RI, pair.B_OR, pairs=[pair]), warmup=warmup)
    pair.A_RI.grad, pair.B_OR.grad = (B.T @ G).float(), (G @ A.T).float()
    optimizer.step()
    first = (optimizer.state[factor]["exp_avg"].double() / 0.1 for factor in (pair.A_RI, pair.B_OR))
    return tuple(first)  # pyright: ignore[reportReturnType]


def some(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=draw).double() for shape in ((3, 8), (6, 3), (6, 8)))  # pyright: ignore[reportReturnType]


def test_it_steps_as_the_balanced_factorization_does_whatever_the_pair_is() -> None:
    """The balanced one by the SVD of B A: B~ = U S^1/2, A~ = S^1/2 V^T. A gradient step of it moves B A by
    G A~^T A~ + B~ B~^T G to first order, and so must a step of the pair along what is put in the gradients' place."""
    A, B, G = some()
    U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
    U, S, V = U[:, :3], S[:3], V[:3]
    moved = G @ (V.T * S) @ V + (U * S) @ U.T @ G
    T = torch.tensor([[2.0, 0.5, 0.0], [0.0, 0.3, 0.1], [0.0, 0.0, 5.0]]).double()
    for A1, B1 in ((A, B), (torch.linalg.inv(T) @ A, B @ T)):
        g_A, g_B = gradients_after(A1, B1, G)
        assert torch.allclose(g_B @ A1 + B1 @ g_A, moved, atol=1e-4 * moved.abs().max().item())
    plain = G @ A.T @ A + B @ B.T @ G
    assert not torch.allclose(plain, moved, atol=0.1)


def test_a_pair_that_has_no_balanced_factorization_yet_is_left_to_adamw() -> None:
    A, B, G = some()
    for zero in (torch.zeros_like(B), B * torch.tensor([1.0, 1.0, 0.0])):
        g_A, g_B = gradients_after(A, zero, G)
        assert torch.allclose(g_B, G @ A.T, atol=1e-4)
        assert torch.allclose(g_A, zero.T @ G, atol=1e-4)
    assert torch.allclose(gradients_after(A, B, G, warmup=1)[1], G @ A.T, atol=1e-4)


def test_an_optimizer_of_pairs_is_refused_where_there_are_none(recipe_file: Path) -> None:
    for word in ("reflora", "lora_muon"):
        with pytest.raises(RecipeError, match=rf"arms\.full\.optimizer: {word} .* method full has none"):
            read_recipe(recipe_file, [f"arms.full.optimizer={word}"])


def test_a_link_goes_on_as_if_it_had_not_stopped_and_is_another_than_adamws() -> None:
    straight, moments = trained("lora", optimizer={"reflora": {"warmup": 2}})
    cut, _ = trained("lora", 1, 2, 4, optimizer={"reflora": {"warmup": 2}})
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    plain, adamw = trained("lora")
    assert moments.keys() == adamw.keys()
    assert any(not torch.equal(straight[name], plain[name]) for name in straight)
    late, _ = trained("lora", optimizer={"reflora": {"warmup": 100}})
    assert all(torch.equal(late[name], plain[name]) for name in plain)
