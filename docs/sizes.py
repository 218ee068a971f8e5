"""The table of docs/performance.md of what grows with the size of what a user brings, from its committed record."""

import json
from pathlib import Path

RECORD = Path(__file__).parent.parent / "benchmarks/results/size.json"


def sizes() -> str:
    """CPU time and memory of each case at a tenth of its size and at all of it."""
    record = json.loads(RECORD.read_text())
    made = record["made"]
    packages = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "transformers"))
    machine = (
        f"{made['started'][:10]}, {made['machine']['cpu']}, {made['machine']['cores']} cores shared with other work"
    )
    rows = [f"{machine}, {packages} ([size.json](../benchmarks/results/size.json)).\n"]
    rows += ["| what | size | CPU seconds | peak memory, GB |", "| :-- | --: | --: | --: |"]
    for case in record["cases"].values():
        for size, found in case["sizes"].items():
            cells = f"{found['cpu_seconds']:.1f} | {found['peak_bytes'] / 1e9:.2f}"
            ended = "" if found["code"] == 0 else f", ended with {found['code']}"
            rows.append(f"| {case['what']}{ended} | {int(size):,} | {cells} |")
    return "\n".join(rows) + "\n"
