"""What a recipe is run with: the base, the data and how it is scored, found and checked before anything is trained."""

from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from cola.data.encode import Example
from cola.data.splits import Splits, load_splits
from cola.link.adapters import count_parameters
from cola.link.find import find_model
from cola.link.model import Source
from cola.measure.evaluate import Evaluator, Ways
from cola.recipe.methods import Settings
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.checks import check_accelerator, check_arms, general_text_of, virtual_tokens


@dataclass(frozen=True)
class Materials:
    """What a recipe is run with.

    Attributes:
        recipe: The resolved recipe.
        source: The base.
        skeleton: The base without weights.
        splits: The examples.
        general: Passages of the general text; empty where none is scored.
        evaluator: Scores both.
        device: That computes.
    """

    recipe: Recipe
    source: Source
    skeleton: PreTrainedModel
    splits: Splits
    general: list[Example]
    evaluator: Evaluator
    device: torch.device
    _counts: dict[Settings, int] = field(default_factory=dict)

    @property
    def virtual_tokens(self) -> int:
        """The most that an arm puts before a row."""
        return virtual_tokens(self.recipe)

    def count_parameters(self, settings: Settings) -> int:
        """Parameters that a link trains, counted once."""
        if settings not in self._counts:
            self._counts[settings] = count_parameters(self.skeleton, settings)
        return self._counts[settings]

    def asking(self, ways: Ways) -> "Materials":
        """The same for a model that is asked in these ways."""
        return replace(self, recipe=heeding(ways, self.recipe), evaluator=self.evaluator.asking(ways))


def gather(recipe: Recipe, terminal: Terminal) -> Materials:
    """Find and check all of it.

    Raises:
        ColaError: model or data cannot serve the recipe.
    """
    accelerator = check_accelerator(recipe, terminal)
    source = find_model(recipe.model, terminal.say)
    tokenizer = source.tokenizer()
    splits = load_splits(recipe.data, tokenizer, recipe.drawn_seeds, source.ends())
    sizes = ", ".join(f"{n} {name}" for name, n in splits.sizes.items())
    terminal.say(f"data: {sizes} examples" + (", other training rows under each seed" if splits.redrawn else ""))
    for note in splits.notes:
        terminal.warn(f"data: {note}")
    skeleton = source.skeleton()
    counts = check_arms(recipe, source, skeleton, splits, accelerator.device)
    general = general_text_of(recipe, source, skeleton, tokenizer, terminal)
    evaluator = Evaluator.of(recipe, tokenizer, splits, accelerator, source.ends())
    return Materials(recipe, source, skeleton, splits, general, evaluator, accelerator.device, counts)


def heeding(ways: Ways, recipe: Recipe) -> Recipe:
    """The recipe for a model that is asked in these ways, whose rows must perhaps not share a pass."""
    alone = recipe.training.model_copy(update={"micro_batch_tokens": 1})
    return recipe.model_copy(update={"training": alone}) if ways.rows == "alone" else recipe
