"""Names: what changes the weights changes the name, and nothing else does. Run: pytest tests/tree/test_segments.py

`PYTHONPATH=.:tests python tests/tree/test_segments.py` writes the golden loss curves anew.
"""

import copy
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import SKY, tiny_model, tiny_tokenizer
from runs import go, read_jsonl, result

from cola.data.splits import load_splits
from cola.link.find import find_model
from cola.plan.tree import Planner
from cola.recipe.plan import Job, trials_of
from cola.recipe.read import read_recipe
from cola.tree import segments
from cola.tree.segments import Lineage, Tree
from cola.tree.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROLES = frozenset({"lora", "chain", "full"})
LOW_RANK = frozenset({"lora", "chain"})
CHAIN = frozenset({"chain"})

# ---------------------------------------------------------------------------------------------------------
# A recipe to be changed, and its names


@dataclass
class Case:
    """A recipe whose arms are known by what they are, whatever they are called, and the seed that is looked at."""

    recipe: dict[str, Any]
    folder: Path
    names: dict[str, str] = field(default_factory=lambda: {role: role for role in ROLES})
    seed: int = 0

    def arm(self, role: str) -> dict[str, Any]:
        return self.recipe["arms"][self.names[role]]

    @property
    def training(self) -> dict[str, Any]:
        return self.recipe["training"]

    def write(self) -> Path:
        path = self.folder / "case.yaml"
        path.write_text(json.dumps(self.recipe))  # JSON is YAML
        return path


