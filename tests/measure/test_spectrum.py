"""Singular values, ranks, overlaps and intruders against dense numpy, closed forms and PEFT.

Run: pytest tests/measure/test_spectrum.py
"""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cola.link.residual import Pair, Residual, factors, times
from cola.measure.spectrum import (
    TOP,
    Svd,
    Tuned,
    both_sides,
    count_intruders,
    dense_svd,
    effective_rank,
    low_rank_svd,
    numbers_of,
    of_chain,
    overlap,
    random_overlap,
    rank_90,
    stable_rank,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(40, 56), (56, 40), (48, 48)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(n_features: int, rank: int, seed: int = 0) -> Tensor:
    """Orthonormal columns of a random subspace."""
    return torch.linalg.qr(draw(n_features, rank, seed=seed)).Q


def pair(n_out: int, n_in: int, rank: int, seed: int, scale: float = 2.0) -> Pair:
    return Pair(draw(rank, n_in, seed=seed).float(), draw(n_out, rank, seed=seed + 100).float(), scale)


def dense(links: Residual, name: str) -> NDArray[np.float64]:
    return sum(p.scale * p.B_OR.double().numpy() @ p.A_RI.double().numpy() for p in (one[name] for one in links))


def values_of(svd: Svd) -> NDArray[np.float64]:
    return svd.values_R.numpy()


# ---------------------------------------------------------------------------------------------------------
# Singular values and vectors


@pytest.mark.parametrize("shape", SHAPES)
def test_a_link_of_rank_r_has_r_singular_values_and_they_are_those_of_its_dense_product(shape: tuple[int, int]) -> None:
    B_OK, A_KI = draw(shape[0], 8), draw(8, shape[1], seed=1)
    svd = low_rank_svd(B_OK, A_KI)
    assert svd.rank == 8
    reference = np.linalg.svd((B_OK @ A_KI).numpy(), compute_uv=False)[:8]
    assert values_of(svd) == pytest.approx(reference, rel=1e-12)
    rebuilt = svd.left_OR @ svd.values_R.diag() @ svd.right_IR.T
    assert torch.allclose(rebuilt, B_OK @ A_KI, atol=1e-12)
    for side in (svd.left_OR, svd.right_IR):
        assert torch.allclose(side.T @ side, torch.eye(8, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dense_update_has_the_values_and_directions_of_its_svd(shape: tuple[int, int]) -> None:
    update = draw(*shape) @ torch.diag(torch.logspace(0, -3, shape[1], dtype=torch.float64))
    svd = dense_svd(update, most=5)
    left, values, right = scipy.linalg.svd(update.numpy(), full_matrices=False)
    assert values_of(svd) == pytest.approx(values, rel=1e-5)  # eps (s_1 / s)² of the smallest
    assert values_of(svd)[:5] == pytest.approx(values[:5], rel=1e-12)
    for found, known in ((svd.left_OR, left[:, :5]), (svd.right_IR, right[:5].T)):
        assert np.abs((found.numpy() * known).sum(axis=0)) == pytest.approx(np.ones(5), rel=1e-9)


def test_what_was_not_learned_has_no_rank() -> None:
    assert low_rank_svd(torch.zeros(20, 4), draw(4, 30)).rank == 0
    assert dense_svd(torch.zeros(20, 30)).rank == 0
    nothing = numbers_of(torch.zeros(0), 3.0)
    assert nothing["rank"] == 0
    assert nothing["relative_size"] == 0
    assert nothing["values"] == []
    assert nothing["effective_rank"] is nothing["rank_90"] is nothing["stable_rank"] is None


def test_factors_that_are_larger_than_B_are_no_reason_to_see_more_than_the_rank() -> None:
    assert low_rank_svd(draw(40, 60), draw(60, 30, seed=1)).rank == 30
    assert low_rank_svd(draw(40, 60), draw(60, 56, seed=1)).rank == 40


def test_neither_scaling_nor_another_choice_of_factors_changes_what_they_stand_for() -> None:
    B_OK, A_KI, mix_KK = draw(40, 6), draw(6, 30, seed=1), draw(6, 6, seed=2)
    first = low_rank_svd(B_OK, A_KI)
    for B, A in ((1e3 * B_OK, 1e-3 * A_KI), (B_OK @ mix_KK, torch.linalg.solve(mix_KK, A_KI))):
        again = low_rank_svd(B, A)
        assert values_of(again) == pytest.approx(values_of(first), rel=1e-10)
        assert both_sides(first, again)["left"] == pytest.approx(1, abs=1e-12)
        assert both_sides(first, again)["right"] == pytest.approx(1, abs=1e-12)
    one, tenfold = numbers_of(first.values_R, 1.0), numbers_of(10 * first.values_R, 10.0)
    for key in ("rank", "relative_size", "effective_rank", "rank_90", "stable_rank"):
        assert tenfold[key] == pytest.approx(one[key], rel=1e-12)


# ---------------------------------------------------------------------------------------------------------
# Numbers


def test_the_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    values = draw(12).abs()
    assert effective_rank(values) == pytest.approx(math.exp(scipy.stats.entropy(values.numpy())), rel=1e-12)


def test_the_rank_at_90_percent_is_the_fewest_directions_with_that_energy() -> None:
    assert rank_90(torch.tensor([3.0, 1.0])) == 1  # 9 of 10
    assert rank_90(torch.tensor([2.9, 1.0])) == 2
    assert rank_90(torch.ones(20)) == 18
    assert rank_90(torch.tensor([4.0])) == 1


def test_the_stable_rank_is_the_squared_frobenius_by_the_squared_spectral_norm() -> None:
    matrix = draw(30, 20)
    norms = np.linalg.norm(matrix.numpy(), "fro"), np.linalg.norm(matrix.numpy(), 2)
    assert stable_rank(dense_svd(matrix).values_R) == pytest.approx((norms[0] / norms[1]) ** 2, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------
# Overlap


def test_equal_directions_overlap_1_orthogonal_ones_0_and_a_part_is_in_the_whole() -> None:
    whole_DR = basis(30, 8)
    mixed_DR = whole_DR @ basis(8, 8, seed=1)
    assert overlap(whole_DR, mixed_DR) == pytest.approx(1)
    assert overlap(whole_DR[:, :3], whole_DR[:, 3:]) == pytest.approx(0, abs=1e-24)
    assert overlap(mixed_DR, whole_DR[:, :3]) == pytest.approx(1)
    assert overlap(whole_DR[:, :3], mixed_DR) == pytest.approx(1)


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    one_DR, other_DS = basis(30, 4), basis(30, 6, seed=1)
    angles = scipy.linalg.subspace_angles(one_DR.numpy(), other_DS.numpy())
    assert overlap(one_DR, other_DS) == pytest.approx(np.mean(np.cos(angles) ** 2), rel=1e-10)


@pytest.mark.parametrize(("rank", "other", "n_features"), [(4, 4, 32), (3, 7, 24), (8, 10, 12)])
def test_random_directions_overlap_as_much_as_expected(rank: int, other: int, n_features: int) -> None:
    found = [overlap(basis(n_features, rank, seed=i), basis(n_features, other, seed=10_000 + i)) for i in range(1000)]
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert abs(np.mean(found) - random_overlap(rank, other, n_features)) < 4 * error


# ---------------------------------------------------------------------------------------------------------
# Chains


def test_a_chain_is_the_sum_of_its_links_whatever_their_order() -> None:
    links: Residual = [{"m": pair(40, 56, rank, seed)} for rank, seed in ((4, 0), (2, 1), (3, 2))]
    matrix = of_chain(links, lambda name: 7.0)["m"]
    assert matrix["shape"] == [40, 56]
    for what, part in (("link 1", links[:1]), ("link 2", links[1:2]), ("link 3", links[2:]), ("chain", links)):
        reference = np.linalg.svd(dense(part, "m"), compute_uv=False)
        found = matrix["updates"][what]
        assert found["values"] == pytest.approx(reference[: found["rank"]], rel=1e-9)
        assert found["relative_size"] == pytest.approx(np.linalg.norm(dense(part, "m")) / 7, rel=1e-9)
    assert [one["rank"] for one in matrix["updates"].values()] == [4, 2, 3, 9]
    turned = of_chain(links[::-1], lambda name: 7.0)["m"]
    assert turned["updates"]["chain"]["values"] == pytest.approx(matrix["updates"]["chain"]["values"], rel=1e-9)
    assert [one["links"] for one in matrix["overlap"]] == [
        ["link 1", "link 2"],
        ["link 1", "link 3"],
        ["link 2", "link 3"],
    ]
    assert matrix["overlap"][0]["left"] == pytest.approx(turned["overlap"][2]["left"], rel=1e-9)


def test_the_rank_of_a_chain_is_at_most_the_sum_of_its_links() -> None:
    first, second = pair(40, 56, 4, 0), pair(40, 56, 3, 1)
    cases = [([first, second], 7), ([first, first], 4), ([first, first.negated()], 0)]
    for pairs, rank in cases:
        assert of_chain([{"m": one} for one in pairs], lambda name: None)["m"]["updates"]["chain"]["rank"] == rank


def test_links_that_learned_the_same_overlap_1_and_orthogonal_ones_0() -> None:
    first = pair(40, 56, 4, 0)
    B_OK, A_KI, _ = factors([{"m": first}], "m")
    svd = low_rank_svd(B_OK, A_KI)
    free_O, free_I = torch.linalg.svd(svd.left_OR).U[:, 4:8], torch.linalg.svd(svd.right_IR).U[:, 4:8]
    apart = Pair(free_I.T, free_O, 1.0)
    same = of_chain([{"m": first}, times({"m": first}, 0.1)], lambda name: None)["m"]["overlap"][0]
    none = of_chain([{"m": first}, {"m": apart}], lambda name: None)["m"]["overlap"][0]
    assert (same["left"], same["right"]) == pytest.approx((1, 1))
    assert (none["left"], none["right"]) == pytest.approx((0, 0), abs=1e-12)
    assert same["random"] == pytest.approx((4 / 40 + 4 / 56) / 2)


def test_links_may_touch_different_matrices_and_one_may_have_learned_nothing() -> None:
    idle = Pair(draw(2, 56).float(), torch.zeros(40, 2), 2.0)
    links: Residual = [{"a": pair(40, 56, 4, 0), "b": pair(56, 40, 4, 1)}, {"a": idle}]
    found = of_chain(links, lambda name: None)
    assert list(found["b"]["updates"]) == ["link 1", "chain"]
    assert found["b"]["overlap"] == found["a"]["overlap"] == []
    assert found["a"]["updates"]["link 2"]["rank"] == 0
    assert found["a"]["updates"]["chain"]["rank"] == 4
    assert found["a"]["updates"]["link 1"]["relative_size"] is None


def test_full_fine_tuning_is_compared_in_as_many_directions_for_all_updates() -> None:
    links: Residual = [{"m": pair(40, 56, 4, 0)}, {"m": pair(40, 56, 2, 1)}]
    update = draw(40, 56, seed=9)
    found = of_chain(links, lambda name: None, {"m": dense_svd(update)})["m"]["with_full"]
    assert found["rank"] == 2
    full_left, _, full_right = np.linalg.svd(update.numpy())
    for what, part in (("link 1", links[:1]), ("link 2", links[1:]), ("chain", links)):
        left, _, right = np.linalg.svd(dense(part, "m"))
        for side, mine, theirs in (("left", left[:, :2], full_left[:, :2]), ("right", right[:2].T, full_right[:2].T)):
            assert found["updates"][what][side] == pytest.approx(np.linalg.norm(mine.T @ theirs) ** 2 / 2, rel=1e-6)
        assert found["updates"][what]["random"] == pytest.approx((2 / 40 + 2 / 56) / 2)


# ---------------------------------------------------------------------------------------------------------
# Intruders


@pytest.mark.parametrize("shape", SHAPES)
def test_the_left_vectors_of_a_tuned_matrix_are_those_of_the_dense_sum(shape: tuple[int, int]) -> None:
    weight_OI, B_OK, A_KI = draw(*shape), draw(shape[0], 3, seed=1), draw(3, shape[1], seed=2)
    base = Tuned.of(weight_OI)
    for tuned, reference_OI in ((base, weight_OI), (base.plus(B_OK, A_KI), weight_OI + B_OK @ A_KI)):
        left = np.linalg.svd(reference_OI.numpy(), full_matrices=False)[0]
        found = tuned.left_vectors().numpy()
        assert found.shape == left.shape
        assert np.abs((found * left).sum(axis=0)) == pytest.approx(np.ones(left.shape[1]), rel=1e-6)
        assert tuned.left_vectors(TOP).numpy() == pytest.approx(found[:, :TOP])


class Three(nn.Module):
    """A wide, a tall and a square matrix whose singular values decay, as those of trained ones do."""

    def __init__(self) -> None:
        super().__init__()
        for number, (n_out, n_in) in enumerate(SHAPES):
            layer = nn.Linear(n_in, n_out, bias=False)
            n = min(n_out, n_in)
            values = torch.linspace(3, 0.1, n, dtype=torch.float64)
            weight = basis(n_out, n, seed=number) @ values.diag() @ basis(n_in, n, seed=number + 10).T
            layer.weight = nn.Parameter(weight.float())
            self.add_module(f"layer{number}", layer)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("size", [0.3, 1.0, 1.5, 3.0, 8.0])
def test_intruders_are_those_that_peft_finds(size: float) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer0", "layer1", "layer2"])
    model = get_peft_model(Three(), config)  # pyright: ignore[reportArgumentType] - PEFT takes any module
    for number in range(3):
        layer = model.get_submodule(f"base_model.model.layer{number}")
        layer.lora_A["default"].weight.data = draw(4, SHAPES[number][1], seed=number).float() / 8
        layer.lora_B["default"].weight.data = size * draw(SHAPES[number][0], 4, seed=number + 5).float() / 8
    said: list[str] = []
    reduce_intruder_dimension(model, logging_sink=said.append)
    theirs = [0 if "No intruders" in line else int(line.rpartition(": ")[2]) for line in said[:3]]
    ours = []
    for number in range(3):
        layer = model.get_submodule(f"base_model.model.layer{number}")
        base = Tuned.of(layer.base_layer.weight.data)
        B_OK, A_KI = 2 * layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data
        ours.append(count_intruders(base.left_vectors(), base.plus(B_OK, A_KI).left_vectors(TOP)))
    assert ours == theirs
    assert (sum(ours) > 0) == (size > 0.3)


# ---------------------------------------------------------------------------------------------------------
# Work


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, one.numel() if isinstance(one, Tensor) else 0)
        return out


@pytest.mark.slow
def test_a_chain_of_four_links_on_a_7b_model_makes_no_matrix_of_the_models_size() -> None:
    """Llama-2-7B: 32 layers of 7 matrices, rank 8. The factors are drawn once for each shape; all are analysed, which
    takes seconds since nothing is larger than the factors."""
    shapes = {"q": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    kinds = ("q", "q", "q", "q", "up", "up", "down")
    drawn = [{kind: pair(*shape, 8, seed=number) for kind, shape in shapes.items()} for number in range(4)]
    names = [(f"{layer}.{place}.{kind}", kind) for layer in range(32) for place, kind in enumerate(kinds)]
    links: Residual = [{name: one[kind] for name, kind in names} for one in drawn]
    with Largest() as made:
        found = of_chain(links, lambda name: 1.0)
    assert len(found) == 224
    assert {matrix["updates"]["chain"]["rank"] for matrix in found.values()} == {32}
    assert made.numel <= 4 * 8 * 11008  # the factors of four links side by side
