"""cola data, and scores as rows that can be read again. Run: pytest tests/cli/test_data_view.py"""

import json
from pathlib import Path

import pytest
from runs import cola
from test_data import count, data_of, write_rows
from transformers import PreTrainedTokenizerFast

from cola.cli.data_view import pieces
from cola.data.splits import load_splits
from cola.measure.scores import ExampleScore, score_rows


@pytest.fixture
def recipe_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A recipe on a model that has no weights, and rows one of which is too long and one in two splits."""
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{i} what colour is the sky", "answer": "blue"} for i in range(12)]
    rows[3]["question"] += " maybe" * 60
    write_rows(tmp_path / "train.jsonl", [*rows, {"question": "seen", "answer": "red"}])
    write_rows(
        tmp_path / "test.jsonl", [{"question": "Ünseen", "answer": "red"}, {"question": "seen", "answer": "red"}]
    )
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""
name: mine
model: {{name_or_path: {tmp_path / "model"}}}
data:
  files: {{train: train.jsonl, validation: train.jsonl, test: test.jsonl}}
  rows: {{validation: 2}}
  max_length: 40
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{steps: 1}}
arms: {{lora: {{rank: 2}}}}
seeds: [0]
"""
    )
    return path


def test_what_is_trained_on_is_shown_without_weights(recipe_of: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    result = cola("data", recipe_of, "--split", "test", "--rows", 1)
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    tables = [line.split() for line in lines]
    # 13 rows: 2 for validation, 9 that are left for train without the long one and the one that test has too.
    assert ["train.jsonl", "13", "9", "2", "–", "2"] in tables
    assert ["test.jsonl", "2", "–", "–", "2", "0"] in tables
    assert "train: 1 row longer than 40 tokens, passed over" in lines
    assert "train: 1 row with a prompt that is in another split, left out" in lines
    (head,) = [line for line in lines if line.startswith("test 1 of 2: ")]
    place = head.split(": ")[1].split(",")[0]
    row = json.loads((recipe_of.parent / "test.jsonl").read_text().splitlines()[int(place.split(":")[1]) - 1])
    prompt = tokenizer(f"{row['question']}?", add_special_tokens=False).input_ids
    answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert head == f"test 1 of 2: {place}, {len(prompt) + len(answer)} tokens, {len(answer)} of them targets"
    shown = lines[lines.index(head) + 1]
    assert shown.count("│") == len(prompt) + len(answer)
    assert shown.count("▸") == len(answer)
    marked = "".join(part.removeprefix("▸") for part in shown.split("│") if part.startswith("▸"))
    assert marked == f"·{row['answer']}{tokenizer.eos_token}"
    whole = shown.replace("│", "").replace("▸", "").replace("‥", "").replace("·", " ")
    assert whole == f"{row['question']}? {row['answer']}{tokenizer.eos_token}"


def test_the_other_choices_are_shown_and_a_mistake_is_one_line(recipe_of: Path) -> None:
    rows = [{"question": f"{i} which", "own": ["yes", "no"], "label": 1} for i in range(8)]
    write_rows(recipe_of.parent / "train.jsonl", rows)
    asked = ["data.files=train.jsonl", "data.rows={train: 2, validation: 2, test: 2}", "data.task=multiple_choice"]
    asked += ["data.answer=null", "data.choices=own", "data.label=label"]
    result = cola("data", recipe_of, *asked)
    assert result.exit_code == 0, result.output
    lines = [line.strip().replace("│", "") for line in result.stdout.splitlines()]
    assert lines.count("another choice, scored and not trained on:") == lines.count("·yes") == 2
    assert "no row is too long, or in two splits: none is left out or cut" in lines
    result = cola("data", recipe_of, *asked, "data.label=answer")
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)
    assert "data.label: train.jsonl:" in result.stderr


@pytest.mark.parametrize("text", ["Ünï 日本 № 😀 what", " one  two\n\tthree", "<|im_start|>user", "�", ""])
def test_the_pieces_of_tokens_make_up_their_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_score_says_what_was_right_and_what_was_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"q": f"{i} what ", "a": "blue", "label": i % 2, "text": f"text {i} here"} for i in range(8)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    settings = {
        "answer": {},
        "multiple_choice": {"choices": ["yes", "no"], "label": "label"},
        "text": {"text": "{text}"},
    }
    for task, more in settings.items():
        examples = load_splits(data_of(path, task=task, rows=count(), **more), tokenizer).test
        scores = [ExampleScore(example.id, 1.0, 2, 1.0, None, None) for example in examples]
        found = score_rows(examples, scores, tokenizer, prompts=True)
        assert [row["id"] for row in found] == [example.id for example in examples]
        for written in found:
            row = rows[int(written["id"].removeprefix("t.jsonl:")) - 1]
            prompt = row["text"] if task == "text" else f"{row['q']}?"
            right = {"answer": row["a"], "multiple_choice": ["yes", "no"][row["label"]], "text": None}[task]
            assert (written["prompt"], written["answer"]) == (prompt, right)
            assert written["gold"] == (row["label"] if task == "multiple_choice" else None)
            assert written["choices"] == (["yes", "no"] if task == "multiple_choice" else None)
        assert not {"prompt", "choices"} & score_rows(examples, scores, tokenizer, prompts=False)[0].keys()
