"""Sources, templates, splits, tokens, their cache, and batches. Run: pytest tests/data/test_data.py"""

import copy
import csv
import json
import os
import random
import re
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cola.data.batches import batch_order, by_tokens, collate, training_batches
from cola.data.encode import Example
from cola.data.fields import fill
from cola.data.sources import open_pools
from cola.data.splits import Splits, load_splits
from cola.errors import DataError
from cola.files import cache_dir
from cola.recipe.data_section import Data
from cola.recipe.schema import SPLITS

Row = dict[str, Any]


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(n: int) -> list[Row]:
    return [{"id": i, "q": f"question {i} what colour", "a": ["red", "blue", "green"][i % 3]} for i in range(n)]


def data_of(files: Path | dict[str, Path] | None, **settings: Any) -> Data:
    """A resolved data section; task `answer` over {q} and {a} unless told otherwise."""
    source = (
        {}
        if files is None
        else {"files": str(files) if isinstance(files, Path) else {k: str(v) for k, v in files.items()}}
    )
    task = settings.get("task", "answer")
    defaults = {
        "answer": {"prompt": "{q}?", "answer": "{a}", "answer_prefix": " ", "too_long": "drop"},
        "multiple_choice": {"prompt": "{q}?", "answer_prefix": " ", "too_long": "drop"},
        "text": {"text": "{text}", "too_long": "split"},
    }[task]
    return Data.model_validate({**source, "task": task, **defaults, **settings})


def count(train: int | None = 4, validation: int | None = 2, test: int | None = 2) -> dict[str, int | None]:
    return {"train": train, "validation": validation, "test": test}


def by_row(splits: Splits) -> dict[int, Example]:
    """All examples by the place of their row in the one file that they come from."""
    return {row_of(example): example for _, examples in splits.items() for example in examples}


def row_of(example: Example) -> int:
    """The place of its row in a file without blank lines, from 0."""
    return int(example.id.rpartition(":")[2]) - 1


def rows_of(path: Path) -> list[Row]:
    pool = open_pools(data_of(path))["train"]
    assert pool.size is not None
    return [pool.row(i) for i in range(pool.size)]


