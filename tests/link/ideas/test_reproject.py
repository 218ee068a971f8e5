"""AdamW's moments, projected into the next pair's span. Run: pytest tests/link/ideas/test_reproject.py"""

import pytest
import torch
from test_methods import close
from torch import Tensor

from cola.errors import IdeaError
from cola.link.ideas.door import HandedOn, State
from cola.link.ideas.reproject import reproject
from cola.link.residual import Pair

GENERATOR = torch.Generator().manual_seed(5)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def state(first: Tensor) -> State:
    return {"step": torch.tensor(9.0), "exp_avg": first, "exp_avg_sq": first.square() + 0.1}


def handed_on(before: Pair, after: Pair) -> HandedOn:
    return HandedOn("m", before, after, state(drawn(*before.A_RI.shape)), state(drawn(*before.B_OR.shape)))


def pair(scale: float = 2.0) -> Pair:
    return Pair(drawn(3, 7), drawn(5, 3), scale)


def least_squares(first: Tensor, old: Tensor) -> Tensor:
    """The matrix (rows of `first`, width of `old`) of least norm that gives `first` as its product with old^T."""
    return torch.linalg.lstsq(old.double(), first.double().T, driver="gelsd").solution.T


def test_the_first_moments_are_those_of_the_least_gradient_that_explains_the_old_ones() -> None:
    before, after = pair(2.0), pair(0.5)
    own = handed_on(before, after)
    A, B = reproject(own)
    # m_B = s M A^T is solved for the whole weight's moment M (O, I), and m_B' = s' M A'^T taken of it; likewise for A.
    of_B_OI = least_squares(own.B["exp_avg"] / 2.0, before.A_RI)
    assert close(B["exp_avg"].double(), 0.5 * of_B_OI @ after.A_RI.double().T)
    of_A_OI = least_squares(own.A["exp_avg"].T / 2.0, before.B_OR.T).T
    assert close(A["exp_avg"].double(), 0.5 * after.B_OR.double().T @ of_A_OI)


def test_the_moments_of_a_gradient_within_the_old_span_are_the_new_pairs_to_rounding() -> None:
    before, after = pair(2.0), pair(3.0)
    gradient_OI = before.B_OR @ drawn(3, 3) @ before.A_RI  # of which the old moments know everything
    A, B = reproject(
        HandedOn("m", before, after, state(2 * before.B_OR.T @ gradient_OI), state(2 * gradient_OI @ before.A_RI.T))
    )
    assert close(A["exp_avg"], 3 * after.B_OR.T @ gradient_OI, 1e-4)
    assert close(B["exp_avg"], 3 * gradient_OI @ after.A_RI.T, 1e-4)


def test_under_the_pair_as_it_was_the_moments_are_handed_on_as_they_are() -> None:
    before = pair()
    own = handed_on(before, before)
    for given, old in zip(reproject(own), (own.A, own.B), strict=True):
        assert given["step"] == 9
        assert close(given["exp_avg"], old["exp_avg"])
        assert close(given["exp_avg_sq"], old["exp_avg_sq"])


def test_a_rotation_of_the_pair_rotates_the_first_moments_and_a_permutation_the_second_ones_too() -> None:
    before = pair()
    own = handed_on(before, before)
    rotation = torch.linalg.qr(drawn(3, 3)).Q
    permutation = torch.eye(3)[[2, 0, 1]]
    for turn in (rotation, permutation):
        after = Pair(turn @ before.A_RI, before.B_OR @ turn.T, before.scale)
        A, B = reproject(HandedOn("m", before, after, own.A, own.B))
        assert close(A["exp_avg"], turn @ own.A["exp_avg"])
        assert close(B["exp_avg"], own.B["exp_avg"] @ turn.T)
        assert close(A["exp_avg_sq"], turn.square() @ own.A["exp_avg_sq"])  # without LoFT's cross terms
        assert close(B["exp_avg_sq"], own.B["exp_avg_sq"] @ turn.T.square())


