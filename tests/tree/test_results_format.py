"""docs/results.md against the files of a real run. Run: pytest tests/tree/test_results_format.py"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_once
from runs import read_jsonl

from cola.compare.ablation_records import Ablation
from cola.compare.records import Summary, TasksSummary
from cola.recipe.arms import SEARCHABLE, LinkSettings
from cola.recipe.resolved import Rules
from cola.recipe.schema import SPLITS
from cola.tree import run_folder
from cola.tree.made import PACKAGES, Provenance
from cola.tree.records import Chosen, References, Result, TrialResult
from cola.tree.spectra import Spectrum

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERIMENTS, STUDY = Path(__file__).parents[2] / "experiments", "001-does-chaining-pay/results"
PAGE = (Path(__file__).parents[2] / "docs/results.md").read_text(encoding="utf-8")
OWN = Path(__file__).parents[1] / "own_ideas.py"
# What the words in capital letters stand for.
STANDS_FOR = {
    "SPLIT": set(SPLITS),
    "KEY": set(SEARCHABLE),
    "RULE": set(Rules.model_fields),
    "SETTING": set(LinkSettings.model_fields),
    "PACKAGE": set(PACKAGES),
    "FILE": {str(OWN)},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, colours: Path, prose: Path) -> Path:
    """A run whose files have every key: links of two methods, a search, knots, looks at validation."""
    path = run_once(
        tmp_path_factory.mktemp("format"),
        f"""
name: format
model: {{name_or_path: {tiny_folder}}}
data:
  files: {colours}
  rows: {{train: 16, validation: 4, test: 4}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{epochs: 2, batch_size: 8, learning_rate: {{search: [1e-3, 1e-2]}}}}
arms:
  base: {{links: 0}}
  chain2: {{links: 2, init: "{OWN}:step", init_batches: 1, knot: {{merge_fraction: "{OWN}:shrinking"}}}}
  full: {{method: full}}
evaluation: {{general_text: {prose}, keep_prompts: true}}
seeds: [0]
tracking: {{wandb: off}}
output: {tmp_path_factory.mktemp("runs")}
""",
    )
    STANDS_FOR["INPUT"] = set(json.loads((path / "provenance.json").read_text())["inputs"])
    return path


def documented(heading: str) -> set[str]:
    """The keys in the first column of a section's table."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    keys = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    assert len(keys) == len(set(keys)), "a key is documented twice"
    return set(keys)


def keys_of(value: Any, name: str = "") -> Iterator[str]:
    """The dotted names of what holds no further names; `[]` for the items of a list of mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from keys_of(inner, f"{name}[]")
    else:
        yield name


def spelled_out(key: str) -> set[str]:
    """A documented key with its capital words replaced by all that they stand for."""
    word = next((word for word in STANDS_FOR if word in re.split(r"[.\[\]]", key)), None)
    if word is None:
        return {key}
    return set().union(*(spelled_out(key.replace(word, value, 1)) for value in STANDS_FOR[word]))


def check(found: set[str], keys: set[str]) -> None:
    """Every key that was found is documented, and every documented key was found."""
    known = {key: spelled_out(key) for key in keys}
    assert found - set().union(*known.values()) == set()
    assert {key for key, names in known.items() if not names & found} == set()


def test_what_was_scored_can_be_read_again_from_the_row_that_its_id_names(run: Path, colours: Path) -> None:
    lines = colours.read_text().splitlines()
    files = list(run.glob("arms/*/seed-*/scores/*.jsonl"))
    for file in files:
        for score in read_jsonl(file):
            if file.stem == "general":
                assert score["id"].startswith("prose.jsonl:")
                continue
            name, _, line = score["id"].partition(":")
            row = json.loads(lines[int(line) - 1])
            assert (name, score["prompt"]) == (colours.name, f"{row['question']}?")
            assert score["answer"] == row["answer"]
            assert score["score"] == (score["prediction"].strip() == row["answer"])
    assert len(files) == 12


def test_every_key_of_a_result_is_documented_and_every_documented_key_is_there(run: Path) -> None:
    results = [json.loads(path.read_text()) for path in run.rglob("result.json")]
    assert len(results) == 7
    found = {key for one in results for key in keys_of({**one, "meta_info": None})}
    # Null where there is none: the keys below them are what other results have.
    check(found - {"train_info.rules", "train_info.links", "train_info.knots", "train_info.evaluations",
                   "train_info.segments_made"}, documented("result.json"))  # fmt: skip


def test_every_key_of_the_provenance_is_documented_and_is_the_results_meta_info(run: Path) -> None:
    provenance = json.loads((run / "provenance.json").read_text())
    check(set(keys_of(provenance)), documented("provenance.json"))
    for path in run.rglob("result.json"):
        assert json.loads(path.read_text())["meta_info"] == provenance


@pytest.mark.parametrize(
    ("heading", "pattern"),
    [
        ("metrics.jsonl", "**/metrics.jsonl"),
        ("ledger.jsonl", "**/ledger.jsonl"),
        ("scores/SPLIT.jsonl", "**/scores/*.jsonl"),
    ],
)
def test_every_key_of_the_rows_is_documented(run: Path, heading: str, pattern: str) -> None:
    rows = [row for path in run.glob(pattern) for row in read_jsonl(path)]
    check({key for row in rows for key in keys_of(row)}, documented(heading))


@pytest.mark.parametrize(
    ("heading", "path"), [("chosen.json", "trials/chain2/chosen.json"), ("segments.json", "segments.json")]
)
def test_every_key_of_the_other_files_is_documented(run: Path, heading: str, path: str) -> None:
    check(set(keys_of(json.loads((run / path).read_text()))), documented(heading))


def test_every_key_of_a_manifest_is_documented(run: Path) -> None:
    manifests = [json.loads(path.read_text()) for path in run.rglob("manifest.json")]
    found = {key for one in manifests for key in one if key != "files"}
    found |= {f"files.FILE.{key}" for one in manifests for entry in one["files"].values() for key in entry}
    assert found | {"files.FILE.before"} == documented("manifest.json")


def test_what_a_model_has_read_it_writes_again_to_the_letter(run: Path) -> None:
    shapes = {
        "result.json": Result,
        "provenance.json": Provenance,
        "summary.json": Summary,
        "segments.json": References,
    }
    files = [*run.glob("arms/**/result.json"), *(run / name for name in shapes if name != "result.json")]
    files += [EXPERIMENTS / name / "summary.json" for name in ("000-quickstart", f"{STUDY}/trec", f"{STUDY}/schedule")]
    records = [(file, shapes[file.name]) for file in files]
    records += [(file, TrialResult) for file in run.glob("trials/**/result.json")]
    records += [(file, Chosen) for file in run.glob("trials/**/chosen.json")]
    records += [(file, Spectrum) for file in run.glob("arms/**/spectrum.json")]
    records += [(EXPERIMENTS / f"{STUDY}/length/ablation.json", Ablation)]
    records += [(EXPERIMENTS / f"{STUDY}/over-tasks/summary.json", TasksSummary)]
    assert len(records) == 19
    for file, shape in records:
        value = json.loads(file.read_text())
        assert json.dumps(shape.model_validate(value).content()) == json.dumps(value), file


def test_the_page_is_about_the_format_that_is_written(run: Path) -> None:
    assert f"\nFormat {run_folder.FORMAT}. " in PAGE
    assert f"\n- **{run_folder.FORMAT}** " in PAGE
    assert {json.loads(path.read_text())["format"] for path in run.rglob("result.json")} == {run_folder.FORMAT}
