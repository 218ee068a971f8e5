"""Rows that go on from one pass over them, each from a place of its own.

The pass was padded on the right. What is wanted of each row's keys and values is moved to the right end, so that all
rows go on at one place, as prompts do that are padded on the left; a mask hides what stands before them.

Axes: B rows that go on, H heads, T tokens, N selected positions, V vocabulary, D features of a head.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cola.errors import ModelError
from cola.link.adapters import unwrapped
from cola.link.forward import logits_and_cache


def going_on(model: PreTrainedModel, wanted: bool) -> dict[str, object]:
    """What a pass over rows is given so that they can go on from it, or not.

    A layer that looks back so far only would keep so much of each row, its padding for a part; here it keeps all.
    """
    inputs: dict[str, object] = {"use_cache": wanted}
    if wanted and unwrapped(model) is model:
        cache = DynamicCache(config=model.config)
        if any(layer.is_sliding for layer in cache.layers if isinstance(layer, DynamicLayer)):
            cache.activate_past_recording()
            inputs["past_key_values"] = cache
    return inputs


class Continued:
    """Rows that were read into a cache, and go on.

    Args:
        model: That has read them.
        cache: Of a pass with `going_on`, virtual tokens among it; taken over, and changed.
        width: Tokens of each row of that pass, padding included.
        rows: Which of its rows go on; one may go on in several ways.
        lengths: How many of its tokens each of these keeps.

    Raises:
        ModelError: the cache does not hold keys and values of every position.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache | None, width: int, rows: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.model, self.cache = model, _whole(model, cache)
        virtual = self.cache.get_seq_length() - width
        lengths_B = torch.tensor(lengths, device=model.device) + virtual
        places_T = torch.arange(int(lengths_B.max()), device=model.device)
        from_BT = places_T - (len(places_T) - lengths_B)[:, None]
        self.mask_BT = (from_BT >= 0).long()
        source_B1T1, rows_B = from_BT.clamp(min=0)[:, None, :, None], torch.tensor(rows, device=model.device)

        def moved(kept_BHTD: Tensor) -> Tensor:
            _, n_heads, _, n_features = kept_BHTD.shape
            return kept_BHTD[rows_B].gather(2, source_B1T1.expand(-1, n_heads, -1, n_features))

        for layer in cast("list[Any]", self.cache.layers):  # of the two kinds that `_whole` lets through
            if not layer.is_initialized:
                continue  # it shares the keys and values of another one
            layer.keys, layer.values = moved(layer.keys), moved(layer.values)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.record_past, layer.cumulative_length = False, len(places_T)
                layer.keys, layer.values = (x[:, :, 1 - layer.sliding_window :] for x in (layer.keys, layer.values))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""
        if len(rows) < len(self.mask_BT):
            rows_B = torch.tensor(rows, device=self.mask_BT.device)
            self.cache.batch_select_indices(rows_B)
            self.mask_BT = self.mask_BT[rows_B]

    def logits(self, input_ids_BT: Tensor, where_BT: Tensor) -> Tensor:
        """Logits (N, V) of the selected ones of further tokens, padded on the right, which are read in passing."""
        first_B1 = self.mask_BT.sum(1, keepdim=True)
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(input_ids_BT)], dim=1)
        inputs: dict[str, object] = {"use_cache": True, "past_key_values": self.cache, "attention_mask": self.mask_BT}
        model = unwrapped(self.model)  # PEFT's wrapper would put the virtual tokens before these once more
        if "position_ids" in signature(model.forward).parameters:
            inputs["position_ids"] = first_B1 + torch.arange(input_ids_BT.shape[1], device=first_B1.device)
        return logits_and_cache(model, input_ids_BT, where_BT, **inputs)[0]


def _whole(model: PreTrainedModel, cache: Cache | None) -> DynamicCache:
    """Refuse a cache of states, and one of a window that has let go of what its shorter rows need."""

    def is_whole(layer: Any) -> bool:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return False
        return not layer.is_initialized or layer.keys.shape[-2] == length

    length = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
    if not isinstance(cache, DynamicCache) or not all(map(is_whole, cache.layers)):
        raise ModelError(f"{type(model).__name__} gives no cache of keys and values of every position")
    return cache
