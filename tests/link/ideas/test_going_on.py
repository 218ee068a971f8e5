"""Every optimizer of pairs goes on where its link was stopped. Run: pytest tests/link/ideas/test_going_on.py"""

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from test_methods import ADAMW, batches, chain_of, gradients, link

from cola.chain import extend
from cola.link import adapters
from cola.link.moments import Moments, read_moments
from cola.link.residual import LinkWeights
from cola.link.train import tune
from cola.recipe.ideas import OF_PAIRS
from cola.recipe.plan import Link

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("optimizer", ["adamw", *sorted(OF_PAIRS)])
@pytest.mark.parametrize("more", [{}, {"loraplus_lr_ratio": 4.0, "use_dora": True}], ids=["plain", "LoRA+ and DoRA"])
def test_a_link_that_is_stopped_in_the_middle_goes_on_bit_for_bit(optimizer: str, more: dict[str, object]) -> None:
    own, pairs, losses = link(optimizer=optimizer, **more), [], []
    for stops in ([6], [3, 6]):
        done, kept, pair, heard = 0, None, None, []
        for stop in stops:
            kept, pair = part(own, done, stop, kept, pair, heard)
            done = stop
        assert pair is not None
        pairs.append(pair)
        losses.append(heard)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    for name, factors in pairs[0].items():
        assert torch.equal(factors.A_RI, pairs[1][name].A_RI), name
        assert torch.equal(factors.B_OR, pairs[1][name].B_OR), name


def part(
    own: Link, done: int, stop: int, kept: Moments | None, pair: LinkWeights | None, heard: list[float]
) -> tuple[Moments, LinkWeights]:
    """Some steps of a link, by a process of their own."""
    chain, accelerator = chain_of(tiny_model()), Accelerator()
    extend(chain, own, gradients)
    if pair is not None:
        adapters.set_pair(chain.model, pair)
    optimizer = tune(
        chain.model,
        own,
        batches(6)[done:stop],
        accelerator,
        lambda step, _: heard.append(step.loss),
        **ADAMW,
        done=done,
        moments=None if kept is None else {key: kept[key] for key in sorted(kept)},  # as a file gives them back
    )
    return read_moments(chain.model, optimizer, accelerator), adapters.read_pair(chain.model)
