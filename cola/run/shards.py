"""A base in shards (`model.shard`), as rank 0 leads the others through it.

Gathering a layer takes all ranks. So each pass of rank 0's that is no training's (scores, probes, the gradient of a
start, the self-check) is told to the others, who go along with one token; and so is what is tied, which each of them
writes into its own rows. A pair is whole on every rank, and nothing of it is gathered.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola.errors import ModelError, one_line
from cola.link import wires
from cola.link.model import Source
from cola.link.residual import Pair, Residual
from cola.recipe.resolved import BaseFormat


def load(source: Source, base: BaseFormat, device: torch.device, shard: bool) -> PreTrainedModel:
    """A base for this run; in shards on all ranks where it is to be. Raises ModelError."""
    if not shard:
        return source.load(base.dtype, device, base.quantization)
    from cola.link import shards  # torch's FSDP takes a while to import, and few ask for it

    wires.send("load", {"source": said(source), "fingerprint": source.fingerprint(), "base": base._asdict()})
    try:
        model = source.load(base.dtype, torch.device("cpu"))
        layers = shards.layers_of(model)
    except ModelError as error:
        with suppress(ModelError):  # which is said to the others, as they wait
            wires.check_ready(one_line(error))
        raise
    wires.check_ready(None)
    shards.shard(model, layers, device, wires.count())
    model.register_forward_pre_hook(_tell_pass, prepend=True)
    return model


def _tell_pass(model: torch.nn.Module, _args: Any) -> None:
    """Let the others go along in a pass that is no training's, in which they go by themselves."""
    if not (model.training and torch.is_grad_enabled()):
        wires.send("pass", {"grad": torch.is_grad_enabled(), "training": model.training})


def tell_write(residual: Residual, names: Sequence[str], merge: str, before: Residual | None) -> None:
    """Let the others write their rows of what this process writes; `Base.told` of a base in shards."""
    now, tensors = packed("now", residual)
    then, more = packed("before", before or [])
    values = {"now": now, "before": then if before is not None else None, "names": list(names), "merge": merge}
    wires.send("write", values, tensors | more)


def said(source: Source) -> dict[str, Any]:
    """Where a base lies, as JSON."""
    return {**asdict(source), "folder": str(source.folder)}


TENSORS = ("A_RI", "B_OR", "rows_O", "magnitude_O")  # of a pair


def packed(what: str, learned: Residual) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What a chain has learned, as the scales of each link's pairs, by module, and their tensors by name."""
    tensors = {
        f"{what}/{number}/{name}/{key}": tensor
        for number, link in enumerate(learned)
        for name, pair in link.items()
        for key in TENSORS
        if (tensor := getattr(pair, key)) is not None
    }
    return [{name: pair.scale for name, pair in link.items()} for link in learned], tensors


def unpacked(what: str, scales: list[dict[str, float]], tensors: dict[str, Tensor]) -> Residual:
    """The same as it was."""
    return [
        {
            name: Pair(scale=scale, **{key: tensors.get(f"{what}/{number}/{name}/{key}") for key in TENSORS})  # pyright: ignore[reportArgumentType] - A and B are there
            for name, scale in link.items()
        }
        for number, link in enumerate(scales)
    ]
