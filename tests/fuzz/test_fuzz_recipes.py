"""Random recipes and overrides: each is read, or refused in a few clear lines and in time.

Run: pytest tests/fuzz/test_fuzz_recipes.py (mutate.py says how to run more)
"""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutate import ODD_TEXTS, change_bytes, change_tree, counted, odd_value, one_clear_line
from typer.testing import CliRunner

from cola.cli.app import app
from cola.compare.ablation import points_of
from cola.errors import LONGEST, MOST_LINES
from cola.recipe.faults import known_keys
from cola.recipe.plan import evaluation_steps, jobs_of, plan_arm
from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe

pytestmark = pytest.mark.slow

# Every kind of section and value; the recipes of the repository are tried too.
RICH = """\
name: rich
model: {name_or_path: some-org/some-model, revision: main}
data:
  files: {train: rows.jsonl, test: other.csv}
  rows: {train: 24, validation: 8, test: 16}
  task: multiple_choice
  prompt: "{question}? {meta.title}"
  choices: {yes: 'Yes', no: 'No'}
  label: gold
  group: passage
training: {epochs: 2, batch_size: 8, learning_rate: {search: [1e-4, 2e-4], per: seed}, warmup_steps: 0.1}
link: {rank: 4, alpha: 2r}
arms:
  base: {links: 0}
  lora: {links: 1, dropout: 0.1}
  chain3: {links: [&link {rank: 8}, *link, {<<: *link, rank: 2}], knot: {optimizer: {prune_random: 0.5}}}
  full: {method: full, freeze: [head]}
knot: {schedule: link, warmup_steps: 1}
comparison: {primary: [chain3, lora], secondary: [[chain3, full]]}
evaluation: {every: 5, checkpoint: best, general_text: null}
seeds: [0, 1]
tracking: {wandb: off}
"""
ROOT = Path(__file__).parent.parent.parent
TEXTS = [RICH, RICH, RICH, (ROOT / "recipes/qwen1_8b_chain3.yaml").read_text()]
TREES = [yaml.safe_load(text) for text in TEXTS]
KEYS = known_keys()
NAMES = sorted({part for key in KEYS for part in key.split(".")})
SNIPPETS = [
    *(text.encode() for text in ODD_TEXTS if len(text) < 500),
    *(
        b"&a ",
        b"*a",
        b"*link",
        b"<<: *link\n",
        b"!!int ",
        b"!!python/name:os.system ",
        b"!!binary ",
        b"---\n",
        b"...\n",
    ),
    *(b": ", b"- ", b"? ", b"{", b"}", b"[", b"]", b"'", b'"', b"|\n", b">\n", b"\t", b"#", b"%YAML 1.1\n", b"\r"),
    *(b'"\\ud800"', b'"\\0"', b"\xff\xfe", b"\xed\xa0\x80", b"[" * 300, b"a: " * 300, b"{a: " * 100),
]


def an_override(random: Random) -> str:
    """Mostly a known key with an odd value."""
    key = random.choice(KEYS).replace("NAME", random.choice(["base", "lora", "chain3", "full", "new", "1e3"]))
    if random.random() < 0.2:
        key += random.choice([".0", ".1.rank", ".²", "..", ".x.y", ".search", "." + "9" * 5000, "." + "a." * 300])
    value: Any = random.choice(ODD_TEXTS)
    if random.random() < 0.6:
        value = yaml.safe_dump(odd_value(random), default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    return random.choice([f"{key}={value}", f"{key}={value}", f"{key}={value}", key, f"={value}"])


def a_recipe(random: Random) -> tuple[bytes, list[str]]:
    """The bytes of a recipe's file, and overrides."""
    number = random.randrange(len(TEXTS))
    if random.random() < 0.5:
        tree = yaml.safe_load(TEXTS[number]) if random.random() < 0.05 else _copy(TREES[number])
        for _ in range(random.choice([1, 1, 1, 3])):
            change_tree(random, tree, NAMES)
        content = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    else:
        content = change_bytes(random, TEXTS[number].encode(), SNIPPETS)
    return content, [an_override(random) for _ in range(random.choice([0, 0, 1, 3]))]


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@counted(400)
@given(st.randoms(use_true_random=False))
def test_a_recipe_is_read_or_refused_in_clear_lines_and_survives_being_written_down(file: Path, random: Random) -> None:
    content, overrides = a_recipe(random)
    file.write_bytes(content)

    def check() -> None:
        recipe = read_recipe(file, overrides)
        for arm in recipe.arms:
            links = plan_arm(recipe, arm, recipe.seeds[0], 24)
            evaluation_steps(recipe, links, 24)
        jobs_of(recipe)
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        assert read_recipe(file) == recipe

    one_clear_line(check)


@counted(50)
@given(st.randoms(use_true_random=False))
def test_a_dry_run_ends_in_a_plan_or_in_clear_lines(file: Path, random: Random) -> None:
    content, overrides = a_recipe(random)
    file.write_bytes(content)
    words = ["run", "--dry-run", str(file), *overrides, "model.name_or_path=some-org/some-model"]
    end_clearly(words)


@counted(50)
@given(st.randoms(use_true_random=False))
def test_an_ablation_is_a_grid_or_is_refused_in_clear_lines(file: Path, random: Random) -> None:
    file.write_text(RICH)
    keys = [an_override(random) for _ in range(random.choice([1, 2]))]
    keys += [random.choice(["link.rank=1,2,4", "arms.chain3.links=1,2,", "seeds=[0],[1]", "link.rank=" + "1,2," * 400])]
    one_clear_line(lambda: points_of(file, keys, random.random() < 0.5))


def end_clearly(words: list[str]) -> None:
    """The command ends with 0, or with 2 and a few clear lines."""
    result = CliRunner().invoke(app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 2), result.output
    if result.exit_code:
        lines = result.stderr.strip().splitlines()
        assert 1 <= len(lines) <= MOST_LINES
        assert all(line.startswith("error: ") and len(line) <= LONGEST + 7 for line in lines), result.stderr
