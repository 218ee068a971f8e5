"""The house rules that a machine can check. Run: pytest tests/test_house.py"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Who may import whom: a file imports only files of lower rows (and of its own row where that is said).
LAYERS = [
    {"errors", "cache", "interrupt", "answers", "locks"},
    {"recipe", "environment", "shapes"},
    {"recipe_file", "plan", "compare", "choice", "scope"},
    {"checkpoint", "gguf_file", "package_file", "text_part", "files", "record", "terminal", "segments", "chat"},
    {"spectra", "sources"},
    {"data", "summary", "tables", "store"},
    {"ablation", "tasks", "tracking"},
    {"drawing", "differences"},
    {"charts", "heatmaps"},
    {"figures"},
    {"captions"},
    {"batches", "bottleneck", "drift", "memory", "residual", "model", "moments", "report", "store_view"},
    {"adapters"},
    {"forward", "starts", "flops", "spectrum"},
    {"chain", "evaluate", "train", "preview", "data_view"},
    {"states", "measure", "outcome", "learned", "selfcheck"},
    {"bench", "score", "card"},
    {"job", "settle", "export", "run_view"},
    {"run"},
    {"ablate"},
    {"cli"},
    {"__main__"},
]
ALLOWED_PACKAGES = {
    "peft": {"adapters"},
    "wandb": {"tracking"},
    "wandb_workspaces": {"tracking"},
    "reasoning_gym": {"sources"},
    "matplotlib": {"drawing", "charts", "heatmaps", "figures"},
}
WITHOUT_TORCH = {
    "errors",
    "environment",
    "files",
    "answers",
    "locks",
    "recipe",
    "recipe_file",
    "plan",
    "record",
    "shapes",
    "spectra",
    "compare",
    "choice",
    "scope",
    "summary",
    "tables",
    "report",
    "drawing",
    "charts",
    "heatmaps",
    "figures",
    "captions",
    "ablation",
    "tasks",
    "differences",
    "terminal",
    "tracking",
    "segments",
    "store",
    "store_view",
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "cola" else {node.module}
    return found


FILES = {path.stem: path for path in (ROOT / "cola").glob("*.py") if path.stem != "__init__"}


def test_every_file_has_its_place_in_the_layers() -> None:
    assert set().union(*LAYERS) == set(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down_only(name: str) -> None:
    height = next(i for i, layer in enumerate(LAYERS) if name in layer)
    below = set().union(*LAYERS[:height])
    mine = {module.split(".")[1] for module in imports(FILES[name]) if module.startswith("cola.")}
    assert mine <= below, f"{name} imports {mine - below}"


@pytest.mark.parametrize("package", sorted(ALLOWED_PACKAGES))
def test_a_foreign_library_has_one_seam(package: str) -> None:
    users = {name for name, path in FILES.items() if any(m.split(".")[0] == package for m in imports(path))}
    assert users == ALLOWED_PACKAGES[package]


def test_results_are_read_without_torch() -> None:
    code = "import sys\n" + "".join(f"import cola.{name}\n" for name in sorted(WITHOUT_TORCH))
    code += "assert not {'torch', 'transformers', 'wandb', 'wandb_workspaces'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_chain_knows_no_file_logger_or_data_set() -> None:
    foreign = {f"cola.{name}" for name in ("data", "record", "tracking", "terminal", "store", "segments", "job")}
    foreign |= {"json", "pathlib", "logging"}
    assert not imports(FILES["chain"]) & foreign
    assert FILES["chain"].read_text().count("\n") <= 100


def test_generated_docs_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_test_file_holds_a_test() -> None:
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body), path.name
