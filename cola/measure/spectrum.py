"""What an update of a matrix is made of: its singular values, how many directions they are, and which ones.

A chain's update is kept as factors, and never multiplied out: with B = Q R and Aᵀ = P S,

    ΔW = B A = Q (R Sᵀ) Pᵀ,        so that svd(R Sᵀ) = L D Mᵀ  gives  ΔW = (Q L) D (P M)ᵀ

for two thin QR decompositions and the SVD of a matrix no larger than the rank, all in float64. Full fine-tuning's
update is dense. There the eigenvalues of the Gram matrix of its smaller side are the squared singular values: two to
six times as fast as an SVD (576 x 576, 576 x 1536). It loses what is below 2e-8 of the largest singular value, and that
is lost anyhow: the update is the difference of two float32 matrices, whose own rounding is 6e-8 of theirs.

Pure functions on tensors: no files, no models. Axes: O output features, I input features, K stacked ranks, R directions
(those with a singular value that is not zero), D features of either side.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cola.link.residual import Residual, factors, modules_of

KEPT = 64  # singular values of a matrix that are recorded, and directions that are compared with full fine-tuning's
GRAM_FLOOR = 1e-7  # of the largest singular value: what is below cannot be told from zero in a Gram matrix
TOP = 10  # left singular vectors of the tuned weights among which intruders are looked for
SIMILAR = 0.5  # |cosine| with a singular vector of the base from which on a direction is the base's own


@dataclass(frozen=True)
class Svd:
    """Singular values, largest first, and vectors; float64."""

    left_OR: Tensor  # directions that the update writes to
    values_R: Tensor  # all that are not zero; for a dense update there may be more of them than vectors
    right_IR: Tensor  # directions that it reads from

    @property
    def rank(self) -> int:
        """Singular values that are not zero."""
        return len(self.values_R)


def low_rank_svd(B_OK: Tensor, A_KI: Tensor) -> Svd:
    """SVD of B A from the factors alone.

    Values below what rounding leaves of a zero are taken for zero: equal links, stacked, have the rank of one.
    """
    Q_OK, R_KK = torch.linalg.qr(B_OK.double())
    P_IK, S_KK = torch.linalg.qr(A_KI.double().T)
    left_KK, values_K, right_KK = torch.linalg.svd(R_KK @ S_KK.T, full_matrices=False)
    # The product's error is relative to the factors' sizes, which may cancel in it, not to its own.
    floor = torch.finfo(torch.float64).eps * max(len(B_OK), A_KI.shape[1]) * R_KK.norm() * S_KK.norm()
    rank = int((values_K > floor).sum())
    return Svd(Q_OK @ left_KK[:, :rank], values_K[:rank], P_IK @ right_KK[:rank].T)


def dense_svd(update_OI: Tensor, most: int = KEPT) -> Svd:
    """All singular values of a dense update and the vectors of the `most` largest, by the Gram matrix of its smaller
    side, on the update's device."""
    update_OI = update_OI.double()
    wide = _is_wide(update_OI)
    rows_DI = update_OI if wide else update_OI.T
    squares_D, vectors_DD = torch.linalg.eigh(rows_DI @ rows_DI.T)
    values_D = squares_D.flip(0).clamp(min=0).sqrt()
    values_R = values_D[values_D > GRAM_FLOOR * values_D[0]]
    near_DR = vectors_DD.flip(1)[:, : min(most, len(values_R))]
    far_IR = rows_DI.T @ near_DR / values_R[: near_DR.shape[1]]
    return Svd(near_DR, values_R, far_IR) if wide else Svd(far_IR, values_R, near_DR)


def effective_rank(values_R: Tensor) -> float:
    """exp of the entropy of s / Σ s (Roy & Vetterli, EUSIPCO 2007): n for n equal values, 1 for a single one."""
    shares_R = values_R / values_R.sum()
    return math.exp(torch.special.entr(shares_R).sum().item())


