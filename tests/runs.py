"""Runs of the tiny model, and command lines of cola, in the tests' own process; what of two runs must be the same."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner, Result

from cola.cli.app import app
from cola.compare.records import Summary
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.write import dump_recipe
from cola.report.terminal import Terminal
from cola.run.run import run
from cola.tree.run_folder import RunFolder
from cola.tree.run_holder import take_run

CHOICE = ["data.task=multiple_choice", "data.answer=null", "data.choices=[blue,green,yellow,red]", "data.label=label"]
SHORT = ["training.steps=4", "training.batch_size=4"]
SHORT += ["data.rows.train=16", "data.rows.validation=4", "data.rows.test=4", *CHOICE]
FULL_ONLY = ["arms.base=null", "arms.lora=null", "arms.chain3=null", "comparison.primary=null"]
LORA_ONLY = ["arms.full=null", "arms.base=null", "arms.chain3=null", "comparison.primary=null"]


def unsealed(run: Path) -> Path:
    """A run as a version without manifests left it, whose files a test may write as it likes."""
    for path in run.rglob("manifest.json"):
        path.unlink()
    return run


def quiet() -> Terminal:
    return Terminal(Console(file=open(os.devnull, "w")))  # noqa: PTH123 - closed with the process


def go(recipe_file: Path, *overrides: str, folder: Path | None = None) -> tuple[RunFolder, Summary]:
    """A new run; it shares what the runs of the same test have stored unless it names a store of its own."""
    recipe = read_recipe(recipe_file, list(overrides))
    run_folder = create_run(recipe, folder)
    return run_folder, run(recipe, run_folder, quiet())


def create_run(recipe: Recipe, path: Path | None = None) -> RunFolder:
    """A run's new folder, which nobody else knows of."""
    named = Path(recipe.output) / recipe.name
    with take_run(dump_recipe(recipe), path or named, dated=path is None) as (folder, fresh):
        assert fresh
    return folder


def open_run(path: Path) -> tuple[RunFolder, Recipe]:
    """A run that is there, and its recipe."""
    folder = RunFolder.open(path)
    return folder, read_recipe(folder.recipe_file)


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file, as they lie there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(folder: RunFolder, arm: str, seed: int = 0) -> dict:
    return json.loads((folder.path / "arms" / arm / f"seed-{seed}" / "result.json").read_text())


def cola(*words: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def wide_cola(*words: object) -> Result:
    """The same in a terminal so wide that rich wraps nothing."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "1000"})


def assert_one_line(told: Result) -> None:
    """The command was refused in one line that a user can read."""
    assert isinstance(told.exception, SystemExit), told.exception
    assert told.exit_code == 2, told.output
    lines = [line for line in told.output.splitlines() if line]
    assert len(lines) == 1, told.output
    assert lines[0].startswith("error: ")


# ---------------------------------------------------------------------------------------------------------
# What must be the same to the bit


@dataclass
class Outcome:
    """All of a run that says what was trained and scored, without times and places."""

    files: dict[str, Any]

    def differences(self, other: "Outcome") -> list[str]:
        names = self.files.keys() | other.files.keys()
        return sorted(name for name in names if self.files.get(name) != other.files.get(name))


def outcome(run_folder: Path) -> Outcome:
    files: dict[str, Any] = {}
    for kind in ("arms", "trials"):
        for path in sorted((run_folder / kind).rglob("*")):
            name = str(path.relative_to(run_folder))
            if path.suffix == ".safetensors" or path.parent.name == "scores":
                files[name] = path.read_bytes()
            elif path.name == "chosen.json":
                files[name] = path.read_text()
            elif path.name == "metrics.jsonl":
                rows = read_jsonl(path)
                files[name] = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
            elif path.name == "ledger.jsonl":
                files[name] = read_jsonl(path)
            elif path.name == "result.json":
                record = json.loads(path.read_text())
                info = record["train_info"]
                kept = ("learning_rate", "scored_step", "looked_loss", "steps", "segments", "scored_state", "tokens")
                files[name] = [record["status"], record["evaluation"], {key: info[key] for key in kept}]
    return Outcome(files)


def write_recipe(folder: Path, recipe_text: str, *lines: str) -> Path:
    """The tiny recipe with fewer rows and a checkpoint after every step."""
    folder.mkdir(exist_ok=True)
    text = recipe_text.replace("{train: 24, validation: 8, test: 16}", "{train: 16, validation: 4, test: 4}")
    text = text.replace("epochs: 2, batch_size: 8", "steps: 9, batch_size: 4")
    path = folder / "tiny.yaml"
    path.write_text(text + "checkpoint_seconds: 0\n" + "\n".join(lines) + "\n")
    return path


def fresh(recipe: Path, overrides: list[str], folder: Path) -> Outcome:
    """The undisturbed run, with a store of its own."""
    whole, summary = go(recipe, *overrides, f"store={folder / 'undisturbed'}", folder=folder / "undisturbed-run")
    assert not summary.interrupted
    made = outcome(whole.path)
    assert any(name.endswith("result.json") for name in made.files)
    return made
