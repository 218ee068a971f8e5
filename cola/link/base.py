"""The base's weights as they were loaded: read where they lie, never changed."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from cola.errors import ModelError

BLOCK = 1 << 17  # entries of a matrix that are worked on at a time: half a megabyte in float32, a few stay in the cache


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold some of the model's weights (`shards.shard`)."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def own_rows(weight: Any) -> tuple[Tensor, int]:
    """The rows of a weight that this process holds, and the number of the first: all of them, where it is no shard."""
    if not hasattr(weight, "to_local"):  # torch's DTensor, which is slow to import and seldom met
        return weight, 0
    mesh = weight.device_mesh
    first = mesh.get_local_rank() * math.ceil(len(weight) / mesh.size())  # as torch.chunk deals them
    return weight.to_local(), min(first, len(weight))


class Base:
    """The base's own weights, float32 and untouched, one matrix at a time.

    Where the model came from safetensors, a matrix is read from the file and nothing is kept in memory. One that the
    files do not have as it is, or that differs from what was loaded, is copied by `remember`, before it is changed.
    Of a sharded model each process reads its own rows, and `told` lets the others write theirs when this one does.
    """

    def __init__(self, model: nn.Module, files: Sequence[Path] = (), quantized: bool = False) -> None:
        self.quantized = quantized
        self.sharded = is_sharded(model)
        self.told: Callable[..., None] | None = None  # with what `residual.write` is called with
        self._model = model
        self._files: dict[str, tuple[Path, str]] = {}  # by the model's name of a weight: where, and under which name
        self._copies: dict[str, Tensor] = {}
        self._remembered: set[str] = set()
        self._beside: dict[str, RemovableHandle] = {}
        self._squared_norms: dict[str, float] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._files |= {name: (file, key) for key, name in names_in_model(model, opened.keys()).items()}

    def remember(self, names: Sequence[str]) -> None:
        """Make sure the pristine weights of these modules can be had from now on."""
        for name in set(names) - self._remembered:
            weight, stored = weight_of(self._model, name), self.stored(name)
            self._remembered.add(name)
            # Codes are never written, so the files' own weights are all that can be asked for.
            if self.quantized:
                assert stored is not None
                continue
            own, first = own_rows(weight)
            if stored is not None and torch.equal(stored[first : first + len(own)].to(own.dtype), own.cpu()):
                continue
            if self.sharded:
                raise ModelError(
                    f"model.shard: the files do not hold the weight of {name} as the model has it, so that nobody has "
                    "all of it: say false"
                )
            self._copies[name] = weight.to("cpu", copy=True)

    def weight(self, name: str) -> Tensor:
        """Weight of a remembered module on the CPU, in the file's dtype and the module's own layout; not to be
        changed. Where it comes from a file, only what is read of it is ever in memory."""
        assert name in self._remembered, f"{name} was never remembered"
        stored = self._copies[name] if name in self._copies else self.stored(name)
        assert stored is not None
        return stored

    def squared_norm(self, name: str) -> float:
        """||W||_F squared of a remembered module's weight, read once for all who ask."""
        if name not in self._squared_norms:
            blocks = self.weight(name).flatten().split(BLOCK)
            self._squared_norms[name] = math.fsum(torch.dot(b, b).item() for b in map(Tensor.float, blocks))
        return self._squared_norms[name]

    def put_beside(self, name: str, module: nn.Module, factors: tuple[Tensor, Tensor] | None) -> None:
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

    def keeps_beside(self, name: str) -> bool:
        """Whether what was learned lies beside a module's weight, which is the base's own."""
        return self.quantized or name in self._beside

    def matrix(self, name: str) -> Tensor | None:
        """The weight as the files have it, seen as (O, I)."""
        stored = self.stored(name)
        return None if stored is None else as_stored(self._model.get_submodule(name), stored)

    def stored(self, name: str) -> Tensor | None:
        """The weight as the files have it; None where they have it in no single tensor."""
        if f"{name}.weight" not in self._files:
            return None
        file, key = self._files[f"{name}.weight"]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)


def names_in_model(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """What the model calls each tensor of a file: many files are older than the names of today, or have no prefix.

    As transformers' loading renames them. Those that it makes of several, or in several, are left out.
    """
    if not isinstance(model, PreTrainedModel):
        return {key: key for key in keys}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    renamed = {key: rename_source_key(key, renamings, converters, prefix, own) for key in keys}
    return {key: name for key, (name, converted) in renamed.items() if converted is None}


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


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A view from (O, I) to the layout of the module's file, or back: GPT-2's Conv1D keeps its weight as (I, O)."""
    kind = getattr(module, "source_cls", type(module))  # what codes stand in for, whose file is all that is read of it
    return rearrange(weight, "a b -> b a") if issubclass(kind, Conv1D) else weight
