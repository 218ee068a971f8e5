"""The laws of a chain, checked where code that is not cola's own has run: a start leaves the outputs as they were or
says that it does not, and nothing but the pair is trained. (That it gets a gradient `tune` checks of every link, and
what a knot moves `check_drift`.)"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola.errors import IdeaError
from cola.link import adapters
from cola.link.base import own_rows
from cola.link.drift import Drift, Outputs, Probe
from cola.recipe.methods import Lora
from cola.recipe.plan import Link


@dataclass
class Laws:
    """Watches a chain through its probe."""

    ask: Probe
    never_written: bool  # whether the frozen weights are dense ones that no knot writes (`merge: no`)
    allowed: float  # change of a logit, relative to the largest, that rounding explains
    moved: float | None = None  # change of the outputs by the start of the link at hand; None where it makes none
    _before: list[Outputs] = field(default_factory=list)  # what was heard last

    def probe(self, model: PreTrainedModel) -> Outputs:
        """What the model says, remembered."""
        self._before = [self.ask(model)]
        return self._before[0]

    def check_start(self, model: PreTrainedModel, link: Link) -> None:
        """Look at the outputs under the pair that was just drawn; IdeaError where it moves them and does not say so."""
        self.moved = None
        if not isinstance(link.settings, Lora) or link.keeps_pair:
            return
        ideas = {"init": link.settings.init} | ({"knot.pair": link.pair_rule} if link.pair_rule else {})
        who = " after ".join(f"{key}: {idea}" for key, idea in reversed(ideas.items()))
        taken, layers = adapters.taken_out(model), adapters.pair_layers(model)
        if taken and self.never_written:
            raise IdeaError(
                f"{who} takes its pair out of the frozen weight, which knot.merge: no leaves as it is: say "
                "merge: exact, or let it return A alone or Factors(A, B, moves=True)"
            )
        moves = any(adapters.factors_of(layer)[1].any() for name, layer in layers.items() if name not in taken)
        if not moves and all(idea.file is None for idea in ideas.values()):
            return
        before = self._before[0]
        change = Drift.between(before, before, self.ask(model)).relative
        if moves:
            self.moved = change
        elif not change <= self.allowed:
            raise IdeaError(
                f"{who} moved a logit by {change:.2g} of the largest logit where {self.allowed:.2g} is "
                "rounding: what it took out could not be taken out of this base, or it changed a weight; a start that "
                "means to change the function returns Factors(A, B, moves=True)"
            )

    def frozen(self, model: PreTrainedModel, link: Link) -> list[Tensor]:
        """A sum over each weight that is frozen, to be compared; nothing where no foreign code trains the link."""
        if link.settings.optimizer.file is None:
            return []
        return [_sum(parameter) for parameter in model.parameters() if not parameter.requires_grad]

    def check_frozen(self, model: PreTrainedModel, link: Link, before: list[Tensor]) -> None:
        """IdeaError where a frozen weight is not what it was."""
        after = self.frozen(model, link)
        if before and not torch.equal(torch.stack(before), torch.stack(after)):
            raise IdeaError(f"optimizer: {link.settings.optimizer} moved weights that are frozen")


def _sum(parameter: Tensor) -> Tensor:
    """Of a weight's bits, as whole numbers: no order of summation and no rounding."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return own_rows(parameter.detach())[0].view(whole).sum(dtype=torch.int64)
