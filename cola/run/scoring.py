"""Scores of a job's models, taken from the store where they were computed before."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from cola.data.encode import Example
from cola.measure.scores import ExampleScore, evaluation_of, forgetting_of, score_rows
from cola.run.assignment import Assignment
from cola.run.loaded import Loaded


def score_attached(given: Assignment, model: PreTrainedModel, step: int) -> list[ExampleScore]:
    """Validation by the model as it is at a step, the link's weights beside the others."""
    compute = partial(_score, given, lambda: model, "validation", f" at step {step}")
    return given.measured.scores("validation", step, "attached", compute)


def score_untouched(given: Assignment, model: PreTrainedModel) -> None:
    """The general text by a base that was just loaded for something else, before anything is attached to it."""
    if given.general:
        _general_before(given, lambda: model)


def evaluate(given: Assignment, loaded: Loaded, step: int) -> dict[str, Any]:
    """Score every split and the general text by the model after a step; `evaluation` of result.json."""
    model = partial(loaded.model_after, step)
    scores: dict[str, list[ExampleScore]] = {}
    for split in given.splits:
        scores[split] = given.measured.scores(split, step, "tied", partial(_score, given, model, split, ""))
        _write(given, split, given.rows[split], scores[split])
    return evaluation_of(scores) | ({} if given.job.trial else {"general": _forgetting(given, loaded, step)})


def _forgetting(given: Assignment, loaded: Loaded, step: int) -> dict[str, Any] | None:
    """Loss on the general text after and before training; None where the recipe leaves it out."""
    if not given.general:
        return None
    after = []
    if step:
        compute = partial(_score, given, partial(loaded.model_after, step), "general", "")
        after = given.measured.scores("general", step, "tied", compute)
    # Asked for last: where a model had to be loaded for anything else, this was measured then, before anything was
    # attached to that; a chain has links in it by now.
    before = _general_before(given, loaded.load)
    after = after or before  # without links nothing is forgotten
    _write(given, "general", given.general, after)
    return forgetting_of(before, after)


def _general_before(given: Assignment, untouched: Callable[[], PreTrainedModel]) -> list[ExampleScore]:
    """The general text by the untouched base, whose name all arms and seeds on it share."""
    compute = partial(_score, given, untouched, "general", " of the untouched model")
    return given.measured.scores("general", 0, "attached", compute)


def _score(given: Assignment, model: Callable[[], PreTrainedModel], split: str, at: str) -> list[ExampleScore]:
    scored, general = model(), split == "general"
    given.bench.progress.stage(f"scoring {'the general text' if general else split}{at}")
    evaluator = given.evaluator.of_text() if general else given.evaluator
    return evaluator(scored, given.general if general else given.rows[split])


def _write(given: Assignment, split: str, examples: Sequence[Example], scores: Sequence[ExampleScore]) -> None:
    rows = score_rows(examples, scores, given.evaluator.tokenizer, given.recipe.evaluation.keep_prompts)
    given.bench.folder.write_jsonl(given.file(f"scores/{split}.jsonl"), rows)
