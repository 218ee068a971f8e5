"""What a chain has learned: the sum of its pairs, added to the untouched base in float32 and rounded once.

    W_k = cast(float32(W_0) + Σ_{i<=k} s_i B_i A_i)

Adding each link to the rounded result of the one before loses what is smaller than half a unit in the last
place, and the more links, the smaller each is. So the sum is always taken anew from W_0, which is read from its
memory-mapped safetensors file, and no second model lies in memory.

Axes: O output features, I input features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Pair:
    """One matrix's share of a link: the update scale * B @ A, kept in float32 on the CPU."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float


LinkWeights: TypeAlias = dict[str, Pair]  # module name -> its pair; empty for a link that leaves none (full)
Residual: TypeAlias = list[LinkWeights]


class Base:
    """The base's own weights, float32 and untouched, one matrix at a time.

    Where the model came from safetensors, a matrix is read from the file and nothing is kept in memory. A matrix
    that is not in the files under its own name, or differs from what was loaded, is copied the first time it is
    asked for, which must be before it is changed: `remember` does that.
    """

    def __init__(self, model: nn.Module, files: Sequence[Path] = ()) -> None:
        self._model = model
        self._files: dict[str, Path] = {}
        self._copies: dict[str, Tensor] = {}
        self._remembered: set[str] = set()
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
            if stored is None or not torch.equal(stored.to(weight.dtype), weight.cpu()):
                self._copies[name] = weight.to("cpu", copy=True)
            self._remembered.add(name)

    def weight(self, name: str) -> Tensor:
        """float32 weight of a remembered module on the CPU, in the module's own layout; not to be changed."""
        stored = self._copies.get(name)
        stored = self._stored(name) if stored is None else stored
        assert name in self._remembered, f"{name} was never remembered"
        assert stored is not None
        return stored.float()

    def _stored(self, name: str) -> Tensor | None:
        key = f"{name}.weight"
        if key not in self._files:
            return None
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a linear module, without its history."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def update(residual: Residual, name: str) -> Tensor | None:
    """Σ s B A of one module as float32, shape (O, I); None where no link touched it."""
    pairs = [link[name] for link in residual if name in link]
    if not pairs:
        return None
    # One product of stacked factors: [s_1 B_1 ... s_k B_k] [A_1; ...; A_k].
    stacked_OK = torch.cat([pair.B_OR * pair.scale for pair in pairs], dim=1)
    stacked_KI = torch.cat([pair.A_RI for pair in pairs], dim=0)
    return stacked_OK @ stacked_KI


def modules_of(residual: Residual) -> list[str]:
    """Names of all modules that some link touched, in a fixed order."""
    return sorted({name for link in residual for name in link})


@torch.no_grad()
def write(model: nn.Module, base: Base, residual: Residual, names: Sequence[str]) -> None:
    """Set the weights of `names` to base + residual, added in float32 and cast once to each weight's dtype."""
    for name in names:
        module = model.get_submodule(name)
        delta_OI = update(residual, name)
        merged = base.weight(name)
        if delta_OI is not None:
            # GPT-2's Conv1D keeps its weight as (I, O).
            merged = merged + (rearrange(delta_OI, "o i -> i o") if isinstance(module, Conv1D) else delta_OI)
        weight_of(model, name).copy_(merged)


def relative_size(base: Base, link: LinkWeights) -> dict[str, float]:
    """||s B A||_F / ||W_0||_F for each matrix of a link."""
    sizes = {}
    for name, pair in link.items():
        # ||BA||_F from two R x R products: no dense update is formed.
        gram = (pair.B_OR.T @ pair.B_OR) * (pair.A_RI @ pair.A_RI.T)
        norm = pair.scale * gram.sum().clamp(min=0).sqrt().item()
        sizes[name] = norm / max(base.weight(name).norm().item(), 1e-30)
    return sizes
