"""Whether the time of a study grows no faster than what it is asked for: optimizer steps, links of a chain, arms.

    python benchmarks/linear.py [--rounds 1]

Runs of the quickstart's model and task in one process, each in an empty store; within a series all else is the same.
Through each series a line is laid: what is fixed, what one more takes, and how far from it a run lies at most. Writes
benchmarks/results/linear.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from machine import made
from rich.console import Console

from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe
from cola.report.terminal import Terminal
from cola.run.run import run
from cola.tree.run_holder import take_run

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "recipes/quickstart.yaml"
SMALL = ["data.rows={train: 128, validation: 8, test: 8}", "evaluation={every: never, train_rows: 8}"]
SMALL += ["training.batch_size=4", "evaluation.general_text=null", "tracking.wandb=off"]
SMALL += ["arms.full=null", "arms.base=null"]
SMALL += ["comparison.primary=null", "arms.lora=null"]


def settings(steps: int = 16, links: int = 1, arms: int = 1) -> tuple[str, ...]:
    """A recipe of so many arms, each a chain of so many links that share so many steps; no two arms are the same."""
    chains = [f"arms.chain{n}={{links: {links}, learning_rate: {(6 - n) * 1e-4:g}}}" for n in range(arms)]
    return (*SMALL, "arms.chain3=null", f"training.steps={steps}", *chains)


SERIES = {
    "optimizer steps": {steps: settings(steps=steps) for steps in (8, 16, 32)},
    "links": {links: settings(links=links) for links in (1, 2, 4, 8)},
    "arms": {arms: settings(steps=8, arms=arms) for arms in (1, 2, 4)},
}


def seconds_of(overrides: tuple[str, ...]) -> float:
    """Wall clock of a run in an empty store, what is not of this process left out: imports."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = read_recipe(QUICKSTART, [*overrides, f"store={scratch}/store", f"output={scratch}"])
        with take_run(dump_recipe(recipe), Path(scratch) / "run", dated=False) as (folder, _):
            began = time.perf_counter()
            summary = run(recipe, folder, Terminal(Console(quiet=True)))
            seconds = time.perf_counter() - began
    assert all(state == "ok" for arm in summary.arms.values() for state in arm.states.values())
    return seconds


def line_through(seconds: dict[int, float]) -> dict[str, float]:
    """Of least squares: seconds of what is fixed and of one more, and how far from it a run is at most, as a share."""
    numbers, found = np.array(list(seconds)), np.array(list(seconds.values()))
    each, fixed = np.polyfit(numbers, found, 1)
    return {"fixed": fixed, "each": each, "off": float((abs(fixed + each * numbers - found) / found).max())}


def main(rounds: int) -> None:
    """Measure and write."""
    asked = list(dict.fromkeys(overrides for series in SERIES.values() for overrides in series.values()))
    seconds_of(asked[0])  # what the first run of a machine does once is no part of it
    found: dict[tuple[str, ...], list[float]] = {overrides: [] for overrides in asked}
    for overrides in asked * rounds:
        found[overrides].append(seconds_of(overrides))
        print(f"{found[overrides][-1]:.1f} s: {', '.join(overrides[len(SMALL) + 1 :])}", flush=True)
    record: dict[str, Any] = {"made": made(), "rounds": rounds, "series": {}}
    for name, series in SERIES.items():
        seconds = {number: statistics.median(found[overrides]) for number, overrides in series.items()}
        record["series"][name] = {"seconds": seconds, **line_through(seconds)}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "linear.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    main(parser.parse_args().rounds)
