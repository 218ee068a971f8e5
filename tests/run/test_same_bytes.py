"""Two runs of one recipe, of stores and processes of their own, leave the same bytes.

Run: pytest tests/run/test_same_bytes.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import LORA_ONLY, SHORT, go, read_jsonl

# What may differ: how long and in how much memory it went, when it was, and which store it shares.
MEASURED = {"seconds", "created_at", "started", "memory", "peak_memory", "store", "tracking"}
# Files in which these are told; of a manifest the digests of those.
TELL = re.compile(r"report\.html|tables/cost\.(csv|tex)|figures/cost-(cpu|memory|time)\.(svg|pdf)|(.*/)?manifest\.json")
OTHERS = ["arms.prefix={method: prefix, num_virtual_tokens: 2}", "arms.bottle={method: adapter, bottleneck: 2}"]


def ran(recipe: Path, folder: Path, hashes: str) -> dict[str, Any]:
    """The files of a run by a process whose sets are in another order; what is measured is left out."""
    words = ["run", recipe, "--run-folder", folder / "run", *SHORT, *OTHERS]
    done = subprocess.run(
        [sys.executable, "-m", "cola", *map(str, words)],
        env={**os.environ, "PYTHONHASHSEED": hashes, "COLA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paths = [path for path in sorted((folder / "run").rglob("*")) if path.is_file()]
    names = {path.relative_to(folder / "run").as_posix(): path for path in paths}
    return {name: content(path) for name, path in names.items() if not name.startswith(".")}


def content(path: Path) -> Any:
    match path.suffix:
        case ".json":
            return without(json.loads(path.read_text()))
        case ".jsonl":
            return without(read_jsonl(path))
    return path.read_bytes()


def without(value: Any) -> Any:
    """A value without what is measured anew in each run."""
    if isinstance(value, list):
        return [without(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: one for key, one in value.items() if key not in MEASURED}
    return {key: without(one) for key, one in kept.items() if not re.search(r"_seconds$|_memory_max$", key)}


@pytest.mark.slow
def test_two_runs_of_one_recipe_leave_the_same_bytes(recipe_file: Path, tmp_path: Path) -> None:
    one, other = (ran(recipe_file, tmp_path / name, name) for name in ("1", "2"))
    assert one.keys() == other.keys()
    differing = [name for name in one if one[name] != other[name]]
    assert [name for name in differing if not TELL.fullmatch(name)] == []


def test_modules_are_written_in_one_order(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *LORA_ONLY, *SHORT)
    written = json.loads((folder.path / "arms/lora/seed-0/knots/link-1/adapter_config.json").read_text())
    assert len(written["target_modules"]) == 7
    assert written["target_modules"] == sorted(written["target_modules"])
