"""Killed, stopped, gone on with, shared: always the bits of an undisturbed run. Run: pytest tests/run/test_resume.py"""

import io
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from children import KILLED, end, start
from conftest import SKY
from offline import sent
from rich.console import Console
from runs import CHOICE, create_run, fresh, go, open_run, outcome, read_jsonl, result, write_recipe

from cola.link.model import Source
from cola.measure.scores import ExampleScore
from cola.recipe.read import read_recipe
from cola.recipe.schema import Evaluation
from cola.report.terminal import Terminal
from cola.run.course import better, selection_key
from cola.run.interrupt import Interrupted, Signals
from cola.run.run import run
from cola.tree.run_folder import RunFolder
from cola.tree.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

# What a process may be at when it is killed: writing, publishing, tying a knot, computing, stepping, scoring.
PLACES = ("fsync", "rename", "replace", "rmtree", "knot", "half a knot", "logits", "AdamW", "score")
N_KILLS = 3  # of each variant of a recipe; the variants begin two places apart, so each place is met in one or more


OWN = Path(__file__).parents[1] / "own_ideas.py"
VARIANTS = {
    "last": ["link.dropout=0.1", "training.schedule=constant", "evaluation.every=2", *CHOICE],
    "best": ["evaluation.checkpoint=best", "evaluation.every=1", "training.learning_rate=3e-2", "link.dropout=0.1"],
    "search": ["training.learning_rate={search: [1e-3, 1e-2]}", "arms.full.learning_rate=null", *CHOICE],
    "knots": ["knot={optimizer: {prune_random: 0.5}, merge_fraction: 0.5}", "link.init=orthogonal", *CHOICE],
    "own": [
        f"link.init={OWN}:step",
        "link.init_batches=2",
        f"arms.lora.optimizer={OWN}:heavy_ball",
        "arms.chain3.until={update_stops: {tolerance: 0.9, every: 1}}",
        "arms.chain3.knot.optimizer=reproject",
        *CHOICE,
    ],
    "forgetful": ["keep_full_weights=false", "arms.lora=null", "comparison.primary=null", *CHOICE],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    recipe_text: str, tmp_path: Path, variant: str
) -> None:
    recipe, overrides, said = write_recipe(tmp_path, recipe_text), VARIANTS[variant], tmp_path / "said.txt"
    undisturbed = fresh(recipe, overrides, tmp_path)
    rng = random.Random(variant)
    # Rarer places are met less often.
    often = {"rmtree": 3, "knot": 3, "half a knot": 3, "score": 4, "AdamW": 8, "rename": 10}
    first = 2 * list(VARIANTS).index(variant)
    places = [*PLACES, "time"][first:] + [*PLACES, "time"][:first]
    drawn = variant == "best"  # so that a kill may fall into the drawing of a page
    kills: list[str] = []
    rounds = 0
    while len(kills) < N_KILLS:
        # A round is one run, killed until it is through.
        rounds += 1
        output, store = tmp_path / f"killed-{rounds}", tmp_path / f"store-{rounds}"
        command = ["run", str(recipe), *overrides, f"output={output}", f"store={store}", "--allow-code"]
        code = KILLED
        while code == KILLED:
            place = places[len(kills)] if len(kills) < N_KILLS else "nothing"
            if place == "time":
                process = start(command, said, drawn=drawn)
                time.sleep(rng.uniform(0.3, 1.5))
                process.kill()
            else:
                process = start(command, said, place, rng.randint(1, often.get(place, 25)), drawn=drawn)
            code = end(process)
            assert code in (0, KILLED), (kills, said.read_text())
            kills += [place] if code == KILLED else []
            if any(RunFolder(path.parent).finished for path in output.glob("*/recipe.yaml")):
                break  # killed with all done, on its way out: the same command would begin another run
        [run_folder] = [path.parent for path in output.glob("*/recipe.yaml")]
        assert outcome(run_folder).differences(undisturbed) == [], (kills, said.read_text())
        for words in (["ls"], ["verify"], ["prune", "--yes"]):
            assert end(start(["store", *words, "--store", str(store)], said)) == 0, (kills, said.read_text())
    assert "Traceback" not in said.read_text()
    if variant == "forgetful":
        assert not list(tmp_path.glob("store-*/segments/*/*/model.safetensors")), kills


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_second_step_still_comes_to_its_end(recipe_text: str, tmp_path: Path) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    overrides = ["training.steps=6", "arms.full=null", "arms.lora=null", "comparison.primary=null", "link.dropout=0.1"]
    undisturbed = fresh(recipe, overrides, tmp_path)
    command = ["run", str(recipe), *overrides, f"output={tmp_path / 'killed'}"]
    sessions = 1
    while (code := end(start(command, said, "AdamW", 2))) == KILLED:
        sessions += 1
        assert sessions <= 7
    assert (code, sessions) == (0, 6)  # one step in each, and the last one is the sixth
    [run_folder] = (tmp_path / "killed").iterdir()
    assert outcome(run_folder).differences(undisturbed) == []
    assert result(RunFolder(run_folder), "chain3")["train_info"]["reused_steps"] == 5