def rank_90(values_R: Tensor) -> int:
    """Fewest directions that hold 90 % of the energy Σ s²."""
    energy_R = values_R.square().cumsum(0)
    return int((energy_R < 0.9 * energy_R[-1]).sum()) + 1


def stable_rank(values_R: Tensor) -> float:
    """‖ΔW‖_F² / ‖ΔW‖_2², never above the rank and hardly moved by small values."""
    return (values_R / values_R[0]).square().sum().item()


def numbers_of(values_R: Tensor, base_norm: float | None) -> dict[str, Any]:
    """What is recorded of one matrix's update, from its singular values without zeros; none where nothing was learned.

    Returns:
        `rank`, `relative_size` (to `base_norm`, ‖W_0‖_F), `effective_rank`, `rank_90`, `stable_rank` (None for no
        update), `values` (the largest `KEPT`), `intruders` (None: not looked for).
    """
    size = values_R.norm().item()
    some = len(values_R) > 0
    return {
        "rank": len(values_R),
        "relative_size": size / base_norm if base_norm else None,
        "effective_rank": effective_rank(values_R) if some else None,
        "rank_90": rank_90(values_R) if some else None,
        "stable_rank": stable_rank(values_R) if some else None,
        "values": values_R[:KEPT].tolist(),
        "intruders": None,
    }


def overlap(one_DR: Tensor, other_DR: Tensor) -> float:
    """φ = ‖UᵀU'‖_F² / min(r, r') of two sets of orthonormal columns: 1 where the smaller span lies in the larger, 0
    where they are orthogonal (LoRA, arXiv 2106.09685, section 7.2)."""
    return ((one_DR.T @ other_DR).square().sum() / min(one_DR.shape[1], other_DR.shape[1])).item()


def random_overlap(rank: int, other_rank: int, n_features: int) -> float:
    """φ of independent random subspaces, in expectation: E tr(P P') = r r' / d, so max(r, r') / d."""
    return max(rank, other_rank) / n_features


def both_sides(one: Svd, other: Svd, most: int | None = None) -> dict[str, float]:
    """φ of the directions that two updates of a matrix write to (`left`), of those they read from (`right`), and what
    random ones would have, the mean of both sides (`random`). `most`: only so many of the largest of each."""
    left, other_left = one.left_OR[:, :most], other.left_OR[:, :most]
    right, other_right = one.right_IR[:, :most], other.right_IR[:, :most]
    ranks = left.shape[1], other_left.shape[1]
    return {
        "left": overlap(left, other_left),
        "right": overlap(right, other_right),
        "random": (random_overlap(*ranks, len(left)) + random_overlap(*ranks, len(right))) / 2,
    }


def of_chain(
    links: Residual, norm_of: Callable[[str], float | None], full: Mapping[str, Svd] | None = None
) -> dict[str, Any]:
    """The spectra of what each link added and of the chain, matrix by matrix. No pair may have scaled rows.

    Args:
        norm_of: ‖W_0‖_F of a matrix; None where it is not known.
        full: Full fine-tuning's update of (some of) the same matrices.

    Returns:
        For each matrix `shape`, `updates` (`link 1`, .., `chain`: see `numbers_of`), `overlap` (of each two links that
        learned something in it: see `both_sides`), `with_full` (of each update with full fine-tuning: the `rank`
        largest directions of both, `rank` being the fewest that any of the updates has; None without it).
    """
    matrices = {}
    for name in modules_of(links):
        mine = {f"link {number}": [link] for number, link in enumerate(links, 1) if name in link}
        svds = {update: _svd_of(link, name) for update, link in mine.items()}
        svds["chain"] = next(iter(svds.values())) if len(svds) == 1 else _svd_of(links, name)
        norm = norm_of(name)
        learned = {update: svd for update, svd in svds.items() if svd.rank}
        pairs = combinations([update for update in learned if update != "chain"], 2)
        matrices[name] = {
            "shape": [len(svds["chain"].left_OR), len(svds["chain"].right_IR)],
            "updates": {update: numbers_of(svd.values_R, norm) for update, svd in svds.items()},
            "overlap": [{"links": [a, b], **both_sides(learned[a], learned[b])} for a, b in pairs],
            "with_full": _with_full(learned, full[name]) if full and name in full and learned else None,
        }
    return matrices


