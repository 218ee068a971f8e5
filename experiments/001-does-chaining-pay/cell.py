"""Train one cell of the study again, from nothing, and hold every number of its result against what is kept of it.

python experiments/001-does-chaining-pay/cell.py TASK ARM SEED [RECORD.json]

TASK is a folder of results/ that has a run.tar.xz, or a point of the ablation: length/points/02-chain3.links=2. The
learning rate is the one that the search had chosen; nothing is taken from the store. Prints what was compared and
exits with 1 if anything differs but times, the machine and the search. With RECORD.json the verdict is kept there.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
# What may differ: when, where and by which commit it was made, how long it took, and how its learning rate was found.
OF_THE_OCCASION = (
    "meta_info",
    "created_at",
    "seconds",
    "memory",
    "reused_steps",
    "segments_made",
    "measured_made",
    "choice",
    "at_grid_edge",
)
FILES = ("scores/train.jsonl", "scores/validation.jsonl", "scores/test.jsonl", "scores/general.jsonl", "ledger.jsonl")


def numbers(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a record that is not of the occasion, by where it is."""
    if any(word in at.rpartition(".")[2] for word in OF_THE_OCCASION):
        return
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(one, f"{at}.{key}")
    else:
        yield at, value


def train_again(run: Path, arm: str, seed: int, work: Path) -> Path:
    """Run a kept run's recipe for one arm and one seed in an empty store; the cell's new folder."""
    arms = json.loads((run / "summary.json").read_text())["arms"]
    kept = json.loads((run / "arms" / arm / f"seed-{seed}" / "result.json").read_text())
    learning_rate = kept["train_info"]["choice"].get("learning_rate")
    overrides = [f"arms.{other}=null" for other in arms if other != arm]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    if recipe["data"].get("files"):  # as paths of the machine that it ran on; the study's recipe says them as meant
        files = yaml.safe_load((HERE / "trec.yaml").read_text())["data"]["files"]
        overrides.append(f"data.files={json.dumps(files)}")
    if learning_rate is not None:
        overrides.append(f"arms.{arm}.learning_rate={learning_rate}")
    overrides += ["name=cell", f"seeds=[{seed}]", "comparison={primary: null}", "tracking.wandb=off"]
    command = [sys.executable, "-m", "cola", "run", str(run / "recipe.yaml"), *overrides]
    environment = os.environ | {"COLA_STORE": str(work / "store"), "OMP_NUM_THREADS": "1"}
    if subprocess.run([*command, "--run-folder", str(work / "run")], env=environment).returncode:
        sys.exit("the cell was not trained; why is said above")
    return work / "run" / "arms" / arm / f"seed-{seed}"


def compared(kept: Path, made: Path) -> tuple[list[str], list[str]]:
    """What two folders of a cell hold: the numbers and files that were compared, and those that differ."""
    before, after = (dict(numbers(json.loads((one / "result.json").read_text()))) for one in (kept, made))
    differ = [at for at in sorted(before | after) if before.get(at, "absent") != after.get(at, "absent")]
    files = [name for name in FILES if (kept / name).exists()]
    differ += [name for name in files if (kept / name).read_bytes() != (made / name).read_bytes()]
    return [*before, *files], differ


def main(task: str, arm: str, seed: int, record: Path | None) -> int:
    name, _, inside = task.partition("/")
    archive = HERE / "results" / name / "run.tar.xz"
    if not archive.is_file():
        there = sorted(one.parent.name for one in HERE.glob("results/*/run.tar.xz"))
        sys.exit(f"{archive} is not there: TASK is one of {', '.join(there)}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with tarfile.open(archive) as packed:
            packed.extractall(work / "kept", filter="data")
        run = work / "kept" / inside
        if not (run / "recipe.yaml").is_file():
            there = sorted(str(one.parent.relative_to(work / "kept")) for one in run.glob("**/recipe.yaml"))
            sys.exit(f"{task} is no run: TASK is {' or '.join(f'{name}/{one}' for one in there) or name}")
        kept = run / "arms" / arm / f"seed-{seed}"
        if not kept.is_dir():
            sys.exit(f"{task} has no arm {arm} of seed {seed}")
        made = train_again(run, arm, seed, work)
        seen, differ = compared(kept, made)
        result = json.loads((made / "result.json").read_text())
    made_by, of = result["meta_info"], result["train_info"]
    verdict = {
        "task": task,
        "arm": arm,
        "seed": seed,
        "segments": of["segments"],
        "compared": len(seen),
        "differ": differ,
        "made": {key: made_by[key] for key in ("started", "commit", "machine")},
    }
    print(f"{len(seen)} numbers and files compared; {len(differ)} differ", *differ, sep="\n  ")
    if record is not None:
        record.write_text(json.dumps(verdict, indent=1) + "\n")
    return 1 if differ else 0


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or not sys.argv[3].isdigit():
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) == 5 else None))
