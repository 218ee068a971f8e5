"""A model with fewer of its layers, where they are all alike: what two and three of them come to says what all do."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cola.link.adapters import unwrapped
from cola.link.text_part import text_config

FEW = (2, 3)  # layers: the first, whose input needs no gradient under frozen embeddings, and one or two that are whole


def few_layers(model: PreTrainedModel) -> tuple[int, list[PreTrainedModel]] | None:
    """Of a model on the meta device: how many layers it has, and copies of it with two and with three of them. None
    where it has no more than three, or they are not all alike, so that no number of them says what the others do."""
    found = _layers_of(model)
    if found is None or len(found[1]) <= FEW[-1]:
        return None
    place, layers = found
    first, *others = (_said(layer) for layer in layers)
    if any(other != first for other in others):
        return None
    copies = []
    for n in FEW:
        with _holding(place, nn.ModuleList(layers[:n])):
            copies.append(copy.deepcopy(model))
    return len(layers), copies


def extended(few: tuple[float, float], n_layers: int) -> float:
    """What n layers come to, by what two and three do."""
    return few[0] + (n_layers - FEW[0]) * (few[1] - few[0])


def _layers_of(model: PreTrainedModel) -> tuple[tuple[nn.Module, str], list[nn.Module]] | None:
    """Where the text part keeps its layers, and they."""
    n_layers = getattr(text_config(model), "num_hidden_layers", None)
    for module in unwrapped(model).modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return (module, name), list(child)
    return None


def _said(layer: nn.Module) -> list[Any]:
    """All that a layer's work and memory follow from: its modules, their settings, and its tensors' shapes."""
    said: list[Any] = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)}
        plain.pop("layer_idx", None)
        said.append((name, type(module).__name__, plain))
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [*said, *((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors)]


@contextmanager
def _holding(place: tuple[nn.Module, str], layers: nn.ModuleList) -> Iterator[None]:
    module, name = place
    before = getattr(module, name)
    setattr(module, name, layers)
    try:
        yield
    finally:
        setattr(module, name, before)
