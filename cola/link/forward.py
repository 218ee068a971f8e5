"""Logits only where they are needed.

The output head is the widest matrix of a small model (151,936 rows in Qwen1.5), and a loss on the answer alone
looks at few positions of it. A hook hands the head just those positions, and keeps whatever the model does to logits
afterwards (scaling, soft-capping). A model that takes its head's weight without calling the head has them picked from
the whole pass.

Axes: B rows, T tokens, H hidden features, N selected positions, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel


class _InFloat32:
    """What a linear head computes, in float32, from one float32 copy of its weight: made in the first pass, since no
    process has all of a sharded one before."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head

    @cached_property
    def _copies(self) -> tuple[Tensor, Tensor | None]:
        return self._head.weight.float(), None if self._head.bias is None else self._head.bias.float()

    def __call__(self, hidden: Tensor) -> Tensor:
        weight_VH, bias_V = self._copies
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), weight_VH, bias_V)


@contextmanager
def head_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """While no gradient is taken, let the output head itself compute in float32, whatever the model's dtype.

    bfloat16 logits lie 1/8 apart at 16 and more, so that two answers often tie and their order decides. A pass sees to
    it by itself; around many passes the head's weight is converted once for all, and its copy lives as long.
    """
    head = model.get_output_embeddings()
    if torch.is_grad_enabled() or type(head) is not nn.Linear or isinstance(head.forward, _InFloat32):
        yield
        return
    # Hooks are called as ever: what a knot has put beside the head among them.
    head.forward = _InFloat32(head)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del head.forward


def logits_at(model: PreTrainedModel, input_ids_BT: Tensor, where_BT: Tensor) -> Tensor:
    """float32 logits (N, V) of the positions at which `where_BT` is true, row by row.

    The rows are padded on the right; causal attention needs no mask for that. While no gradient is taken the head
    itself computes in float32, whatever the model's dtype.
    """
    return logits_and_cache(model, input_ids_BT, where_BT, use_cache=False)[0]


def logits_and_cache(
    model: PreTrainedModel, input_ids_BT: Tensor, where_BT: Tensor, **inputs: object
) -> tuple[Tensor, Cache | None]:
    """The same, and the cache of keys and values from which rows can go on, virtual tokens among them."""
    head = model.get_output_embeddings()
    assert head is not None  # Source.load refuses a model without one

    selected = False

    def select(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal selected
        selected = True
        (hidden_BTH,) = args
        # Virtual tokens stand before the row's own; nothing is asked about them.
        own_BTH = hidden_BTH[:, hidden_BTH.shape[1] - where_BT.shape[1] :]
        return (own_BTH[where_BT].unsqueeze(0),)

    hook = head.register_forward_pre_hook(select)
    try:
        with head_in_float32(model):
            output = model(input_ids=input_ids_BT, **inputs)
    finally:
        hook.remove()
    logits = output.logits
    logits_NV = logits[0] if selected else logits[:, logits.shape[1] - where_BT.shape[1] :][where_BT]
    return logits_NV.float(), output.get("past_key_values")
