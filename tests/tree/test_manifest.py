"""A run folder that proves itself: every damage is named where it would be read, and mended from the store.

Run: pytest tests/tree/test_manifest.py
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import recipe_of
from runs import Outcome, assert_one_line, go, outcome, unsealed, wide_cola

from cola.run import scoring
from cola.tree import manifest
from cola.tree.mend import mend
from cola.tree.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = "arms/chain2/seed-0"
KNOT = f"{SEED}/knots/link-1/adapter_model.safetensors"
MODEL = "arms/full/seed-0/model/model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, colours: Path, prose: Path) -> Path:
    """A finished run of two seeds with a search; what its recipe names as the store has all of it."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = folder / "recipe.yaml"
    text = recipe_of(tiny_folder, colours, prose, folder / "runs")
    recipe.write_text(text.replace("{train: 24, validation: 8, test: 16}", "{train: 16, validation: 4, test: 8}"))
    arms = ["arms.chain3=null", "arms.chain2={links: 2}", "comparison.primary=[chain2, lora]", "seeds=[0,1]"]
    search = ["training.learning_rate={search: [1e-3, 1e-2]}", "arms.full={method: full}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola.report.page.figures_of", lambda *_: {})
        run, summary = go(recipe, *arms, *search, f"store={folder / 'store'}", folder=folder / "run")
        assert wide_cola("report", run.path).exit_code == 0
    assert not any(arm.errors for arm in summary.arms.values())
    return run.path


