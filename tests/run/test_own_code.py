"""Ideas in a user's own file: what they may do, and what not. Run: pytest tests/run/test_own_code.py"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from runs import SHORT, assert_one_line, go, read_jsonl, result, wide_cola

from cola.errors import RecipeError
from cola.recipe.read import read_recipe
from cola.recipe.yaml12 import parse_yaml

MINE = (Path(__file__).parents[1] / "own_ideas.py").read_text()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def arms(tmp_path: Path, recipe_text: str, **said: str) -> Path:
    """A recipe with these arms and no others, beside `mine.py`."""
    recipe, _ = parse_yaml(recipe_text, "recipe")
    recipe |= {"arms": {name: parse_yaml(text, name)[0] for name, text in said.items()}, "comparison": {}}
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.slow
def test_starts_and_an_optimizer_of_ones_own_are_trained_beside_colas(
    tmp_path: Path, mine: Path, recipe_text: str
) -> None:
    recipe = arms(
        tmp_path,
        recipe_text,
        lora="{links: 1}",
        along="{links: 2, init: {./mine.py:along: {length: 0.5}}}",
        step="{links: 2, init: './mine.py:step', init_batches: 2}",
        out="{links: 2, init: './mine.py:out_of_weight'}",
        ball="{links: 2, optimizer: './mine.py:heavy_ball'}",
        adam="{links: 2}",
    )
    folder, summary = go(recipe, *SHORT)
    assert {name: arm.errors for name, arm in summary.arms.items() if arm.errors} == {}
    knots = {arm: result(folder, arm)["train_info"]["knots"] for arm in summary.arms}
    assert all(knot["start_moved"] > 1e-3 for knot in knots["step"])  # announced, and logged
    assert not [knot for arm in ("along", "out", "ball") for knot in knots[arm] if "start_moved" in knot]
    assert all(knot["drift_relative"] < 1e-4 for knot in knots["out"])  # and what was taken out came back
    names = {arm: result(folder, arm)["train_info"]["segments"][-1] for arm in summary.arms}
    assert len(set(names.values())) == len(names)
    assert (folder.path / "code").is_dir()
    assert [path.read_text() for path in (folder.path / "code").iterdir()] == [MINE]


def test_code_runs_only_where_the_command_allows_it(tmp_path: Path, mine: Path, recipe_text: str) -> None:
    mine.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'has-run')!r}).touch()\n{MINE}")
    recipe = arms(tmp_path, recipe_text, along="{init: './mine.py:along'}")
    told = wide_cola("run", recipe, *SHORT)
    assert_one_line(told)
    assert "arms.along.init: mine.py:along is Python code of" in told.output
    assert "--allow-code" in told.output
    assert wide_cola("run", recipe, *SHORT, "--dry-run", "--allow-code").exit_code == 0
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "has-run").exists()
    assert wide_cola("run", recipe, *SHORT, "--allow-code").exit_code == 0
    assert (tmp_path / "has-run").exists()
    (tmp_path / "has-run").unlink()
    run = next((tmp_path / "runs").iterdir())
    assert wide_cola("report", run).exit_code == 0
    assert not (tmp_path / "has-run").exists()


@pytest.mark.slow
def test_the_name_of_a_state_holds_what_a_file_says_and_not_where_it_lies(
    tmp_path: Path, mine: Path, recipe_text: str
) -> None:
    recipe = arms(tmp_path, recipe_text, along="{init: './mine.py:along'}", ball="{optimizer: './mine.py:heavy_ball'}")
    before, _ = go(recipe, *SHORT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.py").write_text(MINE)
    recipe.write_text(recipe.read_text().replace("./mine.py", str(elsewhere / "other.py")))
    moved, _ = go(recipe, *SHORT)
    (elsewhere / "other.py").write_text(f"{MINE}# and a comment\n")
    changed, _ = go(recipe, *SHORT)
    for arm in ("along", "ball"):
        infos = [result(folder, arm)["train_info"] for folder in (before, moved, changed)]
        assert [info["reused_steps"] for info in infos] == [0, 4, 0]
        names = [info["segments"][-1] for info in infos]
        assert names[0] == names[1] != names[2]


def test_a_file_that_has_changed_since_the_run_began_is_said(tmp_path: Path, mine: Path, recipe_text: str) -> None:
    recipe = arms(tmp_path, recipe_text, along="{init: './mine.py:along'}")
    folder, _ = go(recipe, *SHORT)
    mine.write_text(f"{MINE}\n")
    told = wide_cola("run", "--resume", folder.path, "--allow-code")
    assert told.exit_code == 2
    assert "mine.py is not what it was when this run began" in told.output
    mine.unlink()
    told = wide_cola("run", "--resume", folder.path, "--allow-code")
    assert_one_line(told)
    assert f"arms.along.init: {mine}: no such file or directory" in told.output


FAULTY = """
import gc

import torch


def raises(matrix):
    return matrix.wait


def transposed(matrix):
    return torch.ones(matrix.weight_OI.shape[1], matrix.rank)


def nowhere(matrix):
    return torch.full((matrix.rank, matrix.weight_OI.shape[1]), float("nan"))


def taken(matrix):
    return torch.ones(matrix.rank, matrix.weight_OI.shape[1]), torch.ones(matrix.weight_OI.shape[0], matrix.rank)


def blind(matrix):
    return matrix.gradient_OI[: matrix.rank]


class Loose(torch.optim.SGD):
    count = 0

    def step(self, closure=None):
        self.count += 1
        super().step(closure)


