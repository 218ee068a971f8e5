"""A whole study by cola, against the script that one would write today: wall clock and peak memory, results held equal.

    python benchmarks/study.py [--recipe benchmarks/study.yaml] [--rounds 3]

Each round runs `cola run RECIPE` in an empty store and benchmarks/by_hand.py, one after the other, each as a process of
its own; then the same `cola run` again, which finds all of it. The training losses of every step, the loss and exact
match of every split and the chosen learning rates must agree. Writes benchmarks/results/RECIPE.json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from machine import TOLERANCE, made
from rich.console import Console

from cola.data.encode import Example
from cola.plan.tree import Planner
from cola.recipe.methods import Lora
from cola.recipe.plan import looking_steps, plan_arm
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.materials import Materials, gather

HERE = Path(__file__).parent


def timed(command: list[str], log: Path, **environment: str) -> dict[str, float]:
    """Wall clock and peak memory of a process.

    The peak is looked for while it runs: cola counts each arm's memory from its beginning, which makes the kernel
    forget what it would say of the whole process in the end.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    started, peak = time.perf_counter(), 0
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def peak_of(process: int) -> int:
    """Largest resident memory of a process so far in bytes, or since it was last counted anew; 0 where it has ended."""
    said = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return int(said[1]) * 1024 if said else 0


def as_text(tokenizer: Any, example: Example) -> dict[str, str]:
    """Prompt and answer, the blank between them with the answer; both read the same tokens."""
    prompt, answer = tokenizer.decode(example.prompt), tokenizer.decode(example.answers[0][:-1])
    assert tokenizer(prompt).input_ids == example.prompt
    assert tokenizer(answer).input_ids == example.answers[0][:-1]
    return {"prompt": prompt, "answer": answer}


def written_out(recipe: Recipe, materials: Materials) -> dict[str, Any]:
    """The recipe as by_hand.py reads it: rows, their order, the learning rate of each step, the seed of each draw."""
    planner = Planner(materials.source, materials.skeleton, materials.splits, materials.device.type)
    tokenizer, n_train = materials.evaluator.tokenizer, materials.splits.sizes["train"]
    rows: dict[str, list[dict[str, str]]] = {}
    for split, examples in materials.splits.items():
        rows[split] = [as_text(tokenizer, example) for example in examples]
    rows["general"] = [{"text": tokenizer.decode([*e.prompt, *e.answers[0]])} for e in materials.general]
    arms, order, looks = [], {}, []
    for name in recipe.arms:
        searched = recipe.search_of(name) is not None
        seeds = [*(recipe.search_seeds(name) if searched else []), *recipe.seeds]
        plans = {s: [plan_arm(recipe, name, s, n_train, c) for c in recipe.choices_of(name)] for s in seeds}
        order |= {
            str(s): planner.order(recipe.training.batch_size, s, plan[0][-1].last_step if plan[0] else 0)
            for s, plan in plans.items()
            if len(order.get(str(s), [])) < (plan[0][-1].last_step if plan[0] else 0)
        }
        looks = max(looks, looking_steps(recipe, plans[seeds[0]][0], n_train), key=len)
        rates = [dict(choice).get("learning_rate") for choice in recipe.choices_of(name)]
        arms.append(
            {
                "name": name,
                "method": "none"
                if not plans[seeds[0]][0]
                else "full"
                if plans[seeds[0]][0][0].settings.is_whole
                else "lora",
                "seed": str(seeds[0]),
                "link_seeds": {str(s): [link.seed for link in plan[0]] for s, plan in plans.items()},
                "rates": [
                    {"learning_rate": rate, "steps": [link.learning_rates for link in links]}
                    for rate, links in zip(rates, plans[seeds[0]], strict=True)
                ],
            }
        )
    pair = next(link for arm in recipe.arms for link in recipe.resolved(arm).links if isinstance(link, Lora))
    return {
        "model": str(materials.source.folder),
        "rows": rows,
        "order": order,
        "looks": looks,
        "seeds": recipe.seeds,
        "batch_size": recipe.training.batch_size,
        "lora": {"r": pair.rank, "lora_alpha": pair.alpha, "target_modules": pair.target_modules},
        "arms": arms,
    }


