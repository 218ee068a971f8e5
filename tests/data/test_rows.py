"""Local data files, row for row, against the libraries that write them. Run: pytest tests/data/test_rows.py"""

import bz2
import csv
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import count, data_of, numbered, refusal, rows_of, write_rows
from transformers import PreTrainedTokenizerFast

from cola.data.batches import batch_digests, training_batches
from cola.data.fields import fill
from cola.data.sources import open_pools
from cola.data.splits import load_splits
from cola.recipe.schema import SPLITS
from cola.recipe.write import find_path
from cola.tree.states import rows_digest

ROWS = [{"q": f"Ünï {i}", "a": "yes"} for i in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def places_of(path: Path) -> list[str]:
    pool = open_pools(data_of(path))["train"]
    return [pool.place(i) for i in range(pool.size or 0)]


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# ---------------------------------------------------------------------------------------------------------
# As many rows out as there are in


def test_nothing_but_a_newline_ends_a_json_line(tmp_path: Path) -> None:
    separators = ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c", "\r", "\t"]
    rows = [{"q": f"one{character}two"} for character in separators]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[0] = lines[0].replace(": ", ":\r ")  # white space to JSON
    path = file(tmp_path / "t.jsonl", "\n \r\n".join(lines))
    assert rows_of(path) == [json.loads(line) for line in lines] == rows
    assert places_of(path) == [f"t.jsonl:{1 + 2 * n}" for n in range(len(rows))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv", ";"), ("t.csv", "\t")])
def test_a_table_has_the_rows_that_csv_counts(tmp_path: Path, name: str, delimiter: str, end: str) -> None:
    cells = [
        "plain",
        "two\nlines",
        'a "quote"',
        "",
        "# no comment",
        "a,b;c\td",
        "-0",
        "1e400",
        "007",
        "a\u2028b\x85c\x1cd",
    ]
    rows = [{"q": cell, "a": f" {n}"} for n, cell in enumerate(cells)]
    path = tmp_path / name
    quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, ["q", "a"], delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writeheader()
        if end == "\r":
            rows[1]["q"] = "two lines"  # else it could be said of no line end which it is
        for row in rows:
            writer.writerow(row)
            opened.write(end)
    with path.open(newline="", encoding="utf-8") as opened:
        assert rows_of(path) == list(csv.DictReader(opened, delimiter=delimiter)) == rows


def test_a_row_is_called_by_the_line_on_which_it_begins(tmp_path: Path) -> None:
    table = file(tmp_path / "t.csv", 'q,a\n\n"over\ntwo lines",1\nlast,2\n')
    assert places_of(table) == ["t.csv:3", "t.csv:5"]
    assert places_of(file(tmp_path / "t.csv", " \nq,a\n  \n1,2\n\t\n")) == ["t.csv:4"]
    assert places_of(file(tmp_path / "t.csv", 'q\n" "\n""\n')) == ["t.csv:2", "t.csv:3"]
    assert places_of(file(tmp_path / "t.txt", "one\n\n\u2028\ntwo")) == ["t.txt:1", "t.txt:4"]
    assert places_of(file(tmp_path / "lines.json", '\n{"q": 1}\n\n{"q": 2}')) == ["lines.json:2", "lines.json:4"]
    # What has no lines of its own is counted.
    assert places_of(file(tmp_path / "list.json", json.dumps(ROWS, indent=1))) == [f"list.json:{n}" for n in (1, 2, 3)]
    assert places_of(parquet(tmp_path / "t.parquet", q=["a", "b"])) == ["t.parquet:1", "t.parquet:2"]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (JSONL, ROWS),
        (JSONL.replace("\n", "\r\n"), ROWS),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), ROWS),
        (json.dumps(ROWS, indent=2), ROWS),
        ('{"q": "one row", "choices": ["a", "b"]}', [{"q": "one row", "choices": ["a", "b"]}]),
    ],
    ids=["lines", "crlf", "objects-over-lines", "list-over-lines", "one"],
)
def test_a_json_file_may_hold_a_list_or_objects(tmp_path: Path, content: str, rows: list[dict[str, Any]]) -> None:
    assert rows_of(file(tmp_path / "t.json", content)) == rows


