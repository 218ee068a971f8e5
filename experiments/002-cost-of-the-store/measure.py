"""What the store costs and saves, on the quickstart's model and task. Writes results.json beside this file.

    python experiments/002-cost-of-the-store/measure.py [steps a link, default 60] [rounds, default 3]

Each round, interleaved: one chain of length 4 in an empty store, then lengths 1, 2, 3, 4 as `cola ablate` runs them in
another, then the same ablation again, then full fine-tuning. Nothing else should run on the machine.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from rich.console import Console

from cola.compare.ablation import points_of, take_ablation
from cola.measure.evaluate import Evaluator
from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe
from cola.report.terminal import Terminal
from cola.run.ablate import ablate
from cola.run.run import run
from cola.tree.made import machine
from cola.tree.run_holder import take_run
from cola.tree.states import States
from cola.tree.store import Store

HERE = Path(__file__).parent
RECIPE = HERE.parent.parent / "recipes/quickstart.yaml"

spent: dict[str, float] = defaultdict(float)
depth: dict[str, int] = defaultdict(int)


def timed(what: str, owner: type, name: str) -> None:
    """Add the time inside a method to `spent`, once where one that is timed calls another."""
    inner = getattr(owner, name)

    def outer(*args: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        depth[what] += 1
        try:
            return inner(*args, **settings)
        finally:
            depth[what] -= 1
            if depth[what] == 0:
                spent[what] += time.perf_counter() - started

    setattr(owner, name, outer)


for name in ("keep", "drop", "put_back", "pair"):
    timed("store", States, name)
for name in ("get", "recall", "remember"):
    timed("store", Store, name)
timed("scoring", Evaluator, "__call__")


def measured(do: Callable[[], list[Path]]) -> dict[str, float]:
    """Wall clock, steps and where the time went, of a call that returns the run folders it made."""
    spent.clear()
    started = time.perf_counter()
    folders = do()
    wall = time.perf_counter() - started
    steps, train = 0, 0.0
    for path in (path for folder in folders for path in folder.glob("arms/*/*/result.json")):
        info = json.loads(path.read_text())["train_info"]
        rows = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        fresh = [row for row in rows if row["kind"] == "step" and row["step"] > info["reused_steps"]]
        steps, train = steps + len(fresh), train + sum(row["seconds"] for row in fresh)
    return {
        "wall_seconds": wall,
        "steps": steps,
        "train_seconds": train,
        "scoring_seconds": spent["scoring"],
        "store_seconds": spent["store"],
    }


def one(settings: list[str], terminal: Terminal) -> list[Path]:
    """A run of its own."""
    recipe = read_recipe(RECIPE, settings)
    with take_run(dump_recipe(recipe), Path(recipe.output) / recipe.name, dated=True) as (run_folder, _):
        summary = run(recipe, run_folder, terminal)
    assert not summary.interrupted
    return [run_folder.path]


def several(settings: list[str], terminal: Terminal) -> list[Path]:
    """An ablation."""
    points = points_of(RECIPE, settings, paired=False)
    with take_ablation(points) as folder:
        assert ablate(points, folder, terminal).finished
    return sorted(folder.glob("points/*"))


def main(steps: int, rounds: int) -> None:
    """Measure and write."""
    common = ["training.protocol=grow", f"training.steps={steps}", "evaluation.every=link", "tracking.wandb=off"]
    common += ["data.rows={train: 80, validation: 20, test: 40}", "comparison.primary=null"]
    common += ["arms.base=null", "arms.lora=null"]
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w") as log:
            folder, terminal = Path(scratch), Terminal(Console(file=log))
            chain = [*common, "arms.full=null", f"output={folder / 'runs'}"]
            first = [*chain, "arms.chain3.links=4", f"store={folder / 'first'}"]
            lengths = [*chain, "arms.chain3.links=1,2,3,4", f"store={folder / 'lengths'}"]
            whole = [*common, "arms.chain3=null", f"output={folder / 'runs'}", f"store={folder / 'whole'}"]
            found.append(
                {
                    "one_chain_of_4": measured(partial(one, first, terminal)),
                    "lengths_1_to_4": measured(partial(several, lengths, terminal)),
                    "the_same_again": measured(partial(several, lengths, terminal)),
                    "full": measured(partial(one, whole, terminal)),
                }
            )
            print(json.dumps(found[-1]), flush=True)

    def median(number: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(number, found))

    def ratio(key: str) -> float:
        return median(lambda r: r["lengths_1_to_4"][key] / r["one_chain_of_4"][key])

    def share(which: str) -> float:
        return median(lambda r: r[which]["store_seconds"] / r[which]["train_seconds"])

    results = {
        "command": f"python experiments/002-cost-of-the-store/measure.py {steps} {rounds}",
        "machine": machine(),
        "steps_a_link": steps,
        "steps_ratio": ratio("steps"),
        "train_seconds_ratio": ratio("train_seconds"),
        "wall_ratio": ratio("wall_seconds"),
        "wall_ratio_without_scoring": median(
            lambda r: (
                (r["lengths_1_to_4"]["wall_seconds"] - r["lengths_1_to_4"]["scoring_seconds"])
                / (r["one_chain_of_4"]["wall_seconds"] - r["one_chain_of_4"]["scoring_seconds"])
            )
        ),
        "again_seconds": median(lambda r: r["the_same_again"]["wall_seconds"]),
        "again_steps": median(lambda r: r["the_same_again"]["steps"]),
        "store_share_lora": median(
            lambda r: r["one_chain_of_4"]["store_seconds"] / r["one_chain_of_4"]["train_seconds"]
        ),
        "store_share_full": median(lambda r: r["full"]["store_seconds"] / r["full"]["train_seconds"]),
        "rounds": found,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
