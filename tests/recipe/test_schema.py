"""The JSON Schema of a recipe, by which editors complete and check one. Run: pytest tests/recipe/test_schema.py"""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from cola.recipe.read import read_recipe
from cola.recipe.yaml12 import parse_yaml

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs/schema/recipe.json"
WRITTEN = [path for path in sorted(ROOT.rglob("*.yaml")) if "\narms:" in path.read_text() and ".venv" not in path.parts]
PLAIN = """
name: plain
model: {name_or_path: some-org/some-model}
data: {files: rows.jsonl, rows: {train: 24, validation: 8, test: 16}, task: answer, prompt: "{q}", answer: "{a}"}
training: {epochs: 2}
arms:
  lora: {links: 1}
seeds: [0]
"""


def faults(text: str) -> list[str]:
    """What the schema finds in a recipe, by place."""
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    return [fault.json_path for fault in validator.iter_errors(parse_yaml(text, "recipe")[0])]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_that_is_written_here_fits_the_schema(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("files: rows.jsonl", "files: {train: rows.jsonl}"),
        ("files: rows.jsonl", "hub: some/rows"),
        ("files: rows.jsonl", "reasoning_gym: chain_sum"),
        (
            'task: answer, prompt: "{q}", answer: "{a}"',
            "task: multiple_choice, prompt: q, label: l, choices: {0: 1, yes: true}",
        ),
        ('answer: "{a}"', 'answer: "{a}", stop: "."'),
        ("links: 1", "links: {search: [1, 2]}, rank: {search: [2, 4]}"),
        ("links: 1", "search: {rank: [2, 4]}"),
        ("links: 1", "method: full, freeze: embeddings"),
        ("links: 1", "alpha: 2r, knot: {merge: no, optimizer: {prune_random: 0.5}}"),
        ("epochs: 2", "epochs: 2, learning_rate: {search: [1e-3, 1e-4]}, warmup_steps: 0.1, max_grad_norm: null"),
        ("seeds: [0]", "seeds: [0]\nevaluation: {general_text: off, every: 5}\ntracking: {wandb: off}"),
        ("seeds: [0]", "seeds: [0]\ntracking: {tracker: mlflow, wandb: off, project: mine}"),
    ],
)
def test_a_spelling_that_the_reader_takes_fits_the_schema(old: str, new: str, tmp_path: Path) -> None:
    assert PLAIN.count(old) == 1
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN.replace(old, new))
    read_recipe(path)
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("links: 1", "link: 1", "$.arms.lora"),
        ("epochs: 2", "epochs: two", "$.training.epochs"),
        ("task: answer", "task: question", "$.data.task"),
        ("seeds: [0]", "seeds: 0", "$.seeds"),
    ],
)
def test_a_misspelt_key_or_value_is_found_at_its_place(old: str, new: str, place: str) -> None:
    assert faults(PLAIN.replace(old, new)) == [place]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_tells_editors_where_its_schema_is(path: Path) -> None:
    (line,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text(), re.MULTILINE)
    assert (path.parent / line).resolve() == SCHEMA
