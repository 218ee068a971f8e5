"""What a recipe is run with: the base, the data and how it is scored, found and checked before anything is trained."""

from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cola import environment
from cola.data.encode import Example
from cola.data.passages import PASSAGE_TOKENS, load_passages
from cola.data.splits import Splits, load_splits
from cola.errors import ModelError
from cola.files import need_package
from cola.link import adapters, starts
from cola.link.accelerator import dtype_warning, make_accelerator, quiet_libraries
from cola.link.find import find_model
from cola.link.model import Source, check_fit, check_tokens
from cola.link.text_part import text_config
from cola.measure.evaluate import Evaluator, Ways
from cola.measure.memory import need_memory
from cola.recipe.methods import Settings
from cola.recipe.plan import plan_arm
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal


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
            self._counts[settings] = adapters.count_parameters(self.skeleton, settings)
        return self._counts[settings]

    def asking(self, ways: Ways) -> "Materials":
        """The same for a model that is asked in these ways."""
        return replace(self, recipe=heeding(ways, self.recipe), evaluator=self.evaluator.asking(ways))


def gather(recipe: Recipe, terminal: Terminal) -> Materials:
    """Find and check all of it.

    Raises:
        ColaError: model or data cannot serve the recipe.
    """
    quiet_libraries()
    accelerator = _accelerator(recipe, terminal)
    source = find_model(recipe.model, terminal.say)
    tokenizer = source.tokenizer()
    splits = load_splits(recipe.data, tokenizer, recipe.drawn_seeds, source.ends())
    sizes = ", ".join(f"{n} {name}" for name, n in splits.sizes.items())
    terminal.say(f"data: {sizes} examples" + (", other training rows under each seed" if splits.redrawn else ""))
    for note in splits.notes:
        terminal.warn(f"data: {note}")
    skeleton = source.skeleton()
    counts = _check_arms(recipe, source, skeleton, splits, accelerator.device)
    general = _general_text(recipe, source, skeleton, tokenizer, terminal)
    evaluator = Evaluator.of(recipe.data, recipe.evaluation.batch_tokens, tokenizer, splits, accelerator, source.ends())
    return Materials(recipe, source, skeleton, splits, general, evaluator, accelerator.device, counts)


def heeding(ways: Ways, recipe: Recipe) -> Recipe:
    """The recipe for a model that is asked in these ways, whose rows must perhaps not share a pass."""
    alone = recipe.training.model_copy(update={"micro_batch_tokens": 1})
    return recipe.model_copy(update={"training": alone}) if ways.rows == "alone" else recipe


def _accelerator(recipe: Recipe, terminal: Terminal) -> Accelerator:
    """What computes; the user is told what of the environment it does not heed, and of a dtype that is slow on it."""
    accelerator = make_accelerator(recipe.model.dtype)
    if said := environment.note():
        terminal.warn(said)
    for dtype in sorted({recipe.resolved(arm).base.dtype for arm in recipe.arms}):
        if warning := dtype_warning(dtype, accelerator.device):
            terminal.warn(warning)
    return accelerator


def _check_arms(
    recipe: Recipe, source: Source, skeleton: PreTrainedModel, splits: Splits, device: torch.device
) -> dict[Settings, int]:
    """What each arm asks of the model and the data; returns the parameters that links train, by their settings."""
    check_fit(source, skeleton, splits, virtual_tokens(recipe))
    counts: dict[Settings, int] = {}
    for arm in recipe.arms:
        rules, (dtype, quantization) = recipe.resolved(arm).rules, recipe.resolved(arm).base
        if quantization is not None:
            need_package("bitsandbytes", f"quantization: {quantization}", "quantized")
        for choice in recipe.choices_of(arm):
            links = [link.settings for link in plan_arm(recipe, arm, 0, splits.sizes["train"], choice)]
            try:
                for settings in links:
                    if settings.is_whole and dtype == "float16" and device.type == "cpu":
                        raise ModelError("full fine-tuning in float16 needs a GPU; set dtype: float32")
                    if settings not in counts:
                        counts[settings] = adapters.count_parameters(skeleton, settings)
                        need_memory(counts[settings], device)
                starts.check_room(skeleton, links[:1] if rules.keeps_pair else links)
            except (ModelError, ValueError) as error:
                raise ModelError(f"arms.{arm}: {error}") from None
    return counts


def virtual_tokens(recipe: Recipe) -> int:
    """The largest number of virtual tokens that an arm puts before a row."""
    variants = [variant for arm in recipe.arms for variant in recipe.variants(arm)]
    return max((link.virtual_tokens for variant in variants for link in variant.links), default=0)


def _general_text(
    recipe: Recipe,
    source: Source,
    skeleton: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    terminal: Terminal,
) -> list[Example]:
    """The passages of the general text, the same for all arms; none where the recipe leaves it out."""
    if recipe.evaluation.general_text is None:
        return []
    positions = getattr(text_config(skeleton), "max_position_embeddings", None) or PASSAGE_TOKENS
    room = min(PASSAGE_TOKENS, positions - virtual_tokens(recipe))
    passages = load_passages(recipe.evaluation.general_text, tokenizer, room)
    check_tokens(source, skeleton, passages)
    why = f" at most, as the model has {positions} positions" if room < PASSAGE_TOKENS else " at most"
    n_tokens = sum(passage.n_tokens for passage in passages)
    terminal.say(f"general text: {n_tokens} tokens in {len(passages)} passages of {room}{why}")
    return passages
