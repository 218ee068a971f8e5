"""How fast this machine is: matrix products at the shapes that occur, attention, memory, and the cost of an operation.

What was measured is kept in cola's cache folder, by device, threads and versions, and added to by each calibration.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from cola.files import cache_dir, digest, load_json, write_text
from cola.plan.passes import Product
from cola.tree.made import machine

VERSION = 1  # part of the file's name: raise it when something else is measured
MOST_ROWS = 512  # of a measured product; longer ones run at the same rate
SECONDS = 0.08  # that each measurement takes at least, after a first go
SMALL, LARGE = 1 << 10, 1 << 24  # entries of a tensor that costs its launch, and of one that comes from memory


@dataclass
class Calibration:
    """Rates of this machine; empty where nothing was measured."""

    device: str
    products: dict[str, float] = field(default_factory=dict)  # seconds of one, by "m,k,n,dtype"
    attention: float = 0.0  # FLOP/s
    bandwidth: float = 0.0  # bytes a second that operations in passing read and write
    overhead: float = 0.0  # seconds of an operation that does next to nothing
    fresh: float = 0.0  # seconds of a byte of memory that the system gives anew

    @property
    def measured(self) -> bool:
        return self.bandwidth > 0


def device_key() -> dict[str, Any]:
    """What a calibration holds for."""
    cuda = torch.cuda.is_available()
    about = machine()
    return {
        "version": VERSION,
        "device": torch.cuda.get_device_name() if cuda else f"{about['cpu']}, {torch.get_num_threads()} threads",
        "cores": about["cores"],
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _file() -> Path:
    return cache_dir() / "calibration" / f"{digest(device_key())}.json"


def read_calibration() -> Calibration:
    """What was measured on this machine with these versions, or nothing. A file that cannot be read is nothing."""
    try:
        said = load_json(_file())
        return Calibration(**{key: said[key] for key in Calibration.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return Calibration(device_key()["device"])


def calibrate(products: Iterable[Product], say: Callable[[str], None] = lambda _: None) -> Calibration:
    """Measure, keep and return the machine's rates; of the products those that were not measured before."""
    known, device = read_calibration(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {_key((min(m, MOST_ROWS), k, n, dtype)): (min(m, MOST_ROWS), k, n, dtype) for m, k, n, dtype in products}
    missing = {key: product for key, product in wanted.items() if key not in known.products}
    say(f"calibrating {known.device}: {len(missing)} matrix products, attention, memory")
    for key, (m, k, n, dtype) in missing.items():
        kind = getattr(torch, dtype)
        left_MK, right_KN = (torch.randn(*shape, device=device).to(kind) for shape in ((m, k), (k, n)))
        known.products[key] = _seconds(lambda left=left_MK, right=right_KN: left @ right, device)
    heads = torch.randn(1, 16, 256, 64, device=device)
    flops = 2 * 16 * 256 * 256 * 64
    known.attention = flops / _seconds(
        lambda: scaled_dot_product_attention(heads, heads, heads, is_causal=True), device
    )
    small, large = torch.randn(SMALL, device=device), torch.randn(LARGE, device=device)
    known.overhead = _seconds(lambda: small + small, device)
    # As layers have it: some operations are bound by memory, some by an exponential.
    mixed = [_seconds(lambda: large * large, device), _seconds(lambda: torch.nn.functional.silu(large), device)]
    known.bandwidth = large.nbytes * 5 / sum(mixed)
    # Written for the first time, against written again.
    twice = [_seconds(lambda: torch.empty_like(large).zero_(), device), _seconds(large.zero_, device)]
    known.fresh = max(0.0, twice[0] - twice[1]) / large.nbytes
    write_text(_file(), json.dumps({"of": device_key(), **asdict(known)}, indent=1) + "\n")
    return known


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the least of several rounds: whatever else runs only adds to it."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    work()
    settle()
    best, spent = math.inf, 0.0
    while spent < SECONDS:
        began = time.perf_counter()
        work()
        settle()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
    return best


def _key(product: Product) -> str:
    return ",".join(map(str, product))


def product_seconds(known: Mapping[str, float], product: Product) -> float:
    """Of one product: as it was measured, or as the one that is most like it of those that were, by its FLOPs."""
    m, k, n, dtype = product
    if (exact := known.get(_key(product))) is not None:
        return exact
    shapes = [(*map(int, key.split(",")[:3]), key) for key in known if key.endswith(f",{dtype}")]
    if not shapes:
        shapes = [(*map(int, key.split(",")[:3]), key) for key in known]

    def unlike(shape: tuple[Any, ...]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip((min(m, MOST_ROWS), k, n), shape[:3], strict=True))

    near = min(shapes, key=unlike)
    return known[near[3]] * (m * k * n) / math.prod(near[:3])
