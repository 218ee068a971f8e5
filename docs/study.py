"""The blocks of experiments/001-does-chaining-pay/README.md, from committed results. docs/generate.py writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola.tables import Table

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"


def scout() -> str:
    """What the scout found on each candidate."""
    record: dict[str, Any] = json.loads((STUDY / "scout/results/candidates.json").read_text())
    found = record["candidates"]
    table = Table(
        "",
        ["candidate", "base", "LoRA r 8 (learning rate)", "full (learning rate)", "full − LoRA", "mean", "detectable"],
        [],
    )
    for name, one in sorted(found.items(), key=lambda item: -sum(item[1]["gain"])):
        cells = [f"{one['arms']['base']['seeds'][0]['test_score']:.3f}"]
        for arm in ("lora", "full"):
            of_seeds = ", ".join(f"{seed['test_score']:.3f}" for seed in one["arms"][arm]["seeds"])
            cells.append(f"{of_seeds} ({one['arms'][arm]['learning_rate'][0]:g})")
        gains = ", ".join(f"{gain:+.3f}" for gain in one["gain"])
        mean = sum(one["gain"]) / len(one["gain"])
        table.rows.append([name, *cells, gains, f"{mean:+.3f}", f"{one['detectable']:.3f}"])
    return (
        "Exact match on test, one number per seed ([candidates.json](scout/results/candidates.json)); *detectable* is "
        "the smallest true difference that six seeds and 500 rows of one task would mostly tell from 0, by the scout's "
        f"variances.\n\n{table.markdown()}\n\nSo the tasks are {', '.join(record['chosen'])}. The mean over the three "
        f"could detect a gain of {record['detectable']:.3f}.\n"
    )


def page(fill: Callable[[str, str, str], str]) -> str:
    """The study's README with its blocks; `fill(text, name, block)` puts one in."""
    return fill((STUDY / "README.md").read_text(), "study-scout", scout())