# ---------------------------------------------------------------------------------------------------------
# Names: encodings, packing, links, columns


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.txt"])
def test_a_byte_order_mark_says_how_a_text_is_written(tmp_path: Path, name: str, encoding: str) -> None:
    content = {"t.csv": "q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in ROWS), "t.txt": "Ünï\nzwei\n"}
    path = file(tmp_path / name, content.get(name, JSONL).encode(encoding))
    assert rows_of(path) == ([{"text": "Ünï"}, {"text": "zwei"}] if name == "t.txt" else ROWS)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", lambda raw: gzip.compress(raw[:20]) + gzip.compress(raw[20:])),
        (".GZ", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda raw: pa.compress(raw, "zstd", asbytes=True)),
    ],
)
def test_a_packed_file_is_read_as_what_is_in_it(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(JSONL.encode())
    assert rows_of(file(tmp_path / f"t.jsonl{suffix}", packed)) == ROWS
    for damaged in (packed[:-6], JSONL.encode()):
        said = refusal(rows_of, file(tmp_path / f"t.jsonl{suffix}", damaged))
        assert said.startswith(f"data.files: t.jsonl{suffix}: not a whole {suffix} file: ")


def test_a_link_is_read_by_its_own_name(tmp_path: Path) -> None:
    blob = file(tmp_path / "blobs/0a1b2c", JSONL)
    link = tmp_path / "train.jsonl"
    link.symlink_to(blob)  # as a hub's cache has it
    named = Path(find_path("train.jsonl", tmp_path))
    assert named == link
    assert rows_of(named) == ROWS
    again = tmp_path / "test.jsonl"
    again.symlink_to(link)
    pools = open_pools(data_of({"train": link, "validation": link, "test": again}))
    assert pools["test"] is pools["train"]  # one file: drawn from it without overlap
    circle = tmp_path / "circle.jsonl"
    circle.symlink_to(circle)
    assert refusal(rows_of, circle).startswith(f"data.files: {circle} cannot be read: ")


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = {split: file(tmp_path / split / "t.jsonl", JSONL.replace("Ünï", split)) for split in SPLITS}
    pools = open_pools(data_of(paths))
    assert {split: pools[split].place(0) for split in SPLITS} == {split: f"{path}:1" for split, path in paths.items()}


def test_a_header_may_have_blanks_and_columns_without_a_name(tmp_path: Path) -> None:
    spaced = file(tmp_path / "spaced.csv", 'question, answer\nwhat, "a, b"\n x,  5\n')
    with spaced.open(newline="") as opened:
        assert rows_of(spaced) == list(csv.DictReader(opened, skipinitialspace=True))
    before = file(tmp_path / "before.csv", "q ,a\n 1, 2\n")
    assert rows_of(before) == [{"q": " 1", "a": " 2"}]  # of the cells nothing is taken
    indexed = file(tmp_path / "indexed.csv", ",q,a,\n0,x,y,\n")  # pandas' to_csv, and a comma at the end of a line
    assert rows_of(indexed) == [{"q": "x", "a": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "q,a,a\n1,2,3\n", "t.csv:1: two columns are called 'a'"),
        ("t.csv", "a, a\n1,2\n", "t.csv:1: two columns are called 'a'"),
        ("t.jsonl", '{"a": 1}\n{"q": 1, "a": 2, "a": 2}\n', "t.jsonl:2: an object has the key 'a' twice"),
        ("t.jsonl", '{"m": [{"q": 1, "q": 2}]}\n', "t.jsonl:1: an object has the key 'q' twice"),
        ("t.json", '[{"q": 1},\n{"a": 1, "a": 2}]', "t.json line 2: an object has the key 'a' twice"),
        ("t.csv", "q,a\n1,2,3\n", "t.csv:2: not as many fields as the header has: 3, not 2"),
        ("t.csv", "q,a\n1,2\nq,a\n3,4\n", "t.csv:3: the header again, as where two files are put together"),
        ("t.csv", "q,a\n1,x\ry\n", "t.csv:2: not valid CSV: a carriage return in a cell without quotes"),
        ("t.csv", "q\ra,b\n1,2\n", "t.csv:1: not valid CSV: a carriage return in a cell without quotes"),
        ("t.csv", 'q,a\n1,2\n"a"b,c\n', "t.csv:3: not valid CSV"),
        ("t.csv", "q,a\n1,\0\n", "t.csv:2: holds a NUL character"),
        ("t.jsonl", JSONL.encode("utf-16-le"), "t.jsonl:1: not UTF-8 text"),
        ("t.jsonl", '{"q": 1}\n'.encode("utf-16-le"), "t.jsonl:1: holds a NUL character, as UTF-16 without"),
        ("t.csv", "q,a\n1,2\nné,2\n".encode("latin-1"), "t.csv:3: not UTF-8 text at byte 9, 0xe9; save it as UTF-8"),
        ("t.csv", "q,a\n1,2\n".encode("utf-16")[:-1], "not UTF-16 text"),
        ("t.txt", "one\rtwo\rthree", "t.txt: its lines end in a carriage return alone"),
        ("t.jsonl", '{"q": 1}\r{"q": 2}', "t.jsonl: its lines end in a carriage return alone"),
        ("t.jsonl", '{"q": 1} {"q": 2}\n', "t.jsonl:1: not valid JSON: Extra data"),
        ("t.jsonl", '// a comment\n{"q": 1}\n', "t.jsonl:1: not valid JSON"),
        ("t.jsonl", '{"q": 1,}\n', "t.jsonl:1: not valid JSON"),
        ("t.jsonl", f'{{"q": {"9" * 5000}}}\n', "t.jsonl:1: a whole number of more than 4300 digits"),
        ("t.jsonl", "[" * 100_000 + "\n", "t.jsonl:1: JSON that is nested too deeply"),
        ("t.json", '[{"q": 1},]', "t.json line 1: not valid JSON"),
        ("t.json", '[{"q": 1}', "t.json line 1: not valid JSON"),
        ("t.json", '[{"q": 1}\n{"q": 2}]', "t.json line 2: not valid JSON: Expecting ',' delimiter"),
        ("t.json", '[{"q": 1}]\n[]', "t.json line 2: not valid JSON: Extra data"),
        ("t.json", '{"q": 1} {"q": 2}', "t.json: two objects on line 1"),
        ("t.json", '{"v": 1, "data": [{"q": 1}, {"q": 2}]}', "its rows may be the list of 2 objects in 'data'"),
        ("t.json", '{"q": {"0": "x"}, "a": {"0": "y"}}', "t.json: one object of columns"),
        ("t.json", "7", "t.json:1: a row is an object with named fields, not a int"),
        ("t.json.rar", "x", "t.json.rar: unknown kind '.rar'; known are .jsonl, "),
        ("t.gz", "x", "t.gz: unknown kind ''"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_or_in_none_is_refused_by_name(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    said = refusal(rows_of, file(tmp_path / name, content))
    assert said.startswith("data.files: ")
    assert reason in said
    assert len(said) < 300


def test_two_columns_of_one_name_are_refused_in_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "t.parquet")
    assert "t.parquet: two columns are called 'a'" in refusal(rows_of, tmp_path / "t.parquet")
    inner = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    assert "t.parquet: its values cannot be read" in refusal(rows_of, parquet(tmp_path / "t.parquet", m=inner))


def test_the_same_bytes_under_another_suffix_are_other_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = "text\n" + "".join(f"line {i} of the sky\n" for i in range(7))
    for name, wanted in (("t.txt", 8), ("t.csv", 7)):
        splits = load_splits(data_of(file(tmp_path / name, lines), task="text", rows=count(None, 1, 1)), tokenizer)
        assert sum(splits.sizes.values()) == wanted


# ---------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"q": NaN}', "field 'q' is empty"),
        ('{"q": null}', "field 'q' is empty"),
        ('{"q": Infinity}', "field 'q' is infinite, or a number too large to be read"),
        ('{"q": -1e400}', "field 'q' is infinite, or a number too large to be read"),
        (r'{"q": "\ud83d"}', r"field 'q' holds half of a character, \ud83d alone"),
        ('{"q": [1, 2]}', "field 'q' is a list; name one of its entries: {q.0}, {q.1}"),
    ],
)
def test_a_value_without_a_text_names_its_row(tmp_path: Path, line: str, why: str) -> None:
    path = file(tmp_path / "t.jsonl", f'{{"q": "fine"}}\n{line}\n')
    row = rows_of(path)[1]
    assert refusal(fill, "{q}", row, places_of(path)[1], "data.prompt") == f"data.prompt: t.jsonl:2: {why}"
    assert fill("unread", row, "here", "data.prompt") == "unread"  # what no template names may be anything


def test_a_missing_choice_is_no_choice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"q": str(i), "label": 0, "own": ["yes", None if i == 4 else "no"]} for i in range(6)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    data = data_of(path, task="multiple_choice", choices="own", label="label", rows=count(2, 2, 2))
    assert refusal(load_splits, data, tokenizer) == "data.choices: t.jsonl:5: field 'own.1' is empty"


