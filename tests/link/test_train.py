"""tune: what it looks at, and what it waits for. Run: pytest tests/link/test_train.py"""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from test_methods import ADAMW, batches, chain_of, gradients, link
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from cola.chain import extend
from cola.errors import NoGradient
from cola.link import adapters
from cola.link.ideas.door import TrainedPair
from cola.link.moments import read_moments
from cola.link.train import Step, tune, update_norm
from cola.recipe.plan import Link


class Calls(TorchDispatchMode):
    """Counts the tensor operations that are made, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def trained(own: Link) -> tuple[list[Step], list[Counter[str]]]:
    """The steps of a link on the tiny model, and the operations of each."""
    chain = chain_of(tiny_model())
    extend(chain, own, gradients)
    steps, counts = [], []
    with Calls() as calls:

        def note(step: Step, _: object) -> None:
            steps.append(step)
            counts.append(calls.counts.copy())
            calls.counts.clear()

        tune(chain.model, own, batches(own.last_step), Accelerator(), note, **ADAMW)
    return steps, counts


def test_a_gradient_is_looked_at_until_its_tensor_has_had_one_and_at_no_later_step() -> None:
    """Fails if the check for silent gradients returns to later steps, where it costs a pass over all of them each."""
    steps, counts = trained(link(n_steps=5))
    assert [step.without_gradient for step in steps] == [14, 0, 0, 0, 0]  # beside B = 0 no A has one at first
    assert [count["any"] for count in counts] == [28, 14, 0, 0, 0]


def test_a_link_that_is_cut_counts_the_tensors_without_a_gradient_as_one_that_is_not() -> None:
    def counted(*cuts: int) -> list[int]:
        chain, own, accelerator, steps = chain_of(tiny_model()), link(n_steps=4), Accelerator(), []
        extend(chain, own, gradients)
        _, once = adapters.trainable(chain.model)[:2]  # a B, which has a gradient at the first step and at no later one
        once.register_hook(lambda gradient: gradient * (not steps))
        moments = None
        for start, end in itertools.pairwise((0, *cuts, 4)):
            part = batches(4)[start:end]
            optimizer = tune(
                chain.model,
                own,
                part,
                accelerator,
                lambda step, _: steps.append(step.without_gradient),
                **ADAMW,
                done=start,
                moments=moments,
            )
            moments = read_moments(chain.model, optimizer, accelerator)
        return steps

    assert counted() == counted(1) == counted(1, 2, 3) == [14, 0, 0, 0]


def test_a_look_between_steps_leaves_the_next_step_its_dropout() -> None:
    """Fails if a model that was scored goes on in eval mode, or the modules are walked through at every step."""

    def losses(look: bool) -> list[float]:
        chain, own, found = chain_of(tiny_model()), link(n_steps=4, dropout=0.5), []
        extend(chain, own, gradients)
        walks = Counter[str]()
        first = next(iter(adapters.pair_layers(chain.model).values()))
        first.train = lambda mode=True, train=first.train: walks.update([str(mode)]) or train(mode)  # pyright: ignore[reportAttributeAccessIssue]

        def note(step: Step, _: object) -> None:
            found.append(step.loss)
            if look:
                chain.model.eval()

        tune(chain.model, own, batches(4), Accelerator(), note, **ADAMW)
        assert walks["True"] == (4 if look else 1)
        return found

    assert losses(look=True) == losses(look=False)


def test_a_step_waits_for_the_device_as_often_for_many_tensors_as_for_few() -> None:
    """Fails if a step reads a number of each trained tensor: on a GPU each would wait for all that was asked before."""
    (_, few), (_, many) = trained(link(n_steps=2, target_modules=["q_proj"])), trained(link(n_steps=2))
    assert [c["_local_scalar_dense"] for c in many] == [c["_local_scalar_dense"] for c in few]


def test_a_gradient_that_is_lost_at_a_later_step_is_an_error_too() -> None:
    chain, own = chain_of(tiny_model()), link()
    extend(chain, own, gradients)

    def lose(step: Step, _: object) -> None:
        if step.step == 3:
            for parameter in adapters.trainable(chain.model):  # beside A = 0 and B = 0 nothing gets a gradient
                parameter.data.zero_()

    with pytest.raises(NoGradient, match=r"step 4: none of the 28 trained tensors got a gradient"):
        tune(chain.model, own, batches(own.last_step), Accelerator(), lose, **ADAMW)


def test_the_norm_of_the_update_is_that_of_the_dense_products_whatever_their_shapes_and_scales() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 9, 7, 2.0), (4, 9, 7, 0.5), (2, 5, 11, 3.0)]
    pairs = [
        TrainedPair(
            str(n), Parameter(torch.randn(r, i, generator=draw)), Parameter(torch.randn(o, r, generator=draw)), s
        )
        for n, (r, i, o, s) in enumerate(shapes)
    ]
    dense = [(pair.scale * pair.B_OR.double() @ pair.A_RI.double()).square().sum() for pair in pairs]
    assert update_norm(pairs) == pytest.approx(sum(dense).sqrt().item(), rel=1e-5)  # pyright: ignore
    assert update_norm([]) is None
