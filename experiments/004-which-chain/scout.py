"""Run the scout's cells (an arm on a task) that have no result yet, and rank what there is.

python experiments/004-which-chain/scout.py run [WORKERS] [TASK/ARM ...]
python experiments/004-which-chain/scout.py rank

A cell is one `cola run` of scout.yaml with one trained arm. Its learning rate is chosen on the first seed among the
recipe's three; while the best one is at an edge of those tried, one more beyond that edge is tried, twice at most. What
is kept of it, in results/TASK/ARM.json, is small, so that the scout can go on on another machine. `rank` compares arms
on the validation rows, by cola's own statistics, and writes results/ranking.json; README.md is made from that.
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cola.compare.statistics import Table, estimate

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = HERE.parent.parent / "runs" / "004"
RECIPE = HERE / "scout.yaml"
EXTENSIONS = 2  # values beyond an edge of the grid
TASKS: dict[str, list[str]] = {
    "trec": [],
    "chain_sum": [
        "data.files=null",
        "data.reasoning_gym={name: chain_sum, options: {min_terms: 2, max_terms: 2, min_digits: 2, max_digits: 2}}",
        'data.prompt="{metadata.expression} ="',
        'data.answer="{answer}"',
        "data.group=question",
    ],
    "simple_equations": [
        "data.files=null",
        "data.reasoning_gym={name: simple_equations, options: {max_terms: 2, max_value: 12}}",
        'data.prompt="{metadata.equation}, {metadata.variable} ="',
        'data.answer="{answer}"',
        "data.group=question",
    ],
}
GRID = "{search: [%s], seeds: [200], select_by: score}"
ALL_LINEAR = ["link.target_modules=all-linear", "training.learning_rate=" + GRID % "1e-3, 2e-3, 4e-3"]
LATE = ["training.schedule=wsd", "training.decay_steps=0.2"]
# Arms that differ from one of the recipe's in what holds for all of a run: by what, and of which arm.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "lora_all": ("lora", ALL_LINEAR),
    "chain3_all": ("chain3", ALL_LINEAR),
    "lora_late": ("lora", LATE),
    "chain3_late": ("chain3", [*LATE, "knot.warmup_steps=0.1"]),
}
# In the order in which they are run: what the others are held against first.
ARMS = [
    *(
        "lora",
        "chain3",
        "full",
        "lora_all",
        "chain3_all",
        "gradient3",
        "lora_one3",
        "lora_ga3",
        "reproject3",
        "rewarm3",
    ),
    *(
        "lora_late",
        "chain3_late",
        "until3",
        "unequal3",
        "reflora3",
        "riemannian3",
        "rite3",
        "muon3",
        "galore",
        "apollo",
    ),
]


def cell(task: str, name: str) -> dict[str, Any]:
    """Run one arm on one task, extend its grid as the rule says, and give what is kept of it."""
    arm, overrides = VARIANTS.get(name, (name, []))
    recipe = yaml.safe_load(RECIPE.read_text())
    others = [f"arms.{other}=null" for other in recipe["arms"] if other not in (arm, "base")]
    given = [f"name=004-{task}-{name}", *TASKS[task], *others, *overrides, "tracking.wandb=off"]
    grid: list[float] = []
    for extension in range(EXTENSIONS + 1):
        folder = RUNS / task / f"{name}-{extension}"
        search = [f"arms.{arm}.learning_rate=" + GRID % ", ".join(map(repr, grid))] if grid else []
        command = [sys.executable, "-m", "cola", "run", str(RECIPE), *given, *search, "--run-folder", str(folder)]
        if folder.exists():
            command.append("--resume")
        environment = os.environ | {"COLA_STORE": str(RUNS / "store"), "OMP_NUM_THREADS": "1"}
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            code = subprocess.run(["nice", "-n", "15", *command], env=environment, stdout=out, stderr=out).returncode
        if code:
            raise RuntimeError(f"{task}/{name} ended with {code}: {log}")
        summary = json.loads((folder / "summary.json").read_text())
        (choice,) = summary["trials"][arm]["choices"]
        rates = [trial["values"]["learning_rate"] for trial in choice["trials"]]
        chosen = rates[choice["chosen"]]
        if extension == EXTENSIONS or chosen not in (min(rates), max(rates)):
            break
        grid = [chosen / 2, *rates] if chosen == min(rates) else [*rates, chosen * 2]
    return kept(folder, arm, choice, summary["meta"])


def kept(folder: Path, arm: str, choice: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Of a run's arm: its trials, its cost, and each validation row's score and nats under each seed."""
    seeds = {}
    for path in sorted((folder / "arms" / arm).glob("seed-*")):
        result = json.loads((path / "result.json").read_text())
        rows = sorted(
            map(json.loads, (path / "scores/validation.jsonl").read_text().splitlines()), key=lambda r: r["id"]
        )
        of = result["train_info"]
        seeds[str(result["run_info"]["seed"])] = {
            **{key: result["evaluation"]["validation"][key] for key in ("score", "loss")},
            **{
                key: of[key]
                for key in ("steps", "flops", "train_cpu_seconds", "process_memory_max", "num_trainable_params")
            },
            "link_ends": [link["last_step"] for link in of["links"]],
            "rows": hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:16],
            "groups": [row["group"] or row["id"] for row in rows]
            if path.name == "seed-200" and arm == "lora"
            else None,
            "tokens": [row["tokens"] for row in rows] if path.name == "seed-200" and arm == "lora" else None,
            "right": "".join(str(int(row["score"])) for row in rows),
            "nats": [round(row["nats"], 4) for row in rows],
        }
    trials = [{key: trial[key] for key in ("values", "score", "loss", "failed")} for trial in choice["trials"]]
    made = {key: meta[key] for key in ("started", "commit", "machine")}
    return {"trials": trials, "chosen": choice["chosen"], "seeds": seeds, "made": made}


