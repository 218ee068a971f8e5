"""What a chain has learned: the sum of its pairs, added to the untouched base in float32 and rounded once.

    W_k = cast(float32(W_0) + Σ_{i<=k} s_i B_i A_i)

(with DoRA's rows d: W_k = d_k (W_{k-1} + s_k B_k A_k), unrolled). Adding each link to the rounded result of the one
before loses what is smaller than half a unit in the last place, and the more links, the smaller each is. So the sum is
always taken anew from W_0, which is read from its memory-mapped safetensors file some rows at a time, and neither a
second model nor a second matrix lies in memory. What each matrix was given is measured on the way (`Applied`).
Where nothing may be written (a quantized base, or `merge: no`) the pairs are stacked beside the weights: one low-rank
product for all links, and no rounding at all.

Axes: O output features, I input features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from cola.link.base import Base, as_stored, linear, weight_of


@dataclass(frozen=True)
class Pair:
    """One matrix's share of a link, kept in float32 on the CPU: W <- rows * (W + scale * B @ A)."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float  # alpha / rank, or alpha / sqrt(rank)
    rows_O: Tensor | None = None  # DoRA's factor of each row of the weight; None: 1
    magnitude_O: Tensor | None = None  # DoRA's trained length of each row

    def without(self, other: "Pair") -> "Pair":
        """scale * (B @ A - other's B @ A) as one pair of both ranks."""
        A_RI, B_OR = torch.cat([self.A_RI, other.A_RI]), torch.cat([self.B_OR, -other.B_OR], dim=1)
        return replace(self, A_RI=A_RI, B_OR=B_OR)

    def split(self, rank: int) -> tuple["Pair", "Pair | None"]:
        """What `without` put together: the pair of that rank, and what was taken away."""
        own = replace(self, A_RI=self.A_RI[:rank], B_OR=self.B_OR[:, :rank])
        rest = Pair(self.A_RI[rank:], -self.B_OR[:, rank:], self.scale)
        return own, rest if len(rest.A_RI) else None

    def negated(self) -> "Pair":
        """The pair that takes this one away."""
        return Pair(self.A_RI, -self.B_OR, self.scale)


BLOCK = 1 << 20  # entries of a matrix that are worked on at a time: 4 MB in float32, a dozen of which are needed

LinkWeights: TypeAlias = dict[str, Pair]  # module name -> its pair; empty for a link that leaves none (full)
Residual: TypeAlias = list[LinkWeights]


