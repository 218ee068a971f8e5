"""The house rules that a machine can check. Run: pytest tests/test_house.py"""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent

# From the ground up: a room imports those before it, and nothing of those after it.
GROUND = {"errors", "files", "environment", "clock"}
ROOMS = ["recipe", "data", "link", "chain", "measure", "tree", "compare", "report", "plan", "run", "export", "cli"]

# Foreign libraries that are imported in one place only.
SEAMS = {
    "peft": {"link/from_peft.py", "link/ideas/riemannian.py"},
    "ray": {"run/on_ray.py", "run/ray_task.py"},
    "pandas": {"cli/notebook.py"},
    "wandb": {"report/to_wandb.py"},
    "trackio": {"report/to_trackio.py"},
    "mlflow": {"report/to_mlflow.py"},
    "wandb_workspaces": {"report/group_report.py"},
    "reasoning_gym": {"data/sources.py"},
    "typer": {"cli/app.py", "cli/models.py", "cli/said.py", "cli/store.py"},
}
WITHOUT_TORCH = ["recipe", "compare", "report"]
# Who takes a whole recipe; the other rooms are given what they need of it.
KNOW_THE_RECIPE = {"recipe", "plan", "run", "export", "cli"}
FILES = {path.relative_to(ROOT / "cola").as_posix(): path for path in sorted((ROOT / "cola").rglob("*.py"))}


@cache
def imports(path: Path, top: bool = False) -> set[str]:
    """Every module that a file imports, at its top or inside a function; `top`: at its top only."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def module_of(name: str) -> str:
    return "cola." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_file_is_in_a_room_and_every_room_says_what_it_is() -> None:
    flat = {name.removesuffix(".py") for name in FILES if "/" not in name}
    assert flat == GROUND | {"chain", "__init__", "__main__"}
    assert {name.split("/")[0] for name in FILES if "/" in name} == set(ROOMS) - {"chain"}
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), name


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("__init__.py", "__main__.py")])
def test_imports_point_down_only(name: str) -> None:
    room = room_of(module_of(name))
    below = GROUND | ({room} if room in GROUND else {room, *ROOMS[: ROOMS.index(room)]})
    mine = {room_of(module) for module in imports(FILES[name]) if module.startswith("cola.")}
    assert mine <= below, f"{name} imports {mine - below}"


def test_no_file_imports_what_imports_it() -> None:
    modules = {module_of(name): path for name, path in FILES.items() if "__" not in name}
    order = TopologicalSorter({name: imports(path) & set(modules) for name, path in modules.items()}).static_order()
    assert set(order) == set(modules)  # a circle has no order, and is an error that names it


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in KNOW_THE_RECIPE | {"compare", "report"}])
def test_few_rooms_know_the_recipe(room: str) -> None:
    mine = {name: path for name, path in FILES.items() if room_of(module_of(name)) == room}
    assert not [name for name, path in mine.items() if "cola.recipe.recipe" in imports(path)]


@pytest.mark.parametrize("package", sorted(SEAMS))
def test_a_foreign_library_has_one_seam(package: str) -> None:
    users = {name for name, path in FILES.items() if any(m.split(".")[0] == package for m in imports(path))}
    assert users == SEAMS[package]


def test_results_are_read_without_torch() -> None:
    names = [name for name in FILES if name.split("/")[0] in WITHOUT_TORCH]
    names += [name for name in FILES if name.startswith("tree/") and name != "tree/states.py"]
    code = "import sys\n" + "".join(f"import {module_of(name)}\n" for name in names)
    code += "import cola.cli.app\n"
    code += "assert not {'torch', 'transformers', 'wandb', 'wandb_workspaces', 'trackio', 'mlflow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_chain_knows_no_file_logger_or_data_set() -> None:
    assert {room_of(m) for m in imports(FILES["chain.py"]) if m.startswith("cola.")} <= {"link", "recipe"}
    assert not imports(FILES["chain.py"]) & {"json", "pathlib", "logging"}
    assert FILES["chain.py"].read_text().count("\n") <= 100


def test_generated_docs_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", [path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]
)
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = {ROOT / path for path in re.findall(r"\b(?:cola|tests|docs|recipes|experiments)/[\w./-]*\w", text)}
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    named |= {(ROOT / page).parent / link for link in linked}
    assert not [str(path) for path in sorted(named) if not path.exists()]


@pytest.mark.parametrize("folder", ["docs", "experiments"])
def test_every_name_that_a_script_takes_from_cola_is_there(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cola."):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    there = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert there, f"{path}: {node.module} has no {alias.name}"


def test_the_version_is_the_same_wherever_it_stands() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.findall(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert set(re.findall(r"chain_of_lora-([0-9.]+)-py3", (ROOT / "README.md").read_text())) == {version}


def test_every_test_file_holds_a_test() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body), path.name


def test_every_folder_of_tests_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - {"fuzz"} <= set(ROOMS)
