"""The store: whole or not at all, checked on every read, shared and pruned. Run: pytest tests/tree/test_store.py"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from children import command, processes
from conftest import recipe_of, run_once, tiny_model
from peft import PeftModel
from runs import FULL_ONLY, LORA_ONLY, SHORT, assert_one_line, go, result
from runs import wide_cola as cola

from cola.data.splits import load_splits
from cola.errors import StoreError
from cola.files import digest
from cola.link import adapter_files
from cola.link.find import find_model
from cola.plan.tree import Planner
from cola.recipe.plan import Job, jobs_of
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.tree import leases, prune
from cola.tree import store as store_file
from cola.tree.run_folder import RunFolder
from cola.tree.segments import Lineage, state_name
from cola.tree.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = [*SHORT, "arms.full=null", "arms.base=null", "arms.chain3.links=2", "training.schedule=constant"]


@pytest.fixture
def place() -> Path:
    """The store of this test's runs."""
    return Path(os.environ["COLA_CACHE"]) / "store"


@pytest.fixture(scope="module")
def runs(
    tiny_folder: Path, colours: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], Path]:
    """The folder with a run of these overrides and its store, made when it is first asked for."""

    @cache
    def made(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        run_once(folder, recipe_of(tiny_folder, colours, prose, folder), *overrides)
        return folder

    return lambda overrides: made(*overrides)


@pytest.fixture
def whole_run(runs: Callable[[list[str]], Path], place: Path) -> RunFolder:
    """A run of all arms; the store that it made is the test's own."""
    shutil.copytree(runs(SHORT) / "cache/store", place)
    return RunFolder(runs(SHORT) / "run")


@pytest.fixture
def pair_run(runs: Callable[[list[str]], Path], place: Path) -> RunFolder:
    """A run of LoRA and a chain of two; the store that it made is the test's own."""
    shutil.copytree(runs(PAIR) / "cache/store", place)
    return RunFolder(runs(PAIR) / "run")


def opened(place: Path) -> tuple[Store, list[str]]:
    """A store and what it warns of."""
    said: list[str] = []
    return Store(place, said.append), said


def weights_in(store: Store) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in store.path.glob("segments/*/*/*model.safetensors")}


# A state without a run: what the store asks for is causes that hash to the name.
ROOT = {"base": "b", "dtype": "float32", "device": "cpu", "training_version": 1}


def causes_of(number: int) -> dict[str, Any]:
    return {"link": {"parent": digest(ROOT), "number": number}, "steps": [[0.1, "batch"]]}


