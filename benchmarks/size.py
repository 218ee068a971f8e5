"""What grows with the size of what a user brings: long rows, many rows, test rows, arms, runs.

    python benchmarks/size.py [--to FILE] [CASE ...]

Each case at a tenth of its size and at all of it: CPU seconds and peak memory of one command in a process of its own,
imports included. Runs are a finished run of the tests' tiny model whose files are copied: its scores under other ids,
its arms under other names. CPU time is taken, since other work on a machine changes the wall clock. Writes
benchmarks/results/size.json.
"""

import argparse
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from kills import Ground
from machine import made

HERE = Path(__file__).parent
Command = list[str]


def a_row(ground: Ground, to: Path, mb: int) -> Command:
    """A JSONL file one row of which has so many million characters."""
    rows = (ground.folder / "rows.jsonl").read_text().splitlines()
    long = json.loads(rows[0]) | {"id": "long", "question": "blue sky " * (mb * 1_000_000 // 9)}
    (to / "rows.jsonl").write_text("\n".join([*rows, json.dumps(long)]) + "\n")
    return ["run", "--dry-run", str(ground.recipe), f"data.files={to / 'rows.jsonl'}"]


def rows(ground: Ground, to: Path, n: int) -> Command:
    """A CSV file of so many rows."""
    lines = (f"{number},what is {number} and the sky,blue,0" for number in range(n))
    (to / "rows.csv").write_text("\n".join(["id,question,answer,label", *lines]) + "\n")
    return ["data", str(ground.recipe), f"data.files={to / 'rows.csv'}"]


def test_rows(ground: Ground, to: Path, n: int) -> Command:
    """A run with so many test rows."""
    run = a_run(ground, to)
    for path in run.glob("arms/*/*/scores/test.jsonl"):
        known = [json.loads(line) for line in path.read_text().splitlines()]
        with path.open("w") as file:
            for number in range(n):
                file.write(json.dumps(known[number % len(known)] | {"id": str(number)}) + "\n")
    return ["report", str(run)]


def arms(ground: Ground, to: Path, n: int) -> Command:
    """A run with so many arms."""
    run = a_run(ground, to)
    recipe = (run / "recipe.yaml").read_text()
    [lora] = re.findall(r"^  lora:.*?(?=^ {0,2}\S)", recipe, re.MULTILINE | re.DOTALL)
    names = [f"copy{number}" for number in range(n - len(list((run / "arms").iterdir())))]
    for name in names:
        shutil.copytree(run / "arms/lora", run / "arms" / name)
        for path in (run / "arms" / name).rglob("result.json"):
            result = json.loads(path.read_text())
            result["run_info"]["arm"] = name
            path.write_text(json.dumps(result))
    copies = "".join(lora.replace("lora:", f"{name}:", 1) for name in names)
    (run / "recipe.yaml").write_text(recipe.replace(lora, lora + copies, 1))
    return ["report", str(run)]


def runs(ground: Ground, to: Path, n: int) -> Command:
    """So many runs, each of a recipe of its own."""
    first = a_run(ground, to)
    recipe = (first / "recipe.yaml").read_text()
    for number in range(1, n):
        run = shutil.copytree(first, to / f"run-{number}")
        (run / "recipe.yaml").write_text(recipe.replace("name: tiny", f"name: tiny{number}", 1))
    return ["report", *(str(path) for path in sorted(to.glob("run*"))), "--to", str(to / "report")]


def a_run(ground: Ground, to: Path) -> Path:
    """A copy of the real one, without manifests: its files are about to be changed."""
    run = Path(shutil.copytree(ground.study("chains").run, to / "run", ignore=shutil.ignore_patterns("*.safetensors")))
    for path in run.rglob("manifest.json"):
        path.unlink()
    return run


CASES: dict[str, tuple[Callable[[Ground, Path, int], Command], int, str]] = {
    "row": (a_row, 50, "MB in one row of a JSONL file, `cola run --dry-run`"),
    "rows": (rows, 1_000_000, "rows of a CSV file, `cola data`"),
    "test rows": (test_rows, 100_000, "test rows of each of four arms, `cola report`"),
    "arms": (arms, 200, "arms of a run, `cola report`"),
    "runs": (runs, 1_000, "runs in one `cola report`"),
}


def cost(words: Command, to: Path) -> dict[str, Any]:
    """CPU seconds and peak memory of a command, and how it ended."""
    said = to / "said.txt"
    pid = os.fork()
    if not pid:
        file = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= {"COLA_CACHE": str(to / "cache"), "OMP_NUM_THREADS": "1"}
        resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
        os.execv(sys.executable, [sys.executable, "-m", "cola", *words])
    _, status, used = os.wait4(pid, 0)
    ended = {"code": os.waitstatus_to_exitcode(status), "said": said.read_text()[-300:]}
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024, **ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES))
    parser.add_argument("--to", type=Path, default=HERE / "results/size.json")
    asked = parser.parse_args()
    record = json.loads(asked.to.read_text()) if asked.to.is_file() else {"cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        ground = Ground(Path(scratch))
        for name in asked.cases:
            build, size, what = CASES[name]
            record["cases"][name] = {"what": what, "sizes": {}}
            for n in (size // 10, size):
                to = Path(tempfile.mkdtemp(dir=scratch))
                found = cost(build(ground, to, n), to)
                record["cases"][name]["sizes"][str(n)] = found
                print(name, n, found, flush=True)
                shutil.rmtree(to)
            record["made"] = made()
            asked.to.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
