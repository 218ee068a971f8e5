"""Where and with what a run was made."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "scipy", "wandb")


def provenance() -> dict[str, Any]:
    """Where and with what a run was made; nothing of the environment, which may hold secrets."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cola": _version("chain-of-lora"),
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
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


def _version(package: str) -> str | None:
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
