"""Damaged files: each is read, or refused in a few clear lines and in time, or set aside by the store.

Run: pytest tests/fuzz/test_fuzz_files.py (mutate.py says how to run more)
"""

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_once
from hypothesis import given
from hypothesis import strategies as st
from mutate import ODD_NUMBERS, ODD_TEXTS, change_bytes, change_tree, counted, odd_value, one_clear_line
from test_store import keep

from cola.compare.summary import summarize
from cola.data.fields import fill, lookup
from cola.data.sources import open_pools, open_texts
from cola.recipe.data_section import Data
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.report.differences import compare_runs
from cola.report.page import read_curves
from cola.report.tables import page_tables
from cola.report.verdict import verdict
from cola.tree import prune
from cola.tree.run_folder import RunFolder
from cola.tree.store import Store, fault_of

# The run is of a tiny model, which more threads make slower.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

FIELDS = ["question", "answer", "text", "id", "meta", "a:b", "é", ""]
SNIPPETS = [
    *(text.encode("utf-8") for text in ODD_TEXTS if len(text) < 500),
    *(b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\r\n", b"\n\n", b"{", b"}", b"[", b"]", b"[" * 5000, b'""', b":"),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b'"\\ud800"', b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"PAR1", b"#"),
    *(b'{"a": 1, "a": 2}\n', b'{"question": {"question": ["x"]}}\n', b"null\n", b"\x00\x00\x00\x00", b"\xff" * 8),
]


def a_cell(random: Random) -> Any:
    return odd_value(random) if random.random() < 0.2 else random.choice(["blue", "What is 1 + 1?", 3, 0.5, True, ""])


def a_table(random: Random) -> list[dict[str, Any]]:
    names = FIELDS[:3] if random.random() < 0.5 else random.sample(FIELDS, random.randrange(1, len(FIELDS)))
    return [{name: a_cell(random) for name in names} for _ in range(random.randrange(6))]


def as_csv(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else FIELDS, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    names = list(rows[0]) if rows else FIELDS
    text = {name: [str(row[name])[:100].encode("utf-8", "replace").decode() for row in rows] for name in names}
    text["numbers"] = [1.5] * len(rows)
    file = io.BytesIO()
    pq.write_table(pa.table(text), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": lambda rows: as_csv(rows, ","),
    "tsv": lambda rows: as_csv(rows, "\t"),
    "parquet": as_parquet,
    "txt": lambda rows: "\n".join(str(row) for row in rows).encode("utf-8", "replace"),
}


@counted(300)
@given(st.randoms(use_true_random=False))
def test_a_data_file_gives_rows_or_one_clear_line(file: Path, random: Random) -> None:
    kind = random.choice(list(WRITERS))
    content = WRITERS[kind](a_table(random))
    content = change_bytes(random, content, SNIPPETS) if random.random() < 0.8 else content
    path = file.with_suffix(f".{kind}")
    path.write_bytes(content)
    data = Data.model_validate({"files": str(path), "task": "text", "text": "{text}"})

    def check() -> None:
        pool = open_pools(data)["train"]
        assert pool.size
        for number in range(pool.size):
            row = pool.row(number)
            assert isinstance(row, dict)
            for name in FIELDS[:5]:
                one_clear_line(lambda name=name, row=row: fill(f"{{{name}}}", row, "here", "data.text").encode())
                one_clear_line(lambda name=name, row=row: lookup(row, f"{name}.0", "here", "data.label"))
        texts = open_texts(path, "evaluation.general_text")
        assert texts.size

    one_clear_line(check)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "rows"


# ---------------------------------------------------------------------------------------------------------
# Results


@pytest.fixture(scope="module")
def recipe(runs: list[Path]) -> Recipe:
    return read_recipe(runs[0] / "recipe.yaml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, colours: Path, prose: Path) -> list[Path]:
    """A run with a chain and a search, its copy, and the run again."""
    folder = run_once(
        tmp_path_factory.mktemp("fuzzed"),
        f"""
name: fuzzed
model: {{name_or_path: {tiny_folder}}}
data:
  files: {colours}
  rows: {{train: 8, validation: 4, test: 4}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{steps: 2, batch_size: 4, learning_rate: {{search: [1e-3, 1e-2]}}}}
arms:
  lora: {{links: 1}}
  chain2: {{links: 2}}
comparison: {{primary: [chain2, lora]}}
evaluation: {{general_text: {prose}}}
seeds: [0]
tracking: {{wandb: off}}
output: {tmp_path_factory.mktemp("runs")}
""",
    )
    return [folder, Path(shutil.copytree(folder, folder.parent / "other"))]


FUZZED = ("result.json", "provenance.json", "summary.json", "chosen.json", "segments.json", "spectrum.json", "*.jsonl")


def damage(random: Random, path: Path) -> None:
    """Change some bytes of a JSON file, or a value or key of what it holds."""
    content = path.read_bytes()
    if random.random() < 0.3:
        path.write_bytes(change_bytes(random, content, SNIPPETS))
        return
    lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
    number = random.randrange(len(lines))
    tree = {"root": json.loads(lines[number])}
    for _ in range(random.choice([1, 1, 3])):
        change_tree(random, tree, ["loss", "score", "id", "seed", "nan"])
    lines[number] = json.dumps(tree.get("root", random.choice(ODD_NUMBERS)))
    path.write_text("\n".join(lines) + "\n")


@counted(100)
@given(st.randoms(use_true_random=False))
def test_a_damaged_file_of_a_run_is_named_or_harmless(runs: list[Path], recipe: Recipe, random: Random) -> None:
    run, other = runs
    folder = RunFolder(run)
    path = random.choice(sorted(found for name in FUZZED for found in run.rglob(name)))
    whole = path.read_bytes()
    with ExitStack() as after:
        after.callback(path.write_bytes, whole)
        damage(random, path)
        damaged = path.name

        def report() -> None:
            folder.check_readable()
            folder.check_results()
            summary = summarize(recipe, folder)
            page_tables(summary, read_curves(folder, []))
            verdict(summary)
            folder.references()
            _ = folder.finished

        for check in [report, lambda: compare_runs(run, other)][: random.choice([1, 1, 1, 1, 2])]:
            try:
                one_clear_line(check)
            except AssertionError as error:
                raise AssertionError(f"{damaged}: {error}") from None


# ---------------------------------------------------------------------------------------------------------
# The store


@counted(100)
@given(st.randoms(use_true_random=False))
def test_a_damaged_file_of_the_store_is_set_aside(tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    said: list[str] = []
    store = Store(tmp_path_factory.mktemp("store"), said.append)
    name = keep(store, 1)
    store.remember({"state": name, "what": "test"}, {"loss": [1.0, 2.0]})
    [folder], [measured] = store.segments(), store.path.glob("measured/*/*.json")
    prune.register(store, tmp_path_factory.getbasetemp())
    path = random.choice([*folder.iterdir(), measured, store.path / "format.json", *(store.path / "runs").iterdir()])
    before = path.read_bytes()
    path.chmod(0o644)
    if path.suffix == ".json":
        damage(random, path)
    if path.read_bytes() == before:
        path.write_bytes(change_bytes(random, before, SNIPPETS))
    after = path.read_bytes()

    def check() -> None:
        again = Store(store.path, said.append)
        prune.references(again)
        prune.garbage(again)
        fault_of(folder)
        segment = again.get(name)
        if path.parent == folder and after != before:
            # The record's own blanks may change, or a file that it does not name.
            assert segment is None or json.loads(after) == json.loads(before)
        again.recall({"state": name, "what": "test"})
        prune.verify(again)
        prune.prune(again, prune.garbage(again))

    one_clear_line(check)
    assert all(len(line) < 1500 for line in said)