def refusal(do: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        do(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Local files

TABLE = [{"q": 'a "b", c', "n": "1"}, {"q": "two\nlines", "n": "2"}, {"q": "Ünï", "n": "3"}]


def write_table(path: Path) -> None:
    if path.suffix in (".jsonl", ".ndjson"):
        write_rows(path, TABLE)
    elif path.suffix == ".json":
        path.write_text(json.dumps(TABLE))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["q", "n"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(TABLE)


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json", "t.csv", "t.tsv", "t.parquet"])
def test_the_same_table_is_read_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    assert rows_of(tmp_path / name) == TABLE


def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv")
    assert rows_of((tmp_path / "t.csv").rename(tmp_path / "t.CSV")) == TABLE


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_table(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert rows_of(path) == TABLE


def test_a_text_file_gives_a_row_for_each_line_that_is_not_blank(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("first line\n\n  \nsecond {line}\r\nthird")
    assert rows_of(tmp_path / "t.txt") == [{"text": "first line"}, {"text": "second {line}"}, {"text": "third"}]


@pytest.mark.parametrize("character", ["\u2028", "\x0c", "\x85", "\x1c"])
def test_only_a_newline_ends_a_line_of_a_text_file(tmp_path: Path, character: str) -> None:
    (tmp_path / "t.txt").write_text(f"one{character}still one\ntwo\n", encoding="utf-8")
    assert rows_of(tmp_path / "t.txt") == [{"text": f"one{character}still one"}, {"text": "two"}]


def test_values_keep_the_types_that_json_and_parquet_give_them(tmp_path: Path) -> None:
    rows = [{"n": 1, "x": 0.5, "flag": True, "list": ["a", "b"], "inner": {"title": "t"}}]
    assert rows_of(write_rows(tmp_path / "t.jsonl", rows)) == rows
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert rows_of(tmp_path / "t.parquet") == rows


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", '{"q": 1}\n\n{"q": 2\n{"q": 3}\n', "t.jsonl:3: not valid JSON"),
        ("t.jsonl", '{"q": 1}\n[1, 2]\n', "t.jsonl:2: a row is an object with named fields, not a list"),
        ("t.json", '[{"q": 1},\n{"q": }]', "t.json line 2: not valid JSON"),
        ("t.json", '[{"q": 1}, "x"]', "t.json:2: a row is an object"),
        ("t.jsonl", "", "t.jsonl holds no rows"),
        ("t.jsonl", "\n\n", "t.jsonl holds no rows"),
        ("t.json", "[]", "t.json holds no rows"),
        ("t.csv", "", "t.csv holds no rows"),
        ("t.csv", "q,a\n", "t.csv holds no rows"),
        ("t.txt", "  \n", "t.txt holds no rows"),
        ("t.csv", "q,a\n1,2\n1,2,3\n", "t.csv:3: not as many fields as the header has"),
        ("t.csv", "q,a\n1,2\n1\n", "t.csv:3: not as many fields as the header has"),
        ("t.tsv", "q\ta\n1,2\n", "t.tsv:2: not as many fields as the header has"),
        ("t.csv", 'q,a\n1,2\n"open,2\n', "not valid CSV"),
        ("t.xlsx", "anything", "t.xlsx: unknown kind '.xlsx'; known are .jsonl, "),
        ("t", "anything", "t: unknown kind ''"),
        ("t.parquet", "not parquet", "t.parquet: not a readable Parquet file"),
        ("t.jsonl", b'{"q": "\xff"}\n', "t.jsonl:1: not UTF-8 text"),
        ("t.csv", b"q,a\n\xff,2\n", "t.csv:2: not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    said = refusal(rows_of, tmp_path / name)
    assert said.startswith("data.files: ")
    assert reason in said


@pytest.mark.parametrize(
    ("before", "line"), [('"over\ntwo lines",2\n', 4), ("\n\n1,2\n", 5)], ids=["a-quoted-newline", "blank-lines"]
)
def test_the_line_of_a_bad_csv_row_is_its_line_in_the_file(tmp_path: Path, before: str, line: int) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"q,a\n{before}only one field\n")
    assert path.read_text().splitlines()[line - 1] == "only one field"
    assert f"t.csv:{line}: not as many fields" in refusal(rows_of, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"data.files: {tmp_path / 'none.jsonl'} does not exist" == refusal(rows_of, tmp_path / "none.jsonl")


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    assert f"data.files: {tmp_path} is a folder; name a file" == refusal(rows_of, tmp_path)


def test_a_hub_set_that_cannot_be_had_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    said = refusal(open_pools, data_of(None, hub="nobody-at-all/no-such-set"))
    assert "data.hub: nobody-at-all/no-such-set split 'train' could not be loaded" in said
    assert "data.files" in said


# ---------------------------------------------------------------------------------------------------------
# reasoning_gym

SMALL_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def gym(name: str = "chain_sum", seed: int = 0, **options: object) -> Data:
    source = {"name": name, "seed": seed, "options": options}
    return data_of(None, reasoning_gym=source, prompt="{question}", answer="{answer}", rows=count(30, 20, 20))


def test_a_generator_gives_the_rows_that_reasoning_gym_gives() -> None:
    import reasoning_gym

    pools = open_pools(gym(seed=3))
    for number, split in enumerate(SPLITS):
        reference = reasoning_gym.create_dataset("chain_sum", size=5, seed=300_000_000 + number * 10_000_000)
        assert [pools[split].row(i) for i in range(5)] == [reference[i] for i in range(5)]


def test_a_generators_rows_depend_on_its_seed_alone() -> None:
    def draw(seed: int) -> list[str]:
        pools = open_pools(gym(seed=seed))
        return [pools[split].row(i)["question"] for split in SPLITS for i in range(5)]

    random.seed(1)
    first = draw(0)
    random.seed(2)
    assert draw(0) == first
    assert not set(draw(1)) & set(first)


def test_the_splits_of_a_generator_share_no_prompt_though_it_repeats_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    data = gym(**SMALL_SUMS)
    repeats = load_splits(data.model_copy(update={"overlap": "allow"}), tokenizer)
    prompts = {name: {tuple(e.prompt) for e in examples} for name, examples in repeats.items()}
    assert prompts["train"] & prompts["test"]
    splits = load_splits(data, tokenizer)
    prompts = {name: {tuple(e.prompt) for e in examples} for name, examples in splits.items()}
    assert [len(examples) for _, examples in splits.items()] == [30, 20, 20]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gym("no_such_generator"), "no_such_generator"),
        (gym(no_such_option=1), "no_such_option"),
        (gym(min_terms=0), "min_terms"),
        (gym(min_terms="many"), "chain_sum"),
    ],
)
def test_a_generator_that_does_not_exist_or_cannot_do_it_is_refused(data: Data, reason: str) -> None:
    said = refusal(open_pools, data)
    assert said.startswith("data.reasoning_gym: ")
    assert reason in said


def test_a_generator_needs_to_be_told_how_many_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    data = gym().model_copy(update={"rows": gym().rows.model_copy(update={"train": None})})
    assert "data.rows.train must say how many rows to draw: a generator has no end" in refusal(
        load_splits, data, tokenizer
    )


# ---------------------------------------------------------------------------------------------------------
# Templates

ROW = {
    "q": "why",
    "n": 3,
    "x": 1.0,
    "yes": True,
    "meta": {"title": "T", "deep": {"er": "D"}},
    "a.b": "dotted",
    "void": None,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}?", "why?"),
        ("{q}{q} {n}", "whywhy 3"),
        ("no field", "no field"),
        ("", ""),
        ("{meta.title}, {meta.deep.er}", "T, D"),
        ("{a.b}", "dotted"),
        ("{{q}} is {q}", "{q} is why"),
        ("{{{q}}}", "{why}"),
        ("{x} {yes}", "1 true"),
    ],
)
def test_a_template_is_filled_with_the_rows_fields(template: str, text: str) -> None:
    assert fill(template, ROW, "here", "data.prompt") == text


def test_braces_in_a_rows_own_text_are_left_alone() -> None:
    assert fill("{q}|{a}", {"q": "{a} {0} }{ {{", "a": "x"}, "here", "data.prompt") == "{a} {0} }{ {{|x"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{qq}", "here has no field 'qq'; it has q, n, x, yes, meta, a.b, void"),
        ("{metta}", "did you mean meta?"),
        ("{meta.titel}", "no field 'meta.titel'"),
        ("{q.first}", "no field 'q.first'"),
        ("{void}", "field 'void' is empty"),
        ("{q.__class__}", "no field 'q.__class__'"),
        ("{meta.__class__.__init__}", "no field"),
        ("{q[0]}", "no field 'q[0]'"),
        ("{0}", "no field '0'"),
    ],
)
def test_a_template_can_name_fields_and_nothing_else(template: str, reason: str) -> None:
    said = refusal(fill, template, ROW, "here", "data.prompt")
    assert said.startswith("data.prompt: ")
    assert reason in said


