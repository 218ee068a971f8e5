"""A prompt through the chat template: the same text on every day, or one line in the template's own words."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from cola.errors import LONGEST, DataError, one_line, plain
from cola.recipe.data_section import Data

TURN = "answer-of-the-assistant"  # stands in for one
DAY = "2024-07-26"  # what Llama's templates say where there is no clock


def asks_for_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template names the clock: it has no other way to it."""
    return "strftime_now" in str(tokenizer.chat_template)


def chat_prompt(prompt: str, data: Data, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """The text of a conversation in which the user has said the prompt of the row at `place`, and the model answers.
    Raises DataError if the template refuses the conversation, or fails."""
    user = {"role": "user", "content": prompt}
    messages = [{"role": "system", "content": data.system}, user] if data.system else [user]
    try:
        return _rendered(messages, data.today or DAY, tokenizer)
    # A template is a program of the model's: besides what it raises itself it can fail in any way that Python can.
    except Exception as error:
        words = plain(one_line(error, LONGEST), 200)
        hint = ""
        if data.system:
            with suppress(Exception):  # of two errors the first is told
                _rendered([user], data.today or DAY, tokenizer)
                hint = "; it takes the user's message alone: remove data.system, and put its words into data.prompt"
        raise DataError(f"{place}: data.chat: the model's chat template says: {words}{hint}") from error


def after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an assistant's message; nothing where it takes none."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": TURN}]
    try:
        said = _rendered(messages, DAY, tokenizer, asks=False)
    except Exception:  # a program of the model's, which may fail in any way
        return ""
    return said.rpartition(TURN)[2] if TURN in said else ""


def _rendered(messages: list[dict[str, str]], day: str, tokenizer: PreTrainedTokenizerBase, asks: bool = True) -> str:
    with _pinned(day, str(messages)):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


@contextmanager
def _pinned(day: str, seed: str) -> Iterator[None]:
    """Another day, or another draw of jinja's `random`, would be other tokens: a template gets one day from its clock,
    and a seed that is the messages' own."""

    class Day(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Day":
            return cls.fromisoformat(day)

    before = random.getstate()
    random.seed(seed)
    try:
        with patch.object(chat_template_utils, "datetime", Day):  # where transformers gives templates their clock
            yield
    finally:
        random.setstate(before)
