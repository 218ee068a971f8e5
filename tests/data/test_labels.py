"""What the label of a multiple choice means. Run: pytest tests/data/test_labels.py"""

import re
from pathlib import Path
from typing import Any

import pytest
from test_data import by_row, count, data_of, refusal, rows_of, write_rows
from transformers import PreTrainedTokenizerFast

from cola.data.splits import load_splits
from cola.errors import RecipeError
from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe


def golds(tokenizer: PreTrainedTokenizerFast, path: Path, **settings: Any) -> list[str]:
    """The text of the right choice of every row, in the order of the file."""
    settings = {"label": "label", "prompt": "{id}", **settings}
    size = len(rows_of(path))
    data = data_of(path, task="multiple_choice", rows=count(size - 2, 1, 1), **settings)
    return [example.texts[example.gold] for _, example in sorted(by_row(load_splits(data, tokenizer)).items())]


def labelled(path: Path, labels: list[Any], **more: Any) -> Path:
    return write_rows(path, [{"id": i, "label": label, **more} for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("choices", "labels", "expected"),
    [
        ({"t": "Yes", "f": "No"}, ["t", "f", "f"], ["Yes", "No", "No"]),
        ({True: "Yes", False: "No"}, [True, False, True], ["Yes", "No", "Yes"]),
        ({"true": "Yes", "false": "No"}, [False, True, False], ["No", "Yes", "No"]),
        ({0: "zero", 1: "one"}, [1, "0", 1.0], ["one", "zero", "one"]),
        ({"A": "first", "B": "second"}, ["b", "A", "a"], ["second", "first", "first"]),
        (["Yes", "No"], ["No", "Yes", "No"], ["No", "Yes", "No"]),
        (["Yes", "No"], ["no", "YES", "No"], ["No", "Yes", "No"]),
        (["Yes", "No"], [1, 0, "1"], ["No", "Yes", "No"]),
        (["Yes", "No"], [1.0, 0.0, 1.0], ["No", "Yes", "No"]),
        (["Yes", "No"], ["1.0", "0.0", "1.0"], ["No", "Yes", "No"]),  # an index in a CSV file that pandas wrote
        (["red", "Red"], ["Red", "red", "Red"], ["Red", "red", "Red"]),
        (["0", "1"], ["0", "1", 1.0], ["0", "1", "1"]),  # index and text mean the same in every row
        (["1", "2", "4", "8"], [3, 2, 0], ["8", "4", "1"]),  # the text of no choice somewhere, so an index everywhere
        (["1", "2", "4", "8"], ["8", 2, 1], ["8", "2", "1"]),  # no index somewhere, so a text everywhere
    ],
)
def test_a_label_is_read_in_the_one_way_that_fits_all_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, choices: Any, labels: list[Any], expected: list[str]
) -> None:
    assert golds(tokenizer, labelled(tmp_path / "t.jsonl", labels), choices=choices) == expected


@pytest.mark.parametrize("spelling", [("True", "False"), ("true", "false"), ("TRUE", "FALSE")])
def test_booleans_of_a_csv_file_are_those_of_json(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, spelling: tuple[str, str]
) -> None:
    true, false = spelling
    (tmp_path / "t.csv").write_text(f"id,label\n0,{true}\n1,{false}\n2,{true}\n")
    assert golds(tokenizer, tmp_path / "t.csv", choices={True: "Yes", False: "No"}) == ["Yes", "No", "Yes"]