def test_a_missing_field_names_the_file_and_the_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": f"{i}", "answr": "y"} for i in range(8)])
    said = refusal(load_splits, data_of(path, answer="{answer}", rows=count()), tokenizer)
    assert "data.answer: t.jsonl:" in said
    assert said.endswith("has no field 'answer'; it has q, answr; did you mean answr?")


# ---------------------------------------------------------------------------------------------------------
# Tasks and tokens


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_prompt_and_answer_are_the_tokens_of_the_joint_text_and_the_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = numbered(20)
    splits = load_splits(data_of(write_rows(tmp_path / "t.jsonl", rows), rows=count(12, 4, 4)), tokenizer)
    examples = by_row(splits)
    assert sorted(examples) == list(range(20))
    for i, example in examples.items():
        assert example.prompt + example.answers[0] == [
            *tokens(tokenizer, f"{rows[i]['q']}? {rows[i]['a']}"),
            tokenizer.eos_token_id,
        ]
        assert example.prompt == tokens(tokenizer, f"{rows[i]['q']}?")
        assert (example.gold, example.texts, example.group) == (0, [rows[i]["a"]], None)


@pytest.mark.parametrize("prompt", ["{q}? ", "{q}?   ", "{q}:\n", "{q}\n\n "])
def test_blanks_that_end_a_prompt_are_tokenized_with_the_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    rows = numbered(8)
    path = write_rows(tmp_path / "t.jsonl", rows)
    splits = load_splits(data_of(path, rows=count(), prompt=prompt, answer_prefix=""), tokenizer)
    for i, example in by_row(splits).items():
        joint = prompt.replace("{q}", rows[i]["q"]) + rows[i]["a"]
        assert example.prompt + example.answers[0] == [*tokens(tokenizer, joint), tokenizer.eos_token_id]
        assert not tokenizer.decode(example.prompt).endswith(" ")


def test_where_a_token_would_span_the_boundary_the_text_is_still_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"q": f"{i} yel", "a": "low"} for i in range(8)]
    assert len(tokens(tokenizer, " yellow")) == 1
    path = write_rows(tmp_path / "t.jsonl", rows)
    splits = load_splits(data_of(path, rows=count(), prompt="{q}", answer_prefix=""), tokenizer)
    for i, example in by_row(splits).items():
        assert tokenizer.decode(example.prompt) == f"{i} yel"
        assert tokenizer.decode(example.answers[0]) == "low" + tokenizer.eos_token


def test_an_empty_answer_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": str(i), "a": " "} for i in range(8)])
    assert "the answer is empty" in refusal(load_splits, data_of(path, rows=count()), tokenizer)