def _svd_of(links: Residual, name: str) -> Svd:
    B_OK, A_KI, rows_O = factors(links, name)
    assert rows_O is None
    return low_rank_svd(B_OK, A_KI)


def _with_full(learned: Mapping[str, Svd], full: Svd) -> dict[str, Any] | None:
    rank = min(full.left_OR.shape[1], *(svd.rank for svd in learned.values()))
    if not rank:
        return None
    return {"rank": rank, "updates": {update: both_sides(svd, full, rank) for update, svd in learned.items()}}


@dataclass(frozen=True)
class Tuned:
    """A matrix W + B A with the Gram matrix of its smaller side; the sum itself is never there."""

    weight_OI: Tensor  # W, float64, on the device that is to do it
    gram_DD: Tensor  # M Mᵀ of M = W + B A where O <= I, else Mᵀ M
    B_OK: Tensor | None = None  # None where nothing is added
    A_KI: Tensor | None = None

    @classmethod
    def of(cls, weight_OI: Tensor) -> "Tuned":
        """Of a dense matrix alone."""
        weight_OI = weight_OI.double()
        return cls(weight_OI, weight_OI @ weight_OI.T if _is_wide(weight_OI) else weight_OI.T @ weight_OI)

    def plus(self, B_OK: Tensor, A_KI: Tensor) -> "Tuned":
        """With an update added to the matrix alone: W's Gram matrix and products with the thin factors."""
        B_OK, A_KI = B_OK.to(self.weight_OI), A_KI.to(self.weight_OI)
        if _is_wide(self.weight_OI):
            near_DK, crossed_DK, inner_KK = B_OK, self.weight_OI @ A_KI.T, A_KI @ A_KI.T
        else:
            near_DK, crossed_DK, inner_KK = A_KI.T, self.weight_OI.T @ B_OK, B_OK.T @ B_OK
        half_DD = near_DK @ (crossed_DK + near_DK @ inner_KK / 2).T
        return Tuned(self.weight_OI, self.gram_DD + half_DD + half_DD.T, B_OK, A_KI)

    def left_vectors(self, most: int | None = None) -> Tensor:
        """Left singular vectors (O, min(O, I)) as columns, those of the largest values first; `most`: only so many."""
        squares_D, vectors_DD = torch.linalg.eigh(self.gram_DD)
        vectors_DR, values_R = vectors_DD.flip(1)[:, :most], squares_D.flip(0)[:most].clamp(min=0).sqrt()
        if _is_wide(self.weight_OI):
            return vectors_DR
        told = values_R > GRAM_FLOOR * values_R[0]  # what a zero value goes with is no direction of the matrix
        vectors_DR = vectors_DR[:, told]
        left_OR = self.weight_OI @ vectors_DR
        if self.B_OK is not None and self.A_KI is not None:
            left_OR += self.B_OK @ (self.A_KI @ vectors_DR)
        return left_OR / values_R[told]


def _is_wide(weight_OI: Tensor) -> bool:
    return weight_OI.shape[0] <= weight_OI.shape[1]


def count_intruders(base_left_OM: Tensor, tuned_left_OT: Tensor) -> int:
    """How many of the first `TOP` left singular vectors of a tuned matrix resemble none of all those of the base's:
    |cosine| below `SIMILAR` with each (Shuttleworth et al., arXiv 2410.21228, as PEFT's `reduce_intruder_dimension`
    finds them)."""
    return int(((tuned_left_OT.T @ base_left_OM).abs().amax(dim=1) < SIMILAR).sum())
