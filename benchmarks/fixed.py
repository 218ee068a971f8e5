"""What a user waits for beside steps and scores: start, dry run, first step, a second run, the report, a knot.

    python benchmarks/fixed.py [--rounds 5]

Each but the knot is a process of its own, once a round, in turn; the model is the quickstart's, its cache warm. Writes
benchmarks/results/fixed.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # no user compiles each module each time

import torch
from machine import made
from rich.console import Console

from cola.chain import Chain, extend, tie_knot
from cola.link import adapters
from cola.link.base import Base
from cola.measure.evaluate import PROBE_ROWS
from cola.recipe.plan import plan_arm
from cola.recipe.read import read_recipe
from cola.report.terminal import Terminal
from cola.run.materials import gather

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "recipes/quickstart.yaml"
# As small as a run of it can be, with all that is fixed: one LoRA, one chain, one step a link.
SMALL = ["data.rows={train: 24, validation: 8, test: 8}", "training.steps=3", "arms.full=null", "arms.base=null"]


def seconds_of(command: list[str], log: Path, until: str | None = None) -> float:
    """Wall clock of a process, or the time until a file that it writes has its first line."""
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if until and any(path.stat().st_size for path in log.parent.glob(until)):
                seconds = time.perf_counter() - started
                process.terminate()
                process.wait()
                return seconds
            time.sleep(0.01)
    if process.returncode or until:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started


def knots() -> dict[str, float]:
    """Seconds of the first two knots of a chain on all linear layers, the outputs before and after included."""
    recipe = read_recipe(QUICKSTART, [])
    materials = gather(recipe, Terminal(Console(quiet=True)))
    model = materials.source.load("float32", materials.device)
    chain = Chain(model, Base(model, materials.source.files), recipe.resolved("chain3").rules)
    probe = partial(materials.evaluator.outputs, examples=materials.splits.validation[:PROBE_ROWS])
    seconds, start = {}, probe(model)
    for number, link in enumerate(plan_arm(recipe, "chain3", 0, 240)[:2], start=1):
        extend(chain, link, lambda *_: {})
        for layer in adapters.pair_layers(chain.model).values():
            torch.nn.init.normal_(adapters.factors_of(layer)[1], std=1e-3)
        began = time.perf_counter()
        start = tie_knot(chain, start, probe, more_to_come=True).outputs
        seconds[f"knot {number}"] = time.perf_counter() - began
    return seconds


def main(rounds: int) -> None:
    """Measure and write."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            log = folder / "log"
            cola = [sys.executable, "-m", "cola"]
            small = [*cola, "run", str(QUICKSTART), *SMALL, f"output={folder / 'runs'}"]
            once = {
                "cola --help": seconds_of([*cola, "--help"], log),
                "cola run --dry-run": seconds_of([*small, "--dry-run"], log),
                "to the first step": seconds_of(
                    [*small, f"output={folder / 'cut'}", f"store={folder / 'other'}"],
                    log,
                    until="cut/*/arms/*/*/metrics.jsonl",
                ),
                "a small run": seconds_of([*small, f"store={folder / 'store'}"], log),
                "the same again": seconds_of([*small, f"store={folder / 'store'}"], log),
                "in another folder": seconds_of(
                    [*small, f"store={folder / 'store'}", "--run-folder", str(folder / "another")], log
                ),
                "cola report": seconds_of([*cola, "report", str(folder / "another")], log),
                **knots(),
            }
        for name, seconds in once.items():
            found.setdefault(name, []).append(seconds)
        print({name: round(seconds, 2) for name, seconds in once.items()}, flush=True)
    record = {"made": made(), "seconds": found, "median": {n: statistics.median(s) for n, s in found.items()}}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "fixed.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
