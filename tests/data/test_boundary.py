"""Where a text is cut into what is given and what is scored. Run: pytest tests/data/test_boundary.py"""

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from test_data import by_row, count, data_of, refusal, tokens, write_rows
from test_stop import TOKENIZERS
from transformers import PreTrainedTokenizerFast

from cola.data.encode import Example
from cola.data.splits import load_splits

MERGING = ["low", "red", "low maybe", "lowred"]  # " yel" + "low" is one token, " yel" + "red" is not


def choices_of(
    tokenizer: PreTrainedTokenizerFast, path: Path, prompts: list[str], choices: list[str], **settings: Any
) -> list[Example]:
    """The examples of a file with these prompts."""
    rows = [{"q": prompt, "label": n % len(choices)} for n, prompt in enumerate(prompts)]
    data = data_of(
        write_rows(path, rows),
        **{
            **{"task": "multiple_choice", "choices": choices, "label": "label", "label_is": "index", "prompt": "{q}"},
            **{"rows": count(len(prompts) - 2, 1, 1), "answer_prefix": ""},
            **settings,
        },
    )
    return [example for _, example in sorted(by_row(load_splits(data, tokenizer)).items())]


def test_all_choices_are_cut_where_the_tokens_end_that_they_and_the_prompt_have_in_common(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [f"{n} what is yel" for n in range(6)]
    assert tokens(tokenizer, "what is yellow") != [*tokens(tokenizer, "what is yel"), *tokens(tokenizer, "low")]
    for prompt, example in zip(prompts, choices_of(tokenizer, tmp_path / "t.jsonl", prompts, MERGING), strict=True):
        wholes = [tokens(tokenizer, prompt + choice) for choice in MERGING]
        assert [example.prompt + answer for answer in example.answers] == wholes
        columns = zip(tokens(tokenizer, prompt), *wholes, strict=False)
        assert example.prompt == [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        assert tokenizer.decode(example.prompt) == prompt.removesuffix(" yel")


def test_the_cut_does_not_depend_on_which_choice_is_right(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = choices_of(tokenizer, tmp_path / "t.jsonl", [f"{n} yel" for n in range(8)], MERGING)
    assert {len(example.prompt) for example in found} == {1}
    assert {example.gold for example in found} == {0, 1, 2, 3}
    assert all(example.answers == found[0].answers for example in found)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("ending", "prefix"), [("?", " "), ("? ", ""), (" yel", " "), (":", "")])
def test_the_cut_is_lm_evals_where_no_token_spans_it(tmp_path: Path, kind: str, ending: str, prefix: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM

    tokenizer = TOKENIZERS[kind]()

    class Pair(TemplateLM):
        """Only what cuts: lm-eval's own `_encode_pair`."""

        backend = "causal"
        eot_token_id = 0
        loglikelihood_rolling = generate_until = _loglikelihood_tokens = None  # pyright: ignore

        def tok_encode(self, string: str, **kwargs: object) -> list[int]:
            return tokens(tokenizer, string)

    prompts = [f"{n} what colour is the sun{ending}" for n in range(4)]
    answers = ["yellow", "red maybe", "blue"]
    for prompt, example in zip(
        prompts, choices_of(tokenizer, tmp_path / "t.jsonl", prompts, answers, answer_prefix=prefix), strict=True
    ):
        theirs = [Pair()._encode_pair(prompt, prefix + answer) for answer in answers]
        assert [(example.prompt, answer) for answer in example.answers] == theirs


def test_choices_that_begin_within_the_only_token_of_a_prompt_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def load() -> None:
        choices_of(tokenizer, tmp_path / "t.jsonl", [" yel"] * 4, MERGING, overlap="allow")

    assert refusal(load).endswith("data.prompt: the choices begin within its first token")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_to_be_answered_keeps_its_tokens_and_the_text_is_the_same(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    rows = [{"q": f"{'sky ' * n}yel", "a": "low"} for n in range(1, 7)]
    data = data_of(write_rows(tmp_path / "t.jsonl", rows), prompt="{q}", answer_prefix="", rows=count(4, 1, 1))
    for n, example in by_row(load_splits(data, tokenizer)).items():
        assert example.prompt == tokens(tokenizer, rows[n]["q"])
        assert example.prompt + example.answers[0][:-1] != tokens(tokenizer, rows[n]["q"] + "low")
        assert tokenizer.decode([*example.prompt, *example.answers[0][:-1]]) == rows[n]["q"] + "low"