@pytest.fixture(scope="module")
def was(whole: Path) -> Outcome:
    return outcome(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def deleted(path: Path) -> None:
    path.unlink()


def in_place_of_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def another_digit(path: Path) -> None:
    text = path.read_text()
    path.write_text(re.sub(r"(nats\": \d+\.\d)(\d)", lambda of: f"{of[1]}{(int(of[2]) + 1) % 10}", text, count=1))
    assert path.read_text() != text


def said(*words: object) -> tuple[int, str]:
    """A command's exit code, and what it printed and did not end in a traceback."""
    told = wide_cola(*words)
    assert isinstance(told.exception, SystemExit | None), told.exception
    return told.exit_code, told.output


def is_mended(run: Path, was: Outcome, *named: str) -> None:
    """Going on says what was damaged, trains nothing, and ends with the same bits."""
    still = said("verify", run)[0]  # `cola inspect` takes spectra anew by itself
    code, output = said("run", "--resume", run)
    assert code == 0, output
    assert not still or all(name in output for name in named), output
    assert "0 to be trained" in output
    assert outcome(run).differences(was) == []
    code, output = said("verify", run)
    assert (code, "all as they were written" in output) == (0, True), output


def test_every_file_of_a_run_is_in_a_manifest_with_what_it_belongs_to(whole: Path) -> None:
    code, output = said("verify", whole)
    assert code == 0
    assert "in no manifest" not in output
    made = json.loads((whole / SEED / "manifest.json").read_text())
    assert (made["arm"], made["seed"], made["place"]) == ("chain2", 0, SEED)
    states = json.loads((whole / SEED / "result.json").read_text())["train_info"]["segments"]
    knots = [made["files"][f"knots/link-{link}/adapter_model.safetensors"] for link in (1, 2)]
    assert [(knot["link"], knot["state"]) for knot in knots] == [(1, states[0]), (2, states[1])]


def test_a_folder_that_was_copied_packed_and_moved_verifies(whole: Path, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", whole)
    shutil.unpack_archive(packed, tmp_path / "unpacked")
    moved = (tmp_path / "unpacked").rename(tmp_path / "moved")
    assert said("verify", moved)[0] == 0
    assert said("report", moved)[0] == 0
    assert said("verify", moved)[0] == 0


CHAIN, FULL = (["--arm", arm, "--seed", "0"] for arm in ("chain2", "full"))
NAMED = {
    "provenance.json": [["report"], ["export", *CHAIN], ["eval", *CHAIN, "--data"]],
    "manifest.json": [["report"], ["export", *CHAIN], ["inspect"]],
    f"{SEED}/manifest.json": [["report"], ["export", *CHAIN], ["inspect", *CHAIN]],
    f"{SEED}/result.json": [["report"], ["export", *CHAIN], ["inspect", *CHAIN]],
    f"{SEED}/scores/test.jsonl": [["report"]],
    f"{SEED}/metrics.jsonl": [["export", "--as", "results"]],
    f"{SEED}/spectrum.json": [["report"], ["inspect", *CHAIN]],
    f"{SEED}/ledger.jsonl": [],
    KNOT: [["export", *CHAIN], ["eval", *CHAIN, "--data"]],
    MODEL: [["export", *FULL, "--as", "merged"], ["eval", *FULL, "--data"]],
    "arms/lora/seed-1/scores/validation.jsonl": [],
    "trials/lora/chosen.json": [["report"]],
    "trials/lora/learning_rate=0.01/seed-1000/scores/validation.jsonl": [["report"]],
    "segments.json": [],
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, act, id=f"{name}-{act.__name__}", marks=[pytest.mark.slow] * (n % 4 != m))
        for m, act in enumerate((flipped, cut, deleted, in_place_of_a_folder))
        for n, name in enumerate(NAMED)
    ],
)
def test_what_is_damaged_is_named_wherever_it_is_read_and_comes_back_from_the_store(
    run: Path, was: Outcome, name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    damage(run / name)
    code, output = said("verify", run)
    assert code == 1
    assert str(run / name) in output
    for number, (command, *options) in enumerate(NAMED[name]):
        where = [run] if options[-1:] == ["--data"] else []
        where += ["--to", tmp_path / f"to-{number}"] if command == "export" else []
        code, output = said(command, run, *options, *where)
        # What is not there is no result; of the others the file is named.
        if not name.endswith("result.json") or damage is not deleted:
            assert Path(name).name in output or "link-1 is not there" in output, output
        if command in ("export", "eval") and "results" not in options:
            assert code == 2
    is_mended(run, was, Path(name).name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "command"),
    [
        (f"{SEED}/knots/link-1", f"{SEED}/knots/link-2", ["export", "--arm", "chain2", "--seed", "0"]),
        (f"{SEED}/knots/link-1", "arms/chain2/seed-1/knots/link-1", ["export", "--arm", "chain2", "--seed", "0"]),
        (f"{SEED}/scores", "arms/lora/seed-0/scores", ["report"]),
        (SEED, "arms/chain2/seed-1", ["export", "--arm", "chain2", "--seed", "0"]),
    ],
)
def test_what_was_swapped_is_named_and_comes_back(
    run: Path, was: Outcome, first: str, second: str, command: list[str], tmp_path: Path
) -> None:
    (run / first).rename(tmp_path / "aside")
    (run / second).rename(run / first)
    (tmp_path / "aside").rename(run / second)
    code, output = said(command[0], run, *command[1:], *(["--to", tmp_path / "to"] if command[0] == "export" else []))
    assert "is damaged (it " in output
    assert code == (2 if command[0] == "export" else 0)
    assert said("verify", run)[0] == 1
    is_mended(run, was)


def test_a_changed_digit_of_a_score_moves_no_number(run: Path, was: Outcome) -> None:
    before = json.loads((run / "summary.json").read_text())["contrasts"][0]
    another_digit(run / SEED / "scores/test.jsonl")
    assert said("report", run)[0] == 0
    summary = json.loads((run / "summary.json").read_text())
    assert any("scores/test.jsonl is damaged (it does not match its SHA-256)" in note for note in summary["notes"])
    assert summary["contrasts"][0]["n_seeds"] == before["n_seeds"] - 1  # no number of the damaged seed is in it
    is_mended(run, was, "scores/test.jsonl")
    assert json.loads((run / "summary.json").read_text())["contrasts"][0] == before


def test_a_recipe_that_was_changed_is_refused(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("select_by: loss", "select_by: score"))
    for command in (["report", run], ["run", "--resume", run], ["export", run, "--arm", "lora", "--seed", 0]):
        code, output = said(*command)
        assert code == 2
        assert f"{run}/recipe.yaml is not what this run began with: put it back as it was" in output
    (run / "recipe.yaml").write_text(text)
    assert said("report", run)[0] == 0


