"""A link of the tiny model, trained in one go or in parts, between which the optimizer's state is read and put back."""

import itertools
from typing import Any

from accelerate import Accelerator
from conftest import tiny_model
from test_methods import ADAMW, batches, chain_of, gradients, link
from torch import Tensor, nn

from cola.chain import extend
from cola.link.ideas.door import Trained
from cola.link.moments import Moments, read_moments
from cola.link.train import tune


def trained(method: str, *cuts: int, n_steps: int = 5, **settings: Any) -> tuple[dict[str, Tensor], Moments]:
    """The model's weights after a link that was stopped at some steps, and the optimizer's state at its end."""
    chain, own, accelerator = chain_of(tiny_model()), link(method, n_steps, **settings), Accelerator()
    extend(chain, own, gradients)
    moments = None
    for start, end in itertools.pairwise((0, *cuts, n_steps)):
        part = batches(n_steps)[start:end]
        keys = {**ADAMW, "done": start, "moments": moments}
        moments = read_moments(
            chain.model, tune(chain.model, own, part, accelerator, lambda *_: None, **keys), accelerator
        )
    assert moments is not None
    return {name: weight.detach().clone() for name, weight in chain.model.state_dict().items()}, moments


def of(*parameters: nn.Parameter, **settings: Any) -> Trained:
    """Parameters as an optimizer is given them."""
    said = {"pairs": [], "betas": (0.9, 0.99), "epsilon": 1e-8, "weight_decay": 0.1, "n_steps": 9, **settings}
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    return Trained(groups=[{"params": list(parameters), "ratio": 1.0}], matrices=matrices, **said)
