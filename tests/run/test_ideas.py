"""All that is in the recipe of ideas, and a user's own: ended, counted, shared, gone on with, exported.

Run: pytest tests/run/test_ideas.py
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from children import KILLED, end, start
from conftest import run_once, tiny_model
from runs import cola, fresh, outcome, quiet
from test_export import exported, logits, own_model, relative, with_adapter

from cola.compare.summary import summarize
from cola.link.base import shape_of
from cola.link.ideas.door import flops_of
from cola.link.ideas.work import Shape, product, qr
from cola.link.targets import target_names
from cola.plan.tree import Planner
from cola.recipe.ideas import Idea
from cola.recipe.plan import Job
from cola.recipe.read import read_recipe
from cola.report.tables import named_tables
from cola.run.code import need_leave
from cola.run.materials import gather
from cola.tree.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
RANK, LAYERS = 4, 2
OWN = {
    "own_start": "{links: 3, init: OWN:step, init_batches: 2}",
    "own_ball": "{links: 3, optimizer: OWN:heavy_ball}",
    "own_counted": "{links: 3, optimizer: OWN:counted_ball}",
    "own_half": "{links: 3, knot: {pair: OWN:half, optimizer: keep}}",
    "own_share": "{links: 3, knot: {merge_fraction: OWN:by_size}}",
    "ga_moved": "{links: 3, init: lora_ga, knot: {optimizer: reproject}}",
}
# Steps that an arm has in common with another: all of the first link where it is the knot that differs.
SHARED = {
    ("chain3", "lora"): 4,
    ("gradient3", "chain3"): 0,
    ("lora_one3", "chain3"): 0,
    ("lora_ga3", "chain3"): 0,
    ("reproject3", "chain3"): 4,
    ("same_a3", "chain3"): 4,
    ("reflora3", "chain3"): 0,
    ("rite3", "chain3"): 0,
    ("riemannian3", "chain3"): 0,
    ("muon3", "chain3"): 0,
    ("until6", "chain3"): 2,
    ("unequal3", "lora"): 6,
    ("galore", "full"): 0,
    ("apollo", "full"): 0,
    ("own_start", "chain3"): 0,
    ("own_ball", "chain3"): 0,
    ("own_counted", "own_ball"): 0,
    ("own_half", "chain3"): 4,
    ("own_share", "chain3"): 4,
    ("ga_moved", "lora_ga3"): 4,
}
WHOLE = ("full", "galore", "apollo")


def ideas(model: Path, colours: Path, output: Path) -> str:
    """recipes/ideas.yaml on the tiny model, 12 steps an arm, and some ideas of a user's own beside it."""
    recipe = yaml.safe_load((ROOT / "recipes/ideas.yaml").read_text())
    rows = {"train": 16, "validation": 4, "test": 4}
    recipe["model"] = {"name_or_path": str(model)}
    recipe["data"] = {"files": str(colours), "rows": rows, "task": "answer", "prompt": "{question}?"}
    recipe["data"]["answer"] = "{answer}"
    recipe["training"] |= {"batch_size": 4, "epochs": 3}
    recipe["link"] |= {"rank": RANK, "alpha": 2 * RANK}
    arms = recipe["arms"]
    arms["until6"]["until"] = {"update_stops": {"tolerance": 0.9, "every": 1}}  # which ends links so early
    for arm in ("galore", "apollo"):
        next(iter(arms[arm]["optimizer"].values())).update(rank=RANK, refresh=4)
    for name, said in OWN.items():
        arms[name] = yaml.safe_load(said.replace("OWN", str(ROOT / "tests/own_ideas.py")))
    recipe |= {
        "evaluation": {"general_text": None, "every": "never"},
        "tracking": {"wandb": "off"},
        "output": str(output),
    }
    return json.dumps(recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm_folder: Path, colours: Path) -> Path:
    folder = tmp_path_factory.mktemp("ideas")
    return run_once(folder, ideas(warm_folder, colours, folder))


def info(run: Path, arm: str) -> dict[str, Any]:
    return json.loads((run / f"arms/{arm}/seed-0/result.json").read_text())["train_info"]


def losses(run: Path, arm: str) -> list[float]:
    lines = (run / f"arms/{arm}/seed-0/metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "step"]


def arms_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "arms").iterdir())