def test_an_answer_needs_an_end_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    path = write_rows(tmp_path / "t.jsonl", numbered(8))
    assert "no end-of-text token" in refusal(load_splits, data_of(path, rows=count()), endless)


def test_every_choice_is_tokenized_behind_the_prompt_without_an_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"q": f"{i} what", "label": i % 2} for i in range(8)]
    data = data_of(
        write_rows(tmp_path / "t.jsonl", rows),
        task="multiple_choice",
        choices=["yes", "no maybe"],
        label="label",
        rows=count(),
    )
    for i, example in by_row(load_splits(data, tokenizer)).items():
        assert [example.prompt + answer for answer in example.answers] == [
            tokens(tokenizer, f"{i} what? yes"),
            tokens(tokenizer, f"{i} what? no maybe"),
        ]
        assert (example.gold, example.texts) == (i % 2, ["yes", "no maybe"])


def test_a_text_is_predicted_from_its_second_token_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"text {i} the grass is green" for i in range(8)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    splits = load_splits(data_of(tmp_path / "t.txt", task="text", rows=count()), tokenizer)
    for i, example in by_row(splits).items():
        whole = tokens(tokenizer, texts[i])
        assert (example.prompt, example.answers) == (whole[:1], [whole[1:]])


def test_a_group_is_kept_with_its_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "meta": {"passage": row["id"] // 2}} for row in numbered(8)]
    data = data_of(write_rows(tmp_path / "t.jsonl", rows), group="meta.passage", overlap="allow", rows=count())
    assert {i: e.group for i, e in by_row(load_splits(data, tokenizer)).items()} == {i: str(i // 2) for i in range(8)}


# ---------------------------------------------------------------------------------------------------------
# Special tokens and chat


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """The tokenizer as Llama's or BERT's would be: special tokens are added around every text."""
    adding = copy.deepcopy(tokenizer)
    names = ["<|im_start|>", "<|im_end|>"]
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(name, adding.convert_tokens_to_ids(name)) for name in names]
    )
    return adding


@pytest.mark.parametrize("single", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_a_tokenizers_own_first_token_stands_once_before_the_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, single: str
) -> None:
    adding = with_special_tokens(tokenizer, single)
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert adding("red").input_ids[0] == bos
    data = data_of(write_rows(tmp_path / "t.jsonl", numbered(8)), rows=count())
    plain, added = by_row(load_splits(data, tokenizer)), by_row(load_splits(data, adding))
    for i in range(8):
        assert added[i].prompt == [bos, *plain[i].prompt]
        assert added[i].answers == plain[i].answers


def test_an_end_token_alone_is_not_put_before_the_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(write_rows(tmp_path / "t.jsonl", numbered(8)), rows=count())
    ending = with_special_tokens(tokenizer, "$A <|im_end|>")
    assert by_row(load_splits(data, ending)) == by_row(load_splits(data, tokenizer))


def test_a_text_behind_a_first_token_is_predicted_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"text {i} the sky" for i in range(8)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    adding = with_special_tokens(tokenizer, "<|im_start|> $A")
    for i, example in by_row(load_splits(data_of(tmp_path / "t.txt", task="text", rows=count()), adding)).items():
        assert example.prompt == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
        assert example.answers == [tokens(tokenizer, texts[i])]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("adds", [False, True])
def test_a_chat_prompt_is_what_the_tokenizers_template_makes_of_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, system: str | None, adds: bool
) -> None:
    rows = numbered(8)
    chat = {"chat": True, "system": system, "answer_prefix": ""}
    data = data_of(write_rows(tmp_path / "t.jsonl", rows), rows=count(), **chat)
    used = with_special_tokens(tokenizer, "<|im_start|> $A") if adds else tokenizer
    for i, example in by_row(load_splits(data, used)).items():
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": rows[i]["q"] + "?"})
        assert example.prompt == tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert example.answers == [[*tokens(tokenizer, rows[i]["a"]), tokenizer.eos_token_id]]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    mute = copy.deepcopy(tokenizer)
    mute.chat_template = None
    data = data_of(write_rows(tmp_path / "t.jsonl", numbered(8)), rows=count(), chat=True)
    assert "data.chat: the model's tokenizer has no chat template" in refusal(load_splits, data, mute)


# ---------------------------------------------------------------------------------------------------------
# Drawing


def ids(splits: Splits) -> dict[str, list[int]]:
    return {name: [row_of(e) for e in examples] for name, examples in splits.items()}


