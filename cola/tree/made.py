"""Where and with what something was made, as the files of a run say it. No torch."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cola.tree.shapes import Bytes, Count, Flag, Record, Rows, Seconds, Spread, Tensors, Text, Time, Tokens

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "scipy", "wandb")
Packages = Annotated[
    dict[str, Text | None],
    Field(description="versions of those that matter most; null: not installed", json_schema_extra={"key": "PACKAGE"}),
]
Device = Annotated[Text, Field(description="`cpu, threads: 2` and the like, or the GPU's name and CUDA's version")]


class Commit(Record):
    hash: Text | None = Field(description="of cola's own code; null where it is installed without git")
    dirty: Flag | None = Field(description="whether files of it were changed")
    changed: list[Text] | None = Field(default=None, description="which files were changed")


class Machine(Record):
    system: Text | None = Field(default=None, description="the operating system")
    cpu: Text = Field(description="the processor")
    cores: Count | None = Field(default=None, description="cores that the process may use")
    memory_bytes: Bytes | None = Field(default=None, description="the computer's memory")


class Made(Record):
    """With what states or measurements were made, once for all that agree."""

    cola: Text | None = Field(description="version")
    commit: Commit
    python: Text = Field(description="version")
    packages: Packages
    machine: Machine
    device: Device


class RecipeDigest(Record):
    sha256: Text = Field(description="of RUN/recipe.yaml")


class Model(Record):
    name: Text | None = Field(description="as the recipe names it")
    revision: Text | None = Field(default=None, description="the hub's commit")
    sha256: Text = Field(description="a fingerprint of config and weights")


class Data(Record):
    sha256: Text = Field(
        description="of the tokens of all splits; under `data.redraw: per_seed` of validation, test and all that the "
        "draws follow from, so that runs of other seeds have the same"
    )
    notes: list[Text] = Field(description="what was left out, or cut, in words")


class GeneralText(Record):
    name: Text | None = Field(description="the file, `sample`, or null where it is off")
    sha256: Text = Field(description="of its tokens")
    passages: Count = Field(default=0, description="their number")
    longest: Tokens = Field(default=0, description="length of the longest passage")


class Ways(Record):
    """How a model is asked ([numbers.md](numbers.md#the-self-check))."""

    rows: Literal["together", "alone"] = Field(description="several in one pass, or each alone")
    choices: Literal["cached", "plain"] = Field(description="continued from the prompt's cache, or each read as a row")
    decoding: Literal["cached", "padded", "alike", "plain"] = Field(
        description="`cached`: on from the pass that gives the loss; `padded` on the left; `alike`: prompts of one "
        "length; `plain`: passes over one prompt"
    )
    positions: Count | None = Field(description="the model's positions where decoding could go beyond them")


class BaseCheck(Record):
    dtype: Text = Field(description="of a base that an arm has")
    quantization: Text | None = Field(description="likewise")
    ways: Ways
    tolerance: Spread = Field(description="what `batch`, `choices` and `decoding` may be")
    later_token: Spread = Field(description="what tokens after a position move there")
    rounding: Spread = Field(description="what shorter passes change")
    batch: Spread = Field(description="what other rows of a batch do")
    choices: Spread | None = Field(
        description="of choices from the cache from plain passes; null where the task has none, or there is no such way"
    )
    decoding: Spread | None = Field(description="of `generate`'s steps from plain passes; null likewise")
    notes: list[Text] = Field(description="why a slower way is taken, in words")
    tensors: Tensors = Field(description="size of the state that full fine-tuning keeps")
    seconds: Seconds = Field(description="what trying took")


class SelfCheck(Record):
    bases: list[BaseCheck]
    ways: Ways = Field(description="how all arms are asked: the slowest of these")
    shared: list[list[Text]] = Field(
        description="matrices that several modules share, a tied head among them: the names of each"
    )
    notes: list[Text] = Field(description="all notes, and what `target_modules: all-linear` leaves out, in words")


class Provenance(Record):
    """What the run was made with. The same keys are `meta_info` of a result (there of the session that ended it) and
    `meta` of the summary. Nothing of the environment is in it, nor the machine's name. A resumed run must have the
    recipe, model, data and general text of its provenance."""

    format: int = Field(description="of the run's files")
    started: Time = Field(description="when the run began")
    cola: Text | None = Field(description="version")
    commit: Commit
    python: Text = Field(description="version")
    packages: Packages
    all_packages: list[Text] = Field(default=[], description="all that are installed, as pip writes them")
    machine: Machine
    device: Device
    recipe: RecipeDigest
    code: dict[str, Text] = Field(
        default={}, description="SHA-256 of each file of the user's own code", json_schema_extra={"key": "FILE"}
    )
    model: Model
    data: Data
    rows: dict[str, Rows] = Field(
        description="of each split; of `train` under each seed", json_schema_extra={"key": "SPLIT"}
    )
    general_text: GeneralText
    inputs: dict[str, Text] | None = Field(
        default=None,
        description="all that the run was given, by which the same command knows that there is nothing to do: SHA-256 "
        "of each file that it read, and `cola` (its code), `libraries`, `cards`, `store`; null where the hub gave some",
        json_schema_extra={"key": "INPUT"},
    )
    selfcheck: SelfCheck | None = Field(default=None, description="null: of an earlier version")


def provenance() -> dict[str, Any]:
    """Where and with what a run was made; nothing of the environment, which may hold secrets."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cola": version_of("chain-of-lora"),
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: version_of(name) for name in PACKAGES},
        "all_packages": _installed(),
        "machine": machine(),
    }


@cache  # a second to read, and an ablation asks for every point
def _installed() -> list[str]:
    return sorted(f"{package.name}=={package.version}" for package in distributions())


def machine() -> dict[str, Any]:
    """The computer, without its name."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"system": platform.platform(), "cpu": cpu, "cores": cores, "memory_bytes": memory}


def version_of(package: str) -> str | None:
    """The version of a package that is installed; None of one that is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Commit of the code that runs and which of its files were changed since."""
    where = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return {"hash": None, "dirty": None, "changed": None}
    changed = (git("diff", "HEAD", "--name-only") or "").splitlines()
    return {"hash": git("rev-parse", "HEAD"), "dirty": bool(changed), "changed": changed}
