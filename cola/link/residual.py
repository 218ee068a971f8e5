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

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from cola.link import wires
from cola.link.base import BLOCK, Base, as_stored, linear, own_rows, weight_of


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


LinkWeights: TypeAlias = dict[str, Pair]  # module name -> its pair; empty for a link that leaves none (full)
Residual: TypeAlias = list[LinkWeights]
Share: TypeAlias = float | Mapping[str, float]  # of all of a link's pairs, or of each by its module


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


def times(link: LinkWeights, share: Share) -> LinkWeights:
    """A share of each of a link's updates."""
    shares = share if isinstance(share, Mapping) else dict.fromkeys(link, share)
    return {name: replace(pair, scale=pair.scale * shares[name]) for name, pair in link.items()}


def left_behind(links: Residual, shares: Sequence[Share], goes_on: bool) -> Residual:
    """What links are to the chain once another has begun: a share of each, or nothing where all are one pair that goes
    on from link to link."""
    return [{} if goes_on else times(link, share) for link, share in zip(links, shares, strict=True)]


def added(pairs: Residual, shares: Sequence[Share], goes_on: bool) -> Residual:
    """What each link of a chain added to it, so that the sum is what it has learned: the last one whole, a share of
    those before; where all are one pair that goes on, what the pair was changed by."""
    if not goes_on:
        return [*left_behind(pairs[:-1], shares, goes_on), *pairs[-1:]]
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
        before: The links tied before this knot, whose weights the model has now. With them, what each matrix was given
            is returned; pairs beside the weights are applied as they were learned.
    """
    done: dict[str, Applied] = {}
    if base.told is not None:
        base.told(residual, names, merge, before)
    for name in names:
        module = linear(model, name)
        weight = weight_of(module, "")
        beside = merge == "no" or base.quantized
        if beside:
            touched = any(name in link for link in residual)
            base.put_beside(name, module, factors(residual, name)[:2] if touched else None)
        links = _Links(residual, name, weight.device)
        account = None if before is None else _Account(links, _Links(before, name, weight.device))
        if beside:
            if account:
                done[name] = account.beside(base.squared_norm(name))
            continue
        own, first = own_rows(weight)
        weight_OI, pristine_OI = as_stored(module, own), as_stored(module, base.weight(name))
        block = BLOCK if weight.device.type == "cpu" else 8 * BLOCK  # a GPU waits for the launches of small ones
        n_rows = max(1, block // pristine_OI.shape[1])
        for start in range(0, len(weight_OI), n_rows):
            held_bI = weight_OI[start : start + n_rows]
            rows = slice(first + start, first + start + len(held_bI))
            pristine_bI = pristine_OI[rows].to(weight.device, torch.float32)
            low_rank_bI = links.low_rank(rows)
            tied_bI = links.tied(pristine_bI, low_rank_bI, rows, merge, weight.dtype)
            if account:
                account.add(rows, pristine_bI, low_rank_bI, held_bI, tied_bI)
            held_bI.copy_(tied_bI)
        if account:
            if base.sharded:
                account.sum_over_ranks()
            done[name] = account.written(pristine_OI.numel())
    return done


class _Links:
    """All links of one matrix, on the device where they are added to it."""

    def __init__(self, residual: Residual, name: str, device: torch.device) -> None:
        self.pairs = [link[name] for link in residual if name in link]
        self.device, self.stacked = device, None
        self.rows_O: Tensor | None = None
        if self.pairs:
            B_OK, A_KI, rows_O = factors(residual, name)
            self.stacked = B_OK.to(device), A_KI.to(device)
            self.rows_O = None if rows_O is None else rearrange(rows_O, "o -> o 1").to(device)

    def low_rank(self, rows: slice) -> Tensor | None:
        """Some rows of the sum of all pairs; None where no link touched the matrix."""
        return None if self.stacked is None else self.stacked[0][rows] @ self.stacked[1]

    def tied(
        self, pristine_bI: Tensor, low_rank_bI: Tensor | None, rows: slice, merge: str, dtype: torch.dtype
    ) -> Tensor:
        """The same rows of base + links, in the dtype they are kept in."""
        if low_rank_bI is None:
            return pristine_bI.to(dtype)
        if merge == "naive":
            tied_bI = pristine_bI.to(dtype, copy=True)
            for pair in self.pairs:
                tied_bI += (pair.scale * pair.B_OR[rows].to(self.device)) @ pair.A_RI.to(self.device)
            return tied_bI
        scaled_bI = pristine_bI if self.rows_O is None else pristine_bI * self.rows_O[rows]
        # Not addmm: some of its kernels add one product after the other to the weights, and round each time.
        return (scaled_bI + low_rank_bI).to(dtype)

    def update(self, pristine_bI: Tensor, low_rank_bI: Tensor | None, rows: slice) -> Tensor:
        """What the links add to the same rows of the base."""
        if low_rank_bI is None:
            return torch.zeros_like(pristine_bI)
        return low_rank_bI if self.rows_O is None else low_rank_bI + (self.rows_O[rows] - 1) * pristine_bI


class _Account:
    """What a knot does to one matrix, taken while it is done, in sums over the matrix's entries.

    Args:
        now: The links that are tied.
        then: Those that were before.
    """

    def __init__(self, now: _Links, then: _Links) -> None:
        self.now, self.then = now, then
        self.sums: dict[str, Any] = defaultdict(float)
        # What no link scales rows of is of low rank, and so its norm is had from the factors.
        self.low_rank = now.rows_O is None and then.rows_O is None
        if self.low_rank:
            self.sums["learned"] = _squared_norm(now.pairs)
            gone = [pair.negated() for pair in then.pairs if not any(pair is other for other in now.pairs)]
            fresh = [pair for pair in now.pairs if not any(pair is other for other in then.pairs)]
            self.sums["link"] = _squared_norm([*fresh, *gone])

    def add(
        self, rows: slice, pristine_bI: Tensor, low_rank_bI: Tensor | None, held_bI: Tensor, tied_bI: Tensor
    ) -> None:
        """Some rows of the base, of the pairs' sum, and of the weight before and after."""
        self._add("pristine", pristine_bI, pristine_bI)
        learned_bI = self.now.update(pristine_bI, low_rank_bI, rows)
        if not self.low_rank:
            link_bI = learned_bI - self.then.update(pristine_bI, self.then.low_rank(rows), rows)
            self._add("link", link_bI, link_bI)
            self._add("learned", learned_bI, learned_bI)
        self.sums["same"] += (tied_bI == held_bI).sum()
        applied_bI = tied_bI.float() - pristine_bI
        self._add("applied", applied_bI, applied_bI)
        self._add("product", applied_bI, learned_bI)
        error_bI = applied_bI - learned_bI
        self._add("error", error_bI, error_bI)

    def _add(self, quantity: str, first: Tensor, second: Tensor) -> None:
        self.sums[quantity] += torch.dot(first.flatten(), second.flatten()).double()

    def sum_over_ranks(self) -> None:
        """Add up what each process has seen of its own rows."""
        seen = ("pristine", "same", "applied", "product", "error", *([] if self.low_rank else ["link", "learned"]))
        mine = torch.tensor([float(self.sums[key]) for key in seen], dtype=torch.float64, device=self.now.device)
        self.sums |= dict(zip(seen, wires.sum_over(mine).tolist(), strict=True))

    def beside(self, pristine: float) -> Applied:
        """What pairs beside the weights were given, all of it; `pristine`: ||W_0||_F squared. None of them scales
        rows, so that their factors say it and no entry is looked at."""
        return Applied(self._size(pristine), 0.0, 0.0, 1.0)

    def written(self, n_entries: int) -> Applied:
        """What the sums over all rows say."""
        sums = {quantity: float(total) for quantity, total in self.sums.items()}
        lengths = (sums["applied"] * sums["learned"]) ** 0.5
        return Applied(
            self._size(sums["pristine"]),
            sums["same"] / n_entries,
            (sums["error"] / sums["learned"]) ** 0.5 if sums["learned"] else None,
            min(sums["product"] / lengths, 1.0) if lengths else None,
        )

    def _size(self, pristine: float) -> float:
        return (float(self.sums["link"]) / max(pristine, 1e-60)) ** 0.5


def _squared_norm(pairs: Sequence[Pair]) -> float:
    """||sum of s B A||_F squared: the trace of (B^T B) (A A^T), of all pairs stacked."""
    if not pairs:
        return 0.0
    B_OK = torch.cat([pair.scale * pair.B_OR.double() for pair in pairs], dim=1)
    A_KI = torch.cat([pair.A_RI.double() for pair in pairs])
    return max(0.0, ((B_OK.T @ B_OK) * (A_KI @ A_KI.T)).sum().item())
