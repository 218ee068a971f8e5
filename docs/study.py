"""The blocks of experiments/001-does-chaining-pay/README.md, from committed results. docs/generate.py writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola.ablation import ablation_notes, ablation_table
from cola.tables import Table, contrast_sentence, interval, named_tables, spread
from cola.tasks import arms_by_task, task_tables

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"


def read(path: str) -> dict[str, Any]:
    """One of the study's result files."""
    return json.loads((STUDY / path).read_text())


def tasks() -> list[str]:
    """The study's tasks, the scout's largest gain first."""
    return read("scout/results/candidates.json")["chosen"]


def titled(table: Table) -> str:
    return f"**{table.title}**\n\n{table.markdown()}\n"


def scout() -> str:
    """What the scout found on each candidate."""
    record = read("scout/results/candidates.json")
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


def verdict() -> str:
    """What the contrasts over tasks allow to be said."""
    over = read("results/over-tasks/summary.json")
    sentences = [contrast_sentence(one, over["metric"]) for one in over["contrasts"]]
    return "\n".join(f"- {sentence}" for sentence in sentences + over["notes"]) + "\n"


def over_tasks() -> str:
    """The tables of the report of all runs."""
    return "\n".join(titled(table) for table in task_tables(read("results/over-tasks/summary.json")))


def by_task() -> str:
    """Losses, gaps, forgetting and cost of each task's arms."""
    parts = []
    for task in tasks():
        summary = read(f"results/{task}/summary.json")
        table = Table(
            f"{task}: losses in nats per target token",
            ["arm", "learning rate", "train loss", "test loss", "gap_loss", "gap_acc", "closed", "forgetting", "time"],
            [],
        )
        cost = {
            row[0]: dict(zip(costs.columns, row, strict=True))
            for costs in [named_tables(summary)["cost"]]
            for row in costs.rows
        }
        for name, arm in summary["arms"].items():
            edge = " (edge of the grid)" if "learning_rate" in arm["at_grid_edge"] else ""
            table.rows.append(
                [
                    name,
                    cost[name]["learning rate"] + edge,
                    spread(arm["train_loss"]),
                    spread(arm["test_loss"]),
                    interval(arm.get("gap_loss_interval")),
                    interval(arm.get("gap_acc_interval")),
                    interval(arm.get("closed")),
                    spread(arm["forgetting"], signed=True),
                    cost[name]["time"],
                ]
            )
        parts.append(titled(table))
    return "\n".join(parts)


def learned() -> str:
    """What the chain's links added, and how much they have in common."""
    table = Table(
        "",
        ["task", "arm", "what", "‖ΔW‖/‖W‖", "effective rank", "of", "overlap of links 1–2", "2–3", "1–3", "by chance"],
        [],
    )
    for task in tasks():
        spectra = read(f"results/{task}/summary.json")["spectra"]
        for arm in ("lora", "chain3", "keep3", "gradient3", "lora24", "full"):
            found = spectra[arm]
            for row in found["rows"]:
                cells = [f"{row['relative_size']:.2%}", f"{row['effective_rank']:.1f}", f"{row['rank']:.0f}"]
                overlap = ["", "", "", ""]
                if row["what"] == "chain" and found.get("overlap"):
                    pairs = found["overlap"]["matrix"]
                    shared = (pairs[0][1], pairs[1][2], pairs[0][2], found["overlap"]["random"])
                    overlap = [f"{value:.3f}" for value in shared]
                table.rows.append([task, arm, row["what"], *cells, *overlap])
    return f"{table.markdown()}\n"


def knots() -> str:
    """The ledger's worst numbers."""
    rows = []
    for task in tasks():
        for name, arm in read(f"results/{task}/summary.json")["arms"].items():
            if arm.get("max_drift") is not None and len(arm["knots"]) > 1:
                rows.append([task, name, f"{arm['max_drift']:.1e}", f"{arm['max_lost']:.1e}"])
    table = Table("", ["task", "arm", "largest change of a logit", "by what the link had learned"], rows)
    return f"{table.markdown()}\n"


def length() -> str:
    """The ablation of the chain's length."""
    summary = read("results/length/ablation.json")
    return "\n".join([titled(ablation_table(summary)), *[f"- {line}" for line in ablation_notes(summary)]]) + "\n"


def headline() -> str:
    """What the project's README says of the study."""
    over = read("results/over-tasks/summary.json")
    primary = next(one for one in over["contrasts"] if one["role"] == "primary")
    return f"{contrast_sentence(primary, over['metric'])}\n\n{titled(arms_by_task(over))}"


BLOCKS: dict[str, Callable[[], str]] = {"scout": scout}


def page(fill: Callable[[str, str, str], str]) -> str:
    """The study's README with its blocks; `fill(text, name, block)` puts one in."""
    text = (STUDY / "README.md").read_text()
    for name, block in BLOCKS.items():
        text = fill(text, f"study-{name}", block())
    return text