def test_an_arm_that_has_gone_is_found_by_its_summary(run: Path, was: Outcome) -> None:
    shutil.rmtree(run / "arms/full")
    code, output = said("verify", run)
    assert code == 1
    assert f"{run}/arms/full/seed-1 has gone" in output
    is_mended(run, was)


def test_an_earlier_versions_run_has_nothing_to_check_against_and_is_read(run: Path, was: Outcome) -> None:
    unsealed(run)
    code, output = said("verify", run)
    assert (code, "nothing to check against" in output) == (1, True)
    assert said("report", run)[0] == 0
    assert not (run / "manifest.json").exists()
    code, output = said("run", "--resume", run)
    assert code == 0
    assert "warning" not in output
    assert said("verify", run)[0] == 0
    assert outcome(run).differences(was) == []


def test_a_kill_between_a_file_and_its_entry_leaves_what_is_whole(run: Path, was: Outcome) -> None:
    manifest.note(run, Path("summary.json"), b"what was to be written")
    manifest.note(run, Path(SEED) / "spectrum.json", b"what was to be written")
    assert said("verify", run)[0] == 0
    assert said("report", run)[0] == 0
    (run / SEED / "result.json").unlink()  # its manifest was written, and it was not yet
    assert RunFolder(run).path.joinpath(SEED, "manifest.json").is_file()
    is_mended(run, was)


def test_kills_at_one_file_in_several_sessions_leave_what_was_there_before_all_of_them(run: Path) -> None:
    for session in range(3):
        manifest.note(run, Path("plan.json"), f"what session {session} was to write".encode())
    assert RunFolder(run).foreseen() is not None
    assert said("verify", run)[0] == 0
    flipped(run / "plan.json")
    manifest.note(run, Path("plan.json"), b"what is to be written")
    assert said("verify", run)[0] == 1


def test_a_run_that_was_killed_as_it_began_goes_on_without_a_word(run: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "recipe.yaml", tmp_path / "begun")
    manifest.begin(tmp_path / "begun", {"provenance.json": b"what was to be written"})
    mend(RunFolder(tmp_path / "begun"), pytest.fail)


def test_what_a_kill_left_beside_a_file_is_removed(run: Path, was: Outcome) -> None:
    left = [run / ".segments.json.0a1b2c3d", run / SEED / ".spectrum.json.0a1b2c3d"]
    for path in left:
        path.write_text("half")
    is_mended(run, was)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("text", ["[]", "3", '{"status": "ok"}', '{"status": "ok", "run_info": {}}', "\xff"])
def test_a_result_of_an_earlier_version_that_is_none_is_one_line_and_found_again(
    run: Path, was: Outcome, text: str, tmp_path: Path
) -> None:
    unsealed(run)
    (run / SEED / "result.json").write_text(text, encoding="latin-1")
    assert_one_line(wide_cola("export", run, "--arm", "chain2", "--seed", "0", "--to", tmp_path / "to"))
    code, output = said("report", run)
    assert code == 0, output
    assert "result.json is damaged (" in output
    is_mended(run, was, "result.json")


def test_scores_that_are_no_text_are_named(run: Path, was: Outcome) -> None:
    unsealed(run)
    (run / SEED / "scores/test.jsonl").write_bytes(b'{"id": "\xff"}\n')
    code, output = said("report", run)
    assert code == 0
    assert "scores/test.jsonl is damaged (" in output


def test_a_run_folder_that_is_removed_under_its_run_is_one_line_and_blocks_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = whole / "recipe.yaml", tmp_path / "mine"
    score = scoring._scores
    removed: list[bool] = []

    def removing(*words: object) -> object:
        if not removed:
            removed.append(True)
            shutil.rmtree(folder)
        return score(*words)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(scoring, "_scores", removing)
    code, output = said("run", recipe, "--run-folder", folder)
    assert code == 2
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{folder} was removed while the run went on" in line
    assert said("run", recipe, "--run-folder", folder)[0] == 0