def keep(
    store: Store, number: int, kind: str = "segment", write: Callable[[Path], None] | None = None, **notes: Any
) -> str:
    """Put a small state of that number into the store; returns its name."""

    def files(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
        (folder / "steps.jsonl").write_text('{"step": 1}\n')

    causes = causes_of(number)
    name = state_name(causes)
    made = {"recipe": "tiny", "arm": "lora", "seed": 0}
    notes = {"link_number": 1, "first_step": 0, "last_step": 1, "towards": None, "seconds": 1.0, "made": made, **notes}
    store.put(kind, causes, ROOT, notes, write or files)
    return name


# ---------------------------------------------------------------------------------------------------------
# Damage


def open_up(path: Path) -> None:
    """Let a file be written into, as a disk that fails needs no leave to."""
    path.chmod(0o644)


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit of a file so that it says something else."""
    open_up(path)
    before = path.read_bytes()
    while True:
        changed = bytearray(before)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        if path.suffix != ".json" or not same_json(before, bytes(changed)):
            path.write_bytes(bytes(changed))
            return


def same_json(before: bytes, after: bytes) -> bool:
    """Whether a change left the value: 1e-08 and 1E-08 are one number."""
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def truncate(path: Path, rng: random.Random) -> None:
    open_up(path)
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(path: Path, rng: random.Random) -> None:
    open_up(path)
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def foreign(path: Path, rng: random.Random) -> None:
    open_up(path)
    texts = ["", "null", "[]", "{}", '"a"', "3", '{"sha256": 0}', '{"sha256": "a", "files": []}', "\ufeff{}", "\0\0"]
    path.write_bytes(rng.choice([*(text.encode() for text in texts), b"\xff\xfe"]))


@pytest.mark.slow
def test_a_flipped_byte_anywhere_in_a_segment_is_caught_and_it_is_trained_again(
    recipe_file: Path, pair_run: RunFolder, place: Path
) -> None:
    store, said = opened(place)
    whole = weights_in(store)
    pristine = place.with_name("pristine")
    shutil.copytree(place, pristine)
    rng = random.Random(0)
    names = sorted(whole)
    for round_number, damage in enumerate([flip] * 12 + [truncate, lengthen, remove, foreign] * 3):
        for file in sorted(path.name for path in store.folder(names[0]).iterdir()):
            name = rng.choice(names)
            folder = store.folder(name)
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            if file not in before:
                continue
            damage(folder / file, rng)
            assert store.has(name) or (damage is remove and file == "segment.json")
            assert store.get(name) is None, (file, damage)
            assert not folder.exists()
            assert len(said) == 1
            assert f"{name} is damaged" in said[0]
            [aside] = (place / "damaged").iterdir()
            assert str(aside) in said[0]
            shutil.rmtree(aside)
            said.clear()
            folder.mkdir()
            for other, content in before.items():
                (folder / other).write_bytes(content)
            assert store.get(name) is not None, round_number
    for name in names:
        for path in store.folder(name).glob("*model.safetensors"):
            flip(path, rng)
    folder, summary = go(recipe_file, *PAIR)
    assert weights_in(store) == whole
    assert len(list((place / "damaged").iterdir())) == len(names)
    assert all(arm.states == {0: "ok"} for arm in summary.arms.values())
    assert result(folder, "lora")["train_info"]["reused_steps"] == 0


@pytest.mark.slow
def test_every_bit_of_a_segments_record_is_covered(place: Path) -> None:
    store, _ = opened(place)
    name = keep(store, 0, seconds=0.1234567890123456)
    path = store.folder(name) / "segment.json"
    before = path.read_bytes()
    for position in range(len(before)):
        for bit in {5, position % 8}:  # of a letter, the fifth is whether it is a capital
            changed = bytearray(before)
            changed[position] ^= 1 << bit
            path.write_bytes(bytes(changed))
            if store_file.fault_of(path.parent) is None:
                assert same_json(before, bytes(changed)), (position, bit)
    path.write_bytes(before)
    assert store_file.fault_of(path.parent) is None


def test_segments_that_changed_places_are_caught(recipe_file: Path, pair_run: RunFolder, place: Path) -> None:
    store, said = opened(place)
    whole = weights_in(store)
    first, second = sorted(whole)[:2]
    one, two = store.folder(first), store.folder(second)
    one.rename(place / "between")
    two.rename(one)
    (place / "between").rename(two)
    assert store.get(first) is None
    assert store.get(second) is None
    assert len(said) == 2
    go(recipe_file, *PAIR)
    assert weights_in(store) == whole


def test_weights_of_another_segment_are_caught(pair_run: RunFolder, place: Path) -> None:
    store, _ = opened(place)
    first, second = (store.folder(name) for name in sorted(weights_in(store))[:2])
    open_up(second / "adapter_model.safetensors")
    shutil.copy(first / "adapter_model.safetensors", second / "adapter_model.safetensors")
    assert store.get(second.name) is None
    assert store.get(first.name) is not None


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, truncate, remove, foreign])
def test_a_damaged_measurement_is_caught_and_made_again(
    recipe_file: Path, whole_run: RunFolder, place: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    rng = random.Random(0)
    measured = sorted(place.glob("measured/*/*.json"))
    content = {path: strip(json.loads(path.read_text())) for path in measured}
    for path in measured:
        damage(path, rng)
    second, summary = go(recipe_file, *SHORT)
    assert all(arm.states == {0: "ok"} for arm in summary.arms.values())
    for arm in ("base", "lora", "chain3", "full"):
        assert result(whole_run, arm)["evaluation"] == result(second, arm)["evaluation"]
    assert {path: strip(json.loads(path.read_text())) for path in measured} == content
    assert bool(list((place / "damaged").iterdir())) is (damage is not remove)
    assert prune.verify(opened(place)[0])[1] == 0


def strip(record: Any) -> Any:
    """A measurement without how long it took."""
    return {**record, "sha256": None, "value": {k: v for k, v in record["value"].items() if "seconds" not in k}}


def test_a_measurement_of_something_else_is_caught(place: Path) -> None:
    store, said = opened(place)
    store.remember({"state": "a"}, 1.0)
    store.remember({"state": "b"}, 2.0)
    one, two = sorted(place.glob("measured/*/*.json"))
    shutil.copy(one, two)
    values = {store.recall({"state": "a"}), store.recall({"state": "b"})}
    assert None in values
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_a_writer_that_fails_leaves_nothing(place: Path) -> None:
    store, _ = opened(place)

    def fails(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half of it")
        raise MemoryError

    with pytest.raises(MemoryError):
        keep(store, 0, write=fails)
    assert not list(store.segments())
    assert not list((place / "writing").iterdir())


def write_and_die(place: Path, number: int) -> None:
    def dies(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    store = Store(place, print)
    with leases.in_use(store.path, store.warn):
        keep(store, number, write=dies)


def write_slowly(place: Path, number: int, begun: Any, go_on: Any) -> None:
    def waits(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"all of it")
        begun.set()
        assert go_on.wait(60)

    store = Store(place, print)
    with leases.in_use(store.path, store.warn):
        keep(store, number, write=waits)


def test_what_a_killed_writer_left_is_invisible_and_cleared_but_a_living_writers_is_not(place: Path) -> None:
    store, _ = opened(place)
    dying = processes.Process(target=write_and_die, args=(place, 0))
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL
    assert not list(store.segments())
    assert len(list((place / "writing").iterdir())) == 1
    with leases.in_use(store.path, store.warn):
        assert not list((place / "writing").iterdir())
    begun, go_on = processes.Event(), processes.Event()
    living = processes.Process(target=write_slowly, args=(place, 1, begun, go_on))
    living.start()
    assert begun.wait(60)
    with leases.in_use(store.path, store.warn):
        assert len(list((place / "writing").iterdir())) == 1
    go_on.set()
    living.join(60)
    assert living.exitcode == 0
    segment = store.get(state_name(causes_of(1)))
    assert segment is not None
    assert (segment.folder / "adapter_model.safetensors").read_bytes() == b"all of it"
    assert not list((place / "writing").iterdir())


def keep_and_drop(place: Path, seconds: float) -> None:
    store = Store(place, print)
    with leases.in_use(store.path, store.warn):
        end = time.monotonic() + seconds
        number = os.getpid() * 1000
        while time.monotonic() < end:
            number += 1
            name = keep(store, number)
            assert store.get(name) is not None
            store.drop(name, "segment")
            assert store.get(name) is None


@pytest.mark.slow
def test_runs_that_begin_and_end_do_not_disturb_one_that_writes(place: Path) -> None:
    store, _ = opened(place)
    writer = processes.Process(target=keep_and_drop, args=(place, 2.0))
    writer.start()
    while writer.is_alive():
        with leases.in_use(store.path, store.warn):
            pass
    assert writer.exitcode == 0


def hold(place: Path, held: Any) -> None:
    with leases.lock(place, "key"):
        held.set()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free_at_once(place: Path) -> None:
    store, _ = opened(place)
    held = processes.Event()
    holder = processes.Process(target=hold, args=(place, held))
    holder.start()
    assert held.wait(60)
    waited: list[float] = []

    def kill() -> None:
        waited.append(time.monotonic())
        holder.kill()
        holder.join()

    with leases.lock(store.path, "key", kill):
        assert time.monotonic() - waited[0] < leases.EXPIRY / 2  # else it had to be found that it says nothing more
    assert len(waited) == 1


def test_the_longest_lived_of_two_states_of_one_name_stays(place: Path) -> None:
    store, _ = opened(place)
    for first, second, stays in [
        ("segment", "checkpoint", "segment"),
        ("checkpoint", "segment", "segment"),
        ("point", "checkpoint", "point"),
        ("checkpoint", "point", "point"),
        ("record", "checkpoint", "segment"),  # a record is of the end of a segment
    ]:
        name = keep(store, 0, first)
        keep(store, 0, second)
        segment = store.get(name)
        assert segment is not None
        assert segment.kind == stays
        store.drop(name, stays)
        assert not store.has(name)


def test_what_has_come_to_be_kept_for_longer_is_not_dropped(place: Path) -> None:
    store, _ = opened(place)
    name = keep(store, 0, "checkpoint")
    store.mark(name, "point")
    store.drop(name, "checkpoint")
    segment = store.get(name)
    assert segment is not None
    assert segment.kind == "point"
    store.mark(name, "checkpoint")
    store.drop(name, "checkpoint")
    assert store.has(name)


def test_a_state_with_its_optimizer_takes_the_place_of_one_without(place: Path) -> None:
    store, _ = opened(place)

    def resumable(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "optimizer.safetensors").write_bytes(b"moments")

    # Whatever they are called: from the second one a link can go on, and the first one cannot do more.
    for kind in ("segment", "checkpoint"):
        name = keep(store, 0, "segment")
        keep(store, 0, kind, write=resumable)
        segment = store.get(name)
        assert segment is not None
        assert segment.resumable
        assert segment.kind == "segment"
        store.drop(name, "segment")


def test_a_reader_does_not_take_a_state_that_is_being_let_go_for_a_damaged_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading a large model takes many seconds, in which another process may let its weights go.
    store, said = opened(place)
    name = keep(store, 0)
    sha256 = store_file.file_digest
    other, _ = opened(place)

    def digest_while_another_lets_go(path: Path) -> str:
        monkeypatch.setattr(store_file, "file_digest", sha256)
        prune.let_go(other, {name}, place)
        return sha256(path)

    monkeypatch.setattr(store_file, "file_digest", digest_while_another_lets_go)
    store.get(name)
    assert said == []
    segment = store.get(name)
    assert segment is not None
    assert segment.kind == "record"


# ---------------------------------------------------------------------------------------------------------
# Two processes


@dataclass
class Raced:
    folders: list[Path]
    said: str

    def info(self, arm: str, number: int) -> dict[str, Any]:
        path = self.folders[number] / f"arms/{arm}/seed-0/result.json"
        record = json.loads(path.read_text())
        assert record["status"] == "ok", record["run_info"]["error"]
        return record


def race(recipe_file: Path, *overrides: str, n_processes: int = 2) -> Raced:
    """The same recipe by several processes at once, each into a folder of its own."""
    folders = [recipe_file.parent / f"race-{number}" for number in range(n_processes)]
    said = recipe_file.parent / "said.txt"
    running = []
    for folder in folders:
        words = ["run", str(recipe_file), *overrides, "--run-folder", str(folder)]
        running.append(processes.Process(target=command, args=(words, said, os.environ["COLA_CACHE"])))
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * n_processes, said.read_text()
    return Raced(folders, said.read_text())


@pytest.mark.slow
def test_processes_that_need_the_same_segment_train_it_once(recipe_file: Path, place: Path) -> None:
    overrides = [*SHORT, "training.steps=12", "checkpoint_seconds=0", "arms.base=null"]
    raced, made = race(recipe_file, *overrides, n_processes=3), {}
    for arm in ("lora", "chain3", "full"):
        records = [raced.info(arm, number) for number in range(3)]
        infos = [record["train_info"] for record in records]
        made[arm] = sum(info["steps"] - info["reused_steps"] for info in infos)
        assert records[0]["evaluation"] == records[1]["evaluation"] == records[2]["evaluation"]
        scores = {(folder / f"arms/{arm}/seed-0/scores/test.jsonl").read_text() for folder in raced.folders}
        assert len(scores) == 1
    # The chain begins with LoRA's steps, or LoRA with the chain's, whoever trained them.
    assert made["lora"] + made["chain3"] == 12 + 8
    assert made["full"] == 12
    assert "damaged" not in raced.said
    assert not list((place / "writing").iterdir())


def lineage_of(recipe: Recipe, job: Job) -> Lineage:
    source = find_model(recipe.model)
    splits = load_splits(recipe.data, source.tokenizer())
    planner = Planner(source, source.skeleton(), splits, "cpu")
    return planner.tree(recipe, planner.meter(recipe)).lineage(job)


@pytest.mark.slow
def test_a_process_leaves_to_another_what_that_is_at_and_does_the_rest(recipe_file: Path, place: Path) -> None:
    overrides = [*SHORT, "arms.base=null"]
    overrides += [f"arms.{arm}.learning_rate={{search: [1e-2, 1e-3]}}" for arm in ("lora", "chain3", "full")]
    folder, said = recipe_file.parent / "second", recipe_file.parent / "said.txt"
    words = ["run", str(recipe_file), *overrides, "--run-folder", str(folder)]
    second = processes.Process(target=command, args=(words, said, os.environ["COLA_CACHE"]))
    recipe = read_recipe(recipe_file, overrides)
    trial = next(job for job in jobs_of(recipe) if job.trial and job.arm == "lora")
    store, _ = opened(place)
    with leases.claim(store.path, digest({"job": lineage_of(recipe, trial).names[-1], "trial": True})) as mine:
        assert mine
        second.start()
        while not said.exists() or "at all that is left; waiting" not in said.read_text():
            assert second.is_alive(), said.read_text()
            time.sleep(0.02)
        done = {path.relative_to(folder).parent for path in folder.rglob("result.json")}
        # Five trials of six, and both arms that need no more than those.
        assert {str(path) for path in done if path.parts[0] == "arms"} == {"arms/chain3/seed-0", "arms/full/seed-0"}
        assert len(done) == 2 + 5
    second.join(60)
    assert second.exitcode == 0, said.read_text()
    assert json.loads((folder / "summary.json").read_text())["arms"]["lora"]["n_seeds"] == 1


def test_a_claim_is_had_by_one_alone_and_free_again_when_its_holder_is_done(place: Path) -> None:
    store, _ = opened(place)
    other, _ = opened(place)
    with (
        leases.claim(store.path, "a") as first,
        leases.claim(other.path, "a") as second,
        leases.claim(other.path, "b") as third,
    ):
        assert (first, second, third) == (True, False, True)
    with leases.claim(other.path, "a") as later:
        assert later


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_process_that_waited_for_full_weights_finds_them_let_go(
    recipe_file: Path, place: Path, checkpoint: str
) -> None:
    overrides = [*SHORT, "keep_full_weights=false", f"evaluation.checkpoint={checkpoint}", *FULL_ONLY]
    folder, said = recipe_file.parent / "waiting", recipe_file.parent / "said.txt"
    words = ["run", str(recipe_file), *overrides, "--run-folder", str(folder)]
    waiting = processes.Process(target=command, args=(words, said, os.environ["COLA_CACHE"]))
    store, _ = opened(place)
    with leases.lock(store.path, lineage_of(read_recipe(recipe_file, overrides), Job(arm="full", seed=0)).names[1]):
        waiting.start()
        while not said.exists() or "waiting for another process" not in said.read_text():
            assert waiting.is_alive(), said.read_text()
            time.sleep(0.02)
        # What the other process does meanwhile: all of it, and it lets the weights go.
        first, _ = go(recipe_file, *overrides, f"store={place.with_name('other')}")
        for kind in ("segments", "measured"):
            shutil.copytree(place.with_name("other") / kind, place / kind, dirs_exist_ok=True)
    waiting.join(60)
    assert waiting.exitcode == 0, said.read_text()
    record = json.loads((folder / "arms/full/seed-0/result.json").read_text())
    assert record["status"] == "ok", record["run_info"]["error"]
    assert record["evaluation"] == result(first, "full")["evaluation"]


# ---------------------------------------------------------------------------------------------------------
# Pruning


def contents(place: Path) -> set[Path]:
    """What is kept: segments and measurements."""
    return {*place.glob("segments/*/*"), *place.glob("measured/*/*.json")}


def test_pruning_keeps_what_a_kept_run_refers_to_and_frees_the_rest(
    recipe_file: Path, pair_run: RunFolder, place: Path
) -> None:
    shared = contents(place)
    other, _ = go(recipe_file, *PAIR, "arms.lora.rank=2")
    more = contents(place) - shared
    assert more
    assert cola("store", "prune", "--yes").exit_code == 0
    assert contents(place) == shared | more
    shutil.rmtree(other.path)
    before = contents(place)
    told = cola("store", "prune")
    assert told.exit_code == 2
    assert contents(place) == before
    assert "say --yes" in told.output
    assert "Traceback" not in told.output
    done = cola("store", "prune", "--yes")
    assert done.exit_code == 0
    assert str(other.path) in done.output
    assert contents(place) == shared
    for folder in more:
        if folder.is_dir():
            assert folder.name[:12] in done.output
    folder, _ = go(recipe_file, *PAIR)
    for arm in ("lora", "chain3"):
        info = result(folder, arm)["train_info"]
        assert info["reused_steps"] == info["steps"]
    again = cola("store", "prune", "--yes")
    assert again.exit_code == 0
    assert "0 segments and 0 measurements" in again.output


def test_pruning_says_the_size_of_what_it_frees(recipe_file: Path, place: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, *LORA_ONLY)
    shutil.rmtree(folder.path)
    told = cola("store", "prune")
    sizes = re.findall(r"no kept run refers to, ([\d.]+) (B|kB|MB)", told.output)
    size = sum(path.stat().st_size for path in place.glob("[ms]e*/*/**/*") if path.is_file())
    [(number, unit)] = sizes
    assert float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit] == pytest.approx(size, rel=0.01)


def test_nothing_is_pruned_while_a_run_is_at_work(recipe_file: Path, place: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, *LORA_ONLY)
    shutil.rmtree(folder.path)
    store, _ = opened(place)
    before = contents(place)
    with leases.in_use(store.path, store.warn):
        told = cola("store", "prune", "--yes")
    assert told.exit_code == 2
    assert "a run is at work" in told.output
    assert contents(place) == before
    assert cola("store", "prune", "--yes").exit_code == 0
    assert not contents(place)


@pytest.mark.slow
def test_a_run_that_begins_waits_for_pruning_to_end(place: Path) -> None:
    store, _ = opened(place)
    begun, go_on = processes.Event(), processes.Event()
    with leases.alone(store.path):
        go_on.set()
        run = processes.Process(target=write_slowly, args=(place, 1, begun, go_on))
        run.start()
        assert not begun.wait(1)
    assert begun.wait(60)
    run.join(60)
    assert run.exitcode == 0


def test_a_checkpoint_is_kept_until_the_end_of_its_segment_is_there(place: Path, tmp_path: Path) -> None:
    store, _ = opened(place)
    end = state_name(causes_of(1))
    on_the_way = keep(store, 0, "checkpoint", towards=end)
    lost = keep(store, 2, "checkpoint", towards=state_name(causes_of(3)))
    run = tmp_path / "run"
    run.mkdir()
    (run / "segments.json").write_text(json.dumps({"segments": [end], "measured": []}))
    prune.register(store, run)
    prune.prune(store, prune.garbage(store))
    assert store.has(on_the_way)
    assert not store.has(lost)
    keep(store, 1)
    prune.prune(store, prune.garbage(store))
    assert not store.has(on_the_way)
    assert store.has(end)


def test_a_best_that_was_outdone_is_pruned_once_its_run_is_at_its_end(recipe_file: Path, place: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, *LORA_ONLY)
    store, _ = opened(place)
    end = result(folder, "lora")["train_info"]["final_state"]
    outdone = keep(store, 0, "point", towards=end)  # as a kill leaves it
    prune.prune(store, prune.garbage(store))
    assert store.has(outdone)  # there is no page yet
    assert cola("report", folder.path).exit_code == 0
    prune.prune(store, prune.garbage(store))
    assert not store.has(outdone)
    assert store.has(end)


def test_full_weights_that_were_let_go_leave_a_record_of_how_they_were_made(recipe_file: Path, place: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, *FULL_ONLY, "keep_full_weights=false")
    store, said = opened(place)
    info = result(folder, "full")["train_info"]
    record = store.get(info["scored_state"])
    assert record is not None
    assert not record.has_weights
    assert len(record.steps()) == 4
    assert sorted(path.name for path in record.folder.glob("*.safetensors")) == []
    assert cola("inspect", record.name[:10]).exit_code == 0
    assert cola("store", "verify").exit_code == 0
    assert said == []


# ---------------------------------------------------------------------------------------------------------
# The files, and the command line


def test_segments_are_peft_adapters_and_rebuild_the_trained_chain(recipe_file: Path, place: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, "arms.full=null", "arms.chain3.links=2")
    store, _ = opened(place)
    ids = torch.arange(1, 21).unsqueeze(0)
    theirs, ours = tiny_model(), tiny_model()
    for name in result(folder, "chain3")["train_info"]["segments"]:
        segment = store.get(name)
        assert segment is not None
        theirs = PeftModel.from_pretrained(theirs, segment.folder)
        with torch.no_grad():
            beside = theirs(ids).logits
            theirs = theirs.merge_and_unload()
            for module, pair in adapter_files.load_pair(segment.folder).items():
                ours.get_submodule(module).weight += pair.scale * pair.B_OR @ pair.A_RI
            assert torch.allclose(beside, ours(ids).logits, atol=1e-4)
            assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4)
            assert not torch.allclose(beside, tiny_model()(ids).logits, atol=1e-2)


def test_the_listing_shows_each_segment_once_and_verifying_finds_what_is_damaged(
    pair_run: RunFolder, place: Path
) -> None:
    names = {name for arm in ("lora", "chain3") for name in result(pair_run, arm)["train_info"]["segments"]}
    listed = cola("store", "ls")
    assert listed.exit_code == 0
    assert all(listed.output.count(name[:12]) == 1 for name in names)
    assert f"{len(names)} segments" in listed.output
    assert cola("store", "verify").exit_code == 0
    store, _ = opened(place)
    name = sorted(names)[0]
    flip(store.folder(name) / "adapter_model.safetensors", random.Random(0))
    found = cola("store", "verify")
    assert found.exit_code == 1
    assert f"{name} is damaged" in found.output
    assert "1 damaged" in found.output
    assert cola("store", "verify").exit_code == 0
    assert "1 set aside as damaged" in cola("store", "ls").output


def test_inspecting_follows_a_chain_back_to_the_base(pair_run: RunFolder, place: Path) -> None:
    names = result(pair_run, "chain3")["train_info"]["segments"]
    told = cola("inspect", names[-1][:8])
    assert told.exit_code == 0
    places = [told.output.index(name) for name in names]
    assert places == sorted(places)
    assert json.loads((pair_run.path / "provenance.json").read_text())["model"]["sha256"] in told.output
    assert "all names recomputed, all checksums verified" in told.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("{}", "trains a pair of rank 8, alpha 16, on 14 modules (down_proj, gate_proj, "),
        ("{rank: 4, use_dora: true, loraplus_lr_ratio: 4}", "a pair of rank 4, alpha 8, use_dora, on 14 modules ("),
        ("{loraplus_lr_ratio: 4, init: gaussian}", "init gaussian, B at 4 times the rate of A, lora, seed "),
        ("{links: 2}", "; knot: merge exact, fraction 1, optimizer fresh"),
        ("{links: 2, knot: {optimizer: {prune_random: 0.5}}}", "fraction 1, optimizer (prune_random 0.5)"),
        ("{method: full, freeze: embeddings}", "trains all weights, freeze embeddings, full, seed "),
        (
            "{method: adapter, bottleneck: 8}",
            "trains bottleneck 8, placement pfeiffer, activation relu, adapter, seed ",
        ),
        ("{method: p_tuning, num_virtual_tokens: 3}", "trains num_virtual_tokens 3, p_tuning, seed "),
    ],
)
def test_inspecting_says_what_a_link_trains_and_what_the_knot_before_it_did(
    recipe_file: Path, arm: str, words: str
) -> None:
    folder, _ = go(recipe_file, *SHORT, *LORA_ONLY, f"arms.lora={arm}")
    told = cola("inspect", result(folder, "lora")["train_info"]["segments"][-1])
    assert told.exit_code == 0
    assert words in told.output.replace("\n", " ")


@pytest.mark.usefixtures("pair_run")
@pytest.mark.parametrize("word", ["zzz", "", "0" * 32, "../..", "*"])
def test_inspecting_what_is_not_there_is_one_line(word: str) -> None:
    assert_one_line(cola("inspect", word))


def test_inspecting_what_could_be_two_segments_is_one_line(place: Path) -> None:
    store, _ = opened(place)
    names = [keep(store, number) for number in range(20)]
    beginnings = [name[0] for name in names]
    twice = next(letter for letter in beginnings if beginnings.count(letter) > 1)
    told = cola("inspect", twice)
    assert_one_line(told)
    assert f"{beginnings.count(twice)} segments begin with '{twice}'" in told.output


def test_a_segment_that_is_damaged_or_whose_parent_has_gone_is_one_line(pair_run: RunFolder, place: Path) -> None:
    first, last = result(pair_run, "chain3")["train_info"]["segments"]
    store, _ = opened(place)
    shutil.rmtree(store.folder(first))
    told = cola("inspect", last)
    assert_one_line(told)
    assert first in told.output
    flip(store.folder(last) / "steps.jsonl", random.Random(0))
    told = cola("inspect", last)
    assert told.exit_code == 2
    assert "is damaged" in told.output
    assert "Traceback" not in told.output


@pytest.mark.parametrize("words", [["inspect", "abc"], ["store", "ls"], ["store", "verify"], ["store", "prune"]])
def test_a_store_that_is_not_there_is_one_line_and_is_not_made(tmp_path: Path, words: list[str]) -> None:
    told = cola(*words, "--store", tmp_path / "nowhere")
    assert_one_line(told)
    assert str(tmp_path / "nowhere") in told.output
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": null}', "\0"])
def test_a_store_of_another_format_is_left_alone(place: Path, text: str) -> None:
    store, _ = opened(place)
    name = keep(store, 0)
    (place / "format.json").write_text(text)
    with pytest.raises(StoreError, match="set store to another"):
        opened(place)
    assert_one_line(cola("store", "prune", "--yes"))
    assert (store.folder(name) / "segment.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "\0"])
@pytest.mark.parametrize("which", ["note", "references"])
def test_a_damaged_reference_frees_nothing_and_is_one_line(
    recipe_file: Path, place: Path, which: str, text: str
) -> None:
    store, _ = opened(place)
    name = keep(store, 0)
    run = recipe_file.parent / "run"
    run.mkdir()
    (run / "segments.json").write_text(json.dumps({"segments": [name], "measured": []}))
    prune.register(store, run)
    [note] = (place / "runs").iterdir()
    (note if which == "note" else run / "segments.json").write_text(text)
    for words in (["ls"], ["prune", "--yes"]):
        told = cola("store", *words)
        assert isinstance(told.exception, SystemExit | None), told.exception
        assert told.exit_code in (0, 2)
        assert store.has(name)


def test_two_processes_may_make_one_store(tmp_path: Path) -> None:
    makers = [processes.Process(target=Store, args=(tmp_path / "new", print)) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("word", ["ls", "verify"])
def test_looking_at_a_store_is_not_disturbed_by_a_run_that_drops_checkpoints(place: Path, word: str) -> None:
    opened(place)
    writer = processes.Process(target=keep_and_drop, args=(place, 2.0))
    writer.start()
    while writer.is_alive():
        told = cola("store", word)
        assert told.exit_code == 0, told.exception or told.output
        assert isinstance(told.exception, SystemExit | None)
    assert writer.exitcode == 0
    assert not list((place / "damaged").iterdir())
