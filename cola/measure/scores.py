"""Scores of examples, and what is made of them: means and forgetting."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cola.data.encode import Example


@dataclass(frozen=True)
class ExampleScore:
    """One example's result."""

    id: str  # the example's
    nats: float  # -log p of the right answer, summed over its tokens
    tokens: int  # their number
    score: float | None  # 1.0 or 0.0; None for plain text
    prediction: int | str | None  # index of the chosen answer, or the decoded one
    group: str | None  # the example's


def score_rows(
    examples: Sequence[Example], scores: Sequence[ExampleScore], tokenizer: PreTrainedTokenizerBase, prompts: bool
) -> list[dict[str, Any]]:
    """The rows of scores/SPLIT.jsonl: each score and the right answer of its example; with `prompts` also the text that
    was read (of a task `text` all of it) and a multiple choice's answers."""
    rows = []
    for example, score in zip(examples, scores, strict=True):
        answer = example.texts[example.gold] if example.texts else None
        row = {**asdict(score), "answer": answer, "gold": example.gold if len(example.answers) > 1 else None}
        if prompts:
            read = example.prompt if example.texts else [*example.prompt, *example.answers[0]]
            row["prompt"] = tokenizer.decode(read, clean_up_tokenization_spaces=False)
            row["choices"] = example.texts if len(example.answers) > 1 else None
        rows.append(row)
    return rows


def mean_loss(scores: Iterable[ExampleScore]) -> float:
    """Nats per target token over all examples: the sum of nats by the sum of tokens."""
    scores = list(scores)
    return math.fsum(s.nats for s in scores) / sum(s.tokens for s in scores)


def mean_score(scores: Iterable[ExampleScore]) -> float | None:
    """Mean of the examples' scores; None for plain text."""
    values = [s.score for s in scores if s.score is not None]
    return math.fsum(values) / len(values) if values else None


def forgetting_of(before: Sequence[ExampleScore], after: Sequence[ExampleScore]) -> dict[str, Any]:
    """What training has cost on a general text: the loss of its passages after training, `before` it, by the untouched
    base, and the difference."""
    loss, start = mean_loss(after), mean_loss(before)
    tokens = sum(score.tokens for score in after)
    return {"loss": loss, "before": start, "forgetting": loss - start, "n": len(after), "tokens": tokens}


def evaluation_of(scores: dict[str, list[ExampleScore]]) -> dict[str, Any]:
    """Loss, score and number of rows of each split, and the gaps where train and test are there."""
    evaluation: dict[str, Any] = {
        split: {"loss": mean_loss(rows), "score": mean_score(rows), "n": len(rows)} for split, rows in scores.items()
    }
    if "train" in evaluation and "test" in evaluation:
        train, test = evaluation["train"], evaluation["test"]
        evaluation["gap_loss"] = test["loss"] - train["loss"]
        evaluation["gap_acc"] = None if train["score"] is None else train["score"] - test["score"]
    return evaluation
