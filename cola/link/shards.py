"""A frozen base that lies in shards on several processes: each holds some rows of every weight (torch's FSDP2).

A layer's weights are gathered while a pass goes through it, and let go behind it. Pairs are put beside them whole, on
every process, and are no part of a shard: nothing of an adapter can be lost in one. Gathering is done by all processes
together, so whoever leads a pass must be followed by the others in it (`run/ranks.py`).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola.errors import ModelError


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """What is gathered at a time. A ModelError where the model's layers are not known, or its weights do not lie in the
    rows that are dealt."""
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise ModelError(
            f"model.shard: {type(model).__name__} keeps its weights the other way round (Conv1D): say false"
        )
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"model.shard: {type(model).__name__} does not say what its layers are, so it cannot be sharded: say false"
        )
    return layers


def shard(model: PreTrainedModel, layers: Sequence[nn.Module], device: torch.device, n_ranks: int) -> None:
    """Spread a frozen model over the processes, layer by layer; what this one does not hold is let go."""
    mesh = init_device_mesh(device.type, (n_ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # The rest too is in shards whenever no pass goes on: embeddings and head are read and written as such.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
