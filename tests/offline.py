"""What an offline run of W&B holds."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


def records(folder: Path) -> list[dict]:
    """The records of one offline run, as `wandb leet inspect --json` prints them, without its second of Python."""
    [file] = folder.glob("*.wandb")
    words = [get_core_path(), "leet", "inspect", "--json", "--no-observability", "-run-file", str(file)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Curves:
    """What all offline runs of one arm and seed hold together."""

    ids: set[str]
    points: list[dict[str, Any]]
    final: dict[str, Any]

    def steps(self, metric: str) -> list[int]:
        return [point["step"] for point in self.points if metric in point]


def sent(folder: Path) -> dict[str, Curves]:
    """What the runs of a folder have sent, by the names of arms and seeds."""
    found: dict[str, Curves] = {}
    # W&B's own process outlives a kill by a moment and may leave a folder whose file was never begun.
    for path in sorted({file.parent for file in folder.glob("wandb/offline-run-*/*.wandb")}):
        mine = records(path)
        for head in [record["run"] for record in mine if record["type"] == "run"]:
            curves = found.setdefault(head["display_name"], Curves(set(), [], {}))
            curves.ids.add(head["run_id"])
            curves.points += [record["history"]["item"] for record in mine if record["type"] == "history"]
            for record in mine:
                if record["type"] == "summary":
                    curves.final |= record["summary"].get("update", {})
    return found