def disagreements(run_folder: Path, by_hand: dict[str, Any]) -> dict[str, float]:
    """Largest difference of a training loss, of a split's loss, of an exact match, and of a chosen rate."""
    worst = {"training loss": 0.0, "loss": 0.0, "score": 0.0, "learning rate": 0.0}
    for path in run_folder.glob("arms/*/seed-*/result.json"):
        result, key = json.loads(path.read_text()), f"{path.parts[-3]} {path.parts[-2].removeprefix('seed-')}"
        theirs, metrics = by_hand[key], map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        losses = [row["loss"] for row in metrics if row["kind"] == "step"]
        pairs = {"training loss": list(zip(losses, theirs["losses"], strict=True))}
        splits = [name for name in ("train", "validation", "test", "general") if name in theirs]
        pairs["loss"] = [(result["evaluation"][name]["loss"], theirs[name]["loss"]) for name in splits]
        scored = [name for name in splits if theirs[name]["score"] is not None]
        pairs["score"] = [(result["evaluation"][name]["score"], theirs[name]["score"]) for name in scored]
        pairs["learning rate"] = [(result["train_info"]["learning_rate"] or 0, theirs["learning_rate"] or 0)]
        for quantity, both in pairs.items():
            worst[quantity] = max([worst[quantity], *(abs(a - b) for a, b in both)])
    return worst


def spent(run_folder: Path, whole: float) -> dict[str, float]:
    """Where the seconds of a `cola run` went: all arms, seeds and trials."""
    steps = knots = scoring = 0.0
    for path in run_folder.rglob("result.json"):
        info = json.loads(path.read_text())["train_info"]
        tied = sum(knot["seconds"] for knot in info["knots"])
        steps, knots = steps + info["train_seconds"], knots + tied
        scoring += info["total_seconds"] - info["train_seconds"] - tied
    return {"steps": steps, "scoring": scoring, "knots": knots, "the rest": whole - steps - scoring - knots}


def main(recipe_file: Path, rounds: int) -> None:
    """Measure, compare, write."""
    recipe = read_recipe(recipe_file, [])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "log").open("w") as log:
            materials = gather(recipe, Terminal(Console(file=log)))  # both find the model and the rows on this disk
        (folder / "study.json").write_text(json.dumps(written_out(recipe, materials)))
        found: dict[str, list[dict[str, float]]] = {"cola": [], "by hand": [], "cola again": []}
        worst: dict[str, float] = {}
        where: dict[str, list[dict[str, float]]] = {"cola": [], "by hand": []}
        for number in range(rounds):
            store = folder / f"store-{number}"
            command = [sys.executable, "-m", "cola", "run", str(recipe_file), f"store={store}", f"output={folder}"]
            command += ["--run-folder", str(folder / f"run-{number}")]
            by_hand = [sys.executable, str(HERE / "by_hand.py"), str(folder / "study.json"), str(folder / "hand.json")]
            found["cola"].append(timed(command, folder / "cola.log", WANDB_MODE="offline"))
            found["by hand"].append(timed(by_hand, folder / "hand.log"))
            again = [*command[:-1], str(folder / f"again-{number}")]
            found["cola again"].append(timed(again, folder / "again.log", WANDB_MODE="offline"))
            theirs = json.loads((folder / "hand.json").read_text())
            where["cola"].append(spent(folder / f"run-{number}", found["cola"][-1]["seconds"]))
            rest = found["by hand"][-1]["seconds"] - sum(theirs["spent"].values())
            where["by hand"].append(theirs["spent"] | {"the rest": rest})
            for quantity, value in disagreements(folder / f"run-{number}", theirs["results"]).items():
                worst[quantity] = max(value, worst.get(quantity, 0.0))
            print({name: round(runs[-1]["seconds"], 1) for name, runs in found.items()}, worst, flush=True)
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(found["cola"], found["by hand"], strict=True)]
    record = {
        "recipe": recipe_file.name,
        "made": made(),
        "runs": found,
        "median_seconds": {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()},
        "median_ratio": statistics.median(ratios),
        "spent": where,
        "largest_differences": worst,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{recipe_file.stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["median_seconds"]), f"ratio {record['median_ratio']:.2f}")
    if worst["training loss"] > TOLERANCE or worst["loss"] > TOLERANCE or worst["score"] or worst["learning rate"]:
        sys.exit("the two do not agree")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    main(asked.recipe, asked.rounds)
