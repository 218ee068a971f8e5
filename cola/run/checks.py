"""What a recipe asks of model, data and machine, checked before anything is trained."""

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cola import environment
from cola.data.encode import Example
from cola.data.passages import PASSAGE_TOKENS, load_passages
from cola.data.splits import Splits
from cola.errors import ModelError
from cola.files import need_package
from cola.link import adapters, starts
from cola.link.accelerator import dtype_warning, make_accelerator
from cola.link.model import Source, check_fit, check_tokens
from cola.link.text_part import text_config
from cola.measure.memory import need_memory
from cola.recipe.methods import Settings
from cola.recipe.plan import plan_arm
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal


def check_accelerator(recipe: Recipe, terminal: Terminal) -> Accelerator:
    """What computes; the user is told what of the environment it does not heed, and of a dtype that is slow on it."""
    accelerator = make_accelerator(recipe.model.dtype)
    if said := environment.note():
        terminal.warn(said)
    for dtype in sorted({recipe.resolved(arm).base.dtype for arm in recipe.arms}):
        if warning := dtype_warning(dtype, accelerator.device):
            terminal.warn(warning)
    return accelerator


def check_arms(
    recipe: Recipe, source: Source, skeleton: PreTrainedModel, splits: Splits, device: torch.device
) -> dict[Settings, int]:
    """Check what each arm asks of the model and the data; returns the parameters that links train, by their settings.

    Raises:
        ModelError: an arm cannot be had; the message names it.
        DataError: a row is too long for the model.
    """
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


def general_text_of(
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