def test_splits_of_one_file_are_drawn_without_overlap(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(60))
    drawn = ids(load_splits(data_of(path, rows=count(30, 10, 20)), tokenizer))
    assert {name: len(rows) for name, rows in drawn.items()} == {"train": 30, "validation": 10, "test": 20}
    assert sorted(chain(*drawn.values())) == list(range(60))
    assert drawn["test"] != sorted(drawn["test"])  # shuffled: a file may be sorted by class


def test_only_the_recipes_seed_changes_which_rows_are_drawn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(60))
    random.seed(1)
    first = ids(load_splits(data_of(path, rows=count()), tokenizer))
    random.seed(2)
    assert ids(load_splits(data_of(path, rows=count(), prompt="{q}!"), tokenizer)) == first
    assert ids(load_splits(data_of(path, rows=count(), seed=1), tokenizer)) != first


def test_more_training_rows_change_neither_test_nor_validation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(60))
    few = load_splits(data_of(path, rows=count(4, 6, 8)), tokenizer)
    many = load_splits(data_of(path, rows=count(40, 6, 8)), tokenizer)
    more_validation = load_splits(data_of(path, rows=count(4, 20, 8)), tokenizer)
    assert (few.test, few.validation) == (many.test, many.validation)
    assert few.train == many.train[:4]
    assert few.test == more_validation.test


def test_training_takes_all_rows_that_the_other_splits_leave(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(30))
    drawn = ids(load_splits(data_of(path, rows=count(None, 5, 6)), tokenizer))
    assert len(drawn["train"]) == 19
    assert sorted(chain(*drawn.values())) == list(range(30))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_split_of_a_shared_file_must_say_its_size(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, split: str
) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(30))
    data = data_of(path, rows={**count(), split: None})
    assert f"data.rows.{split} must say how many rows to draw" in refusal(load_splits, data, tokenizer)


def test_splits_with_files_of_their_own_take_all_their_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", [{"q": f"{name} {i}", "a": "red"} for i in range(n)])
        for name, n in (("train", 9), ("validation", 3), ("test", 4))
    }
    drawn = ids(load_splits(data_of(files), tokenizer))
    assert {name: sorted(rows) for name, rows in drawn.items()} == {
        "train": list(range(9)),
        "validation": list(range(3)),
        "test": list(range(4)),
    }


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (count(20, 5, 6), "data.rows.train: 20 rows are wanted and t.jsonl has 19 left for train"),
        (count(4, 30, 6), "data.rows.validation: 30 rows are wanted and t.jsonl has 24 left for validation"),
        (count(4, 5, 31), "data.rows.test: 31 rows are wanted and t.jsonl has 30 left for test"),
        (count(None, 10, 20), "data.rows.train: some rows are wanted and t.jsonl has 0 left for train"),
    ],
)
def test_a_file_with_too_few_rows_says_how_many_are_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: dict, reason: str
) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(30))
    assert refusal(load_splits, data_of(path, rows=rows), tokenizer) == reason


def overlapping_files(tmp_path: Path) -> dict[str, Path]:
    """Prompts 0-9 in test; 8-12 in validation, two of them in test; 5-24 in train, eight of them in the others."""
    spans = {"test": range(10), "validation": range(8, 13), "train": range(5, 25)}
    return {
        name: write_rows(tmp_path / f"{name}.jsonl", [{"q": f"question {i}", "a": "red"} for i in span])
        for name, span in spans.items()
    }