def test_every_idea_is_trained_to_its_end(run: Path) -> None:
    assert {*arms_of(run)} == {name for pair in SHARED for name in pair} | {"base"}
    for arm in arms_of(run):
        if arm != "base":
            heard = losses(run, arm)
            assert len(heard) == info(run, arm)["steps"] == 12, arm
            assert min(heard[4:]) < heard[0], arm
    assert len(info(run, "until6")["links"]) == 6
    assert info(run, "until6")["links"][0]["last_step"] <= 2


# ---------------------------------------------------------------------------------------------------------
# Sharing


def test_an_idea_shares_the_steps_before_it_differs_and_nothing_else(run: Path) -> None:
    recipe = read_recipe(run / "recipe.yaml")
    need_leave(recipe, allowed=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    materials = gather(recipe, quiet())
    code = json.loads((run / "provenance.json").read_text())["code"]
    planner = Planner(materials.source, materials.skeleton, materials.splits, "cpu", code)
    tree = planner.tree(recipe, planner.meter(recipe))
    names = {arm: tree.lineage(Job(arm=arm, seed=0)).names[1:] for arm in recipe.trained_arms}
    for (arm, other), expected in SHARED.items():
        common = [first for first, second in zip(names[arm], names[other], strict=True) if first == second]
        assert common == names[arm][: len(common)]
        assert len(common) == expected, (arm, other)
    for arm in ("reproject3", "same_a3", "own_half", "own_share", "ga_moved"):
        assert info(run, arm)["reused_steps"] == 4, arm


# ---------------------------------------------------------------------------------------------------------
# Cost


def sizes() -> list[tuple[int, int]]:
    """Of all linear layers but the head."""
    model = tiny_model()
    return [shape_of(model, name) for name in target_names(model, "all-linear")]


def state_sizes(n_weights: int) -> dict[str, int]:
    """Bytes that each optimizer remembers, from the tables of docs/methods.md."""
    pairs = [(RANK * (n_out + n_in), RANK) for n_out, n_in in sizes()]
    entries = sum(numbers for numbers, _ in pairs)
    adam = 4 * (2 * entries + 2 * len(pairs))  # two moments; of each tensor a step count, a tensor as well
    rite = 4 * sum(2 * numbers + 2 * rank**2 for numbers, rank in pairs)  # a mean, V, and the other's basis
    others = n_weights - sum(n_out * n_in for n_out, n_in in sizes())
    galore = sum(RANK * min(size) + 2 * RANK * max(size) for size in sizes())
    apollo = sum(2 * RANK * max(size) + 1 for size in sizes())
    return {
        **dict.fromkeys(("lora", "chain3", "gradient3", "reproject3", "until6", "reflora3", "riemannian3"), adam),
        **dict.fromkeys(("muon3", "own_ball", "own_counted"), 4 * entries),
        "rite3": rite,
        "galore": 4 * (galore + 2 * others),
        "apollo": 4 * (apollo + 2 * others),
    }


def test_what_an_optimizer_remembers_is_counted_from_what_it_holds(run: Path) -> None:
    n_weights = info(run, "full")["num_trainable_params"]
    for arm, expected in state_sizes(n_weights).items():
        assert info(run, arm)["optimizer_bytes"] == expected, arm
    n_tensors = len(list(tiny_model().parameters()))
    assert info(run, "full")["optimizer_bytes"] == 4 * (2 * n_weights + n_tensors)


def test_flops_hold_those_of_optimizer_and_starts_and_say_which_are_not_counted(run: Path) -> None:
    told = {arm: info(run, arm) for arm in arms_of(run)}
    for arm in ("lora", "chain3", "same_a3", "full"):
        assert (told[arm]["optimizer_flops"], told[arm]["start_flops"]) == (0, 0)
    plain = told["chain3"]["flops"]
    for arm in ("rite3", "riemannian3", "reflora3", "muon3"):
        assert told[arm]["optimizer_flops"] > 0, arm
        assert told[arm]["flops"] == pytest.approx(plain + told[arm]["optimizer_flops"], rel=1e-9), arm
    # Into the subspace and back at each step, out of an SVD at every fourth; of the sketch once, of none.
    there = sum(product(*size, RANK) for size in sizes())
    svds = sum(6 * max(size) * min(size) ** 2 + 20 * min(size) ** 3 for size in sizes())
    assert told["galore"]["optimizer_flops"] == pytest.approx(12 * 2 * there + 3 * svds)
    assert told["apollo"]["optimizer_flops"] == pytest.approx(12 * there)
    assert told["galore"]["flops"] == pytest.approx(told["full"]["flops"] + told["galore"]["optimizer_flops"])
    for arm in ("gradient3", "lora_one3", "lora_ga3"):
        assert told[arm]["flops"] == pytest.approx(plain + told[arm]["start_flops"], rel=1e-9), arm
    assert told["gradient3"]["start_flops"] < told["lora_one3"]["start_flops"]  # which looks along its vectors too
    entries = sum(RANK * (n_out + n_in) for n_out, n_in in sizes())
    assert told["own_counted"]["optimizer_flops"] == (12 + 9) * entries  # as its function says, of three links
    assert told["own_ball"]["optimizer_flops"] is None
    assert told["own_ball"]["flops"] == plain
    assert told["own_start"]["start_flops"] is None
    assert plain < told["own_start"]["flops"] < told["gradient3"]["flops"]  # its gradients are counted, of half as much


def test_the_table_of_costs_shows_work_and_state_where_some_arm_is_not_plain(run: Path) -> None:
    summary = summarize(read_recipe(run / "recipe.yaml"), RunFolder.open(run))
    table = named_tables(summary)["cost"]
    rows = {str(row[0]): dict(zip(table.columns, map(str, row), strict=True)) for row in table.rows}
    assert rows["own_ball"]["by optimizer"] == "not counted"
    assert rows["chain3"]["by optimizer"] == rows["chain3"]["by starts"] == "0"
    assert rows["own_start"]["by starts"] == "not counted"
    assert rows["muon3"]["optimizer state"].endswith("kB")
    summary.arms.clear()
    assert "by optimizer" not in named_tables(summary)["cost"].columns


def test_directions_orthogonal_to_those_before_cost_more_link_by_link() -> None:
    says = flops_of(Idea("orthogonal"))
    assert says is not None
    second, third = (says(Shape(40, 24, 3, earlier)) for earlier in (3, 6))
    assert third - second == pytest.approx(qr(24, 6) - qr(24, 3) + 4 * product(3, 24, 3))


# ---------------------------------------------------------------------------------------------------------
# Going on and handing out


@pytest.mark.slow
def test_ideas_that_are_killed_again_and_again_end_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, warm_folder: Path, colours: Path
) -> None:
    recipe, said = tmp_path / "ideas.yaml", tmp_path / "said.txt"
    text = json.loads(ideas(warm_folder, colours, tmp_path / "killed")) | {"checkpoint_seconds": 0}
    recipe.write_text(json.dumps(text))
    undisturbed = fresh(recipe, [], tmp_path)
    rng, kills = random.Random(5), 0
    command = ["run", str(recipe), f"store={tmp_path / 'store'}", "--allow-code"]
    while (code := end(start(command, said, "logits", rng.randint(5, 30)))) == KILLED:
        kills += 1
        assert kills < 150, said.read_text()
    assert code == 0, said.read_text()
    assert kills > len(text["arms"]) / 2  # so that it was in the middle of most of them
    [folder] = (tmp_path / "killed").iterdir()
    assert outcome(folder).differences(undisturbed) == []


@pytest.mark.parametrize("arm", sorted({name for pair in SHARED for name in pair} - {*WHOLE}))
def test_plain_peft_gives_an_ideas_logits_from_its_exported_adapter(run: Path, warm_folder: Path, arm: str) -> None:
    model = with_adapter(warm_folder, exported(run, arm))
    assert relative(logits(model), logits(own_model(run, arm))) < 1e-5


@pytest.mark.parametrize("arm", WHOLE)
def test_whole_weights_are_no_adapter_and_an_export_says_so(run: Path, arm: str) -> None:
    told = cola("export", run, "--arm", arm, "--as", "adapter")
    assert told.exit_code == 2
    assert "merged" in told.output
    assert cola("export", run, "--arm", arm, "--as", "merged").exit_code == 0
