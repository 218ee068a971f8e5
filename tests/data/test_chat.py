"""Chat templates: the same text on any day, and a refusal in their own words. Run: pytest tests/data/test_chat.py"""

import copy
import random
from datetime import datetime
from pathlib import Path

import pytest
from pydantic import ValidationError
from test_data import by_row, count, data_of, numbered, refusal, write_rows
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from cola.data.splits import load_splits
from cola.recipe.data_section import Data

PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
DATED = "Today is {{ strftime_now('%d %b %Y') }}." + PLAIN
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role\n not supported') }}{% endif %}" + PLAIN
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def chats(tmp_path: Path, **settings: object) -> Data:
    path = write_rows(tmp_path / "t.jsonl", numbered(8))
    return data_of(path, rows=count(), chat=True, **{"answer_prefix": "", **settings})


def on(day: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As if it were that day, and nothing had been cached."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setenv("COLA_CACHE", str(cache))


def test_a_template_that_asks_for_the_date_gives_the_same_tokens_on_any_day(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated, data, seen = with_template(tokenizer, DATED), chats(tmp_path), []
    for number, day in enumerate(("2025-01-02", "2031-12-30")):
        on(day, monkeypatch, tmp_path / f"cache{number}")
        assert datetime.fromisoformat(day).strftime("%d %b %Y") in dated.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False
        )
        splits = load_splits(data, dated)
        seen.append(splits)
        texts = [dated.decode(example.prompt) for example in by_row(splits).values()]
        assert all(text.startswith("Today is 26 Jul 2024.") for text in texts)
        assert "is told 2024-07-26" in splits.notes[0]
    assert seen[0] == seen[1]


def test_the_date_that_a_template_is_told_is_the_recipes_and_another_one_is_never_read_from_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dated = with_template(tokenizer, DATED)
    for day, said in ((None, "26 Jul 2024"), ("2026-11-28", "28 Nov 2026"), (None, "26 Jul 2024")):
        for example in by_row(load_splits(chats(tmp_path, today=day), dated)).values():
            assert dated.decode(example.prompt).startswith(f"Today is {said}.")
    plain = with_template(tokenizer, PLAIN)
    assert "data.today: the model's chat template does not ask" in refusal(
        load_splits, chats(tmp_path, today="2026-11-28"), plain
    )
    assert not load_splits(chats(tmp_path), plain).notes


@pytest.mark.parametrize("said", ["yesterday", "2026-02-30", "20261128", "28.11.2026"])
def test_a_day_that_is_none_is_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(ValidationError, match="a day is written as 2024-07-26"):
        chats(tmp_path, today=said)


def test_the_date_without_a_chat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="today has no effect without chat: true"):
        data_of(tmp_path / "t.jsonl", today="2026-11-28")


def test_a_template_that_draws_at_random_draws_the_same_each_time_and_leaves_others_draws_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, seen = with_template(tokenizer, "{{ range(100000) | random }}" + PLAIN), []
    for number in range(2):
        monkeypatch.setenv("COLA_CACHE", str(tmp_path / f"cache{number}"))
        random.seed(number)
        expected = random.Random(number).random()
        seen.append(by_row(load_splits(chats(tmp_path), drawing)))
        assert random.random() == expected
    assert seen[0] == seen[1]
    assert len({drawing.decode(example.prompt)[:4] for example in seen[0].values()}) > 1


def test_a_template_that_refuses_the_system_message_is_quoted_with_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    picky = with_template(tokenizer, NO_SYSTEM)
    said = refusal(load_splits, chats(tmp_path, system="Be brief."), picky)
    place, key, words = said.split(": ", 2)
    assert place.startswith("t.jsonl:")
    assert key == "data.chat"
    assert words.startswith("the model's chat template says: System role not supported; ")
    assert "remove data.system" in words
    assert len(by_row(load_splits(chats(tmp_path), picky))) == 8


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Users must not ask ' + messages[-1]['content'][:8]) }}", "Users must not ask question"),
        ("{{ messages[0]['content'] / 2 }}", "unsupported operand"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[5]['content'] }}", "has no element 5"),
        ("{{ raise_exception('x' * 5000) }}", "x" * 197 + "..."),
        ("{{ raise_exception('') }}", "TemplateError"),
    ],
)
def test_a_template_that_fails_is_one_line_whatever_it_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str, words: str
) -> None:
    for system in (None, "Be brief."):
        said = refusal(load_splits, chats(tmp_path, system=system), with_template(tokenizer, template))
        assert said.startswith("t.jsonl:")
        assert "data.chat: the model's chat template says: " in said
        assert words in said
        assert "data.system" not in said
        assert len(said) < 320