# ---------------------------------------------------------------------------------------------------------
# The same command


@pytest.mark.slow
def test_the_same_command_after_the_end_makes_a_new_folder_trains_nothing_and_loads_no_weights(
    recipe_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    search = VARIANTS["search"]
    command = ["run", str(recipe), *search]
    assert end(start(command, said)) == 0, said.read_text()
    [first] = (tmp_path / "runs").iterdir()

    def load(*_: Any) -> None:
        raise AssertionError("the model is loaded though nothing is left to be computed")

    monkeypatch.setattr(Source, "load", load)
    folder, summary = go(recipe, *search)
    assert folder.path != first
    assert outcome(folder.path).differences(outcome(first)) == []
    for path in folder.path.rglob("result.json"):
        info = json.loads(path.read_text())["train_info"]
        assert info["reused_steps"] == info["steps"]
    assert all(arm.states == {0: "ok"} for arm in summary.arms.values())


def steps_in(path: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged so far."""
    return [row for row in read_jsonl(path) if row["kind"] == "step"]


def stop_when(process: Any, signal_number: int, ready: Callable[[], bool]) -> int:
    """Send a signal as soon as something has come to pass; the exit code."""
    while not ready():
        assert process.is_alive(), process.exitcode
        time.sleep(0.005)
    os.kill(process.pid, signal_number)
    return end(process)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "arm"), [(signal.SIGINT, "chain3"), (signal.SIGTERM, "full")])
def test_a_stop_inside_a_link_keeps_the_step_it_was_at_and_goes_on_to_the_same_bits(
    recipe_text: str, tmp_path: Path, stop: signal.Signals, arm: str
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    others = [f"arms.{name}=null" for name in ("base", "lora", "chain3", "full") if name != arm]
    overrides = ["training.steps=60", "checkpoint_seconds=60", "comparison.primary=null", "evaluation.every=never"]
    overrides += [*others, *(["link.dropout=0.1"] if arm == "chain3" else []), *CHOICE]
    command = ["run", str(recipe), *overrides, f"output={tmp_path / 'stopped'}"]

    def in_the_middle() -> bool:
        logs = (tmp_path / "stopped").glob(f"*/arms/{arm}/seed-0/metrics.jsonl")
        return any(len(steps_in(path)) >= 25 for path in logs)

    assert stop_when(start(command, said), stop, in_the_middle) == 75, said.read_text()
    [folder] = (tmp_path / "stopped").iterdir()
    last = steps_in(folder / "arms" / arm / "seed-0/metrics.jsonl")[-1]["step"]
    assert 25 <= last < 60
    store = Store(Path(os.environ["COLA_CACHE"]) / "store", print)
    kept = [record for path in store.segments() if (record := store.record(path))["kind"] == "checkpoint"]
    assert [record["last_step"] for record in kept] == [last]
    assert end(start(command, said)) == 0, said.read_text()
    assert result(RunFolder(folder), arm)["train_info"]["reused_steps"] == last
    assert outcome(folder).differences(fresh(recipe, overrides, tmp_path)) == []
    assert not [path for path in store.segments() if store.record(path)["kind"] == "checkpoint"]


def test_a_signal_that_waits_is_not_forgotten() -> None:
    # One that comes after the last step's check must not let a whole evaluation, or the next arm, go on.
    signals = Signals()
    with signals.installed(), pytest.raises(Interrupted), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_stop_while_validation_is_scored_keeps_the_step_before_it(recipe_text: str, tmp_path: Path) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    overrides = ["checkpoint_seconds=60", "arms.full=null", "arms.base=null", "evaluation.every=5", *CHOICE]
    stopped = [*overrides, f"output={tmp_path / 'stopped'}"]
    assert end(start(["run", str(recipe), *stopped], said, "score, stopped", 1)) == 75, said.read_text()
    assert end(start(["run", str(recipe), *stopped], said)) == 0, said.read_text()
    [folder] = (tmp_path / "stopped").iterdir()
    assert result(RunFolder(folder), "lora")["train_info"]["reused_steps"] == 5
    assert outcome(folder).differences(fresh(recipe, overrides, tmp_path)) == []


# ---------------------------------------------------------------------------------------------------------
# W&B


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "lost"),
    [
        # Three stops: in LoRA's fourth step, which is an evaluation point, and while validation is scored.
        pytest.param(["AdamW, stopped 4", "score, stopped 1", "score, stopped 1"], 0, id="stopped"),
        # A kill may lose the row that was on its way.
        pytest.param(["AdamW 6", "AdamW 7"], 1, id="killed"),
    ],
)
def test_wandb_goes_on_with_the_same_run_and_gets_each_step_once(
    recipe_text: str, tmp_path: Path, places: list[str], lost: int
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    overrides = ["arms.full=null", "arms.base=null", "tracking.wandb=offline", "evaluation.every=4", *CHOICE]
    command = ["run", str(recipe), *overrides, f"output={tmp_path / 'stopped'}"]
    for words in places:
        place, _, number = words.rpartition(" ")
        code = end(start(command, said, place, int(number)))
        assert code == (75 if "stopped" in place else KILLED), said.read_text()
    assert end(start(command, said)) == 0, said.read_text()
    [folder] = (tmp_path / "stopped").iterdir()
    curves = sent(folder)
    assert sorted(curves) == ["chain3-seed0", "comparison", "lora-seed0"]
    assert curves["comparison"].final["arm/lora/gap_loss"] == curves["lora-seed0"].final["gap/loss"]
    for arm, looks in (("lora", [4, 8, 9]), ("chain3", [4, 8, 9])):
        mine = curves[f"{arm}-seed0"]
        assert len(mine.ids) == 1
        steps = mine.steps("train/loss")
        assert len(steps) == len(set(steps))
        losses = {row["step"]: row["loss"] for row in steps_in(folder / f"arms/{arm}/seed-0/metrics.jsonl")}
        assert all(point["train/loss"] == losses[point["step"]] for point in mine.points if "train/loss" in point)
        evaluation = result(RunFolder(folder), arm)["evaluation"]
        assert mine.final["gap/loss"] == evaluation["gap_loss"]
        assert mine.final["gap/acc"] == evaluation["gap_acc"]
        assert len(steps) >= len(losses) - lost, steps
        if not lost:
            assert mine.steps("validation/loss") == looks
            assert mine.steps("knot/drift_relative") == ([9] if arm == "lora" else [3, 6, 9])


# ---------------------------------------------------------------------------------------------------------
# Sharing


def told(recipe: Path, *overrides: str) -> tuple[RunFolder, list[str]]:
    """A new run, and what it says of its segments."""
    console = Console(file=io.StringIO(), soft_wrap=True, width=10_000)
    resolved = read_recipe(recipe, list(overrides))
    folder = create_run(resolved)
    run(resolved, folder, Terminal(console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return folder, [line for line in lines if line.startswith("segments: ")]


def counts(line: str) -> tuple[int, ...]:
    """Needed, found and to be trained; steps to be trained and in all."""
    store = Path(os.environ["COLA_CACHE"]) / "store"
    words = line.replace(str(store), "STORE").split()
    return tuple(int(word) for word in words if word.isdigit())


def reused(folder: RunFolder, arm: str, seed: int = 0) -> tuple[int, int]:
    info = result(folder, arm, seed)["train_info"]
    return info["reused_steps"], info["steps"]


def test_lora_and_a_chain_train_their_common_steps_once(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    overrides = ["training.schedule=constant", "arms.full=null", *CHOICE]
    folder, [line] = told(recipe, *overrides)
    # 3 in common, 6 more of LoRA, 3 and 3 more of the chain.
    assert counts(line) == (4, 0, 4, 15, 15)
    assert reused(folder, "lora") == (0, 9)
    assert reused(folder, "chain3") == (3, 9)
    assert outcome(folder.path).differences(
        fresh(recipe, [*overrides, "arms.lora=null", "comparison.primary=null"], tmp_path)
    ) == sorted(
        str(path.relative_to(folder.path))
        for path in (folder.path / "arms/lora").rglob("*")
        if path.suffix in (".safetensors", ".jsonl") or path.name == "result.json"
    )


@pytest.mark.slow
def test_the_chosen_trial_is_not_trained_again(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    grid = "training.learning_rate={search: [1e-3, 1e-2], seeds: [0]}"
    folder, lines = told(recipe, grid, "arms.full.learning_rate=null", "arms.base=null", *CHOICE)
    # Two rates of three arms; LoRA and the chain part after three steps.
    assert counts(lines[0])[:3] == (10, 0, 10)
    assert lines[1] == "segments: those of 3 more runs are known when the searches are at their end"
    assert counts(lines[2])[:3] == (10, 10, 0) or counts(lines[2])[:3] == (5, 5, 0)
    assert [reused(folder, arm) for arm in ("lora", "chain3", "full")] == [(9, 9)] * 3


@pytest.mark.slow
def test_another_recipe_of_another_name_finds_what_it_shares(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    told(recipe, "arms.chain3=null", "comparison.primary=null", *CHOICE)
    elsewhere = ["name=another", f"output={tmp_path / 'elsewhere'}", *CHOICE]
    second, [line] = told(recipe, *elsewhere)
    # LoRA's last step and full fine-tuning's; not LoRA's third step, where nobody parted from it.
    assert counts(line) == (5, 2, 3, 9, 24)
    assert reused(second, "lora") == reused(second, "full") == (9, 9)
    third, [line] = told(recipe, *elsewhere, "name=third", "arms.lora=null", "comparison.primary=null")
    assert counts(line) == (4, 4, 0, 0, 18)
    assert reused(third, "chain3") == (9, 9)


@pytest.mark.slow
def test_a_seed_that_is_added_is_all_that_is_trained(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    told(recipe, "training.schedule=constant", *CHOICE)
    folder, [line] = told(recipe, "training.schedule=constant", "seeds=[0, 1]", *CHOICE)
    assert counts(line) == (10, 5, 5, 24, 48)
    for arm in ("lora", "chain3", "full"):
        assert reused(folder, arm) == (9, 9)
    assert reused(folder, "full", 1) == reused(folder, "lora", 1) == (0, 9)
    assert reused(folder, "chain3", 1) == (3, 9)


# ---------------------------------------------------------------------------------------------------------
# Other questions about what was trained


@pytest.mark.slow
def test_a_state_whose_validation_was_not_measured_is_evaluated_and_not_trained(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    told(recipe, "evaluation.every=never", *CHOICE)
    changed = ["evaluation.every=never", "evaluation.batch_tokens=64", *CHOICE]
    folder, [line] = told(recipe, *changed)
    assert counts(line)[2] == 0
    for arm in ("lora", "chain3", "full"):
        assert reused(folder, arm) == (9, 9)
    assert outcome(folder.path).differences(fresh(recipe, changed, tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("every", "checkpoint"), [("1", "best"), ("link", "last"), ("never", "last")])
def test_validation_that_is_looked_at_elsewhere_gives_what_a_run_of_its_own_would_have(
    recipe_text: str, tmp_path: Path, every: str, checkpoint: str
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    told(recipe, "evaluation.every=2", "training.learning_rate=3e-2", *CHOICE)
    changed = [f"evaluation.every={every}", f"evaluation.checkpoint={checkpoint}", "training.learning_rate=3e-2"]
    folder, _ = told(recipe, *changed, *CHOICE)
    assert outcome(folder.path).differences(fresh(recipe, [*changed, *CHOICE], tmp_path)) == []
    if every == "never":
        assert reused(folder, "lora") == reused(folder, "full") == (9, 9)


# The answer cannot be told from this prompt, so learning the training rows soon makes validation worse.
UNLEARNABLE = ["data.prompt=row {id}", "link.rank=16", "training.learning_rate=3e-2", "arms.full.learning_rate=1e-2"]


def trains_nothing(recipe: Path, *overrides: str) -> RunFolder:
    """The same run again finds all of it."""
    folder, _ = told(recipe, *overrides)
    for path in folder.path.glob("arms/*/seed-*/result.json"):
        record = json.loads(path.read_text())
        assert record["status"] == "ok", record["run_info"]
        assert record["train_info"]["reused_steps"] == record["train_info"]["steps"], path
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "longer",
    [
        pytest.param(["evaluation.every=4", "evaluation.checkpoint=best"], id="a better point"),
        # Validation was not looked at on the way, so the longer run comes past the shorter one's end.
        pytest.param(["evaluation.every=1"], id="a checkpoint"),
    ],
)
def test_a_longer_run_does_not_take_away_the_end_of_a_shorter(
    recipe_text: str, tmp_path: Path, longer: list[str]
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    short = [
        "training.schedule=constant",
        "training.steps=4",
        "evaluation.every=never",
        "arms.chain3=null",
        "comparison.primary=null",
        *CHOICE,
    ]
    first, _ = told(recipe, *short)
    told(recipe, *short, "training.steps=9", *longer)
    again = trains_nothing(recipe, *short)
    assert again.scores("full", 0, "test") == first.scores("full", 0, "test")


@pytest.mark.slow
def test_another_choice_of_the_best_does_not_take_away_the_best_of_a_run_before(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    best = ["evaluation.checkpoint=best", "training.steps=18", *UNLEARNABLE, *CHOICE]
    best += ["arms.full=null", "arms.base=null"]
    folder, _ = told(recipe, *best, "evaluation.every=5")
    before = {arm: result(folder, arm)["train_info"] for arm in ("lora", "chain3")}
    folder, _ = told(recipe, *best, "evaluation.every=1")
    after = {arm: result(folder, arm)["train_info"] for arm in ("lora", "chain3")}
    assert all(before[arm]["scored_step"] != after[arm]["scored_step"] for arm in before)
    store = Store(Path(os.environ["COLA_CACHE"]) / "store", print)
    for info in (*before.values(), *after.values()):
        assert store.get(info["scored_state"]) is not None, info["scored_step"]
    trains_nothing(recipe, *best, "evaluation.every=5")
    trains_nothing(recipe, *best, "evaluation.every=1")


@pytest.mark.slow
def test_arms_with_common_steps_leave_each_other_their_best(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    best = ["evaluation.checkpoint=best", "evaluation.every=1", "training.steps=18", *UNLEARNABLE, *CHOICE]
    best += ["training.schedule=constant", "arms.short={links: [{steps: 3}, {}]}"]
    folder, _ = told(recipe, *best)
    store = Store(Path(os.environ["COLA_CACHE"]) / "store", print)
    for arm in ("lora", "chain3", "short", "full"):
        info = result(folder, arm)["train_info"]
        assert store.get(info["scored_state"]) is not None, (arm, info["scored_step"])
    trains_nothing(recipe, *best)


def more_tests(folder: Path) -> str:
    """A data override whose test rows are a file of their own."""
    rows = [
        {"id": n, "question": f"{n} what colour is the {thing}", "label": list(SKY).index(thing)}
        for n, thing in enumerate([*SKY] * 5, 500)
    ]
    path = folder / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_full_weights_that_were_let_go_are_trained_again_only_for_a_new_question(
    recipe_text: str, tmp_path: Path, checkpoint: str, colours: Path
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    files = f"data.files={{train: {colours}, test: {more_tests(tmp_path)}}}"
    forgetful = ["keep_full_weights=false", "evaluation.every=1", f"evaluation.checkpoint={checkpoint}", files]
    forgetful += [*UNLEARNABLE, *CHOICE, "arms.full.learning_rate=1e-1", "training.steps=18", "checkpoint_seconds=60"]
    folder, _ = told(recipe, *forgetful)
    if checkpoint == "best":
        assert result(folder, "full")["train_info"]["scored_step"] < 18
    store = Path(os.environ["COLA_CACHE"]) / "store"
    assert not list(store.glob("segments/*/*/model.safetensors"))
    assert not (folder.path / "arms/full/seed-0/model").exists()
    trains_nothing(recipe, *forgetful)
    asked = [*forgetful, "data.rows.test=8"]
    again, _ = told(recipe, *asked)
    assert result(again, "full")["status"] == "ok", result(again, "full")["run_info"]["error"]
    assert reused(again, "lora") == reused(again, "chain3") == (18, 18)
    assert reused(again, "full")[0] < 18
    assert outcome(again.path).differences(fresh(recipe, asked, tmp_path)) == []
    assert not list(store.glob("segments/*/*/model.safetensors"))
    trains_nothing(recipe, *asked)


@pytest.mark.slow
def test_pruning_leaves_a_stopped_run_all_that_it_goes_on_from(recipe_text: str, tmp_path: Path) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    overrides = ["evaluation.checkpoint=best", "evaluation.every=1", "training.steps=18", *UNLEARNABLE, *CHOICE]
    overrides += ["arms.full=null", "arms.base=null", "arms.lora=null", "comparison.primary=null"]
    overrides += ["arms.chain3.links=1", f"output={tmp_path / 'stopped'}"]
    command = ["run", str(recipe), *overrides]
    assert end(start(command, said, "AdamW", 15)) == KILLED
    assert end(start(["store", "prune", "--yes"], said)) == 0
    assert end(start(command, said)) == 0
    [folder] = (tmp_path / "stopped").iterdir()
    assert reused(RunFolder(folder), "chain3") == (14, 18)


@pytest.mark.slow
def test_a_kill_before_the_full_weights_are_let_go_does_not_keep_them_for_ever(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    command = ["run", str(recipe), "keep_full_weights=false", *CHOICE]
    assert end(start(command, said, "let go", 1)) == KILLED
    assert end(start(command, said)) == 0, said.read_text()
    assert not list((Path(os.environ["COLA_CACHE"]) / "store").glob("segments/*/*/model.safetensors"))


# ---------------------------------------------------------------------------------------------------------
# What a review found


class Killed(BaseException):
    """Ends a run as a kill does: nothing is kept on the way out."""


def test_a_kill_after_a_better_point_goes_on_from_the_checkpoint_before_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looks at 4 and 8, the second better; the one checkpoint at 6; the kill in step 9.
    best = ["evaluation.checkpoint=best", "evaluation.every=4", "training.steps=12", "training.learning_rate=3e-3"]
    alone = ["arms.base=null", "arms.chain3=null", "arms.full=null", "comparison.primary=null"]
    calls = {"due": 0, "step": 0}

    def due(_states: object) -> bool:
        calls["due"] += 1
        return calls["due"] == 6

    step = torch.optim.AdamW.step

    def dying(*args: Any, **settings: Any) -> Any:
        calls["step"] += 1
        if calls["step"] == 9:
            raise Killed
        return step(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("cola.tree.states.States.checkpoint_due", due)
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(Killed):
            go(recipe_file, *best, *alone)
    again, _ = go(recipe_file, *best, *alone)
    assert result(again, "lora")["train_info"]["reused_steps"] == 6
    undisturbed, _ = go(recipe_file, *best, *alone, f"store={tmp_path / 'own'}")
    assert again.scores("lora", 0, "test") == undisturbed.scores("lora", 0, "test")


def with_scaling(_dtype: str) -> Accelerator:
    """fp16 with a live gradient scaler, which accelerate makes on a GPU only."""
    accelerator = Accelerator(mixed_precision="fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


@pytest.mark.slow
def test_gradient_scaling_is_the_same_however_a_path_is_cut_and_shared(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola.run.assignment.make_accelerator", with_scaling)
    common = ["model.dtype=float16", "arms.full=null", "arms.base=null", "training.steps=9", "comparison.primary=null"]
    common += ["training.schedule=constant", "training.learning_rate=3e-3"]
    lora, _ = go(recipe_file, *common, "arms.chain3=null", f"store={tmp_path / 'lora'}")
    both, _ = go(recipe_file, *common, f"store={tmp_path / 'both'}")
    chain, _ = go(recipe_file, *common, "arms.lora=null", f"store={tmp_path / 'chain'}")
    assert result(both, "chain3")["train_info"]["reused_steps"] == 3
    assert both.scores("lora", 0, "test") == lora.scores("lora", 0, "test")
    assert both.scores("chain3", 0, "test") == chain.scores("chain3", 0, "test")
    norms = [r["grad_norm"] for r in read_jsonl(both.path / "arms/lora/seed-0/metrics.jsonl") if r["kind"] == "step"]
    assert min(norms) > 0.1  # unscaled twice, they would be some ten thousand times smaller
    # A second, longer link goes on inside what was cut: the scaler's state comes back from the store.
    longer, summary = go(recipe_file, *common, "training.steps=12", "arms.chain3=null", f"store={tmp_path / 'lora'}")
    assert summary.arms["lora"].states == {0: "ok"}
    assert result(longer, "lora")["train_info"]["reused_steps"] == 9


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    worst = selection_key("score", float("nan"), 1.0)
    assert max([worst, selection_key("score", 5.0, 0.0)]) == selection_key("score", 5.0, 0.0)
    assert selection_key("score", float("inf"), 1.0) == worst


def test_of_equal_looks_the_earlier_is_the_best_and_a_later_one_has_to_be_better() -> None:
    evaluation, best = Evaluation(checkpoint="best", select_by="loss"), None
    for step, nats in enumerate((3.0, 2.0, 2.0, 2.5), start=1):
        best = better(evaluation, best, step, [ExampleScore("a", nats, 2, 1.0, None, None)])
    assert best is not None
    assert best.step == 2


@pytest.mark.slow
def test_two_runs_that_cut_elsewhere_do_not_train_the_same_steps(recipe_text: str, tmp_path: Path) -> None:
    # The one with a chain cuts LoRA's path at 30; the one without waits for it and must then wait for the rest.
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_text)
    common = ["run", str(recipe), "training.steps=90", "training.schedule=constant", "arms.full=null", "arms.base=null"]
    common += ["comparison.primary=null", "evaluation.every=never"]
    both = start([*common, "--run-folder", str(tmp_path / "both")], tmp_path / "both.txt")
    while not (tmp_path / "both/arms/lora/seed-0/metrics.jsonl").exists():
        time.sleep(0.01)
    alone = start([*common, "arms.chain3=null", "--run-folder", str(tmp_path / "alone")], tmp_path / "alone.txt")
    assert end(both) == end(alone) == 0
    made = [result(RunFolder(tmp_path / name), "lora")["train_info"]["reused_steps"] for name in ("both", "alone")]
    assert sum(90 - reused for reused in made) == 90


def test_what_recalled_weights_were_made_with_is_in_the_result(recipe_file: Path) -> None:
    alone = ["arms.base=null", "arms.chain3=null", "arms.full=null", "comparison.primary=null"]
    first, _ = go(recipe_file, *alone)
    made = result(first, "lora")["train_info"]["segments_made"]
    assert [one["packages"]["torch"] for one in made] == [torch.__version__]
    second, _ = go(recipe_file, *alone)
    assert result(second, "lora")["train_info"]["segments_made"] == made


def test_a_folder_whose_making_was_killed_is_taken(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.recipe.yaml.123").write_text("na")
    assert create_run(read_recipe(recipe_file), tmp_path / "mine").path == tmp_path / "mine"


@pytest.mark.parametrize("damage", ["", "[]", '{"id": "abc", "logged": 3}', "{"])
def test_a_damaged_note_of_a_wandb_run_begins_a_new_one(recipe_file: Path, damage: str) -> None:
    alone = ["arms.lora=null", "arms.chain3=null", "arms.full=null", "comparison.primary=null"]
    folder = create_run(read_recipe(recipe_file, [*alone, "tracking.wandb=offline"]))
    note = folder.path / "arms/base/seed-0/wandb.json"
    note.parent.mkdir(parents=True)
    note.write_text(damage)
    opened, recipe = open_run(folder.path)
    summary = run(recipe, opened, Terminal(Console(file=io.StringIO())))
    assert summary.tracking.mode == "offline"
    assert summary.arms["base"].states == {0: "ok"}


def test_a_damaged_choice_of_a_learning_rate_is_made_again(recipe_file: Path) -> None:
    search = ["arms.lora.learning_rate={search: [1e-3, 1e-2]}", "arms.chain3=null", "comparison.primary=null"]
    folder, _ = go(recipe_file, *search, "arms.full=null")
    before = (folder.path / "trials/lora/chosen.json").read_bytes()
    (folder.path / "trials/lora/chosen.json").write_text("{")
    (folder.path / "arms/lora/seed-0/result.json").unlink()
    opened, recipe = open_run(folder.path)
    summary = run(recipe, opened, Terminal(Console(file=io.StringIO())))
    assert summary.arms["lora"].states == summary.arms["base"].states == {0: "ok"}
    assert (folder.path / "trials/lora/chosen.json").read_bytes() == before


def test_the_plan_counts_steps_that_a_new_look_makes_necessary(recipe_file: Path) -> None:
    alone = ["arms.base=null", "arms.chain3=null", "arms.full=null", "comparison.primary=null"]
    go(recipe_file, *alone)
    said = io.StringIO()
    recipe = read_recipe(recipe_file, [*alone, "evaluation.every=2"])
    folder = create_run(recipe)
    run(recipe, folder, Terminal(Console(file=said, width=300)))
    assert "1 needed, 0 found" in said.getvalue()
    assert "1 to be trained: 6 of 6 optimizer steps" in said.getvalue()
    assert result(folder, "lora")["train_info"]["reused_steps"] == 0


def test_scores_beside_the_weights_and_merged_into_them_are_kept_apart(recipe_file: Path) -> None:
    # In bfloat16 the merge rounds, so the last look at validation and the final score are two numbers.
    alone = ["arms.base=null", "arms.chain3=null", "arms.full=null", "comparison.primary=null"]
    for _ in ("measured", "recalled"):
        folder, _ = go(recipe_file, *alone, "model.dtype=bfloat16", "evaluation.checkpoint=best")
        record = result(folder, "lora")
        assert record["train_info"]["looked_loss"] is not None
        assert record["train_info"]["looked_loss"] != record["evaluation"]["validation"]["loss"]
        assert record["train_info"]["knots"][0]["drift_max_logit_change"] > 0


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_after_the_last_step_validation_is_scored_once_unless_the_best_look_is_chosen(
    recipe_file: Path, tmp_path: Path, checkpoint: str
) -> None:
    alone = ["arms.base=null", "arms.chain3={links: 2}", "arms.full=null", "arms.lora=null", "comparison.primary=null"]
    alone += [f"evaluation={{checkpoint: {checkpoint}, every: link, general_text: null}}", "model.dtype=bfloat16"]
    for _ in ("measured", "recalled"):
        folder, _ = go(recipe_file, *alone, f"store={tmp_path / 'own'}")
        record = result(folder, "chain3")
        looks, (middle, last) = record["train_info"]["evaluations"], (3, 6)
        assert [look["step"] for look in looks] == [middle, last]
        tied = record["evaluation"]["validation"]["loss"]
        assert (looks[-1]["loss"] == tied) == (checkpoint == "last")
        assert record["train_info"]["looked_loss"] == (None if checkpoint == "last" else looks[-1]["loss"])
        rows = [row for row in read_jsonl(folder.path / "arms/chain3/seed-0/metrics.jsonl") if row["kind"] != "step"]
        kinds = ["validation", "knot", *(["validation", "knot"] if checkpoint == "best" else ["knot", "validation"])]
        assert [row["kind"] for row in rows] == kinds
        measured = [json.loads(path.read_text())["what"] for path in (tmp_path / "own/measured").rglob("*.json")]
        of_rows = [what["rows"] for what in measured if what["measured"] == "scores"]
        # train and test once, validation at both steps, and once more at the last where looks are compared.
        assert sorted(of_rows.count(rows) for rows in set(of_rows)) == [1, 1, 2 if checkpoint == "last" else 3]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_page_was_written_goes_on_in_its_folder(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    command = ["run", str(recipe), "arms.full=null", "arms.chain3=null", "comparison.primary=null"]
    command += [f"output={tmp_path / 'out'}"]
    assert end(start(command, said)) == 0
    [folder] = (tmp_path / "out").iterdir()
    page = folder / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert end(start(command, said)) == 0
    assert list((tmp_path / "out").iterdir()) == [folder]
    assert page.read_bytes() == before
    assert end(start(command, said)) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
