"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247).

    h <- h + U f(D h + d) + u          D: m x H, U: H x m, m the bottleneck, f the activation

after the sublayers of each decoder layer, before the residual sum: after the MLP (`pfeiffer`), or after the attention
too (`houlsby`). U and u begin at zero, so the function is unchanged until they are trained.

Axes: B rows, T tokens, H hidden features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cola.errors import ModelError
from cola.link.text_part import in_text, outside_text, text_config
from cola.recipe.methods import Adapter

ACTIVATIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}
NAME = "bottleneck"  # of the module inside the sublayer whose output it takes


class Bottleneck(nn.Module):
    """One adapter, float32 whatever the base's format."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width, dtype=torch.float32)
        self.up = nn.Linear(width, hidden, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        change_BTH = self.up(self.activation(self.down(hidden_BTH.float())))
        return hidden_BTH + change_BTH.to(hidden_BTH.dtype)


def attach(model: PreTrainedModel, settings: Adapter) -> None:
    """Put an adapter after the sublayers, in place; a model that has them already is left as it is. Raises ModelError
    where its layers have no `self_attn` and `mlp`, as Llama's and Qwen2's have."""
    outside = outside_text(model)
    layers = [
        module
        for name, module in model.named_modules()
        if hasattr(module, "self_attn") and hasattr(module, "mlp") and in_text(name, outside)
    ]
    if not layers:
        raise ModelError(
            "method adapter: the model's layers have no self_attn and mlp, as Llama's and Qwen2's have; use method lora"
        )
    kinds = ["self_attn", "mlp"] if settings.placement == "houlsby" else ["mlp"]
    for sublayer in (layer.get_submodule(kind) for layer in layers for kind in kinds):
        if not hasattr(sublayer, NAME):
            # On the sublayer's device, or on meta where the model has no weights yet.
            with torch.device(next(sublayer.parameters()).device):
                adapter = Bottleneck(text_config(model).hidden_size, settings.bottleneck, settings.activation)
            sublayer.add_module(NAME, adapter)
            sublayer.register_forward_hook(_apply)


def _apply(sublayer: nn.Module, _args: Any, output: Any) -> Any:
    adapter = getattr(sublayer, NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)
