"""What a chain has learned: the sum of its pairs, added to the untouched base in float32 and rounded once.

    W_k = cast(float32(W_0) + Σ_{i<=k} s_i B_i A_i)

(with DoRA's rows d: W_k = d_k (W_{k-1} + s_k B_k A_k), unrolled). Adding each link to the rounded result of the one
before loses what is smaller than half a unit in the last place, and the more links, the smaller each is. So the sum is
always taken anew from W_0, which is read from its memory-mapped safetensors file, and no second model lies in memory.
Where nothing may be written (a quantized base, or `merge: no`) the pairs are stacked beside the weights: one low-rank
product for all links, and no rounding at all.

Axes: O output features, I input features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Pair:
    """One matrix's share of a link, kept in float32 on the CPU: W <- rows * (W + scale * B @ A).

    Attributes:
        A_RI: Reads the input.
        B_OR: Writes the output.
        scale: alpha / rank, or alpha / sqrt(rank).
        rows_O: DoRA's factor of each row of the weight; None: 1.
        magnitude_O: DoRA's trained length of each row.
    """

    A_RI: Tensor
    B_OR: Tensor
    scale: float
    rows_O: Tensor | None = None
    magnitude_O: Tensor | None = None

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

    def times(self, share: float) -> "Pair":
        """A share of the update."""
        return self if share == 1 else replace(self, scale=self.scale * share)


LinkWeights: TypeAlias = dict[str, Pair]  # module name -> its pair; empty for a link that leaves none (full)
Residual: TypeAlias = list[LinkWeights]


class Base:
    """The base's own weights, float32 and untouched, one matrix at a time.

    Where the model came from safetensors, a matrix is read from the file and nothing is kept in memory. A matrix
    that is not in the files under its own name, or differs from what was loaded, is copied the first time it is
    asked for, which must be before it is changed: `remember` does that.
    """

    def __init__(self, model: nn.Module, files: Sequence[Path] = (), quantized: bool = False) -> None:
        self.quantized = quantized
        self._model = model
        self._files: dict[str, Path] = {}
        self._copies: dict[str, Tensor] = {}
        self._remembered: set[str] = set()
        self._beside: dict[str, RemovableHandle] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def remember(self, names: Sequence[str]) -> None:
        """Make sure the pristine weights of these modules can be had from now on."""
        for name in names:
            if name in self._remembered:
                continue
            weight = weight_of(self._model, name)
            stored = self._stored(name)
            # Codes are never written, so the files' own weights are all that can be asked for.
            if self.quantized:
                assert stored is not None
            elif stored is None or not torch.equal(stored.to(weight.dtype), weight.cpu()):
                self._copies[name] = weight.to("cpu", copy=True)
            self._remembered.add(name)

    def weight(self, name: str) -> Tensor:
        """float32 weight of a remembered module on the CPU, in the module's own layout; not to be changed."""
        stored = self._copies.get(name)
        stored = self._stored(name) if stored is None else stored
        assert name in self._remembered, f"{name} was never remembered"
        assert stored is not None
        return stored.float()

    def put_beside(self, name: str, module: nn.Module, factors: "tuple[Tensor, Tensor] | None") -> None:
        """Let a module add B A x to its output, in float32, from now on; None: nothing. One product for all links."""
        if (handle := self._beside.pop(name, None)) is not None:
            handle.remove()
        if factors is None:
            return
        B_OK, A_KI = (factor.to(weight_of(module, "").device) for factor in factors)

        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                return output + (args[0].float() @ A_KI.T @ B_OK.T).to(output.dtype)

        self._beside[name] = module.register_forward_hook(add)

    def _stored(self, name: str) -> Tensor | None:
        key = f"{name}.weight"
        if key not in self._files:
            key = key.removeprefix(f"{getattr(self._model, 'base_model_prefix', '')}.")  # as GPT-2's files have it
        if key not in self._files:
            return None
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a linear module, without its history."""
    weight = model.get_submodule(name).weight  # of the module itself where the name is empty
    assert isinstance(weight, Tensor)
    return weight.detach()


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """Output and input features of a linear module."""
    n_out, n_in = weight_of(model, name).shape
    return (n_in, n_out) if isinstance(model.get_submodule(name), Conv1D) else (n_out, n_in)


def linear(model: nn.Module, name: str) -> nn.Module:
    """The linear module of that name, under the pair that may be attached to it."""
    module = model.get_submodule(name)
    return getattr(module, "base_layer", module)


def factors(residual: Residual, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the links have made of one matrix W: rows * W + B A, as B (O, K), A (K, I) and rows (O,), None where no link
    scaled any. All pairs stacked: [s_1 B_1 ... s_k B_k] [A_1; ...; A_k].

    Raises:
        KeyError: no link touched the module.
    """
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
    return {name: pair.times(share) for name, pair in link.items()}


def modules_of(residual: Residual) -> list[str]:
    """Names of all modules that some link touched, in a fixed order."""
    return sorted({name for link in residual for name in link})


@torch.no_grad()
def write(model: nn.Module, base: Base, residual: Residual, names: Sequence[str], merge: str = "exact") -> None:
    """Make the function of `names` that of base + residual.

    Args:
        model: Changed in place.
        base: Its own weights.
        residual: The links tied so far.
        names: Modules to be brought up to date.
        merge: `exact`: added in float32 to the base and cast once to each weight's dtype; `naive`: link by link, in
            place as PEFT's merge does it, which rounds each time; `no`: beside the weights, which stay the base's. A
            quantized base has it beside whatever is asked for.
    """
    for name in names:
        module = linear(model, name)
        touched = any(name in link for link in residual)
        if merge == "no" or base.quantized:
            base.put_beside(name, module, factors(residual, name)[:2] if touched else None)
        elif merge == "naive":
            weight = weight_of(module, "")
            weight.copy_(base.weight(name))
            for pair in (link[name] for link in residual if name in link):
                weight += _as_stored(module, pair.scale * (pair.B_OR @ pair.A_RI)).to(weight.device)
        else:
            weight_of(module, "").copy_(_as_stored(module, merged(base, residual, name, module)))


def merged(base: Base, residual: Residual, name: str, module: nn.Module) -> Tensor:
    """float32 weight (O, I) of one module with the links of the residual."""
    weight_OI = _as_stored(module, base.weight(name))
    if not any(name in link for link in residual):
        return weight_OI
    B_OK, A_KI, rows_O = factors(residual, name)
    if rows_O is not None:
        weight_OI = weight_OI * rearrange(rows_O, "o -> o 1")
    return weight_OI + B_OK @ A_KI


def _as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """From (O, I) to the module's own layout, or back: GPT-2's Conv1D keeps its weight as (I, O)."""
    return rearrange(weight, "a b -> b a") if isinstance(module, Conv1D) else weight


def relative_size(model: nn.Module, base: Base, before: Residual, link: LinkWeights) -> dict[str, float]:
    """||W_k - W_{k-1}||_F / ||W_0||_F for each matrix of a link."""
    sizes = {}
    for name, pair in link.items():
        if pair.rows_O is None:
            # ||BA||_F from two R x R products: no dense update is formed.
            gram = (pair.B_OR.T @ pair.B_OR) * (pair.A_RI @ pair.A_RI.T)
            norm = pair.scale * gram.sum().clamp(min=0).sqrt().item()
        else:
            module = linear(model, name)
            change = merged(base, [*before, link], name, module) - merged(base, before, name, module)
            norm = change.norm().item()
        sizes[name] = norm / max(base.weight(name).norm().item(), 1e-30)
    return sizes