def factors(residual: Residual, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the links that touched one matrix W have made of it: rows * W + B A, as B (O, K), A (K, I) and rows (O,),
    None where no link scaled any. All pairs stacked: [s_1 B_1 ... s_k B_k] [A_1; ...; A_k]."""
    pairs = [link[name] for link in residual if name in link]
    if not pairs:
        raise KeyError(name)
    rows_O: Tensor | None = None
    blocks = []
    for pair in reversed(pairs):  # a later link's rows scale all that came before
        if pair.rows_O is not None:
            rows_O = pair.rows_O if rows_O is None else rows_O * pair.rows_O
        block_OR = pair.B_OR * pair.scale
        blocks.append(block_OR if rows_O is None else block_OR * rearrange(rows_O, "o -> o 1"))
    return torch.cat(blocks[::-1], dim=1), torch.cat([pair.A_RI for pair in pairs]), rows_O


def times(link: LinkWeights, share: float) -> LinkWeights:
    """A share of each of a link's updates."""
    return {name: replace(pair, scale=pair.scale * share) for name, pair in link.items()}


def left_behind(links: Residual, share: float, goes_on: bool) -> Residual:
    """What links are to the chain once another has begun: a share of each, or nothing where all are one pair that goes
    on from link to link."""
    return [{} if goes_on else times(link, share) for link in links]


def added(pairs: Residual, share: float, goes_on: bool) -> Residual:
    """What each link of a chain added to it, so that the sum is what it has learned: the last one whole, a share of
    those before; where all are one pair that goes on, what the pair was changed by."""
    if not goes_on:
        return [*left_behind(pairs[:-1], share, goes_on), *pairs[-1:]]
    return [
        *pairs[:1],
        *({name: pair.without(before[name]) for name, pair in after.items()} for before, after in pairwise(pairs)),
    ]


def stacked(residual: Residual) -> LinkWeights:
    """The whole chain as one pair of each module, of rank Σ r_i. No link may have scaled rows."""
    whole = {}
    scales = {pair.scale for link in residual for pair in link.values()}
    scale = scales.pop() if len(scales) == 1 else None
    for name in modules_of(residual):
        B_OK, A_KI, rows_O = factors(residual, name)
        assert rows_O is None
        if scale is not None:  # alpha / rank stays what it was, and not even the scaling rounds
            B_OK = torch.cat([link[name].B_OR for link in residual if name in link], dim=1)
        whole[name] = Pair(A_KI, B_OK, 1.0 if scale is None else scale)
    return whole


def compressed(residual: Residual, rank: int) -> tuple[LinkWeights, dict[str, tuple[float, float]]]:
    """The best approximation of the chain by one pair of at most this rank per module, by singular values.

    From the factors alone: with B = Q R and A^T = P S, the singular values of B A are those of the small R S^T.
    Beside the pairs: of each module the squared Frobenius norm of the update that is kept, and all of it.
    """
    pairs, energy = {}, {}
    for name, pair in stacked(residual).items():
        Q_OK, R_KK = torch.linalg.qr(pair.scale * pair.B_OR.double())
        P_IK, S_KK = torch.linalg.qr(pair.A_RI.double().T)
        left_KK, values_K, right_KK = torch.linalg.svd(R_KK @ S_KK.T, full_matrices=False)
        root_R = values_K[:rank].sqrt()
        B_OR, A_RI = Q_OK @ left_KK[:, :rank] * root_R, rearrange(root_R, "r -> r 1") * (right_KK[:rank] @ P_IK.T)
        pairs[name] = Pair(A_RI.float(), B_OR.float(), 1.0)
        energy[name] = values_K[:rank].square().sum().item(), values_K.square().sum().item()
    return pairs, energy


def modules_of(residual: Residual) -> list[str]:
    """Names of all modules that some link touched, in a fixed order."""
    return sorted({name for link in residual for name in link})


@dataclass(frozen=True)
class Applied:
    """What tying a link did to one matrix: of all links together, what the weights now hold above W_0 (applied) against
    the sum of the pairs (learned)."""

    relative_size: float  # ||W_k - W_{k-1}||_F / ||W_0||_F, before any rounding
    unchanged: float  # share of the entries that the knot left as they were, in the dtype they are kept in
    error: float | None  # ||applied - learned||_F / ||learned||_F; None where nothing was learned
    cosine: float | None  # between the two; None where one of them is zero


@torch.no_grad()
def write(
    model: nn.Module,
    base: Base,
    residual: Residual,
    names: Sequence[str],
    merge: str = "exact",
    before: Residual | None = None,
) -> dict[str, Applied]:
    """Make the function of the modules `names` that of base + residual, the links tied so far.

    Args:
        merge: `exact`: added in float32 to the base and cast once to each weight's dtype; `naive`: link by link, in
            place as PEFT's merge does it, which rounds each time; `no`: beside the weights, which stay the base's. A
            quantized base has it beside whatever is asked for.
        before: The links tied before this knot. With them, what each matrix was given is returned; pairs beside the
            weights are applied as they were learned.
    """
    done: dict[str, Applied] = {}
    for name in names:
        module = linear(model, name)
        weight = weight_of(module, "")
        beside = merge == "no" or base.quantized
        if beside:
            touched = any(name in link for link in residual)
            base.put_beside(name, module, factors(residual, name)[:2] if touched else None)
            if before is None:
                continue
        weight_OI, pristine_OI = as_stored(module, weight), as_stored(module, base.weight(name))
        now, then = _Links(residual, name, weight.device), _Links(before or [], name, weight.device)
        sums: dict[str, Tensor] = {}
        n_rows = max(1, BLOCK // pristine_OI.shape[1])
        for rows in (slice(first, first + n_rows) for first in range(0, len(pristine_OI), n_rows)):
            pristine_bI = pristine_OI[rows].to(weight.device, torch.float32, copy=True)
            if not beside:
                weight_OI[rows] = now.tied(pristine_bI, rows, merge, weight.dtype)
            if before is not None:
                learned_bI = now.update(pristine_bI, rows)
                of_block = {
                    "pristine": pristine_bI.square(),
                    "link": (learned_bI - then.update(pristine_bI, rows)).square(),
                    "learned": learned_bI.square(),
                }
                if not beside:
                    applied_bI = weight_OI[rows].float() - pristine_bI
                    of_block["applied"] = applied_bI.square()
                    of_block["product"] = applied_bI * learned_bI
                    of_block["error"] = (applied_bI - learned_bI).square()
                    of_block["same"] = weight_OI[rows] == then.tied(pristine_bI, rows, merge, weight.dtype)
                for quantity, values in of_block.items():
                    sums[quantity] = sums.get(quantity, torch.zeros(())) + values.sum(dtype=torch.float64)
        if before is not None:
            done[name] = _applied({quantity: total.item() for quantity, total in sums.items()}, pristine_OI.numel())
    return done


def _applied(sums: dict[str, float], n_entries: int) -> Applied:
    """From the sums over a matrix's entries; those of what was applied are missing where it is beside the weights."""
    size = (sums["link"] / max(sums["pristine"], 1e-60)) ** 0.5
    if "applied" not in sums:
        return Applied(size, 0.0, 0.0, 1.0)
    lengths = (sums["applied"] * sums["learned"]) ** 0.5
    return Applied(
        size,
        sums["same"] / n_entries,
        (sums["error"] / sums["learned"]) ** 0.5 if sums["learned"] else None,
        min(sums["product"] / lengths, 1.0) if lengths else None,
    )


class _Links:
    """All links of one matrix, on the device where they are added to it."""

    def __init__(self, residual: Residual, name: str, device: torch.device) -> None:
        pairs = [link[name] for link in residual if name in link]
        self.pairs = [(pair.scale * pair.B_OR.to(device), pair.A_RI.to(device)) for pair in pairs]
        self.stacked = None
        self.rows_O: Tensor | None = None
        if pairs:
            B_OK, A_KI, rows_O = factors(residual, name)
            self.stacked = B_OK.to(device), A_KI.to(device)
            self.rows_O = None if rows_O is None else rearrange(rows_O, "o -> o 1").to(device)

    def tied(self, pristine_bI: Tensor, rows: slice, merge: str, dtype: torch.dtype) -> Tensor:
        """Some rows of base + links, in the dtype they are kept in."""
        if self.stacked is None:
            return pristine_bI.to(dtype)
        if merge == "naive":
            tied_bI = pristine_bI.to(dtype, copy=True)
            for B_OR, A_RI in self.pairs:
                tied_bI += B_OR[rows] @ A_RI
            return tied_bI
        B_OK, A_KI = self.stacked
        scaled_bI = pristine_bI if self.rows_O is None else pristine_bI * self.rows_O[rows]
        # Not addmm: some of its kernels add one product after the other to the weights, and round each time.
        return (scaled_bI + B_OK[rows] @ A_KI).to(dtype)

    def update(self, pristine_bI: Tensor, rows: slice) -> Tensor:
        """What the links add to some rows of the base."""
        if self.stacked is None:
            return torch.zeros_like(pristine_bI)
        B_OK, A_KI = self.stacked
        low_rank_bI = B_OK[rows] @ A_KI
        return low_rank_bI if self.rows_O is None else low_rank_bI + (self.rows_O[rows] - 1) * pristine_bI