def test_of_a_fresh_pair_with_b_zero_nothing_is_known_of_a_and_its_step_count_begins_anew() -> None:
    before, fresh = pair(), Pair(drawn(3, 7), torch.zeros(5, 3), 2.0)
    A, B = reproject(handed_on(before, fresh))
    assert not any(value.any() for value in A.values())
    assert B["step"] == 9
    assert B["exp_avg"].any()


def test_an_old_pair_with_equal_rows_is_projected_by_its_span_and_other_optimizers_state_is_refused() -> None:
    before, after = pair(), pair()
    before.A_RI[2] = before.A_RI[1]  # A A^T is singular: the pseudoinverse takes the least solution
    assert reproject(handed_on(before, after))[1]["exp_avg"].isfinite().all()
    own = HandedOn("m", before, after, {"momentum_buffer": drawn(3, 7)}, {"momentum_buffer": drawn(5, 3)})
    with pytest.raises(IdeaError, match="reproject moves AdamW's moments, and the optimizer has momentum_buffer"):
        reproject(own)


@pytest.mark.parametrize(("steps", "times"), [(200, 2.9), (1_000_000, 6.6)])
def test_the_first_steps_under_a_nearly_foreign_pair_are_several_times_those_of_a_fresh_adamw(
    steps: int, times: float
) -> None:
    entry = torch.zeros(1, requires_grad=True)
    adamw = torch.optim.AdamW([entry], lr=1.0, weight_decay=0.0)
    # A' has a thousandth of its length in the span of A, just enough for the moments to be handed on.
    before, after = Pair(torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), 1.0), torch.tensor([[1e-3, 1.0]])
    known = 1 - 0.999**steps
    left = {"step": torch.tensor(float(steps)), "exp_avg": torch.zeros(1, 1), "exp_avg_sq": torch.full((1, 1), known)}
    _, given = reproject(HandedOn("m", before, Pair(after, torch.zeros(1, 1), 1.0), state(drawn(1, 2)), left))
    adamw.state[entry].update({key: value.reshape(value.shape[:1]) for key, value in given.items()})
    moves = []
    for _ in range(30):
        old = entry.item()
        entry.grad = torch.ones(1)
        adamw.step()
        moves.append(old - entry.item())
    assert max(moves) == pytest.approx(times, rel=0.02)  # a fresh one moves by 1 at each


def test_a_pair_that_has_nothing_in_common_with_the_old_one_begins_with_a_fresh_state() -> None:
    basis = torch.linalg.qr(drawn(7, 6)).Q.T
    before, after = Pair(basis[:3], drawn(5, 3), 2.0), Pair(basis[3:], torch.zeros(5, 3), 2.0)
    assert (basis[:3] @ basis[3:].T).any()  # but for rounding, which is no knowledge
    for given in reproject(handed_on(before, after)):
        assert not any(value.any() for value in given.values())


def test_the_first_moments_are_lofts_which_it_keeps_of_gradients_over_the_other_factors_product() -> None:
    before, after = pair(1.0), pair(1.0)
    own = handed_on(before, after)
    A, B = reproject(own)
    (A_RI, B_OR), (new_A_RI, new_B_OR) = ((p.A_RI.double(), p.B_OR.double()) for p in (before, after))
    of_A = torch.linalg.inv(B_OR.T @ B_OR) @ own.A["exp_avg"].double()
    of_A = torch.linalg.inv(new_B_OR.T @ new_B_OR) @ new_B_OR.T @ B_OR @ of_A  # 2505.21289: from one step to the next
    assert close(A["exp_avg"].double(), new_B_OR.T @ new_B_OR @ of_A)
    of_B = own.B["exp_avg"].double() @ torch.linalg.inv(A_RI @ A_RI.T)
    of_B = of_B @ A_RI @ new_A_RI.T @ torch.linalg.inv(new_A_RI @ new_A_RI.T)
    assert close(B["exp_avg"].double(), of_B @ new_A_RI @ new_A_RI.T)