def run(workers: int, only: list[str]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)

    def one(at: tuple[str, str]) -> None:
        task, name = at
        try:
            record = cell(task, name)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            print(f"{task}/{name}: {error!r}", flush=True)
            return
        (RESULTS / task).mkdir(parents=True, exist_ok=True)
        (RESULTS / task / f"{name}.json").write_text(json.dumps(record) + "\n")
        scores = ", ".join(f"{of['score']:.3f}" for of in record["seeds"].values())
        print(f"{task}/{name}: {scores} at {record['trials'][record['chosen']]['values']}", flush=True)

    cells = [(task, name) for task in TASKS for name in ARMS]
    asked = [at for at in cells if not only or "/".join(at) in only]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, [at for at in asked if not (RESULTS / at[0] / f"{at[1]}.json").exists()]))


def tables(records: dict[str, dict[str, dict[str, Any]]], first: str, second: str, key: str) -> list[Table]:
    """The two arms on each task that has both, paired by seed and row."""
    found = []
    for of in records.values():
        if first not in of or second not in of:
            continue
        arms = [of[name]["seeds"] for name in (first, second)]
        seeds = sorted(arms[0].keys() & arms[1].keys())
        assert len({one[seed]["rows"] for one in arms for seed in seeds}) == 1, "the arms were scored on other rows"
        values = [[[float(x) for x in one[seed][key]] for seed in seeds] for one in arms]
        lora = of["lora"]["seeds"]["200"]
        weights = lora["tokens"] if key == "nats" else None
        scores = np.array(values) / np.array(weights) if weights else np.array(values)
        found.append(Table(scores, lora["groups"], weights))
    return found


def rank() -> None:
    records = {
        task: {
            name: json.loads(path.read_text()) for name in ARMS if (path := RESULTS / task / f"{name}.json").exists()
        }
        for task in TASKS
    }
    ranking = []
    for name in ARMS:
        tasks = [task for task in TASKS if name in records[task]]
        if not tasks:
            continue
        one: dict[str, Any] = {"arm": name, "tasks": {}}
        for task in tasks:
            record = records[task][name]
            seeds, rates = record["seeds"].values(), [trial["values"]["learning_rate"] for trial in record["trials"]]
            one["tasks"][task] = {
                **{key: float(np.mean([seed[key] for seed in seeds])) for key in ("score", "loss", "flops")},
                **{"parameters": next(iter(seeds))["num_trainable_params"], "learning_rate": rates[record["chosen"]]},
                "at_edge": rates[record["chosen"]] in (min(rates), max(rates)),
                "trials": len(rates),
                "memory": max(seed["process_memory_max"] for seed in seeds),
            }
        one["score"] = float(np.mean([of["score"] for of in one["tasks"].values()]))
        for other in ("lora", "chain3", "full"):
            for key, sign in (("right", 1), ("nats", -1)):
                if name != other and (of := tables(records, name, other, key)):
                    found = estimate((sign, -sign), of)
                    one[f"{key}_minus_{other}"] = {k: getattr(found, k) for k in ("value", "low", "high", "p")}
        ranking.append(one)
    ranking.sort(key=lambda one: (-len(one["tasks"]), -one["score"]))
    (RESULTS / "ranking.json").write_text(json.dumps(ranking, indent=1) + "\n")
    for one in ranking:
        gain = one.get("right_minus_chain3")
        print(one["arm"], len(one["tasks"]), f"{one['score']:.3f}", gain and [round(gain[k], 3) for k in gain])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["rank"]:
            rank()
        case ["run", *rest]:
            run(int(rest[0]) if rest else 2, rest[1:])
        case _:
            sys.exit(__doc__)