def questions(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> set[int]:
    return {int(tokenizer.decode(e.prompt).removeprefix("question ").removesuffix("?")) for e in examples}


def test_a_prompt_that_is_in_two_splits_stays_in_test_then_in_validation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    splits = load_splits(data_of(overlapping_files(tmp_path)), tokenizer)
    assert questions(tokenizer, splits.test) == set(range(10))
    assert questions(tokenizer, splits.validation) == {10, 11, 12}
    assert questions(tokenizer, splits.train) == set(range(13, 25))
    assert sorted(splits.notes) == [
        "train: 8 rows with a prompt that is in another split, left out",
        "validation: 2 rows with a prompt that is in another split, left out",
    ]


def test_an_overlap_that_is_allowed_is_still_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    splits = load_splits(data_of(overlapping_files(tmp_path), overlap="allow"), tokenizer)
    assert [len(examples) for _, examples in splits.items()] == [20, 5, 10]
    assert "train: 8 rows with a prompt that is in another split, kept" in splits.notes


def test_an_overlap_can_be_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    said = refusal(load_splits, data_of(overlapping_files(tmp_path), overlap="error"), tokenizer)
    assert said.startswith("data.overlap: 2 validation rows of validation.jsonl have a prompt that is in another split")


def test_a_row_that_is_left_out_is_replaced_by_the_next(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = overlapping_files(tmp_path)
    splits = load_splits(data_of(files, rows={"train": 12}), tokenizer)
    assert questions(tokenizer, splits.train) == set(range(13, 25))
    said = refusal(load_splits, data_of(files, rows={"train": 13}), tokenizer)
    assert "13 rows are wanted and train.jsonl has 12 left for train (train: 8 rows with a prompt" in said


def long_and_short(tmp_path: Path) -> Path:
    """Forty rows; every fourth has fifty words more."""
    rows = [{"q": f"{i}" + " red" * (50 if i % 4 == 0 else 1), "a": "blue"} for i in range(40)]
    return write_rows(tmp_path / "t.jsonl", rows)


def test_rows_that_are_too_long_are_passed_over_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = long_and_short(tmp_path)
    splits = load_splits(data_of(path, rows=count(None, 5, 5), max_length=20), tokenizer)
    drawn = ids(splits)
    assert sorted(chain(*drawn.values())) == [i for i in range(40) if i % 4]
    told = {note.split(":")[0]: int(note.split()[1]) for note in splits.notes}
    assert sum(told.values()) == 10
    assert all(note.endswith("longer than 20 tokens, passed over") for note in splits.notes)


def test_a_prompt_that_is_too_long_can_lose_its_beginning(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = long_and_short(tmp_path)
    splits = load_splits(data_of(path, rows=count(30, 5, 5), max_length=20, too_long="truncate"), tokenizer)
    for i, example in by_row(splits).items():
        whole = tokens(tokenizer, f"{i}" + " red" * (50 if i % 4 == 0 else 1) + "?")
        answer = [*tokens(tokenizer, " blue"), tokenizer.eos_token_id]
        assert example.answers == [answer]
        assert example.prompt == (whole[-(20 - len(answer)) :] if i % 4 == 0 else whole)
    assert sum(int(note.split()[1]) for note in splits.notes) == 10
    assert all(note.endswith(", cut at the beginning") for note in splits.notes)


def test_a_prompt_that_is_cut_keeps_the_tokenizers_first_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adding = with_special_tokens(tokenizer, "<|im_start|> $A")
    data = data_of(long_and_short(tmp_path), rows=count(30, 5, 5), max_length=20, too_long="truncate")
    examples = by_row(load_splits(data, adding))
    assert {e.prompt[0] for e in examples.values()} == {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    assert max(e.n_tokens for e in examples.values()) == 20
    assert examples[0].n_tokens == 20


def test_rows_that_are_too_long_can_be_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"q": f"{i}" + " red" * (50 if i == 7 else 1), "a": "blue"} for i in range(12)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    said = refusal(load_splits, data_of(path, rows=count(None, 1, 1), max_length=20, too_long="error"), tokenizer)
    assert said.startswith("data.max_length: 1 of ")
    assert "longer than 20 tokens" in said


def test_a_long_text_is_split_into_pieces_that_make_it_up(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{i}" + " sky" * (45 if i == 0 else 3) for i in range(6)]
    files = {}
    for name, lines in (("train", texts), ("validation", ["one two"]), ("test", ["two three"])):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(lines))
    splits = load_splits(data_of(files, task="text", max_length=20), tokenizer)
    whole = tokens(tokenizer, texts[0])
    pieces = [e for e in splits.train if e.id.startswith("train.txt:1.")]
    assert [e.prompt + e.answers[0] for e in pieces] == [whole[:20], whole[20:40], whole[40:]]
    assert [(e.id, e.group) for e in pieces] == [(f"train.txt:1.{n}", "train.txt:1") for n in (1, 2, 3)]
    assert splits.notes == ["train: 1 row longer than 20 tokens, split"]
    assert len(splits.train) == 5 + 3


@pytest.mark.parametrize(
    ("too_long", "n_examples", "done"), [("drop", 5, "passed over"), ("truncate", 6, "cut at the end")]
)
def test_a_long_text_can_be_passed_over_or_cut_at_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, too_long: str, n_examples: int, done: str
) -> None:
    texts = [f"{i}" + " sky" * (45 if i == 0 else 3) for i in range(6)]
    files = {"train": tmp_path / "train.txt", "validation": tmp_path / "v.txt", "test": tmp_path / "test.txt"}
    for path, lines in zip(files.values(), (texts, ["one two"], ["two three"]), strict=True):
        path.write_text("\n".join(lines))
    splits = load_splits(data_of(files, task="text", max_length=20, too_long=too_long), tokenizer)
    assert len(splits.train) == n_examples
    cut = [e for e in splits.train if e.id == "train.txt:1"]
    assert [e.prompt + e.answers[0] for e in cut] == [tokens(tokenizer, texts[0])[:20]] * (too_long == "truncate")
    assert splits.notes == [f"train: 1 row longer than 20 tokens, {done}"]


@pytest.mark.parametrize("too_long", ["split", "truncate", "drop"])
@pytest.mark.parametrize("adds", [False, True])
def test_a_text_of_one_token_at_most_leaves_nothing_to_predict(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, too_long: str, adds: bool
) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"text {i} the sky" for i in range(8)))
    used = with_special_tokens(tokenizer, "<|im_start|> $A") if adds else tokenizer
    data = data_of(tmp_path / "t.txt", task="text", rows=count(), max_length=1, too_long=too_long)
    assert "data." in refusal(load_splits, data, used)


