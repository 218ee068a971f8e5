"""What is refused or told in a line before it costs, and what a kill does not leave.

Run: pytest tests/run/test_bounds_and_leftovers.py
"""

import json
import os
import stat
from pathlib import Path

import pytest
from children import KILLED, end, start
from runs import LORA_ONLY, SHORT, assert_one_line, go, wide_cola, write_recipe

from cola.files import need_room
from cola.tree.prune import garbage
from cola.tree.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_a_rank_that_no_matrix_has_is_told(recipe_file: Path) -> None:
    told = wide_cola("run", recipe_file, *LORA_ONLY, *SHORT, "arms.lora.rank=64")
    assert told.exit_code == 0, told.output
    assert "rank 64 is more than any matrix has that it adapts (32)" in told.output
    assert "is more than any matrix has" not in wide_cola("run", recipe_file, *LORA_ONLY, *SHORT).output


def test_a_search_over_long_lists_of_modules_has_folders_that_a_disk_takes(recipe_file: Path) -> None:
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    names = [f"model.layers.{n}.{part}.{one}" for n in (0, 1) for part, every in parts.items() for one in every]
    search = f"arms.lora.target_modules={{search: [[{','.join(names)}], [{','.join(names[1:])}]]}}"
    folder, summary = go(recipe_file, *LORA_ONLY, *SHORT, search)
    assert summary.arms["lora"].states == {0: "ok"}
    trials = [path.name for path in (folder.path / "trials/lora").iterdir() if path.is_dir()]
    assert len(trials) == 2
    assert max(map(len, trials)) == 200
    assert wide_cola("verify", folder.path).exit_code == 0


def test_arms_whose_names_differ_in_case_alone_are_one_line(recipe_file: Path) -> None:
    told = wide_cola("run", recipe_file, "--dry-run", "arms.LORA={links: 1}")
    assert_one_line(told)
    assert "arms.LORA and arms.lora share a folder" in told.output


def test_a_full_disk_names_a_remedy_that_this_recipe_has(tmp_path: Path) -> None:
    for or_else in ("", ", or keep_full_weights: false"):
        with pytest.raises(OSError, match="make room, or set store to another disk") as told:
            need_room(tmp_path, 10**18, or_else)
        assert str(told.value).endswith(f"another disk{or_else}")


def test_a_full_disk_is_told_with_the_file_that_found_it_full(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "test.jsonl" in path.name:
            raise OSError(28, "No space left on device")  # as a write says it: without a name
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    told = wide_cola("run", recipe_file, *LORA_ONLY, *SHORT, "--run-folder", tmp_path / "run")
    assert told.exit_code == 2
    [line] = [line for line in told.output.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/run/arms/lora/seed-0/scores/test.jsonl: its disk is full" in line
    assert f"cola run --resume {tmp_path}/run" in line
    same = tmp_path.stat().st_dev == Path(os.environ["COLA_CACHE"]).stat().st_dev
    assert ("cola store prune" in line) == same


def test_who_keeps_files_for_himself_does_so_in_the_store(recipe_file: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        go(recipe_file, *LORA_ONLY, *SHORT, f"store={tmp_path / 'own'}")
    finally:
        os.umask(before)
    segments = list((tmp_path / "own/segments").glob("*/*"))
    assert segments
    assert {stat.S_IMODE(path.stat().st_mode) for path in segments} == {0o700}


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 5, 8])
def test_a_kill_between_two_checkpoints_leaves_none_in_the_store(recipe_text: str, tmp_path: Path, number: int) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    command = ["run", str(recipe), *LORA_ONLY, f"output={tmp_path / 'out'}", f"store={tmp_path / 'own'}"]
    assert end(start(command, said, "drop", number)) == KILLED
    assert end(start(command, said)) == 0, said.read_text()
    [folder] = (tmp_path / "out").iterdir()
    kinds = [json.loads(path.read_text())["kind"] for path in (tmp_path / "own/segments").rglob("segment.json")]
    assert set(kinds) == {"segment"}
    assert garbage(Store(tmp_path / "own", pytest.fail)) == []
    assert not [path for path in folder.rglob(".*") if path.is_file() and not path.match(".lease/*")]
