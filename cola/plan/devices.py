"""What trains: this machine, or a device that is not here, known by its data sheet."""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import torch

from cola.errors import RecipeError, did_you_mean, listed, quoted
from cola.measure.memory import memory_of

# Of a device's published peaks, what training is taken to reach. An assumption: not measured by cola on any of them.
EFFICIENCY = 0.4  # of matrix products
OF_BANDWIDTH = 0.7
LAUNCH_SECONDS = 6e-6  # of an operation that Python asks a GPU for
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Device:
    """Where a recipe is planned to run."""

    name: str  # `here`, or of the list
    title: str
    memory: int  # bytes
    kind: str  # `cpu` or `cuda`
    here: bool
    peak: dict[str, float]  # FLOP/s of matrix products by dtype; empty where it is here, and measured
    bandwidth: float  # bytes a second; 0 likewise


@cache
def _listed() -> dict[str, dict[str, float | str]]:
    return json.loads(files("cola.plan").joinpath("devices.json").read_text(encoding="utf-8"))["devices"]


def device_of(name: str | None = None, memory: str | None = None) -> Device:
    """The device of that name, this machine's by default; `memory`: as much of it as `24GB` says.

    Raises:
        RecipeError: there is no such device, or the memory is no size.
    """
    device = _here(name) if name in (None, "here", "cpu") else _by_name(str(name))
    return device if memory is None else replace(device, memory=_bytes(memory))


def _here(name: str | None) -> Device:
    if torch.cuda.is_available() and name != "cpu":
        return Device("here", torch.cuda.get_device_name(), memory_of(torch.device("cuda")), "cuda", True, {}, 0.0)
    threads = torch.get_num_threads()
    title = f"this machine's CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    return Device("here", title, memory_of(torch.device("cpu")), "cpu", True, {}, 0.0)


def _by_name(name: str) -> Device:
    known = _listed()
    if (said := known.get(name.lower())) is None:
        near = did_you_mean(name, known)
        raise RecipeError(f"--device {quoted(name)}: known are here, cpu, {listed(known)}{near}")
    single = float(said["float32"]) * 1e12
    half = float(said["half"]) * 1e12
    peak = {"float32": single, "bfloat16": half, "float16": half}
    if name.lower() in ("t4", "v100-32gb"):
        peak["bfloat16"] = single  # their 16-bit units are of float16 alone
    memory, bandwidth = int(float(said["memory"]) * 1e9), float(said["bandwidth"]) * 1e9
    return Device(name.lower(), str(said["title"]), memory, "cuda", False, peak, bandwidth)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS or not (n := float(match[1]) * UNITS[match[2]]) >= 1:
        raise RecipeError(f"--device-memory {quoted(text)}: give a size, such as 24GB or 80GiB")
    return int(n)