# ---------------------------------------------------------------------------------------------------------
# The cache


def cached_file() -> Path:
    (path,) = (cache_dir() / "tokens").iterdir()
    return path


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == Path(os.environ["COLA_CACHE"])
    monkeypatch.delenv("COLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "cola"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "cola"


@pytest.mark.parametrize(
    ("value", "entries"), [({"text": ["a"], "start": [1]}, "{v.text}, {v.start}"), (["x", "y"], "{v.0}, {v.1}")]
)
def test_a_field_that_holds_fields_is_not_filled_in_as_python_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: object, entries: str
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{**row, "v": value} for row in numbered(20)])
    with pytest.raises(DataError, match=re.escape(f"name one of its entries: {entries}")):
        load_splits(data_of(path, answer="{v}", rows=count(5, 5, 5)), tokenizer)


def test_a_csv_with_semicolons_is_read_as_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "t.csv"
    path.write_text("q;a\n" + "".join(f"red, {i};blue\n" for i in range(20)))
    splits = load_splits(data_of(path, rows=count(5, 5, 5)), tokenizer)
    assert all(example.texts == ["blue"] for example in splits.test)


def test_a_template_without_a_field_is_hinted_at(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(20))
    with pytest.raises(DataError, match="does the template name a field of the row"):
        load_splits(data_of(path, prompt="always the same", rows=count(5, 5, 5)), tokenizer)


def test_rows_of_one_group_stay_in_one_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "passage": row["id"] // 4} for row in numbered(80)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    splits = load_splits(data_of(path, group="passage", rows=count(20, 8, 8)), tokenizer)
    groups = [{example.group for example in examples} for _, examples in splits.items()]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert any("prompt or group that is in another split, left out" in note for note in splits.notes)


def test_a_second_load_reads_the_cache_and_gives_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(overlapping_files(tmp_path), overlap="allow", group="a")
    first = load_splits(data, tokenizer)
    before = cached_file().stat()
    assert load_splits(data, tokenizer) == first
    after = cached_file().stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # not made anew


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff\xfe\x00",
        lambda content: b"[]",
        lambda content: b'{"train": [{}]}',
        lambda content: content.replace(b'"gold": 0', b'"gold": 1', 1),
        lambda content: content.replace(b'"prompt"', b'"promt"', 1),
    ],
    ids=["empty", "cut-off", "binary", "a-list", "other-keys", "another-gold", "a-key-lost"],
)
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: Callable[[bytes], bytes]
) -> None:
    data = data_of(write_rows(tmp_path / "t.jsonl", numbered(8)), rows=count())
    first = load_splits(data, tokenizer)
    whole = cached_file().read_bytes()
    cached_file().write_bytes(damage(whole))
    assert cached_file().read_bytes() != whole
    assert load_splits(data, tokenizer) == first
    assert cached_file().read_bytes() == whole


