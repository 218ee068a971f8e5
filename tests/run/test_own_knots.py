"""Knots by functions: what passes over one, and what it keeps of a pair. Run: pytest tests/run/test_own_knots.py"""

from pathlib import Path

import pytest
import torch
from runs import SHORT, assert_one_line, go, result, wide_cola
from test_own_code import MINE, arms
from torch import Tensor

from cola.errors import RecipeError
from cola.export.outcome import outcomes
from cola.link.adapter_files import load_pair
from cola.link.residual import LinkWeights, Pair
from cola.recipe.read import read_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

FAULTY = """
import torch

from cola import Factors


def transposed(matrix):
    return matrix.drawn.A_RI.T


def unsaid(matrix):
    matrix.before.B_OR.zero_()
    return 3.0


def loud(matrix):
    return Factors(matrix.before.A_RI, matrix.before.B_OR, moves=True)


def nothing(link):
    return 0.0


def text(link):
    return "half"


def lacking(link):
    return {name: 0.5 for name in list(link.pairs)[1:]}


def infinite(link):
    return dict.fromkeys(link.pairs, float("inf"))


def raises(link):
    return link.losses
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def pairs_of(folder: Path, arm: str, n_links: int) -> list[LinkWeights]:
    return [load_pair(folder / f"arms/{arm}/seed-0/knots/link-{number}") for number in range(1, n_links + 1)]


def update(pair: Pair) -> Tensor:
    return pair.scale * pair.B_OR @ pair.A_RI


def test_a_pair_that_begins_with_a_part_of_the_one_before_leaves_the_outputs_as_they_were(
    tmp_path: Path, mine: Path, recipe_text: str
) -> None:
    recipe = arms(
        tmp_path,
        recipe_text,
        half="{links: 2, knot: {pair: {./mine.py:half: {share: 0.25}}}}",
        same_a="{links: 2, knot: {pair: keep_a}}",
        chain="{links: 2}",
    )
    folder, summary = go(recipe, *SHORT, "training.learning_rate=1e-9")  # the second link ends as it began
    assert not [arm.errors for arm in summary.arms.values() if arm.errors]
    for arm in ("half", "same_a", "chain"):
        info = result(folder, arm)["train_info"]
        assert not [knot for knot in info["knots"] if "start_moved" in knot]
        assert all(knot["drift_relative"] < 1e-5 for knot in info["knots"])
    first, second = pairs_of(folder.path, "half", 2)
    for name, before in first.items():
        own, taken = second[name].split(len(before.A_RI))
        assert torch.allclose(own.A_RI, before.A_RI, atol=1e-7), name
        assert torch.allclose(own.B_OR, 0.25 * before.B_OR, atol=1e-7), name
        assert taken is not None
        assert torch.allclose(taken.B_OR, 0.25 * before.B_OR, atol=1e-12), name
    first, second = pairs_of(folder.path, "same_a", 2)
    assert all(torch.allclose(second[name].A_RI, before.A_RI, atol=1e-7) for name, before in first.items())
    first, second = pairs_of(folder.path, "chain", 2)
    assert not any(torch.allclose(second[name].A_RI, before.A_RI, atol=1e-3) for name, before in first.items())
    segments = [result(folder, arm)["train_info"]["segments"] for arm in ("half", "same_a", "chain")]
    assert len({names[0] for names in segments}) == 1  # what the knot does comes after the first link
    assert len({names[1] for names in segments}) == 3


def test_a_function_says_which_share_of_a_pair_a_knot_keeps(tmp_path: Path, mine: Path, recipe_text: str) -> None:
    recipe = arms(
        tmp_path,
        recipe_text,
        shrinking="{links: 3, knot: {merge_fraction: {./mine.py:shrinking: {by: 1.0}}}}",
        by_size="{links: 2, knot: {merge_fraction: './mine.py:by_size'}}",
        number="{links: 2, knot: {merge_fraction: 1.0}}",
    )
    steps = [one if one != "training.steps=4" else "training.steps=6" for one in SHORT]
    folder, summary = go(recipe, *steps)
    assert not [arm.errors for arm in summary.arms.values() if arm.errors]
    knots = result(folder, "shrinking")["train_info"]["knots"]
    assert [knot.get("fraction") for knot in knots] == [1.0, 0.5, None]  # the last link is kept whole
    assert knots[0]["drift_relative"] < 1e-5 < 1e-3 < knots[1]["drift_relative"]
    assert [row.fraction for row in summary.arms["shrinking"].knots] == [1.0, 0.5, 1.0]
    first, second, third = pairs_of(folder.path, "shrinking", 3)
    [outcome] = outcomes(folder.path, "shrinking")
    learned = outcome.residual()  # from the folder, where no code of the user's runs
    for name, pair in first.items():
        shared = [update(first[name]), 0.5 * update(second[name]), update(third[name])]
        got = torch.stack([update(link[name]) for link in learned]).sum(0)
        assert torch.allclose(got, torch.stack(shared).sum(0), atol=1e-6), name
        assert pair.scale == 2.0
    [knot, _] = result(folder, "by_size")["train_info"]["knots"]
    sizes = {
        name: float((pair.B_OR @ pair.A_RI).norm()) for name, pair in pairs_of(folder.path, "by_size", 2)[0].items()
    }
    largest = max(sizes.values())
    assert knot["fraction"] == pytest.approx({name: 0.5 + 0.5 * size / largest for name, size in sizes.items()})
    assert "fraction" not in result(folder, "number")["train_info"]["knots"][0]


@pytest.mark.slow
def test_what_a_functions_knots_have_tied_is_found_again(tmp_path: Path, mine: Path, recipe_text: str) -> None:
    said = {"both": "{links: 3, knot: {merge_fraction: './mine.py:by_size', pair: './mine.py:half'}}"}
    steps = [one if one != "training.steps=4" else "training.steps=6" for one in SHORT]
    whole, _ = go(arms(tmp_path, recipe_text, **said), *steps)
    info = result(whole, "both")["train_info"]
    again, _ = go(arms(tmp_path, recipe_text, **said), *steps)
    assert result(again, "both")["train_info"]["reused_steps"] == 6
    assert result(again, "both")["evaluation"] == result(whole, "both")["evaluation"]
    # Once only the first link is in the store, the chain is put together from what its knot's record says.
    longer = [one if one != "training.steps=6" else "training.steps=8" for one in steps]
    lengths = "{links: [{steps: 2}, {steps: 2}, {steps: 4}], knot: " + said["both"].partition("knot: ")[2]
    grown, _ = go(arms(tmp_path, recipe_text, both=lengths), *longer, "training.schedule=constant")
    alone = arms(tmp_path, recipe_text, both=lengths)
    fresh, _ = go(alone, *longer, "training.schedule=constant", f"store={tmp_path / 'other'}")
    assert result(grown, "both")["evaluation"] == result(fresh, "both")["evaluation"]
    assert info["knots"][0]["fraction"]


def test_what_a_rule_at_a_knot_got_wrong_is_said_and_the_other_arms_go_on(tmp_path: Path, recipe_text: str) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    pairs, shares = ("transposed", "unsaid"), ("nothing", "text", "lacking", "infinite", "raises")
    said = {name: f"{{links: 2, knot: {{pair: './faulty.py:{name}'}}}}" for name in pairs}
    said |= {name: f"{{links: 2, knot: {{merge_fraction: './faulty.py:{name}'}}}}" for name in shares}
    said |= {"unwritten": "{links: 2, knot: {pair: './mine.py:half', merge: no}}", "lora": "{}"}
    said["loud"] = "{links: 2, knot: {pair: './faulty.py:loud'}}"
    (tmp_path / "mine.py").write_text(MINE)
    folder, summary = go(arms(tmp_path, recipe_text, **said), *SHORT)
    errors = {name: " ".join(arm.errors.values()) for name, arm in summary.arms.items()}
    assert errors.pop("lora") == errors.pop("loud") == ""
    assert result(folder, "loud")["train_info"]["knots"][1]["start_moved"] > 1e-4
    expected = {
        "transposed": "knot.pair: faulty.py:transposed gave A as (32, 8) for model.layers.0.self_attn.q_proj; (8, 32)",
        "unsaid": "knot.pair: faulty.py:unsaid gave a float for model.layers.0.self_attn.q_proj; A, (A, B), Factors",
        "nothing": "knot.merge_fraction: faulty.py:nothing gave 0.0 for the link; a number above 0 and 1 at most",
        "text": "knot.merge_fraction: faulty.py:text gave a str for the link; a number above 0 and 1 at most",
        "lacking": "gave shares of 13 modules; one of each of the 14 that have a pair is expected, and model.layers.0",
        "infinite": "knot.merge_fraction: faulty.py:infinite gave inf for model.layers.0.self_attn.q_proj",
        "raises": "'Tied' object has no attribute 'losses' (faulty.py:37)",
        "unwritten": "knot.pair: mine.py:half after init: default takes its pair out of the frozen weight",
    }
    assert {name: text in errors[name] for name, text in expected.items()} == dict.fromkeys(expected, True), errors


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("{merge_fraction: half}", "'half' is no rule for the share that a knot keeps; your own is ./my_idea.py:name"),
        ("{merge_fraction: ./mine.py}", "is a file and a function in it"),
        ("{merge_fraction: 2}", "input should be less than or equal to 1; got 2"),
        ("{merge_fraction: 0}", "input should be greater than 0"),
        (
            "{pair: kept}",
            "'kept' is no rule for the pair at a knot; these are: fresh, keep, keep_a; did you",
        ),
        ("{pair: {keep_a: {length: 1}}}", "keep_a: length: extra inputs are not permitted (it has none)"),
        ("{pair: [keep]}", "a rule for the pair at a knot is a word, or a word with its options below it"),
        ("{pair: keep, merge_fraction: ./mine.py:by_size}", "with pair: keep nothing is let go of between links"),
    ],
)
def test_a_rule_that_is_none_is_refused_with_its_line(
    tmp_path: Path, mine: Path, recipe_text: str, said: str, told: str
) -> None:
    recipe = arms(tmp_path, recipe_text, own=f"{{links: 2, knot: {said}}}")
    with pytest.raises(RecipeError, match=r"arms\.own\.knot\.(pair|merge_fraction)") as refused:
        read_recipe(recipe)
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1, refused.value


def test_a_pair_goes_on_only_into_one_of_its_shape(tmp_path: Path, recipe_text: str) -> None:
    recipe = arms(tmp_path, recipe_text, own="{links: [{rank: 4}, {rank: 2}], knot: {pair: keep_a}}")
    fault = r"arms.own.knot.pair: link 2 has rank 2 after 4, so the pair before does not fit it: use fresh"
    with pytest.raises(RecipeError, match=fault):
        read_recipe(recipe)


def test_the_code_of_a_knot_runs_only_where_it_is_allowed(tmp_path: Path, mine: Path, recipe_text: str) -> None:
    recipe = arms(tmp_path, recipe_text, own="{links: 2, knot: {merge_fraction: './mine.py:by_size'}}")
    told = wide_cola("run", recipe, *SHORT)
    assert_one_line(told)
    assert "arms.own.knot.merge_fraction: mine.py:by_size is Python code of" in told.output
    assert wide_cola("run", recipe, *SHORT, "--dry-run").exit_code == 0
    assert "a share kept by mine.py:by_size" in wide_cola("run", recipe, *SHORT, "--dry-run").output
    wrong = arms(tmp_path, recipe_text, own="{links: 2, knot: {pair: {./mine.py:half: {part: 1}}}}")
    told = wide_cola("run", wrong, *SHORT, "--allow-code")
    assert_one_line(told)
    assert "arms.own.knot.pair: " in told.output
    assert "option part: extra inputs are not permitted; its options are share" in told.output


def test_where_arms_get_the_same_flops_own_code_that_says_none_is_named(
    tmp_path: Path, mine: Path, recipe_text: str
) -> None:
    recipe = arms(
        tmp_path,
        recipe_text,
        lora="{}",
        ball="{optimizer: './mine.py:heavy_ball'}",
        counted="{optimizer: './mine.py:counted_ball'}",
    )
    told = wide_cola("run", recipe, *SHORT, "training.match=flops", "--allow-code")
    assert told.exit_code == 0, told.output
    assert "arms.ball.optimizer: the FLOPs of mine.py:heavy_ball are not counted" in told.output
    assert "heavy_ball_flops" in told.output
    assert "counted_ball are not counted" not in told.output
