"""GaLore against its formula in numpy's float64, and what it remembers. Run: pytest tests/link/ideas/test_galore.py"""

from pathlib import Path

import numpy as np
import pytest
import torch
from cut import of, trained
from numpy.typing import NDArray
from torch import nn

from cola.errors import RecipeError
from cola.link.ideas.galore import galore
from cola.recipe.read import read_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, BETA1, BETA2, EPSILON, DECAY = 0.01, 0.9, 0.99, 1e-8, 0.1


def by_formula(W: NDArray, gradients: list[NDArray], rank: int, refresh: int, scale: float) -> NDArray:
    """Algorithm 2 of the paper; a wide matrix is a tall one's transpose."""
    if W.shape[0] < W.shape[1]:
        return by_formula(W.T, [G.T for G in gradients], rank, refresh, scale).T
    P, M, V = np.zeros((rank, W.shape[1])), np.zeros((W.shape[0], rank)), np.zeros((W.shape[0], rank))
    for t, G in enumerate(gradients):
        if t % refresh == 0:
            # The largest eigenvectors of G^T G; a sign is nobody's to choose, so they are turned as PyTorch's are.
            P = np.linalg.eigh(G.T @ G)[1][:, ::-1][:, :rank].T
            wide = torch.tensor(G, dtype=torch.float32)
            P = P * np.sign((P * torch.linalg.svd(wide, full_matrices=False)[2][:rank].numpy()).sum(1, keepdims=True))
        R = G @ P.T
        M, V = BETA1 * M + (1 - BETA1) * R, BETA2 * V + (1 - BETA2) * R**2
        N = M / (1 - BETA1 ** (t + 1)) / (np.sqrt(V / (1 - BETA2 ** (t + 1))) + EPSILON)
        W = (1 - RATE * DECAY) * W - RATE * scale * N @ P
    return W


def stepped(W: NDArray, gradients: list[NDArray], rank: int, refresh: int, scale: float) -> NDArray:
    """The same by ours, in float32."""
    weight = nn.Parameter(torch.tensor(W, dtype=torch.float32))
    optimizer = galore(of(weight), rank=rank, refresh=refresh, scale=scale)
    optimizer.param_groups[0]["lr"] = RATE
    for G in gradients:
        weight.grad = torch.tensor(G, dtype=torch.float32)
        optimizer.step()
    return weight.detach().double().numpy()


@pytest.mark.parametrize(("refresh", "shape"), [(2, (12, 7)), (100, (12, 7)), (100, (7, 12)), (100, (6, 6))])
def test_a_matrix_moves_as_the_formula_says(refresh: int, shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(3)
    W, gradients = draw.normal(size=shape), [draw.normal(size=shape) for _ in range(5)]
    ours, theirs = stepped(W, gradients, 3, refresh, 0.25), by_formula(W, gradients, 3, refresh, 0.25)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs - W).max()
    moved = ours - W * (1 - RATE * DECAY) ** 5
    assert np.linalg.matrix_rank(moved, tol=1e-4) == (7 if refresh == 2 else 3)  # three subspaces of 3, or one


def test_in_a_subspace_of_all_directions_whose_axes_are_the_weights_own_it_is_adamw() -> None:
    """Where the gradient's singular vectors are axes, rotating there and back changes nothing."""
    weight, other = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    vectors = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    ours = galore(of(weight, vectors[0]), rank=4, refresh=2, scale=1.0)
    adamw = torch.optim.AdamW([other, vectors[1]], betas=(BETA1, BETA2), eps=EPSILON, weight_decay=DECAY)
    for step in range(4):
        for parameter in (weight, other):
            parameter.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]) * (1 + step))
        for parameter in vectors:
            parameter.grad = torch.arange(5.0) - step
        for optimizer in (ours, adamw):
            optimizer.param_groups[0]["lr"] = RATE
            optimizer.step()
    assert torch.allclose(weight, other, atol=1e-6)
    assert torch.allclose(vectors[0], vectors[1], atol=1e-7)


def test_it_remembers_a_subspace_and_two_moments_in_it_and_goes_on_from_them() -> None:
    options = {"optimizer": {"galore": {"rank": 2, "refresh": 2}}}
    straight, moments = trained("full", **options)
    cut, _ = trained("full", 1, 2, 3, **options)
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    _, adamw = trained("full")
    for name, weight in straight.items():
        if name.endswith("proj.weight"):
            short, long = sorted(weight.shape)
            held = [moments[f"{name}.{key}"].numel() for key in ("projection", "exp_avg", "exp_avg_sq")]
            assert held == [2 * short, 2 * long, 2 * long]
            assert adamw[f"{name}.exp_avg"].numel() == short * long
        elif f"{name}.exp_avg" in moments:  # embeddings, norms and biases
            assert moments[f"{name}.exp_avg"].shape == weight.shape
    linear = [{name: tensor for name, tensor in held.items() if "proj.weight" in name} for held in (moments, adamw)]
    sizes = [sum(tensor.nbytes for tensor in held.values()) for held in linear]
    assert sizes[0] < sizes[1] / 4


def test_galore_beside_a_frozen_weight_is_refused(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"arms\.lora\.optimizer: galore .* method lora .* use it with method: full"):
        read_recipe(recipe_file, ["arms.lora.optimizer=galore"])
    with pytest.raises(RecipeError, match="galore: rank: input should be greater than 0"):
        read_recipe(recipe_file, ["arms.full.optimizer={galore: {rank: 0}}"])
