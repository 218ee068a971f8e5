"""The start that takes a step along the full gradient. Run: pytest tests/link/ideas/test_lora_one.py"""

import pytest
import torch
from conftest import ROUNDING, tiny_model
from test_chain import batches, outputs
from test_methods import chain_of, close, gradients, link, links, logits, loss_of, tuner
from torch import Tensor

from cola.chain import extend, tie_knot
from cola.errors import IdeaError
from cola.link import adapters
from cola.link.ideas.door import Factors, Matrix
from cola.link.ideas.lora_one import lora_one


def matrix(gradient_OI: Tensor, rank: int) -> Matrix:
    return Matrix("m", 2.0, rank, [], torch.Generator().manual_seed(1), lambda: torch.empty(0), gradient_OI)


def falling(n_out: int, n_in: int) -> Tensor:
    """A matrix whose singular values fall by a third from each to the next."""
    generator = torch.Generator().manual_seed(4)
    U_OI, _, V_II = torch.linalg.svd(torch.randn(n_out, n_in, generator=generator), full_matrices=False)
    return U_OI * (0.03 * (2 / 3) ** torch.arange(min(n_out, n_in))) @ V_II


def start(gradient_OI: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor, Factors]:
    factors = lora_one(matrix(gradient_OI, rank), gamma=gamma)
    assert factors.B_OR is not None
    return factors.A_RI.double(), factors.B_OR.double(), factors


@pytest.mark.parametrize("shape", [(12, 9), (80, 70), (60, 90)])  # the first by an SVD, the others by iteration
def test_both_factors_are_the_best_step_of_their_rank_along_minus_the_gradient(shape: tuple[int, int]) -> None:
    gradient_OI = falling(*shape)
    A_RI, B_OR, factors = start(gradient_OI, 3, 128.0)
    U_OK, S_K, V_KI = torch.linalg.svd(-gradient_OI.double(), full_matrices=False)
    assert close(B_OR @ A_RI, (U_OK[:, :3] * S_K[:3] / S_K[0]) @ V_KI[:3] / 128)
    assert close(A_RI @ A_RI.T, torch.diag(S_K[:3] / S_K[0]) / 128)  # half of the step in each factor
    assert close(B_OR.T @ B_OR, torch.diag(S_K[:3] / S_K[0]) / 128)
    assert factors.moves


def test_the_step_is_as_long_whatever_the_size_of_the_gradient() -> None:
    A_RI, B_OR, _ = start(falling(12, 9), 2, 64.0)
    of_small_A_RI, of_small_B_OR, _ = start(falling(12, 9) * 2**-20, 2, 64.0)
    assert close(of_small_B_OR @ of_small_A_RI, B_OR @ A_RI)


def test_a_direction_that_the_gradient_has_not_is_zero_in_both_factors_and_a_zero_gradient_an_error() -> None:
    flat_OI = torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 10))  # of rank one
    A_RI, B_OR, _ = start(flat_OI, 2, 128.0)
    assert A_RI[0].norm() > 0.08
    assert max(A_RI[1].norm(), B_OR[:, 1].norm()) < 1e-4
    with pytest.raises(IdeaError, match="the full gradient of m is zero"):
        start(torch.zeros(12, 9), 2, 128.0)


def test_each_link_begins_with_a_step_that_lowers_its_loss_and_trains_both_factors_from_the_first_step_on() -> None:
    chain = chain_of(tiny_model())
    for own in links(2, init={"lora_one": {"gamma": 512.0}}, init_batches=2):
        before, told = outputs(chain.model), logits(chain.model)
        first = batches(own.last_step)[own.first_step :][:2]
        losses = [sum(loss_of(chain.model, one).item() for [one] in first)]
        extend(chain, own, gradients)
        losses.append(sum(loss_of(chain.model, one).item() for [one] in first))
        assert losses[1] < losses[0]
        assert not close(logits(chain.model), told, 1e-5)
        assert adapters.taken_out(chain.model) == {}
        began = adapters.read_pair(chain.model)
        tuner()(chain, link(n_steps=1, init={"lora_one": {"gamma": 512.0}}, init_batches=2))
        after = adapters.read_pair(chain.model)
        assert not any(torch.equal(after[name].A_RI, pair.A_RI) for name, pair in began.items())
        assert tie_knot(chain, before, outputs, more_to_come=True).drift.relative < ROUNDING