def rows_of(numbers: range, words: str = "") -> list[dict[str, Any]]:
    rng = random.Random(numbers.start)
    rows = []
    for number in numbers:
        thing = rng.choice(list(SKY))
        filler = " ".join(rng.choices(["one", "two", "three", "maybe"], k=rng.randint(1, 6)))
        question = f"{filler} {number} what colour is the {thing}{words}"
        rows.append({"id": number, "question": question, "answer": SKY[thing]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def case(tiny_folder: Path, tmp_path: Path) -> Case:
    return case_in(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def unchanged(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """What the recipe trains as it is."""
    folder = tmp_path_factory.mktemp("unchanged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLA_CACHE", str(folder / "cache"))
        return train(case_in(folder, tiny_folder), "store")


def case_in(folder: Path, model: Path) -> Case:
    """Every kind of arm, five steps each, with dropout; test rows have a file of their own."""
    write_rows(folder / "rows.jsonl", rows_of(range(80)))
    write_rows(folder / "test.jsonl", rows_of(range(1000, 1040)))
    return Case(
        {
            "name": "case",
            "model": {"name_or_path": str(model)},
            "data": {
                "files": {"train": str(folder / "rows.jsonl"), "test": str(folder / "test.jsonl")},
                "rows": {"train": 20, "validation": 4, "test": 4},
                "task": "multiple_choice",
                "prompt": "{question}?",
                "choices": list(SKY.values()),
                "label": "answer",
            },
            "training": {"epochs": 1, "batch_size": 4, "learning_rate": 0.01},
            "link": {"dropout": 0.1},
            "arms": {
                "lora": {"links": 1},
                "chain": {"links": 2},
                "full": {"method": "full", "learning_rate": 0.001},
            },
            "evaluation": {"general_text": None},
            "seeds": [0],
            "tracking": {"wandb": "off"},
            "output": str(folder / "runs"),
        },
        folder,
    )


def tree_of(case: Case, device: str = "cpu", spread: dict[str, Any] | None = None) -> Tree:
    """The names that a run of the case would give; nothing is cut yet."""
    recipe = read_recipe(case.write())
    source = find_model(recipe.model)
    splits = load_splits(recipe.data, source.tokenizer())
    planner = Planner(source, source.skeleton(), splits, device, spread=spread or {})
    tree = planner.tree(recipe, planner.meter(recipe))
    return Tree(tree.lineage)


def lineages(case: Case) -> dict[str, Lineage]:
    tree = tree_of(case)
    return {role: tree.lineage(Job(arm=case.names[role], seed=case.seed)) for role in ROLES}


def finals(case: Case) -> dict[str, str]:
    return {role: lineage.names[-1] for role, lineage in lineages(case).items()}


@dataclass
class Trained:
    """What a run made of each role: the name of its last state, its steps, and the weights that are left."""

    names: dict[str, str]
    steps: dict[str, list[Any]]
    weights: dict[str, bytes | None]


def train(case: Case, store: str = "store", roles: Iterable[str] = ROLES) -> Trained:
    """Train these roles of the case, and what else it has besides them, with a store of its own."""
    path = case.folder / store
    left_out = {case.names[role] for role in ROLES - set(roles)}
    arms = {name: arm for name, arm in case.recipe["arms"].items() if name not in left_out}
    case.recipe |= {"store": str(path), "arms": arms}
    folder, _ = go(case.write(), folder=case.folder / f"run-{store}")
    names, steps, weights = {}, {}, {}
    for role in roles:
        arm = case.names[role]
        info = result(folder, arm, case.seed)["train_info"]
        names[role] = info["segments"][-1]
        metrics = read_jsonl(folder.path / f"arms/{arm}/seed-{case.seed}/metrics.jsonl")
        steps[role] = [(r["loss"], r["grad_norm"]) for r in metrics if r["kind"] == "step"]
        state = Store(path, print).get(names[role])
        assert state is not None
        files = list(state.folder.glob("*model.safetensors"))
        weights[role] = files[0].read_bytes() if files else None
    return Trained(names, steps, weights)


# ---------------------------------------------------------------------------------------------------------
# Changes

Change = Callable[[Case, random.Random], None]


def put(*path: str, value: Any) -> Change:
    def change(case: Case, rng: random.Random) -> None:
        place = case.recipe
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value

    return change


def rename_arms(case: Case, rng: random.Random) -> None:
    """Other names, in another order."""
    new = {role: f"{rng.choice('xyz')}{number}-{role}" for number, role in enumerate(sorted(ROLES))}
    old = {name: role for role, name in case.names.items()}
    arms = [(new[old[name]] if name in old else name, arm) for name, arm in case.recipe["arms"].items()]
    rng.shuffle(arms)
    case.recipe["arms"] = dict(arms)
    case.names = new
    case.recipe.pop("comparison", None)


def more_arms(case: Case, rng: random.Random) -> None:
    arms = {"base": {"links": 0}, "chain3": {"links": 3}, "wide": {"rank": 3, "learning_rate": 0.002}}
    for name in rng.sample(sorted(arms), 2):
        case.recipe["arms"][name] = arms[name]


def compare(case: Case, rng: random.Random) -> None:
    roles = rng.sample(sorted(ROLES), 2)
    case.recipe["comparison"] = {"primary": [case.names[role] for role in roles], "full": case.names["full"]}


def spell_modules(case: Case, rng: random.Random) -> None:
    """The same linear layers by name, in any order, short or in full."""
    if "target_modules" in case.recipe["link"]:
        return
    short = rng.sample(MODULES, len(MODULES))
    kinds = {name: ("self_attn" if name in MODULES[:4] else "mlp") for name in MODULES}
    full = [f"model.layers.{layer}.{kinds[name]}.{name}" for name in short for layer in (1, 0)]
    case.recipe["link"]["target_modules"] = rng.choice([short, full])


def spell_links(case: Case, rng: random.Random) -> None:
    """What is the default, said; what is said for all arms, said for one."""
    case.recipe["link"] |= {"rank": 8, "alpha": 16}
    case.arm("lora")["dropout"] = case.recipe["link"]["dropout"]
    case.arm("chain")["method"] = "lora"
    case.training.update({"betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0})


def spell_knots(case: Case, rng: random.Random) -> None:
    """The rules said for each low-rank arm, and others for all arms that none of them follows."""
    for role in LOW_RANK:
        case.arm(role)["knot"] = {"merge": "exact", "merge_fraction": 1, "optimizer": "fresh", "schedule": "run"}
    case.recipe["knot"] = case.recipe.get("knot", {}) | {"merge": "no", "merge_fraction": 0.5}


def steps_for_epochs(case: Case, rng: random.Random) -> None:
    if case.training.pop("epochs", None) is not None:
        case.training["steps"] = 5


def more_test_rows(case: Case, rng: random.Random) -> None:
    case.recipe["data"]["rows"]["test"] = rng.choice([6, 9])


def another_field(case: Case, rng: random.Random) -> None:
    rows = [row | {"id": f"row {row['id']}", "comment": "unread"} for row in rows_of(range(80))]
    case.recipe["data"]["files"]["train"] = write_rows(case.folder / "rows-2.jsonl", rows)


def more_choices(case: Case, rng: random.Random) -> None:
    """What is wrong everywhere is never trained on."""
    case.recipe["data"]["choices"] = [*case.recipe["data"]["choices"], "maybe"]


def best(case: Case, rng: random.Random) -> None:
    case.recipe.setdefault("evaluation", {}).update(checkpoint="best", every=rng.choice([1, 2, "epoch", "link"]))


HARMLESS: dict[str, Change] = {
    "best": best,
    "every": put("evaluation", "every", value=2),
    "select_by": put("evaluation", "select_by", value="score"),
    "batch_tokens": put("evaluation", "batch_tokens", value=64),
    "comparison": compare,
    "tracking": put("tracking", value={"tracker": "trackio", "project": "another"}),
    "name": put("name", value="another"),
    "drift": put("knot", "max_drift", value=0.5),
    "the knots of each arm": spell_knots,
    "an optimizer of zeros": put("knot", "optimizer", value="zero"),
    "match": put("training", "match", value="tokens"),
    "weights": put("keep_full_weights", value=False),
    "gradient_checkpointing": put("training", "gradient_checkpointing", value=True),
    "checkpoint_seconds": put("checkpoint_seconds", value=0),
    "micro_batch_tokens": put("training", "micro_batch_tokens", value=1000),
    "seeds": put("seeds", value=[3, 0]),
    "more_test_rows": more_test_rows,
    "another_field": another_field,
    "more_arms": more_arms,
    "more_choices": more_choices,
    "spell_modules": spell_modules,
    "spell_links": spell_links,
    "steps_for_epochs": steps_for_epochs,
    "rename_arms": rename_arms,
}


def one_step_more(case: Case, rng: random.Random) -> None:
    case.training.pop("epochs", None)
    case.training["steps"] = 6


def another_seed(case: Case, rng: random.Random) -> None:
    case.recipe["seeds"], case.seed = [1], 1


def full_for_lora(case: Case, rng: random.Random) -> None:
    arm = case.arm("lora")
    arm.clear()
    arm["method"] = "full"


def for_arm(role: str, **settings: Any) -> Change:
    return lambda case, rng: case.arm(role).update(settings)


def of_each_link(case: Case, rng: random.Random) -> None:
    case.arm("chain")["links"] = [{"rank": 8}, {"rank": 4}]


def another_base(case: Case, rng: random.Random) -> None:
    folder = case.folder / "base-1"
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    case.recipe["model"]["name_or_path"] = str(folder)


def other_questions(case: Case, rng: random.Random) -> None:
    rows = write_rows(case.folder / "rows-3.jsonl", rows_of(range(80), " now"))
    case.recipe["data"]["files"]["train"] = rows


def other_answers(case: Case, rng: random.Random) -> None:
    rows = [row | {"answer": "red"} for row in rows_of(range(80))]
    case.recipe["data"]["files"]["train"] = write_rows(case.folder / "rows-4.jsonl", rows)


# What must change the name, and of which arms; all others must keep theirs.
HARMFUL: dict[str, tuple[Change, frozenset[str]]] = {
    "learning_rate": (put("training", "learning_rate", value=0.011), LOW_RANK),
    "learning_rate of an arm": (for_arm("full", learning_rate=0.0011), frozenset({"full"})),
    "schedule": (put("training", "schedule", value="cosine"), ROLES),
    "a late decay": (lambda case, rng: case.training.update({"schedule": "wsd", "decay_steps": 0.3}), ROLES),
    "warmup_steps": (put("training", "warmup_steps", value=1), ROLES),
    "knot.schedule": (put("knot", "schedule", value="link"), CHAIN),
    "knot.warmup_steps": (put("knot", "warmup_steps", value=1), CHAIN),
    "knot.merge": (put("knot", "merge", value="no"), CHAIN),
    "knot.merge_fraction": (put("knot", "merge_fraction", value=0.5), CHAIN),
    "knot.optimizer": (put("knot", "optimizer", value="keep"), CHAIN),
    "knot.optimizer pruned": (put("knot", "optimizer", value={"prune_magnitude": 0.9}), CHAIN),
    "knot.optimizer pruned at random": (put("knot", "optimizer", value={"prune_random": 0.9}), CHAIN),
    "protocol": (put("training", "protocol", value="grow"), CHAIN),
    "rank": (put("link", "rank", value=4), LOW_RANK),
    "alpha": (put("link", "alpha", value=9), LOW_RANK),
    "dropout": (put("link", "dropout", value=0.2), LOW_RANK),
    "no dropout": (put("link", "dropout", value=0.0), LOW_RANK),
    "dropout of an arm": (for_arm("lora", dropout=0.3), frozenset({"lora"})),
    "init": (put("link", "init", value="gaussian"), LOW_RANK),
    "init after the first link": (put("link", "init", value="orthogonal"), CHAIN),
    "use_rslora": (put("link", "use_rslora", value=True), LOW_RANK),
    "use_dora": (put("link", "use_dora", value=True), LOW_RANK),
    "loraplus_lr_ratio": (put("link", "loraplus_lr_ratio", value=4), LOW_RANK),
    "freeze": (for_arm("full", freeze="embeddings"), frozenset({"full"})),
    "target_modules": (put("link", "target_modules", value=["q_proj", "v_proj"]), LOW_RANK),
    "batch_size": (put("training", "batch_size", value=5), ROLES),
    "seed": (another_seed, ROLES),
    "steps": (one_step_more, ROLES),
    "weight_decay": (put("training", "weight_decay", value=0.1), ROLES),
    "betas": (put("training", "betas", value=[0.9, 0.99]), ROLES),
    "epsilon": (put("training", "epsilon", value=1e-6), ROLES),
    "max_grad_norm": (put("training", "max_grad_norm", value=0.01), ROLES),
    "dtype": (put("model", "dtype", value="bfloat16"), ROLES),
    "dtype of an arm": (for_arm("lora", dtype="bfloat16"), frozenset({"lora"})),
    "links": (for_arm("chain", links=3), CHAIN),
    "link lengths": (for_arm("chain", links=[{"steps": 1}, {}]), CHAIN),
    "rank of a link": (of_each_link, CHAIN),
    "method": (full_for_lora, frozenset({"lora"})),
    "another base": (another_base, ROLES),
    "other questions": (other_questions, ROLES),
    "other answers": (other_answers, ROLES),
    "data.seed": (put("data", "seed", value=1), ROLES),
    "data.rows.train": (put("data", "rows", "train", value=24), ROLES),
    "data.prompt": (put("data", "prompt", value="{question}!"), ROLES),
    "data.answer_prefix": (put("data", "answer_prefix", value=" the "), ROLES),
    "micro_batch_tokens": (put("training", "micro_batch_tokens", value=48), ROLES),
}


def changed(case: Case, rng: random.Random, harmless: list[str], harmful: str | None = None) -> Case:
    """A copy with these changes. Arms are renamed last, since the others speak of them by name."""
    case = copy.deepcopy(case)
    for name in sorted(harmless, key=lambda name: name == "rename_arms"):
        HARMLESS[name](case, rng)
    if harmful:
        HARMFUL[harmful][0](case, rng)
    return case


def some_harmless(rng: random.Random, harmful: str | None = None) -> list[str]:
    names = sorted(HARMLESS)
    if harmful and harmful.startswith("knot."):
        names = [n for n in names if n not in ("the knots of each arm", "an optimizer of zeros")]
    if harmful == "use_dora":
        names.remove("the knots of each arm")  # for all others it leaves pairs beside the weights, which DoRA cannot
    if harmful == "protocol":
        names.remove("match")
    if harmful in ("target_modules", "rank", "alpha", "rank of a link", "method", "micro_batch_tokens", "seed"):
        # These speak of the same keys.
        names = [n for n in names if n not in ("spell_modules", "spell_links", "micro_batch_tokens", "seeds")]
    if harmful in ("dropout", "no dropout", "dropout of an arm", "other questions", "other answers", "data.prompt"):
        names = [n for n in names if n not in ("spell_links", "another_field")]
    if harmful == "data.rows.train":
        names.remove("steps_for_epochs")
    return rng.sample(names, rng.randint(1, min(6, len(names))))


# ---------------------------------------------------------------------------------------------------------
# The name changes if and only if something changed that can change the weights


@pytest.mark.slow
@pytest.mark.parametrize("harmful", HARMFUL)
def test_what_can_change_the_weights_changes_the_name_and_the_weights(
    case: Case, unchanged: Trained, harmful: str
) -> None:
    roles = HARMFUL[harmful][1]
    after = train(changed(case, random.Random(0), [], harmful), roles=roles)
    for role in roles:
        assert after.names[role] != unchanged.names[role]
        assert after.weights[role] != unchanged.weights[role]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_what_cannot_change_the_weights_changes_no_name_and_no_bit_of_them(
    case: Case, unchanged: Trained, number: int
) -> None:
    rng = random.Random(number)
    # The first runs have each change at least once between them, the others draw.
    names = sorted(HARMLESS)
    chosen = names[number::5] if number < 5 else rng.sample(names, rng.randint(4, 10))
    after = train(changed(case, rng, chosen))
    assert after.names == unchanged.names, chosen
    assert after.steps == unchanged.steps, chosen
    for role in ROLES:
        let_go = role == "full" and "weights" in chosen
        assert unchanged.weights[role] is not None
        assert after.weights[role] == (None if let_go else unchanged.weights[role]), chosen


@pytest.mark.slow
def test_random_recipes_have_the_same_names_if_and_only_if_they_train_the_same(case: Case) -> None:
    before = finals(case)
    rng = random.Random(0)
    for _ in range(60):
        chosen = some_harmless(rng)
        assert finals(changed(case, rng, chosen)) == before, chosen
    for harmful in [*HARMFUL, *rng.choices(sorted(HARMFUL), k=60)]:
        chosen = some_harmless(rng, harmful)
        after = finals(changed(case, rng, chosen, harmful))
        differ = {role for role in ROLES if after[role] != before[role]}
        assert differ == HARMFUL[harmful][1], (harmful, chosen)


def test_two_changes_of_the_weights_never_undo_each_other(case: Case) -> None:
    # Every pair of harmful changes, and each alone, leads to states of its own.
    rng = random.Random(0)
    seen: dict[str, str] = {finals(case)["chain"]: "nothing"}
    for harmful, (_, roles) in HARMFUL.items():
        if "chain" in roles:
            name = finals(changed(case, rng, [], harmful))["chain"]
            assert name not in seen, (harmful, seen[name])
            seen[name] = harmful


def test_another_training_version_has_other_names(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = finals(case)
    monkeypatch.setattr(segments, "TRAINING_VERSION", segments.TRAINING_VERSION + 1)
    assert not set(before.values()) & set(finals(case).values())


@pytest.mark.parametrize(("dtype", "scaled"), [("float32", False), ("bfloat16", False), ("float16", True)])
def test_only_a_gradient_start_in_float16_is_named_by_its_scaling(case: Case, dtype: str, scaled: bool) -> None:
    case.recipe["model"]["dtype"] = dtype
    case.recipe["link"] |= {"init": "gradient", "init_batches": 2}
    starts = [header["start"] for header in lineages(case)["chain"].headers]
    assert [set(start) - {"init", "batches"} for start in starts] == 2 * [{"scaled"} if scaled else set()]
    case.recipe["link"] = {}
    assert [header["start"] for header in lineages(case)["chain"].headers] == 2 * [{"init": "default"}]


def test_another_number_of_processes_has_other_names_for_all_but_the_base(case: Case) -> None:
    spreads = ({}, {"dp": 2}, {"dp": 3}, {"dp": 2, "shard": True})
    names = [
        [tree_of(case, spread=spread).lineage(Job(arm=role, seed=0)).names for role in ROLES] for spread in spreads
    ]
    assert len({path[0] for paths in names for path in paths}) == 1  # which no step has touched
    trained = [{name for path in paths for name in path[1:]} for paths in names]
    assert len(set().union(*trained)) == sum(map(len, trained))


def test_another_kind_of_device_has_other_names(case: Case) -> None:
    names = {
        device: {name for role in ROLES for name in tree_of(case, device).lineage(Job(arm=role, seed=0)).names}
        for device in ("cpu", "cuda")
    }
    assert not names["cpu"] & names["cuda"]


# ---------------------------------------------------------------------------------------------------------
# Names up to a step depend on nothing that follows it


def test_a_longer_run_at_a_constant_rate_begins_with_the_names_of_the_shorter(case: Case) -> None:
    case.training["schedule"] = "constant"
    short = lineages(case)
    case.training["epochs"] = 3
    long = lineages(case)
    for role in ("lora", "full"):
        assert len(long[role].names) == 16
        assert long[role].names[:6] == short[role].names


def test_a_chain_begins_with_the_names_of_the_chains_that_it_goes_on_from(case: Case) -> None:
    case.training.update({"schedule": "constant", "steps": 6, "epochs": None})
    names = {}
    for number in (1, 2, 3):
        case.arm("chain")["links"] = [{"steps": 2}] * number
        case.training["steps"] = 2 * number
        names[number] = lineages(case)["chain"].names
    assert names[3][:5] == names[2]
    assert names[2][:3] == names[1]
    case.arm("chain")["links"] = [{"steps": 2}, {"steps": 2}, {"steps": 2, "rank": 3, "learning_rate": 1.0}]
    assert lineages(case)["chain"].names[:5] == names[2]
    assert lineages(case)["chain"].names[5] != names[3][5]


def test_a_chain_that_grows_begins_as_the_shorter_one_did_whatever_the_schedule(case: Case) -> None:
    case.training.update({"protocol": "grow", "schedule": "cosine", "warmup_steps": 1})
    names = {}
    for number in (1, 2, 3):
        case.arm("chain")["links"] = number
        names[number] = lineages(case)["chain"].names
        assert len(names[number]) == 5 * number + 1
    assert names[3][:11] == names[2]
    assert names[2][:6] == names[1] == lineages(case)["lora"].names


def test_states_of_one_path_have_names_of_their_own(case: Case) -> None:
    case.training.update({"schedule": "constant", "epochs": 4})
    for lineage in lineages(case).values():
        assert len(set(lineage.names)) == len(lineage.names) == 21


def test_the_causes_of_a_segment_hash_to_its_name(case: Case) -> None:
    for lineage in lineages(case).values():
        for step in range(1, len(lineage.steps) + 1):
            assert segments.state_name(json.loads(json.dumps(lineage.causes(step)))) == lineage.names[step]


# ---------------------------------------------------------------------------------------------------------
# Cuts


def test_a_path_is_cut_at_the_ends_of_links_and_where_arms_part(case: Case) -> None:
    case.training.update({"schedule": "constant", "steps": 6, "epochs": None})
    case.arm("chain")["links"] = 3
    tree = tree_of(case)
    lora, chain, full = (Job(arm=arm, seed=0) for arm in ("lora", "chain", "full"))
    tree.plan([tree.lineage(lora)])
    assert tree.cuts(lora) == [6]
    tree.plan(map(tree.lineage, [lora, chain, full]))
    assert tree.cuts(lora) == [2, 6]  # where the chain ties its first knot
    assert tree.cuts(chain) == [2, 4, 6]
    assert tree.cuts(full) == [6]
    shared = tree.lineage(lora).names[2]
    assert tree.lineage(chain).names[2] == shared
    needed = tree.segments([lora, chain, full])
    assert sorted(map(len, needed.values())) == [2, 2, 2, 4, 6]
    assert len(needed[shared]) == 2
    assert tree.goes_on(shared)
    assert not tree.goes_on(tree.lineage(lora).names[6])


def test_paths_that_never_meet_are_not_cut_for_each_other(case: Case) -> None:
    case.recipe["seeds"] = [0, 1]
    tree = tree_of(case)
    jobs = [Job(arm=arm, seed=seed) for arm in ("lora", "full") for seed in (0, 1)]
    tree.plan(map(tree.lineage, jobs))
    assert [tree.cuts(job) for job in jobs] == [[5]] * 4
    assert len(tree.segments(jobs)) == 4


def test_a_trial_and_the_run_that_takes_its_rate_are_one_path(case: Case) -> None:
    case.training["learning_rate"] = {"search": [0.01, 0.02], "per": "seed"}
    del case.arm("full")["learning_rate"]  # every arm has the same trials
    tree = tree_of(case)
    trials = trials_of(read_recipe(case.write()), "lora", 0)
    chosen = Job(arm="lora", seed=0, choice=(("learning_rate", 0.02),))
    tree.plan(map(tree.lineage, [*trials, chosen]))
    assert len(tree.segments([*trials, chosen])) == 2
    assert tree.lineage(chosen).names == tree.lineage(trials[1]).names


# ---------------------------------------------------------------------------------------------------------
# The numbers themselves

# Each curve is sensitive to something: LoRA to dropout, the chain to Adam's epsilon (tiny gradients) and decay, full
# fine-tuning to the schedule.
CURVES: dict[str, dict[str, Any]] = {
    "lora": {"link": {"dropout": 0.1}},
    "chain": {"max_grad_norm": 1e-3, "weight_decay": 0.1, "schedule": "constant"},
    "full": {"schedule": "cosine", "warmup_steps": 2, "micro_batch_tokens": 48},
}


def curves(folder: Path) -> dict[str, list[float]]:
    """Ten losses of each kind of arm, trained in this folder."""
    model = folder / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    found = {}
    for role, settings in CURVES.items():
        case = case_in(folder, model)
        link = settings.get("link", {})
        training = {key: value for key, value in settings.items() if key != "link"}
        case.recipe["arms"] = {role: case.recipe["arms"][role]}
        case.recipe |= {"link": link, "store": str(folder / "store")}
        case.training.update({"epochs": 2, "learning_rate": 0.01, **training})
        run_folder, _ = go(case.write(), folder=folder / role)
        metrics = read_jsonl(run_folder.path / f"arms/{role}/seed-0/metrics.jsonl")
        found[role] = [row["loss"] for row in metrics if row["kind"] == "step"]
    return found


def test_training_makes_the_numbers_that_its_version_stands_for(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    advice = (
        "The store would serve states that this code would not make. If the change of the numbers is meant, raise "
        "TRAINING_VERSION in cola/tree/segments.py and write the curves anew, as the head of this file says"
    )
    assert golden["training_version"] == segments.TRAINING_VERSION, advice
    found = curves(tmp_path)
    for role, losses in golden["losses"].items():
        assert len(losses) == 10
        assert found[role] == pytest.approx(losses, rel=2e-5), f"the losses of {role} changed. {advice}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        os.environ["COLA_CACHE"] = str(Path(made) / "cache")
        words = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        golden = {"training_version": segments.TRAINING_VERSION, "commit": commit, "losses": curves(Path(made))}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
