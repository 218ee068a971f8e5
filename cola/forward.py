"""Logits only where they are needed.

The output head is the widest matrix of a small model (151,936 rows in Qwen1.5), and a loss on the answer alone
looks at few positions of it. A hook hands the head just those positions, which works for every causal language
model and keeps whatever the model does to logits afterwards (scaling, soft-capping).

Axes: B rows, T tokens, H hidden features, N selected positions, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logits_at(model: PreTrainedModel, input_ids_BT: Tensor, where_BT: Tensor, **inputs: object) -> Tensor:
    """float32 logits of the selected positions.

    Args:
        model: A causal language model, with or without a pair attached.
        input_ids_BT: Token ids, padded on the right; causal attention needs no mask for that.
        where_BT: True at the positions whose logits are wanted.
        **inputs: Passed to the model's forward (past_key_values).

    Returns:
        (N, V), in the order of `where_BT`'s true entries, row by row.
    """
    head = model.get_output_embeddings()
    assert head is not None  # Source.load refuses a model without one

    def select(_module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BTH,) = args
        return (hidden_BTH[where_BT].unsqueeze(0),)

    hook = head.register_forward_pre_hook(select)
    try:
        output = model(input_ids=input_ids_BT, **{"use_cache": False, **inputs})
    finally:
        hook.remove()
    return output.logits[0].float()