def test_another_row_template_or_tokenizer_is_another_cache(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", numbered(8))
    adding = with_special_tokens(tokenizer, "<|im_start|> $A")
    seen = [
        load_splits(data_of(path, rows=count()), tokenizer),
        load_splits(data_of(path, rows=count(), prompt="{q}!"), tokenizer),
        load_splits(data_of(path, rows=count()), adding),
    ]
    write_rows(path, [{**row, "a": "yellow"} for row in numbered(8)])
    seen.append(load_splits(data_of(path, rows=count()), tokenizer))
    assert len({splits.fingerprint for splits in seen}) == 4


def test_a_copy_of_the_training_file_as_test_file_is_not_the_cached_one_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of one file the splits are drawn apart; two equal files overlap, which the recipe may call an error."""
    path = write_rows(tmp_path / "t.jsonl", numbered(12))
    twin = write_rows(tmp_path / "twin.jsonl", numbered(12))
    load_splits(data_of(path, rows=count(), overlap="error"), tokenizer)
    apart = data_of({"train": path, "validation": twin, "test": twin}, rows=count(), overlap="error")
    assert "data.overlap" in refusal(load_splits, apart, tokenizer)


# ---------------------------------------------------------------------------------------------------------
# Batches


def example(name: str, n_prompt: int, n_answer: int) -> Example:
    return Example(name, list(range(1, 1 + n_prompt)), [list(range(100, 100 + n_answer))], 0, ["x"], None)


@pytest.mark.parametrize(("n_rows", "batch_size", "per_epoch"), [(24, 8, 3), (21, 4, 6), (5, 8, 1), (1000, 8, 125)])
def test_every_epoch_reads_each_row_once(n_rows: int, batch_size: int, per_epoch: int) -> None:
    lengths = random.Random(0).choices(range(1, 50), k=n_rows)
    rest = [n_rows % batch_size] if n_rows % batch_size else []
    order = batch_order(lengths, batch_size, 3 * per_epoch, seed=1)
    epochs = [order[e * per_epoch : (e + 1) * per_epoch] for e in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(n_rows))
        assert sorted(map(len, epoch)) == sorted([batch_size] * (n_rows // batch_size) + rest)
    assert epochs[0] != epochs[1] or n_rows <= batch_size


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    lengths = list(range(30))
    assert batch_order(lengths, 4, 50, seed=2)[:11] == batch_order(lengths, 4, 11, seed=2)
    assert batch_order(lengths, 4, 0, seed=2) == []


def test_the_order_depends_on_nothing_but_its_arguments() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6] * 5
    random.seed(1)
    torch.manual_seed(1)
    first = batch_order(lengths, 4, 25, seed=3)
    random.seed(2)
    torch.manual_seed(2)
    state = random.getstate()
    assert batch_order(lengths, 4, 25, seed=3) == first
    assert random.getstate() == state
    assert batch_order(lengths, 4, 25, seed=4) != first


def test_rows_of_like_length_are_read_together() -> None:
    lengths = random.Random(0).sample(range(1000), 160)  # 160 rows in batches of 8: one bucket
    batches = batch_order(lengths, 8, 20, seed=0)
    spans = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in batches)
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    assert [min(lengths[i] for i in batch) for batch in batches] != [low for low, _ in spans]  # but not shortest first


@pytest.mark.parametrize("budget", [1, 7, 32, 100, 10_000])
def test_no_pass_holds_more_tokens_than_the_budget_but_for_a_row_alone(budget: int) -> None:
    lengths = random.Random(6).choices(range(1, 41), k=200)
    groups = list(by_tokens(range(len(lengths)), lambda i: lengths[i], budget))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        width = max(lengths[i] for i in group)
        assert width * len(group) <= budget or len(group) == 1
    assert lengths[groups[0][0]] == max(lengths)  # the largest first
    # As few passes as the order allows: the next row would not have fitted.
    for group, following in pairwise(groups):
        assert max(lengths[i] for i in [*group, following[0]]) * (len(group) + 1) > budget


def test_nothing_in_gives_no_pass() -> None:
    assert list(by_tokens([], len, 10)) == []


def test_the_targets_of_a_batch_are_the_answers_tokens() -> None:
    batch = collate([("a", [11, 12, 13], [14, 15]), ("b", [21], [22]), ("c", [31], [32, 33, 34])])
    assert batch.input_ids_BT.tolist() == [[11, 12, 13, 14, 15], [21, 22, 0, 0, 0], [31, 32, 33, 34, 0]]
    assert batch.predicts_BT.long().tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.targets_N.tolist() == [14, 15, 22, 32, 33, 34]
    assert (batch.ids, batch.n_tokens, batch.n_targets) == (["a", "b", "c"], 11, 6)
    # What stands one place after each marked position is its target.
    assert batch.input_ids_BT[:, 1:][batch.predicts_BT[:, :-1]].tolist() == batch.targets_N.tolist()


@pytest.mark.parametrize("budget", [1, 20, 4096])
def test_the_rows_of_a_step_do_not_depend_on_how_its_passes_are_cut(budget: int) -> None:
    examples = [example(f"row-{i}", 2 + i % 5, 1 + i % 3) for i in range(10)]
    steps = list(training_batches(examples, [[0, 3, 7], [9], [1, 2, 4, 5, 6, 8]], budget))
    assert [sorted(name for batch in step for name in batch.ids) for step in steps] == [
        ["row-0", "row-3", "row-7"],
        ["row-9"],
        ["row-1", "row-2", "row-4", "row-5", "row-6", "row-8"],
    ]
    assert [sum(batch.n_targets for batch in step) for step in steps] == [1 + 1 + 2, 1, 2 + 3 + 2 + 3 + 1 + 3]
