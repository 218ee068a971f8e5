"""What several processes that train one link together say to each other (started by torchrun or accelerate launch).

Rank 0 leads. What it tells the others goes over gloo, from CPU to CPU, as JSON and the bytes of tensors. What is summed
over all (gradients, the loss) goes over accelerate's back end, which is NCCL between GPUs and gloo between CPUs. One
process has nobody to talk to: `count` is 1 and nothing here is called.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn

from cola.errors import ModelError, RankFailed, RanksLost, one_line

LONGEST_WAIT = timedelta(days=365)  # for what rank 0 says next: it may score for hours, and who dies is heard of
BUCKET = 1 << 24  # entries of gradients that are summed over the ranks in one go
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
TROUBLE = 512  # bytes of what a rank may say is wrong with it

_lines: list[distributed.ProcessGroup] = []  # the one over which rank 0 speaks, once `join` was called


@dataclass(frozen=True)
class Message:
    """What rank 0 has said."""

    what: str
    values: dict[str, Any]  # JSON's
    tensors: dict[str, Tensor] = field(default_factory=dict)  # on the CPU


def join() -> int:
    """Meet the other processes of the launch; returns this one's rank. A ModelError where they do not meet."""
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # accelerate says so each time
    try:
        state = PartialState(cpu=not torch.cuda.is_available())
        line = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the {os.environ.get('WORLD_SIZE')} processes of this launch do not meet at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {one_line(error)}"
        ) from error
    assert isinstance(line, distributed.ProcessGroup)
    _lines[:] = [line]
    return state.process_index


def leave() -> None:
    """Part from the others; nothing more is said."""
    if _lines:
        fall_silent()
        distributed.destroy_process_group()


def fall_silent() -> None:
    """Say nothing more: the others may wait in the middle of something, and hear of the end of this process."""
    _lines.clear()


def joined() -> bool:
    """Whether this process has met others."""
    return bool(_lines)


def count() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if _lines else 1


def send(what: str, values: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Tell all other ranks, as rank 0; nobody, once it has fallen silent."""
    if not _lines:
        return
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    kinds = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in own.items()]
    text = json.dumps({"what": what, "values": values or {}, "tensors": kinds}).encode()
    with _heard():
        distributed.broadcast(torch.tensor([len(text)]), 0, group=_lines[0])
        for payload in (torch.frombuffer(bytearray(text), dtype=torch.uint8), *map(_bytes, own.values())):
            if payload.numel():
                distributed.broadcast(payload, 0, group=_lines[0])


def receive() -> Message:
    """Wait for what rank 0 says next."""
    with _heard():
        length = torch.zeros(1, dtype=torch.int64)
        distributed.broadcast(length, 0, group=_lines[0])
        text = torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(text, 0, group=_lines[0])
        said, tensors = json.loads(bytes(text.tolist())), {}
        for name, dtype, shape in said["tensors"]:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensors[name].numel():
                distributed.broadcast(_bytes(tensors[name]), 0, group=_lines[0])
    return Message(said["what"], said["values"], tensors)


def check_ready(trouble: str | None) -> None:
    """Come together before a piece of work; a ModelError on every rank where one of them is in trouble."""
    told = torch.zeros(TROUBLE, dtype=torch.uint8)
    text = (trouble or "").encode()[:TROUBLE]
    if text:
        told[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    heard = [torch.empty_like(told) for _ in range(count())]
    with _heard():
        distributed.all_gather(heard, told, group=_lines[0])
    for rank, bytes_of_rank in enumerate(heard):
        if said := bytes(bytes_of_rank.tolist()).rstrip(b"\0").decode(errors="replace"):
            raise ModelError(f"rank {rank} of {count()}: {said}")


def take_from_leader(tensors: Sequence[Tensor]) -> None:
    """Give these tensors the values that rank 0 has."""
    with _heard():
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), 0)


def sum_gradients(parameters: Sequence[nn.Parameter], trouble: Exception | None) -> None:
    """Give each parameter the sum of all ranks' gradients. One without a gradient on every rank has none afterwards; on
    a rank that had none where others had, such as one without a row, it counts as zero.

    RankFailed on all ranks where one is in trouble: its passes failed, and the others would wait for its gradients.
    """
    told = [trouble is not None, *(p.grad is not None for p in parameters)]
    has = torch.tensor(told, dtype=torch.int32, device=parameters[0].device)
    with _heard():
        distributed.all_reduce(has, distributed.ReduceOp.MAX)
        failed, *somewhere = has.tolist()
        if failed:
            rank = distributed.get_rank()
            said = "another rank failed in its passes" if trouble is None else f"rank {rank}: {one_line(trouble)}"
            raise RankFailed(said) from trouble
        taught = [p for p, taught in zip(parameters, somewhere, strict=True) if taught]
        for bucket in _buckets(taught):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            distributed.all_reduce(flat)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)


def sum_over(value: Tensor) -> Tensor:
    """The sum of all ranks' values."""
    with _heard():
        distributed.all_reduce(value)
    return value


def check_alike(parameters: Sequence[nn.Parameter]) -> None:
    """Raise ModelError where the trained weights are not the same to the bit on all ranks, if there are others."""
    if count() == 1:
        return
    flat = (torch.cat([parameter.detach().flatten() for parameter in bucket]) for bucket in _buckets(parameters))
    # In no order, unrounded; by their own width, as an odd number of 16-bit weights fills no whole words of 32.
    bits = torch.stack([values.view(_WHOLE[values.element_size()]).sum(dtype=torch.int64) for values in flat])
    most = torch.cat([bits, -bits])
    with _heard():
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
    if not torch.equal(most[: len(bits)], -most[len(bits) :]):
        raise ModelError(
            "the weights are not the same on all ranks after a step: cards of one kind are needed, and an optimizer "
            "that draws no random numbers of its own"
        )


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in groups of about `BUCKET` entries, in their order."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def lost_in_a_pass(error: Exception) -> RanksLost:
    """What is to be raised where a pass through a base in shards fails on this rank: the others wait in the middle of
    it and cannot be told, if it is not they who have gone."""
    if isinstance(error, distributed.DistError) or "gloo" in str(error):  # gloo's are RuntimeErrors like any other
        return _lost()
    return RanksLost(f"rank {distributed.get_rank()} failed in a pass, and so all have to end: {one_line(error)}")


def _lost() -> RanksLost:
    return RanksLost(
        f"another of the {os.environ.get('WORLD_SIZE')} processes of this launch has ended; what was kept is whole: "
        "the same command goes on from there"
    )


@contextmanager
def _heard() -> Iterator[None]:
    """RanksLost where the others are not heard any more."""
    try:
        yield
    except (RankFailed, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise _lost() from error
