"""Rows become text: a prompt and its answers, by the recipe's templates or the model's chat template."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from cola.data.answers import is_cut_short
from cola.data.chat import chat_prompt
from cola.data.fields import fill, text_of
from cola.data.labels import Label, label_of
from cola.data.rows import Row
from cola.errors import DataError
from cola.recipe.data_section import Data


@dataclass(frozen=True)
class Rendered:
    """A row as text."""

    prompt: str  # what is read; for task `text` all of it
    group: str | None = None  # what the row shares with others
    answers: list[str] = field(default_factory=list)  # what follows the prompt, blanks and answer prefix included
    texts: list[str] = field(default_factory=list)  # the answers alone
    label: Label | None = None  # of a multiple choice


def render(row: Row, place: str, data: Data, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A row, which messages call by its place, as the text that the model reads. Raises DataError if a field, the label
    or the answer does not fit."""
    group = text_of(row, data.group, place, "data.group") if data.group else None
    if data.task == "text":
        assert data.text is not None
        return Rendered(fill(data.text, row, place, "data.text"), group)
    assert data.prompt is not None
    prompt = fill(data.prompt, row, place, "data.prompt")
    label = label_of(row, place, data) if data.task == "multiple_choice" else None
    texts = [_right_answer(row, place, data)] if label is None else label.choices
    if not all(text.strip() for text in texts):
        raise DataError(f"{place}: the answer is empty")
    if data.chat:
        prompt = chat_prompt(prompt, data, tokenizer, place)
    # Most vocabularies hold " Yes" and not "Yes", so blanks at the prompt's end go to the answer.
    blanks = "" if data.chat else prompt[len(prompt.rstrip(" ")) :]
    answers = [blanks + (data.answer_prefix or "") + text for text in texts]
    return Rendered(prompt.removesuffix(blanks), group, answers, texts, label)


def _right_answer(row: Row, place: str, data: Data) -> str:
    assert data.answer is not None
    text = fill(data.answer, row, place, "data.answer")
    if stop := next((stop for stop in data.stop or () if is_cut_short(text, stop, data.normalize or ())), None):
        shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
        raise DataError(f"{place}: data.stop: {stop!r} would cut the right answer short, {shown}; leave it out")
    return text
