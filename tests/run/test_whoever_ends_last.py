"""Spectra and fully fine-tuned weights are a function of the recipe, whoever ends first, in whichever session.

Run: pytest tests/run/test_whoever_ends_last.py
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from children import command, processes
from conftest import recipe_of, run_once
from runs import FULL_ONLY, SHORT, go, open_run, quiet, result
from safetensors.torch import load_file
from test_store import lineage_of, opened, race

from cola.files import digest
from cola.recipe.plan import Job, jobs_of
from cola.recipe.read import read_recipe
from cola.run import job as cola_job
from cola.run import one_job
from cola.run import run as cola_run
from cola.run.assignment import Assignment, Bench
from cola.run.run import run
from cola.tree import leases, prune

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

ARMS = [*SHORT, "arms.base=null", "arms.lora=null", "comparison.primary=null", "arms.chain3.links=2"]
KEPT = ["keep_full_weights=true", "keep_full_weights=false"]


def spectra(folder: Path) -> dict[str, Any]:
    """The content of every spectrum.json but for how long it took."""
    found = {}
    for path in sorted(folder.glob("arms/*/seed-*/spectrum.json")):
        record = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {key: value for key, value in record.items() if key != "seconds"}
    return found


def place() -> Path:
    return Path(os.environ["COLA_CACHE"]) / "store"


def models() -> list[Path]:
    """Fully fine-tuned weights that the store still has."""
    return list(place().glob("segments/*/*/model.safetensors"))


@pytest.fixture(scope="module")
def in_order(
    tiny_folder: Path, colours: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Spectra and summary of an undisturbed run, whose full fine-tuning ends first, with a store of its own."""
    folder = tmp_path_factory.mktemp("in-order")
    run_once(folder, recipe_of(tiny_folder, colours, prose, folder), *ARMS)
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["spectra"]["chain3"]["with_full"] is not None
    found = spectra(folder / "run")
    assert [record["full"] is not None for record in found.values()] == [True, False]
    return found, summary["spectra"]


