"""What processes say to each other and sum up. Run: pytest tests/link/test_wires.py"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import end, launched, processes
from torch import Tensor, nn

from cola.errors import ColaError, ModelError, RankFailed, RanksLost
from cola.link import wires

VALUES = {"text": "é", "rates": [1e-4, 0.1 + 0.2, 5e-324], "none": None}


def tensors() -> dict[str, Tensor]:
    """Every kind that a pair or an optimizer's state may hold."""
    numbers = torch.Generator().manual_seed(0)
    return {
        "A": torch.randn(3, 5, generator=numbers),
        "step": torch.tensor(4.0),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "half": torch.randn(7, generator=numbers).bfloat16(),
        "count": torch.arange(6).view(2, 3).T,
        "double": torch.randn(2, generator=numbers).double(),
    }


def messages(rank: int) -> None:
    if rank == 0:
        wires.send("tune", VALUES, tensors())
        wires.send("end")
        return
    heard = wires.receive()
    assert (heard.what, heard.values) == ("tune", VALUES)
    assert heard.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(heard.tensors[name], tensor)
        assert heard.tensors[name].dtype == tensor.dtype
    assert wires.receive() == wires.Message("end", {})


def sums(rank: int) -> None:
    """Gradients: of both ranks, of one of them, of none."""
    both, one, none = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    both.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 1:
        one.grad = torch.ones(2, 3)
    wires.sum_gradients([both, one, none], None)
    assert torch.equal(both.grad, torch.full((2, 3), 3.0))
    assert one.grad is not None
    assert torch.equal(one.grad, torch.ones(2, 3))
    assert none.grad is None
    assert wires.sum_over(torch.tensor(0.5 + rank)).item() == 2.0


def sums_in_pieces(rank: int) -> None:
    wires.BUCKET = 7
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 4, 20, 1, 2)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.arange(len(parameter)) * (rank + 1.0) + number
    wires.sum_gradients(parameters, None)
    for number, parameter in enumerate(parameters):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.arange(len(parameter)) * 3.0 + 2 * number)


def one_in_trouble(rank: int) -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    words = "rank 1: no memory" if rank else "another rank failed in its passes"
    with pytest.raises(RankFailed, match=words):
        wires.sum_gradients(parameters, MemoryError("no memory") if rank else None)
    with pytest.raises(ModelError, match="rank 1 of 2: it is not here"):
        wires.check_ready("it is not here" if rank else None)
    wires.check_ready(None)  # they are still together


def apart(rank: int) -> None:
    """Weights that differ in the last bit of one of them, and in no sum of floats."""
    weights = [nn.Parameter(torch.tensor([1e8, 1.0])), nn.Parameter(torch.ones(5))]
    wires.check_alike(weights)
    with torch.no_grad():
        weights[0][1] += rank * 1e-6
    with pytest.raises(ModelError, match="not the same on all ranks"):
        wires.check_alike(weights)
    wires.take_from_leader(weights)
    wires.check_alike(weights)


def apart_in_half_words(rank: int) -> None:
    """An odd number of 16-bit weights, of which one differs in its last bit."""
    for dtype in (torch.bfloat16, torch.float16):
        weights = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
        wires.check_alike(weights)
        weights[1].detach().view(torch.int16)[1] += rank
        with pytest.raises(ModelError, match="not the same on all ranks"):
            wires.check_alike(weights)


def left_alone(rank: int) -> None:
    if rank == 1:
        os._exit(0)
    with pytest.raises(RanksLost, match="another of the 2 processes of this launch has ended"):
        wires.check_ready(None)


def child(task: Callable[[int], None], variables: dict[str, str], said: Path) -> None:
    os.environ.update(variables)
    try:
        task(wires.join())
    except (AssertionError, ColaError) as error:
        said.write_text(repr(error))
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    "task", [messages, sums, sums_in_pieces, one_in_trouble, apart, apart_in_half_words, left_alone]
)
def test_two_processes_agree_on(task: Callable[[int], None], tmp_path: Path) -> None:
    children = [
        processes.Process(target=child, args=(task, variables, tmp_path / f"said-{rank}.txt"))
        for rank, variables in enumerate(launched(2))
    ]
    for process in children:
        process.start()
    assert [end(process) for process in children] == [0, 0], [path.read_text() for path in tmp_path.iterdir()]