def test_numbers_of_json_have_the_text_that_python_gives_them(tmp_path: Path) -> None:
    numbers = ["12345678901234567890123", "-0", "1.50", "1e3", "0.1", "-0.0", "true"]
    rows = rows_of(file(tmp_path / "t.jsonl", "".join(f'{{"q": {number}}}\n' for number in numbers)))
    texts = [fill("{q}", row, "here", "data.prompt") for row in rows]
    assert texts == ["12345678901234567890123", "0", "1.5", "1000", "0.1", "0", "true"]


def test_the_columns_of_a_parquet_file_are_the_texts_that_they_stand_for(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 11, 28, 12, 30)
    path = parquet(
        tmp_path / "t.parquet",
        binary=pa.array(["é".encode()], pa.binary()),
        large=pa.array(["long"], pa.large_string()),
        fixed=pa.array([b"abc"], pa.binary(3)),
        inner=pa.array([{"list": [b"x", b"y"]}]),
        words=pa.array(["word"]).dictionary_encode(),
        decimal=pa.array([Decimal("1.10")], pa.decimal128(5, 2)),
        small=pa.array([Decimal("0.0000001")], pa.decimal128(9, 7)),
        single=pa.array([0.1], pa.float32()),
        time=pa.array([day], pa.timestamp("us")),
        flag=pa.array([True]),
        pairs=pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        null=pa.array([None], pa.string()),
        nan=pa.array([float("nan")]),
        image=pa.array([b"\xff\xd8"], pa.binary()),
    )  # fmt: skip
    (row,) = rows_of(path)
    wanted = {
        "binary": "é", "large": "long", "fixed": "abc", "inner.list.1": "y", "words": "word", "decimal": "1.10",
        "small": "0.0000001", "single": "0.1", "time": str(day), "flag": "true", "pairs.k": "v",
    }  # fmt: skip
    assert {name: fill(f"{{{name}}}", row, "here", "data.prompt") for name in wanted} == wanted
    for name in ("null", "nan"):
        assert f"field '{name}' is empty" in refusal(fill, f"{{{name}}}", row, "here", "data.prompt")
    assert "field 'image' holds bytes that are no UTF-8" in refusal(fill, "{image}", row, "here", "data.prompt")


# ---------------------------------------------------------------------------------------------------------
# What rows are called


def test_what_a_row_is_called_is_in_the_name_of_its_scores_and_in_no_segments(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Scores are kept with the ids of their rows: those of a file of another name must not be taken for these."""
    both = [write_rows(tmp_path / name, numbered(8)) for name in ("one.jsonl", "two.jsonl")]
    first, second = (load_splits(data_of(path, rows=count()), tokenizer).train for path in both)
    assert {example.id.partition(":")[0] for example in first} == {"one.jsonl"}
    assert {example.id.partition(":")[0] for example in second} == {"two.jsonl"}
    assert rows_digest(first) != rows_digest(second)
    order = [[0, 1], [2, 3]]
    assert list(batch_digests(first, order, 100)) == list(batch_digests(second, order, 100))
    (batch,) = next(training_batches(first, order, 100))
    assert sorted(batch.ids) == sorted(example.id for example in first[:2])
