"""The tables of the flagship at its size (experiments/005-flagship-at-size), from its committed result."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

FLAGSHIP = Path(__file__).parent.parent / "experiments/005-flagship-at-size"
RESULT = FLAGSHIP / "results/flagship.json"
PROCESSES = {
    "plan": "`cola plan`, all arms",
    "killed": "`cola run`, killed as the chain had tied its first knot",
    "gone on": "the same command, which goes on",
    "not killed": "the same in a store of its own, not killed",
    "verify": "`cola verify`",
    "export": "`cola export --as merged`",
}


def found() -> dict[str, Any] | None:
    return json.loads(RESULT.read_text()) if RESULT.is_file() else None


def gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


def arms() -> str:
    """Predicted beside measured."""
    if (of := found()) is None:
        return "Not measured yet."
    rows = ["| arm | peak, predicted | measured | off by | steps, predicted | measured | a knot | trained |"]
    rows.append("| :-- | --: | --: | --: | --: | --: | --: | --: |")
    for name, arm in of["arms"].items():
        plan = of["plan"]["arms"][name]
        peak, seconds = plan["memory_bytes"]["peak"], plan["training_seconds"]
        measured = arm["process_memory_max"]
        knots = f"{median(arm['knots']):.1f} s" if arm["knots"] else "–"
        told = "?" if seconds is None else f"{seconds:.0f} s"
        rows.append(
            f"| {name} | {gb(peak)} | {gb(measured)} | {peak / measured - 1:+.0%} | {told} | "
            f"{sum(arm['steps']):.0f} s | {knots} | {arm['num_trainable_params'] / 1e6:.2f} M |"
        )
    full = of["plan"]["fits"]["full"]
    words = (
        f"Full fine-tuning was not run: {gb(full['peak_bytes'])} predicted, of {gb(full['room_bytes'])}. "
        f"`cola plan` offers `{' '.join(full['change'])}` in its place, {gb(full['then'])}."
    )
    return "\n".join([*rows, "", words])


def processes() -> str:
    """What each command took."""
    if (of := found()) is None:
        return "Not measured yet."
    rows = ["| | exit code | seconds | peak in RAM |", "| :-- | --: | --: | --: |"]
    for name, words in PROCESSES.items():
        one = of[name]["process"] if name == "plan" else of[name]
        rows.append(f"| {words} | {one['code']} | {one['seconds']:.0f} | {gb(one['peak'])} |")
    n, same = of["knots"]
    made = of["made"]
    where = f"{made['machine']['cpu']}, {made['machine']['cores']} cores, {made['started'][:10]}"
    told = "the same bits" if same else "**other bits**"
    return "\n".join([*rows, "", f"{n} knots of the run that was killed have {told} as those of the other. {where}."])


BLOCKS: dict[str, Callable[[], str]] = {"flagship-arms": arms, "flagship-processes": processes}


def page(fill: Callable[[str, str, str], str]) -> str:
    text = (FLAGSHIP / "README.md").read_text()
    for name, block in BLOCKS.items():
        text = fill(text, name, block() + "\n")
    return text
