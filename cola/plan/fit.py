"""Whether an arm fits into a device's memory, and the smallest change of a recipe by which it would."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cola.plan.forecast import Forecast
from cola.plan.memory import Memory
from cola.recipe.recipe import Recipe

Change = Callable[[Recipe], Recipe]


@dataclass(frozen=True)
class Fit:
    """An arm and a device's memory."""

    peak: int  # bytes
    room: int
    words: list[str]  # of the recipe's keys, by which it would fit; empty where it does, or nothing would help
    then: int  # its peak then
    least: str = ""  # where nothing would help: what takes most

    @property
    def fits(self) -> bool:
        return self.peak <= self.room


def fit_of(forecast: Forecast, arm: str, memory: Memory) -> Fit:
    """Whether an arm fits, and by which of the changes of `_changes`, from the first on, it would."""
    room = forecast.device.memory
    if memory.peak <= room:
        return Fit(memory.peak, room, [], memory.peak)
    least = memory
    for words, recipe in _changes(forecast, arm):
        then = replace(forecast, recipe=recipe, tree=None).memory(arm)
        if then.peak <= room:
            return Fit(memory.peak, room, words, then.peak)
        least = min(least, then, key=lambda one: one.peak)
    most = max(least.training, key=lambda part: least.training[part])
    return Fit(memory.peak, room, [], least.peak, most)


def _changes(forecast: Forecast, arm: str) -> Iterator[tuple[list[str], Recipe]]:
    """Changes of a recipe, what they leave as it is first: rows of a pass, activations twice, number formats, and last
    what is trained. Each is tried alone, and with those before it that change no result."""
    recipe = forecast.recipe
    training, settings = recipe.training, recipe.resolved(arm).links
    if not settings:
        yield ["evaluation.batch_tokens=256"], _evaluating(recipe, 256)
        return
    longest = max(n for n, _ in forecast.rows.lengths(recipe.seeds[0]))
    scored = [f"evaluation.batch_tokens={longest}"] if recipe.evaluation.batch_tokens > longest else []
    base = _evaluating(recipe, longest) if scored else recipe
    if scored:
        yield scored, base
    small, tokens = base, training.micro_batch_tokens
    words = scored
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        words, small = [*scored, f"training.micro_batch_tokens={tokens}"], _training(base, micro_batch_tokens=tokens)
        yield words, small
    if not training.gradient_checkpointing and not any(link.method == "prefix" for link in settings):
        yield [*scored, "training.gradient_checkpointing=true"], _training(base, gradient_checkpointing=True)
        words, small = [*words, "training.gradient_checkpointing=true"], _training(small, gradient_checkpointing=True)
        yield words, small
    if any(link.is_whole for link in settings):
        lora = {"method": "lora", "links": 1}
        yield [*words, f"arms.{arm}.method=lora"], _arm(small, arm, **lora)
        yield [*words, f"arms.{arm}.method=qlora"], _arm(small, arm, method="qlora", links=1)
        return
    own = recipe.resolved(arm).base
    if own.dtype == "float32" and own.quantization is None:
        yield [*words, f"arms.{arm}.dtype=bfloat16"], _arm(small, arm, dtype="bfloat16")
    if own.quantization is None and all(link.is_pair for link in settings):
        for codes in ("int8", "nf4"):
            yield [*words, f"arms.{arm}.quantization={codes}"], _arm(small, arm, quantization=codes)


def _training(recipe: Recipe, **values: object) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})


def _evaluating(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"batch_tokens": tokens})})


def _arm(recipe: Recipe, arm: str, **values: object) -> Recipe:
    return recipe.model_copy(update={"arms": recipe.arms | {arm: recipe.arms[arm].model_copy(update=values)}})
