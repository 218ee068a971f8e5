"""A frozen base that lies in shards on several processes: each holds some rows of every weight (torch's FSDP2).

A layer's weights are gathered while a pass goes through it, and let go behind it. Pairs are put beside them whole, on
every process, and are no part of a shard: nothing of an adapter can be lost in one. Gathering is done by all processes
together, so whoever leads a pass must be followed by the others in it (`run/ranks.py`).
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cola.errors import ModelError


def shard(model: PreTrainedModel, device: torch.device, n_ranks: int) -> PreTrainedModel:
    """Spread a frozen model over the processes, layer by layer; what this one does not hold is let go. A ModelError
    where the model does not say what its layers are."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"model.shard: {type(model).__name__} does not say what its layers are, so it cannot be sharded"
        )
    mesh = init_device_mesh(device.type, (n_ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # The rest too is in shards whenever no pass goes on: embeddings and head are read and written as such.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the model's weights lie on other processes."""
    return isinstance(model, FSDPModule)


def own_rows(weight: Tensor) -> tuple[Tensor, int]:
    """The rows of a weight that this process holds, and the number of the first; all of them, where it is no shard."""
    if not isinstance(weight, DTensor):
        return weight, 0
    mesh = weight.device_mesh
    first = mesh.get_local_rank() * math.ceil(len(weight) / mesh.size())  # as torch.chunk deals them
    return weight.to_local(), min(first, len(weight))
