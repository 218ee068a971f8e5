"""APOLLO against its formula in numpy's float64, and what it remembers. Run: pytest tests/link/ideas/test_apollo.py"""

import numpy as np
import pytest
import torch
from cut import of, trained
from numpy.typing import NDArray
from torch import nn

from cola.link.ideas.apollo import apollo
from cola.recipe.plan import derived_seed

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, BETA1, BETA2, EPSILON, DECAY = 0.01, 0.9, 0.99, 1e-8, 0.1
REFRESH, RANK, SCALE = 2, 3, 4.0


def by_formula(W: NDArray, gradients: list[NDArray]) -> NDArray:
    """Algorithm 1 of the paper for channels, with the limiter; a wide matrix is a tall one's transpose."""
    if W.shape[0] < W.shape[1]:
        return by_formula(W.T, [G.T for G in gradients]).T
    P, M, V, before = np.zeros((RANK, W.shape[1])), np.zeros((W.shape[0], RANK)), np.zeros((W.shape[0], RANK)), np.inf
    for t, G in enumerate(gradients):
        if t % REFRESH == 0:
            draw = torch.Generator().manual_seed(derived_seed("apollo", 0, t // REFRESH))
            P = torch.randn(W.shape[1], RANK, generator=draw).double().numpy().T / np.sqrt(RANK)
        R = G @ P.T
        M, V = BETA1 * M + (1 - BETA1) * R, BETA2 * V + (1 - BETA2) * R**2
        s = np.linalg.norm(M / np.sqrt(V), axis=1) / np.linalg.norm(R, axis=1)
        scaled = np.diag(s) @ G
        size = np.linalg.norm(scaled)
        scaled, before = scaled * min(1, 1.01 * before / size), min(size, 1.01 * before)
        unbiased = np.sqrt(1 - BETA2 ** (t + 1)) / (1 - BETA1 ** (t + 1))
        W = (1 - RATE * DECAY) * W - RATE * np.sqrt(SCALE) * unbiased * scaled
    return W


@pytest.mark.parametrize("growth", [1.0, 0.3, 3.0])  # of the gradients: under the limit, or over it at every step
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_a_matrix_moves_as_the_formula_says(shape: tuple[int, int], growth: float) -> None:
    draw = np.random.default_rng(3)
    W, gradients = draw.normal(size=shape), [growth**t * draw.normal(size=shape) for t in range(6)]
    weight = nn.Parameter(torch.tensor(W, dtype=torch.float32))
    optimizer = apollo(of(weight), rank=RANK, refresh=REFRESH, scale=SCALE)
    optimizer.param_groups[0]["lr"] = RATE
    for G in gradients:
        weight.grad = torch.tensor(G, dtype=torch.float32)
        optimizer.step()
    theirs = by_formula(W, gradients)
    assert np.abs(weight.detach().double().numpy() - theirs).max() < 1e-4 * np.abs(theirs - W).max()


def test_a_step_goes_along_the_gradient_row_by_row_as_far_as_adams_on_average() -> None:
    """With `scale` the width over the rank, a row is as long as Adam's first step: 1 in each of its entries."""
    torch.manual_seed(1)
    weight, gradient = nn.Parameter(torch.zeros(400, 64)), torch.randn(400, 64)
    optimizer = apollo(of(weight, weight_decay=0.0), rank=8, refresh=9, scale=64 / 8)
    optimizer.param_groups[0]["lr"] = 1.0
    weight.grad = gradient.clone()
    optimizer.step()
    assert torch.allclose(torch.cosine_similarity(-weight.detach(), gradient), torch.ones(400), atol=1e-5)
    # Of |R| = |G| chi_8 / sqrt 8 the mean of 1 / |R| is 1.11 times 1 / |G|.
    assert weight.detach().norm(dim=1).mean().item() == pytest.approx(1.11 * 64**0.5, rel=0.03)


def test_it_remembers_two_moments_of_the_sketch_and_goes_on_from_them() -> None:
    options = {"apollo": {"rank": 2, "refresh": 2}}
    straight, moments = trained("full", optimizer=options)
    cut, _ = trained("full", 1, 2, 3, optimizer=options)
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    matrices = {name: weight for name, weight in straight.items() if f"{name}.norm" in moments}
    assert len(matrices) == 14  # seven in each of two layers; the embeddings and the head are AdamW's
    for name, weight in matrices.items():
        held = [value.numel() for key, value in moments.items() if key.startswith(f"{name}.")]
        assert sorted(held) == [1, 2 * max(weight.shape), 2 * max(weight.shape)]
