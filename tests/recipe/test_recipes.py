"""Every recipe in recipes/ on a tiny random Qwen2, and the controls' one key each.

Run: pytest tests/recipe/test_recipes.py
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SKY, tiny_model
from runs import go, quiet
from transformers import PreTrainedTokenizerFast

from cola.compare.ablation import points_of, take_ablation
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.yaml12 import values_of
from cola.run.ablate import ablate

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FEW = "{search: [1e-2, 5e-3]}"  # the fewest trials of a search
SEARCHED = ("qwen1_8b_chain3",)  # whose search is tried here; the others get one learning rate


def save_tiny64(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    """A tiny Qwen2 whose matrices hold whole blocks of 64 weights, as NF4 has them."""
    tiny_model(seed, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny64(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_tiny64(tmp_path_factory.mktemp("tiny-qwen2-64"), tokenizer)


def tiny(name: str, model: Path, colours: Path, output: Path) -> list[str]:
    """Overrides that take one of our recipes to the tiny model and as few steps as its links need."""
    raw = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    data = {"prompt": "'{question}?'", "rows": "{train: 8, validation: 4, test: 4}"}
    if raw["data"]["task"] == "multiple_choice":
        data |= {"choices": f"[{', '.join(SKY.values())}]", "label": "label", "group": "passage"}
    keys = [f"model.name_or_path={model}", f"data.files={colours}", *(f"data.{k}={v}" for k, v in data.items())]
    keys += ["seeds=[0]", "tracking.wandb=off", f"output={output}"]
    if name != "quickstart":  # whose text the tiny model reads for as long as it trains
        keys.append("evaluation.general_text=null")
    n_links = [2]
    for arm, settings in raw["arms"].items():
        links = settings.get("links", 1)
        n_links.append(len(links) if isinstance(links, list) else links)
        if isinstance(links, list):  # even shares in place of the epochs that add up to the recipe's own budget
            keys += [f"arms.{arm}.links.{n}.epochs=null" for n in range(len(links))]
        if isinstance(settings.get("learning_rate"), dict):
            keys.append(f"arms.{arm}.learning_rate={FEW if name in SEARCHED else 1e-2}")
    if isinstance(raw["training"]["learning_rate"], dict):
        keys.append(f"training.learning_rate={FEW if name in SEARCHED else 1e-2}")
    return [*keys, f"training.steps={max(n_links)}"]


def header(name: str) -> str:
    """The comment at the top of a recipe."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[1:] for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")])


def commands(name: str) -> list[list[str]]:
    """The words of every command in a recipe's header."""
    text = header(name).replace("\\\n", " ")
    starts = [match.start() for match in re.finditer(rf"cola (run|ablate) (--dry-run )?recipes/{name}\.yaml", text)]
    found = []
    for start in starts:
        # An argument goes on over the end of a line inside quotes; words that are no override end a command.
        words = shlex.split(re.split(r"\n(?!\s+prompt:)", text[start:])[0].split("(")[0])
        found.append([word for word in words if word not in ("--dry-run", "--allow-code")])
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "quickstart" else pytest.mark.slow) for name in NAMES]
)
def test_every_recipe_trains_all_its_arms_on_a_tiny_qwen2(
    name: str, tiny64: Path, colours: Path, tmp_path: Path
) -> None:
    _, summary = go(RECIPES / f"{name}.yaml", *tiny(name, tiny64, colours, tmp_path))
    assert {arm: about.states for arm, about in summary.arms.items()} == {arm: {0: "ok"} for arm in summary.arms}
    assert summary.same_outputs == []


@pytest.mark.parametrize("name", NAMES)
def test_every_header_says_what_a_reader_must_know_and_its_commands_hold(name: str) -> None:
    text = header(name)
    assert text.splitlines()[0].count("?") == 1
    assert all(f"\n   {word} " in text for word in ("command", "takes", "expect"))
    assert name == "quickstart" or "SmolLM2" in text or "offline" in text
    found = commands(name)
    assert found
    for _, verb, path, *keys in found:
        keys = [key.replace("=DIR", "=.").replace("boolq.jsonl", str(RECIPES / f"{name}.yaml")) for key in keys]
        if verb == "ablate":
            assert len(points_of(RECIPES.parent / path, keys, paired=False)) > 1
        else:
            read_recipe(RECIPES.parent / path, keys)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_points"), [("rank_alpha", 4), ("chain_length", 2), ("base_size", 2)])
def test_the_ablations_of_the_headers_run(
    name: str, n_points: int, tiny64: Path, colours: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, _, _, *keys = next(words for words in commands(name) if words[1] == "ablate")
    ends = []
    for dotted, values in map(values_of, keys):
        if dotted == "model.name_or_path":
            values = [str(tiny64), str(save_tiny64(tmp_path / "another", tokenizer, seed=1))]
        ends.append(f"{dotted}={values[0]},{values[-1]}")
    ablated = {key.partition("=")[0] for key in ends}
    fixed = [key for key in tiny(name, tiny64, colours, tmp_path) if key.partition("=")[0] not in ablated]
    points = points_of(RECIPES / f"{name}.yaml", [*ends, *fixed, "training.steps=5"], paired=False)
    assert len(points) == n_points
    with take_ablation(points) as folder:
        assert ablate(points, folder, quiet()).finished


def settings_of(recipe: Recipe, arm: str) -> dict[str, Any]:
    """Everything that is said of an arm, by key: one value where all its links have the same, else a list of them."""
    resolved, own = recipe.resolved(arm), recipe.arms[arm].links
    lengths = [(link.epochs, link.steps) for link in own] if isinstance(own, list) else [(None, None)] * own
    said: dict[str, Any] = {"links": lengths, **resolved.base._asdict(), "learning_rate": recipe.learning_rate_of(arm)}
    said |= {f"knot.{key}": value for key, value in resolved.rules.model_dump().items()}
    links = [link.record() for link in resolved.links]
    for key in links[0]:
        values = [link[key] for link in links]
        if key == "alpha":  # the scale of the update: alpha is said as a multiple of the rank
            values = [link["alpha"] / link["rank"] for link in links]
        said[key] = values[0] if all(value == values[0] for value in values) else values
    return said


def test_each_control_differs_from_what_it_controls_by_the_one_key_that_it_names() -> None:
    path = RECIPES / "controls.yaml"
    recipe = read_recipe(path)
    named = dict(re.findall(r"^  (\w+): \{.*# controls: (\w+ \([\w.]+\))", path.read_text(), re.MULTILINE))
    assert set(named) == set(recipe.arms) - {"base", "lora"}, "every arm but the two that all begins with"
    for arm, control in named.items():
        other, key = re.fullmatch(r"(\w+) \(([\w.]+)\)", control).groups()  # pyright: ignore[reportOptionalMemberAccess]
        one, two = settings_of(recipe, arm), settings_of(recipe, other)
        common = one.keys() & two.keys()  # another method has keys of its own
        assert [k for k in sorted(common) if one[k] != two[k]] == [key], (arm, other)
