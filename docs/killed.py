"""What docs/segments.md says of the kills that were made, from their committed record."""

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent.parent / "benchmarks/results/kills.json"
KEYS = {"command": "of `cola`", "stage": "while at", "kind": "at"}
WORDS = {"time": "a random moment", "create": "creating exclusively", "write": "opening to write"}


def killed() -> str:
    """How many, where, and what came of them."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    made, by, left = record["made"], record["by"], record["left"]
    rows = [
        f"{made['started'][:10]}, seed {made['seed']}: {record['kills']} kills in {sum(record['rounds'].values())} "
        f"rounds ({_counted(record['rounds'])}).\n",
        "| | kills |",
        "| :-- | :-- |",
        *(f"| {title} | {_counted(by[key])} |" for key, title in KEYS.items() if key in by),
        *([f"| left, in so many rounds | {_counted(left) or 'nothing'} |"] if left is not None else []),
        f"| differing bits, damage, files that are not named above | {len(record['faults']) or 'none'} |",
    ]
    return "\n".join(rows) + "\n"


def _counted(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{WORDS.get(name, name)} {n}" for name, n in ordered)
