"""What is made of a file's fields. Run: pytest tests/data/test_propose.py"""

from typing import Any

import pytest

from cola.data.propose import propose
from cola.errors import DataError


def keys_of(n: int = 40, **columns: Any) -> dict[str, Any]:
    """What is proposed for rows whose fields are the values of functions of the row's number."""
    return propose([{name: made(i) for name, made in columns.items()} for i in range(n)], "rows.jsonl").keys


def asked(i: int) -> str:
    return f"what is {i} and more"


def test_a_question_and_an_answer_are_asked_and_answered() -> None:
    keys = keys_of(id=str, question=asked, answer=lambda i: f"it is {i}")
    assert keys == {"task": "answer", "prompt": "Question: {question}\nAnswer:", "answer": "{answer}"}


def test_an_instruction_keeps_its_input_and_a_prompt_is_gone_on_from_as_it_is() -> None:
    keys = keys_of(instruction=asked, input=lambda i: "" if i % 2 else f"of {i}", output=asked)
    assert keys["prompt"] == "Instruction: {instruction}\nInput: {input}\nOutput:"
    assert keys_of(prompt=asked, completion=asked)["prompt"] == "{prompt}"


def test_few_values_of_a_label_are_classes_and_the_passage_comes_first() -> None:
    keys = keys_of(question=asked, passage=lambda i: f"a text on {i // 2}", answer=lambda i: i % 3 == 0)
    assert keys == {
        "task": "multiple_choice",
        "prompt": "Passage: {passage}\nQuestion: {question}\nAnswer:",
        "choices": {"true": "true", "false": "false"},
        "label": "answer",
        "group": "passage",
    }


def test_words_of_a_class_are_taken_rather_than_its_number_and_neither_is_shown() -> None:
    keys = keys_of(text=asked, label=lambda i: i % 2, label_text=lambda i: ["no", "yes"][i % 2], explanation=asked)
    assert (keys["label"], keys["prompt"]) == ("label", "Text: {text}\nLabel:")
    keys = keys_of(text=asked, label=lambda i: i % 2, answer=lambda i: ["no", "yes"][i % 2], explanation=asked)
    assert (keys["label"], keys["prompt"]) == ("answer", "Text: {text}\nAnswer:")


def test_a_label_on_an_answer_is_asked_about_with_the_answer() -> None:
    keys = keys_of(question=asked, answer=lambda i: f"it is {i}", label=lambda i: i % 2)
    assert keys["prompt"] == "Question: {question}\nAnswer: {answer}\nLabel:"
    assert keys["label"] == "label"


def test_what_names_or_dates_a_row_is_not_shown_whatever_it_is_called() -> None:
    rows = [
        {
            "Ticket ID": f"T-{i}",
            "Received": f"2026-01-{i % 28 + 1:02}",
            "seen": f"1.{i % 12 + 1}.2026 10:{i:02}",
            "Request": asked(i),
            "Note": ["", "checked", "see manual"][i % 3],
            "Intent": "ab"[i % 2],
        }
        for i in range(40)
    ]
    found = propose(rows, "rows.csv")
    assert (found.keys["prompt"], found.keys["label"]) == ("Request: {Request}\nIntent:", "Intent")
    assert found.left_out == ["Ticket ID", "Received", "seen", "Note"]
    sums = keys_of(a=str, b=lambda i: f"{i * i}", answer=lambda i: f"{i + i * i}")  # that is all there is to ask with
    assert sums["prompt"] == "A: {a}\nB: {b}\nAnswer:"


def test_few_values_in_the_last_field_are_classes_though_its_name_says_nothing() -> None:
    keys = keys_of(Text1=asked, Text2=lambda i: f"and {i} is", Urteil=lambda i: ["ja", "nein"][i % 2], id=str)
    assert (keys["label"], keys["choices"]) == ("Urteil", {"ja": "ja", "nein": "nein"})
    assert keys["prompt"] == "Text1: {Text1}\nText2: {Text2}\nUrteil:"
    keys = keys_of(said=asked, mood=lambda i: ["ja", "nein"][i % 2], meant=lambda i: f"it is {i}")
    assert (keys["task"], keys["answer"]) == ("answer", "{meant}")
    keys = keys_of(source=lambda i: f"the line of words {i}", target=lambda i: f"eine Zeile {i}")
    assert keys["prompt"] == "Source: {source}\nTarget:"