def test_rows_with_their_own_choices_and_labels_are_read_as_in_arc(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    letters = {"text": ["sun", "sky", "grass"], "label": ["A", "B", "C"]}
    digits = {"text": ["one", "two", "three", "four"], "label": ["1", "2", "3", "4"]}
    rows = [
        {"id": 0, "choices": letters, "answerKey": "C"},
        {"id": 1, "choices": digits, "answerKey": "1"},  # the name 1, not the index
        {"id": 2, "choices": digits, "answerKey": "4"},
        {"id": 3, "choices": letters, "answerKey": "A"},
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    arc = {"choices": "choices.text", "choice_labels": "choices.label", "label": "answerKey"}
    assert golds(tokenizer, path, **arc) == ["grass", "one", "four", "sun"]


def test_rows_with_their_own_choices_can_count_from_zero(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = labelled(tmp_path / "t.jsonl", [0, "2", 1], endings=["red", "blue", "green"])
    assert golds(tokenizer, path, choices="endings") == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("choices", "label"),
    [
        ({"t": "Yes", "f": "No"}, "x"),
        ({"t": "Yes", "f": "No"}, 0),  # a mapping's labels are its names
        (["Yes", "No"], 2),
        (["Yes", "No"], -1),
        (["Yes", "No"], 0.5),
        (["Yes", "No"], True),
        (["Yes", "No"], "²"),  # a digit to str.isdigit, no number to int
        ("endings", "yellow"),
    ],
)
def test_a_label_outside_the_choices_is_refused_with_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, choices: Any, label: Any
) -> None:
    path = labelled(tmp_path / "t.jsonl", [label] * 3, endings=["red", "blue"])
    said = refusal(lambda: golds(tokenizer, path, choices=choices))
    assert "t.jsonl:" in said
    assert "data.label: " in said
    assert "is none of the choices: " in said


def test_an_empty_label_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = labelled(tmp_path / "t.jsonl", [None] * 3)
    assert "field 'label' is empty" in refusal(lambda: golds(tokenizer, path, choices=["Yes", "No"]))


@pytest.mark.parametrize("endings", ["red", ["red"], {"a": "red"}, 3])
def test_a_rows_own_choices_must_be_a_list_of_two(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, endings: Any
) -> None:
    path = labelled(tmp_path / "t.jsonl", [0] * 3, endings=endings)
    assert "no list of two or more answers" in refusal(lambda: golds(tokenizer, path, choices="endings"))


def test_a_rows_choices_must_have_as_many_names_as_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = labelled(tmp_path / "t.jsonl", ["C"] * 3, endings=["red", "blue"], names=["A", "B", "C"])
    assert "data.choice_labels" in refusal(lambda: golds(tokenizer, path, choices="endings", choice_labels="names"))


def test_two_choices_of_one_name_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = labelled(tmp_path / "t.jsonl", ["A"] * 3, endings=["red", "blue"], names=["A", "A"])
    said = refusal(lambda: golds(tokenizer, path, choices="endings", choice_labels="names"))
    assert said.endswith("data.choice_labels: two choices have one name: A, A")


def test_letters_name_choices_that_have_no_field_of_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"id": 0, "label": "C", "endings": ["red", "blue", "green"]},
        {"id": 1, "label": "b", "endings": ["yes", "no"]},
        {"id": 2, "label": "A", "endings": ["B", "C", "A"]},  # a name, although it is a text too
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    names = ["A", "B", "C", "D"]
    assert golds(tokenizer, path, choices="endings", choice_labels=names) == ["green", "no", "B"]
    assert "[A, B, C, D]" in refusal(lambda: golds(tokenizer, write_rows(path, rows[:2] * 2), choices="endings"))


# ---------------------------------------------------------------------------------------------------------
# A label that can be read in two ways

# Of cais/mmlu, abstract_algebra, whose field `answer` is the index.
MMLU = {"choices": ["8", "2", "24", "120"], "label": 2}
OTHERS = [{"choices": ["0", "4", "2", "6"], "label": 1}, {"choices": ["31", "52", "17", "29"], "label": 0}]


def mmlu(path: Path, *rows: dict[str, Any]) -> Path:
    return write_rows(path, [{"id": i, **row} for i, row in enumerate(rows)])


def test_an_index_that_is_another_choices_text_is_read_as_the_other_rows_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = mmlu(tmp_path / "t.jsonl", MMLU, *OTHERS)
    assert golds(tokenizer, path, choices="choices") == ["24", "4", "31"]


