"""A command that is given again where nothing has changed: its results are told, in a second. Run:
pytest tests/cli/test_again.py"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import LORA_ONLY, SHORT, cola
from safetensors.torch import load_file, save_file

from cola.recipe.read import read_recipe
from cola.run import inputs

ASKED = [*SHORT, *LORA_ONLY, "training.steps=1", "tracking.wandb=off"]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from cola.__main__ import main; main()"


def rarely(change: Callable[[Path, Path], None]) -> object:
    return pytest.param(change, marks=pytest.mark.slow)


@pytest.fixture
def own_inputs(tiny_folder: Path, colours: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the tiny base and of the rows, which a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base")), Path(shutil.copy(colours, tmp_path))


def runs_in(recipe_file: Path) -> list[Path]:
    return sorted(file.parent for file in recipe_file.parent.rglob("recipe.yaml"))


def test_the_same_command_tells_the_results_without_torch(recipe_file: Path) -> None:
    first = cola("run", recipe_file, *ASKED)
    assert first.exit_code == 0, first.output
    again = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "run", str(recipe_file), *ASKED],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    (run,) = runs_in(recipe_file)
    assert f"{run} is the run of this recipe" in again.stdout.replace("\n", " ")
    results = "Loss at the last step"
    assert again.stdout.partition(results)[2] == first.output.partition(results)[2]


@pytest.mark.slow
def test_a_named_folder_and_other_seeds_are_other_runs(recipe_file: Path, tmp_path: Path) -> None:
    assert cola("run", recipe_file, *ASKED).exit_code == 0
    assert cola("run", recipe_file, *ASKED, "--run-folder", tmp_path / "another").exit_code == 0
    assert cola("run", recipe_file, *ASKED, "seeds=[1]").exit_code == 0
    assert len(runs_in(recipe_file)) == 3


def _another_row(base: Path, rows: Path) -> None:
    rows.write_text(rows.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def _another_weight(base: Path, rows: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def _another_tokenizer(base: Path, rows: Path) -> None:
    (base / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text() + "\n")


@pytest.mark.parametrize("change", [rarely(_another_row), _another_weight, rarely(_another_tokenizer)])
def test_what_has_changed_is_run_anew(
    recipe_file: Path, own_inputs: tuple[Path, Path], change: Callable[[Path, Path], None]
) -> None:
    base, rows = own_inputs
    given = [*ASKED, f"model.name_or_path={base}", f"data.files={rows}"]
    assert cola("run", recipe_file, *given).exit_code == 0
    assert "is the run of this recipe" in cola("run", recipe_file, *given).output.replace("\n", " ")
    change(base, rows)
    told = cola("run", recipe_file, *given)
    assert told.exit_code == 0, told.output
    assert len(runs_in(recipe_file)) == 2


def test_cola_s_own_code_the_store_and_the_cards_are_inputs(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(recipe_file, ASKED)
    before = inputs.inputs_of(recipe)
    assert before == inputs.inputs_of(recipe)
    assert inputs.inputs_of(read_recipe(recipe_file, [*ASKED, f"store={tmp_path / 'other'}"])) != before
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert inputs.inputs_of(recipe) != before
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "chain.py").write_text("")
    monkeypatch.setattr(inputs, "CODE", tmp_path / "code")
    inputs._own.cache_clear()
    changed = inputs.inputs_of(recipe)
    inputs._own.cache_clear()
    assert changed != before


@pytest.mark.parametrize("hub", ["model.name_or_path=some/model", "model.trust_remote_code=true"])
def test_what_a_library_would_have_to_fetch_is_not_told(recipe_file: Path, hub: str) -> None:
    assert inputs.inputs_of(read_recipe(recipe_file, [*ASKED, hub])) is None


@pytest.mark.slow
def test_a_damaged_run_is_not_told_as_if_it_were_whole(recipe_file: Path) -> None:
    assert cola("run", recipe_file, *ASKED).exit_code == 0
    (run,) = runs_in(recipe_file)
    summary = run / "summary.json"
    summary.write_text(summary.read_text().replace('"seeds"', '"sheds"', 1))
    told = cola("run", recipe_file, *ASKED)
    assert "is the run of this recipe" not in told.output.replace("\n", " ")
    assert told.exit_code == 0, told.output
