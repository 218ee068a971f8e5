"""Scores of a job's models, taken from the store where they were computed before."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from cola.measure.scores import ExampleScore, evaluation_of, forgetting_of, score_rows
from cola.run.assignment import Assignment
from cola.run.course import Course
from cola.run.loaded import Loaded
from cola.tree.states import Form


def score_attached(given: Assignment, model: PreTrainedModel, step: int) -> list[ExampleScore]:
    """Validation by the model as it is at a step, the link's weights beside the others."""
    return _scores(given, lambda: model, "validation", step, "attached", f" at step {step}")


def evaluate(given: Assignment, course: Course, loaded: Loaded) -> dict[str, Any]:
    """Score every split and the general text by the model after the scored step, tied; `evaluation` of result.json."""
    scores: dict[str, list[ExampleScore]] = {}
    step = course.scored_step
    for split in given.splits:
        scores[split] = _scores(given, partial(loaded.model_after, step), split, step, "tied")
        _write(given, split, scores[split])
    if given.links and step not in course.looks:
        course.note_look(step, scores["validation"])
    return evaluation_of(scores) | ({} if given.job.trial else {"general": _forgetting(given, loaded, step)})


def _forgetting(given: Assignment, loaded: Loaded, step: int) -> dict[str, Any] | None:
    """Loss on the general text after and before training; None where the recipe leaves it out."""
    if not given.rows["general"]:
        return None
    after = _scores(given, partial(loaded.model_after, step), "general", step, "tied") if step else []
    # By the untouched base, whose name all arms and seeds on it share; last, since it takes the chain apart.
    before = _scores(given, loaded.untouched, "general", 0, "attached", " of the untouched model")
    after = after or before  # without links nothing is forgotten
    _write(given, "general", after)
    return forgetting_of(before, after)


def _scores(
    given: Assignment, model: Callable[[], PreTrainedModel], split: str, step: int, form: Form, at: str = ""
) -> list[ExampleScore]:
    def compute() -> list[ExampleScore]:
        scored, general = model(), split == "general"
        given.bench.progress.stage(f"scoring {'the general text' if general else split}{at}")
        evaluator = given.evaluator.of_text() if general else given.evaluator
        return evaluator(scored, given.rows[split])

    return given.measured.scores(split, step, form, compute)


def _write(given: Assignment, split: str, scores: list[ExampleScore]) -> None:
    rows = score_rows(given.rows[split], scores, given.evaluator.tokenizer, given.recipe.evaluation.keep_prompts)
    given.bench.folder.write_jsonl(given.file(f"scores/{split}.jsonl"), rows)
