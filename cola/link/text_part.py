"""The part of a model that reads and writes text: all of it, or the language model inside one that sees and hears too.

cola trains on text alone, so what no text passes through (vision and audio towers, projectors) is not trained, not
given pairs and not looked at; it is saved as it came.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config that has the language model's sizes, which one that sees too keeps in a part of its own."""
    return model.config.get_text_config(decoder=True)


def outside_text(model: PreTrainedModel) -> list[str]:
    """Names of the outermost modules that no text passes through, in the model's order; none in a text model."""
    if text_config(model) is not model.config:
        inside = {model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()}
        return list(_beside(model, "", {module for part in inside if part for module in part.modules()}))
    # The language model's sizes may also stand beside the configs of the towers.
    towers = [getattr(model.config, key) for key in model.config.sub_configs if key.startswith(("vision", "audio"))]
    parts = ((name, part.config) for name, part in model.named_modules() if isinstance(part, PreTrainedModel))
    return [name for name, config in parts if any(config is tower for tower in towers)]


def _beside(module: nn.Module, prefix: str, inside: set[nn.Module]) -> Iterator[str]:
    for name, child in module.named_children():
        if child in inside:
            continue
        if inside.intersection(child.modules()):
            yield from _beside(child, f"{prefix}{name}.", inside)
        else:
            yield prefix + name


def in_text(name: str, outside: list[str]) -> bool:
    """Whether a module or parameter of that name belongs to the text part, given `outside_text`."""
    return not any(name == other or name.startswith(f"{other}.") for other in outside)
