"""Rows that go on from one pass over them, each from a place of its own.

The pass was padded on the right. What is wanted of each row's keys and values is moved to the right end, so that all
rows go on at one place, as prompts do that are padded on the left; a mask hides what stands before them.

Axes: B rows that go on, H heads, T tokens, N selected positions, V vocabulary, D features of a head.
"""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cola.errors import ModelError
from cola.link.adapters import unwrapped
from cola.link.forward import logits_after


class Continued:
    """Rows that were read into a cache, and go on.

    Args:
        model: That has read them.
        cache: From `logits_and_cache`; taken over, and changed.
        width: Tokens of each row of that pass, padding included.
        rows: Which of its rows go on; one may go on in several ways.
        lengths: How many of its tokens each of these keeps.

    Raises:
        ModelError: the cache does not hold keys and values of every position.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, width: int, rows: Sequence[int], lengths: Sequence[int]
    ) -> None:
        _check_whole(model, cache)
        self.model, self.cache = model, cache
        virtual = cache.get_seq_length() - width
        lengths_B = torch.tensor(lengths, device=model.device) + virtual
        places_T = torch.arange(int(lengths_B.max()), device=model.device)
        from_BT = places_T - (len(places_T) - lengths_B)[:, None]
        self.mask_BT = (from_BT >= 0).long()
        source_B1T1, rows_B = from_BT.clamp(min=0)[:, None, :, None], torch.tensor(rows, device=model.device)
        for layer in cache.layers:
            if not layer.is_initialized:
                continue  # it shares the keys and values of another one
            layer.keys = layer.keys[rows_B].take_along_dim(source_B1T1, dim=2)
            layer.values = layer.values[rows_B].take_along_dim(source_B1T1, dim=2)
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
        inputs = {"attention_mask": self.mask_BT}
        if "position_ids" in signature(unwrapped(self.model).forward).parameters:
            inputs["position_ids"] = first_B1 + torch.arange(input_ids_BT.shape[1], device=first_B1.device)
        return logits_after(self.cache, self.model, input_ids_BT, where_BT, **inputs)


def _check_whole(model: PreTrainedModel, cache: Cache) -> None:
    """Refuse a cache of states, and one of a window that has let go of what its shorter rows need."""
    for layer in cache.layers if isinstance(cache, DynamicCache) else [None]:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or (
            layer.is_initialized and layer.keys.shape[-2] != cache.get_seq_length()
        ):
            raise ModelError(f"{type(model).__name__} does not keep keys and values of every position")