def forgetful(trained):
    return Loose(trained.groups, lr=0.0)


class Reaching(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for module in gc.get_objects():
            if isinstance(module, torch.nn.Embedding) and module.weight.device.type == "cpu":
                module.weight.data.mul_(1.5)


def reaching(trained):
    return Reaching(trained.groups, lr=0.0)


def nothing(trained):
    return None


def half(trained):
    return torch.optim.SGD(trained.groups[0]["params"][:1], lr=0.0)
"""


def test_what_faulty_code_did_is_said_and_the_other_arms_go_on(tmp_path: Path, recipe_text: str) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    starts = ("raises", "transposed", "nowhere", "blind")
    optimizers = ("forgetful", "reaching", "nothing", "half")
    said = {name: f"{{init: './faulty.py:{name}'}}" for name in starts}
    said |= {name: f"{{optimizer: './faulty.py:{name}'}}" for name in optimizers}
    said["unwritten"] = "{init: './faulty.py:taken', knot: {merge: no}}"
    _, summary = go(arms(tmp_path, recipe_text, **said, lora="{}"), *SHORT)
    errors = {name: " ".join(arm.errors.values()) for name, arm in summary.arms.items()}
    assert errors.pop("lora") == ""
    expected = {
        "raises": "AttributeError: 'Matrix' object has no attribute 'wait' (faulty.py:8)",
        "transposed": "faulty.py:transposed gave A as (32, 8) for model.layers.0.self_attn.q_proj; (8, 32) is expected",
        "nowhere": "gave A with NaN or infinity",
        "blind": "needs init_batches",
        "forgetful": "keeps count outside of its state",
        "reaching": "moved weights that are frozen",
        "nothing": "gave a NoneType; a torch.optim.Optimizer is expected",
        "unwritten": "takes its pair out of the frozen weight, which knot.merge: no leaves as it is",
        "half": "leaves out 27 of the trained tensors",
    }
    assert {name: text in errors[name] for name, text in expected.items()} == dict.fromkeys(expected, True), errors


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("./mine.py", "is a file and a function in it"),
        ("fourrier", "is no start"),
        ("{gradient: {gamma: 1}}", "gradient: gamma: extra inputs are not permitted (it has none)"),
        ("{./mine.py:along: {length: [1]}}", "an option is a name and a number"),
        ("[gradient]", "a start is a word, or a word with its options below it"),
    ],
)
def test_an_idea_that_is_none_is_refused_with_its_line(
    tmp_path: Path, mine: Path, recipe_text: str, said: str, told: str
) -> None:
    recipe = arms(tmp_path, recipe_text, own=f"{{init: {said}}}")
    with pytest.raises(RecipeError, match=r"arms\.own\.init") as refused:
        read_recipe(recipe)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("./mine.py:fourier", "has no function fourier; it has along, step, out_of_weight, heavy_ball"),
        ("{./mine.py:along: {width: 1}}", "option width: extra inputs are not permitted; its options are length"),
        ("{./mine.py:along: {length: long}}", "option length: input should be a valid number"),
        ("./nowhere.py:along", "no such file"),
    ],
)
def test_what_a_file_does_not_offer_is_said_before_anything_is_trained(
    tmp_path: Path, mine: Path, recipe_text: str, said: str, told: str
) -> None:
    answer = wide_cola("run", arms(tmp_path, recipe_text, own=f"{{init: {said}}}"), *SHORT, "--allow-code")
    assert_one_line(answer)
    assert told in answer.output


def test_a_link_that_ends_by_its_rule_leaves_its_steps_to_the_last(
    tmp_path: Path, mine: Path, recipe_text: str
) -> None:
    mine.write_text(f"{MINE}\n\ndef after(steps, *, n: int):\n    return len(steps) == n\n")
    recipe = arms(
        tmp_path,
        recipe_text,
        chain="{links: [{steps: 2}, {steps: 1}, {steps: 9}]}",
        rule="{links: [{until: {./mine.py:after: {n: 2}}}, {until: {./mine.py:after: {n: 1}}}, {}]}",
        still="{links: 3, until: {update_stops: {tolerance: 0.9, every: 1}}}",
    )
    steps = [one if one != "training.steps=4" else "training.steps=12" for one in SHORT]
    folder, summary = go(recipe, *steps, "training.schedule=constant", "evaluation.every=link")
    assert not [arm.errors for arm in summary.arms.values() if arm.errors]
    chain, rule = (result(folder, arm)["train_info"] for arm in ("chain", "rule"))
    assert [link["last_step"] for link in rule["links"]] == [2, 3, 12]
    assert rule["segments"] == chain["segments"]  # the same steps, found and not made again
    assert rule["reused_steps"] == 12
    still = result(folder, "still")["train_info"]
    rows = read_jsonl(folder.path / "arms/still/seed-0/metrics.jsonl")
    norms = [row["update_norm"] for row in rows if row["kind"] == "step"]
    first = 0
    for link in still["links"][:-1]:
        mine_only, first = norms[first : link["last_step"]], link["last_step"]
        grown = [abs(now - then) / now for then, now in pairwise(mine_only)]
        assert all(share >= 0.9 for share in grown[:-1])
        assert grown[-1] < 0.9 or len(mine_only) == 4
    assert still["links"][0]["last_step"] < 4
    again, _ = go(recipe, *steps, "training.schedule=constant", "evaluation.every=link")
    assert result(again, "still")["train_info"]["segments"] == still["segments"]
    assert result(again, "still")["train_info"]["reused_steps"] == 12