def test_a_topic_is_not_what_is_answered_where_there_is_an_answer() -> None:
    keys = keys_of(instruction=asked, response=lambda i: f"it is {i}", category=lambda i: "ab"[i % 2])
    assert (keys["task"], keys["answer"]) == ("answer", "{response}")
    assert "category" not in keys["prompt"]
    assert keys_of(text=asked, category=lambda i: "ab"[i % 2])["label"] == "category"


@pytest.mark.parametrize(
    ("label", "means"),
    [
        (lambda i: i % 2, {"label_is": "index"}),
        (lambda i: ["up", "down"][i % 2], {"label_is": "text"}),
        (lambda i: "AB"[i % 2], {"choice_labels": ["A", "B"]}),
    ],
)
def test_a_rows_own_choices_are_taken_with_what_the_label_is(label: Any, means: dict[str, Any]) -> None:
    keys = keys_of(question=asked, choices=lambda i: ["up", "down"], answer=label)
    assert (
        keys
        == {
            "task": "multiple_choice",
            "prompt": "Question: {question}\nAnswer:",
            "choices": "choices",
            "label": "answer",
        }
        | means
    )


def test_choices_with_names_beside_them_are_those_of_arc() -> None:
    keys = keys_of(
        question=asked, choices=lambda i: {"text": ["up", "down"], "label": ["1", "2"]}, answerKey=lambda i: "2"
    )
    assert (keys["choices"], keys["choice_labels"], keys["label"]) == ("choices.text", "choices.label", "answerKey")


def test_the_first_of_several_right_answers_is_taken() -> None:
    keys = keys_of(context=asked, question=asked, answers=lambda i: {"text": [f"it is {i}"], "answer_start": [i]})
    assert keys["answer"] == "{answers.text.0}"
    assert keys["prompt"] == "Context: {context}\nQuestion: {question}\nAnswer:"


def test_a_conversation_is_its_first_answer() -> None:
    turns = lambda i: [{"role": "user", "content": asked(i)}, {"role": "assistant", "content": f"it is {i}"}]  # noqa: E731
    assert keys_of(messages=turns) == {
        "task": "answer",
        "prompt": "{messages.0.content}",
        "answer": "{messages.1.content}",
    }


def test_two_texts_without_known_names_ask_and_answer_and_one_alone_is_text() -> None:
    assert keys_of(en=asked, de=lambda i: f"das ist {i}")["answer"] == "{de}"
    assert keys_of(text=asked) == {"task": "text", "text": "{text}"}


def test_a_field_that_some_row_lacks_or_no_template_can_name_is_not_used() -> None:
    keys = keys_of(question=asked, hint=lambda i: None if i == 3 else f"think of {i}", answer=asked)
    assert keys["prompt"] == "Question: {question}\nAnswer:"
    keys = keys_of(text=asked, label=lambda i: float("nan") if i == 3 else i % 2)
    assert keys == {"task": "text", "text": "{text}"}
    keys = keys_of(**{"question": asked, "a:b": asked, "answer": asked})
    assert keys["prompt"] == "Question: {question}\nAnswer:"


def test_splits_are_counted_in_rows_that_differ() -> None:
    rows = [{"question": f"what is {i % 20}", "answer": f"it is {i}"} for i in range(100)]
    assert propose(rows, "rows.jsonl").rows == {"train": 12, "validation": 2, "test": 4}
    with pytest.raises(DataError, match=r"--data: rows.jsonl: 9 rows with different prompts"):
        propose([{"question": f"what is {i % 9}", "answer": f"it is {i}"} for i in range(100)], "rows.jsonl")


def test_fields_that_say_nothing_are_refused_with_the_keys_to_fill() -> None:
    with pytest.raises(DataError, match=r"its fields \(a, b, c\) do not say .* data.prompt and data.answer"):
        keys_of(a=float, b=float, c=float)


def test_fields_of_which_nothing_is_made_are_named() -> None:
    rows = [
        {"id": i, "text": asked(i), "text2": f"so {i}", "answers": {"text": [f"it is {i}"], "at": [i]}}
        for i in range(40)
    ]
    found = propose(rows, "rows.jsonl")
    assert found.keys["answer"] == "{answers.text.0}"
    assert found.left_out == ["id", "answers.at"]
    assert propose(
        [
            {"messages": [{"role": "user", "content": asked(i)}, {"role": "assistant", "content": "a"}], "n": i}
            for i in range(20)
        ],
        "rows.jsonl",
    ).left_out == ["n"]