@pytest.mark.parametrize("kept", KEPT)
def test_spectra_are_the_same_where_full_fine_tuning_ends_last(
    recipe_file: Path, in_order: Any, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cola_run, "jobs_of", lambda recipe: jobs_of(recipe)[::-1])
    second, again = go(recipe_file, *ARMS, kept)
    ended = {arm: (second.path / f"arms/{arm}/seed-0/result.json").stat().st_mtime_ns for arm in ("full", "chain3")}
    assert ended["chain3"] < ended["full"]
    assert spectra(second.path) == in_order[0]
    assert again.content()["spectra"] == in_order[1]
    assert bool(models()) is (kept == KEPT[0])


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("failing", ["full", "chain3"])
def test_spectra_are_the_same_where_an_arm_failed_and_came_in_a_later_session(
    recipe_file: Path, in_order: Any, kept: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_job = one_job.do_job

    def fails(bench: Bench, job: Job) -> None:
        if job.arm == failing:
            raise MemoryError("none left")
        do_job(bench, job)

    with monkeypatch.context() as patch:
        patch.setattr(one_job, "do_job", fails)
        folder, summary = go(recipe_file, *ARMS, kept)
    assert summary.arms[failing].states == {0: "failed"}
    opened_again, recipe = open_run(folder.path)
    again = run(recipe, opened_again, quiet())
    assert spectra(folder.path) == in_order[0]
    assert again.content()["spectra"] == in_order[1]
    assert bool(models()) is (kept == KEPT[0])


@pytest.mark.parametrize("kept", KEPT)
def test_spectra_are_the_same_where_another_process_was_at_full_fine_tuning(
    recipe_file: Path, in_order: Any, kept: str
) -> None:
    folder, said = recipe_file.parent / "second", recipe_file.parent / "said.txt"
    words = ["run", str(recipe_file), *ARMS, kept, "--run-folder", str(folder)]
    second = processes.Process(target=command, args=(words, said, os.environ["COLA_CACHE"]))
    store, _ = opened(place())
    recipe = read_recipe(recipe_file, ARMS)
    with leases.claim(
        store.path, digest({"job": lineage_of(recipe, Job(arm="full", seed=0)).names[-1], "trial": False})
    ) as mine:
        assert mine
        second.start()
        while not said.exists() or "at all that is left; waiting" not in said.read_text():
            assert second.is_alive(), said.read_text()
            time.sleep(0.02)
        assert (folder / "arms/chain3/seed-0/result.json").exists()
    second.join(120)
    assert second.exitcode == 0, said.read_text()
    assert spectra(folder) == in_order[0]
    assert json.loads((folder / "summary.json").read_text())["spectra"] == in_order[1]


@pytest.mark.parametrize("kept", KEPT)
def test_two_processes_that_share_the_work_both_have_the_spectra_of_one_alone(
    recipe_file: Path, in_order: Any, kept: str
) -> None:
    for folder in race(recipe_file, *ARMS, kept).folders:
        assert spectra(folder) == in_order[0]
        assert json.loads((folder / "summary.json").read_text())["spectra"] == in_order[1]
    assert bool(models()) is (kept == KEPT[0])


def test_what_inspect_has_counted_stays_where_nothing_else_is_new(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *ARMS)
    path = folder.path / "arms/chain3/seed-0/spectrum.json"
    record = json.loads(path.read_text())
    for matrix in record["matrices"].values():
        for numbers in matrix["updates"].values():
            numbers["intruders"] = 0
    path.write_text(json.dumps(record) + "\n")
    again, recipe = open_run(folder.path)
    run(recipe, again, quiet())
    assert json.loads(path.read_text()) == record


# ---------------------------------------------------------------------------------------------------------
# Weights that one run has no more use for and another one is about to hand out


def held_before_handing_out(words: list[str], said: Path, cache: str, begun: Any, go_on: Any) -> None:
    """The command, which waits where it has found its weights in the store and has not handed them out."""
    hand_out = cola_job.hand_out

    def waits(given: Assignment, step: int) -> None:
        begun.set()
        assert go_on.wait(120)
        hand_out(given, step)

    cola_job.hand_out = waits
    command(words, said, cache)


def start_held(recipe_file: Path, folder: Path, *overrides: str) -> tuple[Any, Any, Any, Path]:
    begun, go_on, said = processes.Event(), processes.Event(), recipe_file.parent / "said.txt"
    words = ["run", str(recipe_file), *overrides, "--run-folder", str(folder)]
    arguments = (words, said, os.environ["COLA_CACHE"], begun, go_on)
    return processes.Process(target=held_before_handing_out, args=arguments), begun, go_on, said


def assert_has_the_weights(folder: Path, reference: Path) -> None:
    """Against the weights of an undisturbed run with a store of its own."""
    record = json.loads((folder / "arms/full/seed-0/result.json").read_text())
    assert record["status"] == "ok", record["run_info"]["error"]
    mine, theirs = (load_file(run / "arms/full/seed-0/model/model.safetensors") for run in (folder, reference))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# Of these rates the second is chosen: the first leaves the base as it is. What ends with it is let go.
SEARCHED = ["arms.full.learning_rate={search: [1e-9, 1e-3], seeds: [0]}"]


def test_weights_that_another_run_is_about_to_hand_out_are_not_let_go(recipe_file: Path) -> None:
    overrides = [*SHORT, *FULL_ONLY]
    asked = [*overrides, "arms.full.learning_rate=1e-9"]
    reference, _ = go(recipe_file, *asked, f"store={recipe_file.parent / 'own'}")
    folder = recipe_file.parent / "keeps"
    keeps, begun, go_on, said = start_held(recipe_file, folder, *asked)
    keeps.start()
    assert begun.wait(120)
    forgets, _ = go(recipe_file, *overrides, *SEARCHED)
    assert result(forgets, "full")["train_info"]["learning_rate"] == 1e-3
    assert len(models()) == 2
    go_on.set()
    keeps.join(120)
    assert keeps.exitcode == 0, said.read_text()
    assert_has_the_weights(folder, reference.path)
    # Nor later, by who has let them go for its part; and when the one that keeps them is gone, they go with the next.
    again, recipe = open_run(forgets.path)
    run(recipe, again, quiet())
    assert len(models()) == 2
    shutil.rmtree(folder)
    run(recipe, again, quiet())
    assert len(models()) == 1


def test_weights_that_were_let_go_before_another_run_asked_are_trained_for_it_again(recipe_file: Path) -> None:
    overrides = [*SHORT, *FULL_ONLY]
    reference, _ = go(recipe_file, *overrides, f"store={recipe_file.parent / 'own'}")
    go(recipe_file, *overrides, "keep_full_weights=false")
    assert models() == []
    folder = recipe_file.parent / "keeps"
    keeps, begun, go_on, said = start_held(recipe_file, folder, *overrides)
    keeps.start()
    assert begun.wait(120)
    go_on.set()
    keeps.join(120)
    assert keeps.exitcode == 0, said.read_text()
    assert_has_the_weights(folder, reference.path)


def test_a_run_that_asks_while_another_lets_go_waits_and_trains_them_again(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The narrowest place: who lets go has read what others want, this run's want among them not yet.
    asked = [*SHORT, *FULL_ONLY, "arms.full.learning_rate=1e-9"]
    reference, _ = go(recipe_file, *asked, f"store={recipe_file.parent / 'own'}")
    folder, said = recipe_file.parent / "keeps", recipe_file.parent / "said.txt"
    words = ["run", str(recipe_file), *asked, "--run-folder", str(folder)]
    keeps = processes.Process(target=command, args=(words, said, os.environ["COLA_CACHE"]))
    references = prune.references

    def read_and_wait(store: Any, kinds: Any = ("segments", "measured"), but: Any = None) -> Any:
        found = references(store, kinds, but)
        if tuple(kinds) == ("weights",) and not keeps.pid:
            keeps.start()
            end = time.monotonic() + 60
            while not (folder / "segments.json").exists() and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(0.5)  # it has noted its segments by now, and waits before it notes the weights and looks
            assert not (folder / "arms/full/seed-0/model").exists()
            assert keeps.is_alive(), said.read_text()
        return found

    monkeypatch.setattr(prune, "references", read_and_wait)
    go(recipe_file, *SHORT, *FULL_ONLY, *SEARCHED)
    keeps.join(120)
    assert keeps.exitcode == 0, said.read_text()
    assert_has_the_weights(folder, reference.path)


def test_what_a_search_on_seeds_of_its_own_has_trained_goes_once_it_has_chosen(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, *FULL_ONLY, "arms.full.learning_rate={search: [1e-9, 1e-3]}")
    assert sorted(path.name for path in folder.path.glob("trials/full/*/seed-*")) == ["seed-1000"] * 2
    assert [path.parent.name for path in models()] == [result(folder, "full")["train_info"]["scored_state"]]


def test_a_state_that_one_arm_keeps_is_not_let_go_as_a_rate_that_another_one_did_not_choose(recipe_file: Path) -> None:
    searches = {"full": "[1e-9, 1e-8]", "other": "[1e-9, 1e-3]", "another": "[1e-8, 1e-3]"}
    rates = {arm: f"{{search: {grid}, seeds: [0]}}" for arm, grid in searches.items()}
    arms = [f"arms.{arm}={{method: full, learning_rate: {rate}}}" for arm, rate in rates.items()]
    folder, _ = go(recipe_file, *SHORT, *FULL_ONLY, *arms)
    rates = [result(folder, arm)["train_info"]["learning_rate"] for arm in searches]
    assert rates[0] < rates[1] == rates[2] == 1e-3
    assert {path.parent.name for path in models()} == {
        result(folder, arm)["train_info"]["scored_state"] for arm in searches
    }