def test_labels_that_can_all_be_read_in_two_ways_stop_at_the_row_that_they_differ_in(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    agrees = {"choices": ["0", "1", "5"], "label": 1}
    path = mmlu(tmp_path / "t.jsonl", agrees, agrees, MMLU)
    said = refusal(lambda: golds(tokenizer, path, choices="choices"))
    assert said == (
        "t.jsonl:3: data.label: '2' is the index of '24' and the text of '2'; write data.label_is: index or "
        "data.label_is: text"
    )
    assert golds(tokenizer, path, choices="choices", label_is="index") == ["1", "1", "24"]
    assert golds(tokenizer, path, choices="choices", label_is="text") == ["1", "1", "2"]


def test_labels_of_two_kinds_are_refused_with_a_row_of_each(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    choices = ["1", "2", "4", "8"]
    path = mmlu(tmp_path / "t.jsonl", *({"choices": choices, "label": label} for label in (3, 8, 1)))
    said = refusal(lambda: golds(tokenizer, path, choices="choices"))
    number, text = ("'3'", "index", 1), ("'8'", "text", 2)
    assert said in {
        f"t.jsonl:{row}: data.label: {label} is the {kind} of a choice, and {other} of t.jsonl:{other_row} the "
        f"{other_kind} of one; all labels must be of one kind"
        for (label, kind, row), (other, other_kind, other_row) in ((number, text), (text, number))
    }


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        (4, "an index counts from 0"),
        ("4.0", "an index counts from 0"),
        ("B", "data.choice_labels, as in [A, B, C, D]"),
        (True, "choices: {true: 'Yes', false: 'No'}"),
    ],
)
def test_a_label_that_fits_no_choice_is_told_what_it_may_be(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, label: Any, hint: str
) -> None:
    path = labelled(tmp_path / "t.jsonl", [label] * 3, endings=["red", "blue", "green", "yellow"])
    assert refusal(lambda: golds(tokenizer, path, choices="endings")).endswith(hint)


def test_a_mapping_says_names_unless_the_recipe_says_otherwise(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = labelled(tmp_path / "t.jsonl", [1, 0, 1])
    upside_down = {1: "Yes", 0: "No"}
    assert golds(tokenizer, path, choices=upside_down) == ["Yes", "No", "Yes"]
    assert golds(tokenizer, path, choices=upside_down, label_is="index") == ["No", "Yes", "No"]


RECIPE = """
name: labels
model: {name_or_path: some-org/some-model}
data: {files: t.jsonl, task: TASK, prompt: "{id}", choices: field, label: gold, MORE}
training: {epochs: 1}
arms: {lora: {links: 1}}
seeds: [0]
"""


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("label_is: name", "label_is: name needs names: choices as a mapping, or choice_labels"),
        ("label_is: index, choice_labels: names", "choice_labels has no effect with label_is: index: remove it"),
        ("label_is: number", "data.label_is"),
    ],
)
def test_a_kind_of_label_that_does_not_fit_the_choices_is_refused(tmp_path: Path, more: str, reason: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("TASK", "multiple_choice").replace("MORE", more))
    with pytest.raises(RecipeError, match=re.escape(reason)):
        read_recipe(path)


@pytest.mark.parametrize(
    ("more", "label_is"),
    [("choice_labels: names", "name"), ("choice_labels: [1, 2]", "name"), ("label_is: index", "index"), ("", None)],
)
def test_a_resolved_recipe_says_what_labels_are_as_far_as_it_is_known(
    tmp_path: Path, more: str, label_is: str | None
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("TASK", "multiple_choice").replace(", MORE", f", {more}" if more else ""))
    resolved = read_recipe(path)
    assert resolved.data.label_is == label_is
    path.write_text(dump_recipe(resolved))
    assert read_recipe(path) == resolved
