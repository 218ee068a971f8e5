"""The flagship's recipe at its real size on this machine: random weights of Qwen1.5-1.8B, a few steps, all of the way.

python experiments/005-flagship-at-size/flagship.py [FOLDER]

The base is written once into FOLDER (default: the system's temporary folder), 7.3 GB of float32. Then, each a process
of its own: `cola plan` of the recipe's arms, full fine-tuning among them; `cola run` of LoRA and of the chain, killed
with -9 as the chain has tied its first knot; the same command, which goes on; the same command once more in a store of
its own, not killed, for its knots to be compared; `cola verify`; `cola export` of the chain, merged. Peaks of memory
are looked for in /proc while they run. Writes results/flagship.json.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "off"}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch
from transformers import AutoModelForCausalLM

from cola.link.find import find_model
from cola.plan.models import find_planned
from cola.recipe.read import read_recipe
from cola.recipe.schema import Model
from cola.tree.made import provenance

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECIPE = ROOT / "recipes/qwen1_8b_chain3.yaml"
GENERAL = ROOT / "cola/data/general.jsonl"
WORDS = 80  # of a passage: rows nearly as long as BoolQ's
CUT = [
    *("data.hub=null", "data.group=null", "data.label=label", "data.rows={train: 8, validation: 2, test: 2}"),
    *("training.epochs=null", "training.steps=3", "training.batch_size=2", "training.learning_rate=1e-3"),
    *("evaluation.general_text=null", "evaluation.train_rows=2", "evaluation.every=never"),
    *("evaluation.checkpoint=last", "seeds=[0]", "tracking.wandb=off"),
]
PAIRS = ["arms.full=null", "comparison.secondary=[]"]


def write_base(folder: Path) -> None:
    """Random weights in float32, with the quickstart's tokenizer."""
    if (folder / "tokenizer_config.json").is_file():
        return
    planned = find_planned(Model(name_or_path="Qwen/Qwen1.5-1.8B"), network=False)
    assert planned is not None  # it is built in
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(planned.skeleton.config, dtype=torch.float32).save_pretrained(folder)
    find_model(read_recipe(ROOT / "recipes/quickstart.yaml", []).model).tokenizer().save_pretrained(folder)


def write_rows(file: Path) -> None:
    """Passages of the general text that comes with cola, with a question and no meaning."""
    words = " ".join(json.loads(line)["text"] for line in GENERAL.read_text().splitlines()).split()
    rows = [
        {"passage": " ".join(words[n * WORDS : (n + 1) * WORDS]), "question": f"is this row {n}", "label": n % 2 == 0}
        for n in range(min(40, len(words) // WORDS))
    ]
    file.write_text("".join(json.dumps({**row, "label": str(row["label"]).lower()}) + "\n" for row in rows))


def resident(process: int) -> int:
    """Bytes of a process's memory that are in RAM."""
    try:
        said = re.search(r"^VmRSS:\s*(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(said[1]) * 1024 if said else 0


def cola(*words: str, kill_at: Path | None = None) -> dict[str, Any]:
    """What a command printed, its exit code, seconds and peak of memory; `kill_at`: it is killed as that is there."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, "-m", "cola", *words], stdout=out, stderr=errors)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if kill_at is not None and kill_at.exists():
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.02)
        out.seek(0)
        errors.seek(0)
        told, wrong = out.read(), errors.read()
    seconds = time.perf_counter() - started
    print(f"cola {words[0]}: {process.returncode}, {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)
    if process.returncode not in ((-signal.SIGKILL,) if kill_at else (0,)):
        print(told, wrong)
    return {"code": process.returncode, "seconds": seconds, "peak": peak, "said": told}


def knots_of(run: Path) -> dict[str, str]:
    """SHA-256 of each knot's weights."""
    files = sorted(run.glob("arms/*/seed-*/knots/link-*/*.safetensors"))
    return {file.relative_to(run).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def arm_of(run: Path, arm: str) -> dict[str, Any]:
    """Of an arm's result what memory and time it took."""
    folder = run / "arms" / arm / "seed-0"
    result = json.loads((folder / "result.json").read_text())
    info = result["train_info"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["seconds"] for row in rows if row["kind"] == "step"]
    kept = ("process_memory_max", "num_trainable_params", "flops", "train_seconds", "total_seconds", "tokens")
    return {**{key: info[key] for key in kept}, "steps": steps, "knots": [k["seconds"] for k in info["knots"]]}


def main(folder: Path) -> None:
    """Write the base, run, kill, go on, export, and keep what was found."""
    base, rows = folder / "qwen1.5-1.8b-random", folder / "rows.jsonl"
    base.mkdir(parents=True, exist_ok=True)
    write_base(base)
    write_rows(rows)
    given = [str(RECIPE), f"model.name_or_path={base}", f"data.files={rows}", *CUT]
    found: dict[str, Any] = {"made": provenance() | {"all_packages": None}}
    planned = cola("plan", *given, "--calibrate", "--as", "json", kill_at=None)
    plan = json.loads(planned.pop("said")) if planned["code"] in (0, 1) else {}
    kept = ("arms", "totals", "fits", "device", "times")
    found["plan"] = {"process": planned, **{key: plan.get(key) for key in kept}}
    for name in ("killed", "whole"):
        shutil.rmtree(folder / name, ignore_errors=True)
    runs = {name: folder / name / "run" for name in ("killed", "whole")}
    command = {n: ["run", *given, *PAIRS, f"store={folder / n / 'store'}", "--run-folder", str(runs[n])] for n in runs}
    # The knot is in the store before the arm's folder has it.
    first = runs["killed"] / "arms/chain3/seed-0/knots/link-1/adapter_model.safetensors"
    found["killed"] = cola(*command["killed"], kill_at=first)
    found["gone on"] = cola(*command["killed"])
    found["not killed"] = cola(*command["whole"])
    found["verify"] = cola("verify", str(runs["killed"]))
    found["export"] = cola(
        "export", str(runs["killed"]), "--arm", "chain3", "--as", "merged", "--to", str(folder / "merged")
    )
    shutil.rmtree(folder / "merged", ignore_errors=True)
    for name in ("killed", "gone on", "not killed", "verify", "export"):
        found[name].pop("said")
    found["arms"] = {arm: arm_of(runs["whole"], arm) for arm in ("lora", "chain3")}
    found["knots"] = [len(knots_of(runs["killed"])), knots_of(runs["killed"]) == knots_of(runs["whole"])]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/flagship.json").write_text(json.dumps(found, indent=1).replace(str(Path.home()), "~") + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()) / "flagship")
