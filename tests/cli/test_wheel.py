"""The wheel, installed where there is no clone. Run: pytest tests/cli/test_wheel.py"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words: object, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: a build leaves files behind, and takes up those of an earlier one."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("cola", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", made, source, cwd=made)
    (path,) = made.iterdir()
    return path


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cola/")}
    there = [path for path in (ROOT / "cola").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {path.relative_to(ROOT).as_posix() for path in there}
    wanted |= {f"cola/recipes/{path.name}" for path in (ROOT / "recipes").iterdir() if path.is_file()}
    assert held == wanted


def test_an_installed_wheel_writes_a_recipe_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=empty)
    assert run("-c", "import cola; print(cola.__file__)", cwd=empty, PYTHONPATH=str(site)).startswith(str(site))
    listed = run("-m", "cola", "new", cwd=empty, PYTHONPATH=str(site))
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} <= {
        line.partition(" ")[0] for line in listed.splitlines()
    }
    run("-m", "cola", "new", "mine.yaml", cwd=empty, PYTHONPATH=str(site))
    assert [path.name for path in empty.iterdir()] == ["mine.yaml"]
    planned = run(
        "-m", "cola", "run", "--dry-run", "mine.yaml", "model.name_or_path=some/model", cwd=empty, PYTHONPATH=str(site)
    )
    assert "chain3" in planned
