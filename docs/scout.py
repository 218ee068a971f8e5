"""The tables of the scout's page (experiments/004-which-chain), from its committed results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCOUT = Path(__file__).parent.parent / "experiments/004-which-chain"
RESULTS = SCOUT / "results"
TASKS = ("trec", "chain_sum", "simple_equations")


def ranking() -> list[dict[str, Any]]:
    return json.loads((RESULTS / "ranking.json").read_text())


def whole() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The arms that have all tasks, best first, and those that do not."""
    rows = ranking()
    return [row for row in rows if len(row["tasks"]) == len(TASKS)], [
        row for row in rows if len(row["tasks"]) < len(TASKS)
    ]


def signed(of: dict[str, float] | None) -> str:
    """A difference with its interval."""
    if of is None:
        return "–"
    return (
        f"{of['value']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]" if of["low"] is not None else f"{of['value']:+.3f}"
    )


def state() -> str:
    done, part = whole()
    cells = sum(len(row["tasks"]) for row in [*done, *part])
    text = f"Cells (an arm on a task) that are there: {cells}; arms that have all three tasks: {len(done)}."
    return text + (f" Not on all tasks yet: {', '.join(row['arm'] for row in part)}." if part else "")


def verdict() -> str:
    """What the arms that have all tasks say, by interval."""
    done, _ = whole()
    told = [
        f"{word} `{other}` on exact match, with an interval that leaves out 0: {', '.join(named) or 'none'}"
        for other in ("chain3", "lora")
        for word, sign in (("Above", 1), ("Below", -1))
        for named in [[f"`{row['arm']}`" for row in done if beyond(row.get(f"right_minus_{other}"), sign)]]
    ]
    return state() + ("\n\n- " + ".\n- ".join(told) + "." if done else "")


def beyond(of: dict[str, float] | None, sign: int) -> bool:
    return of is not None and of["low"] is not None and (of["low"] > 0 if sign > 0 else of["high"] < 0)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranks() -> str:
    """All arms, those with all tasks first."""
    rows = []
    for row in ranking():
        of = row["tasks"]
        costs = list(of.values())
        rows.append(
            [
                row["arm"],
                f"{row['score']:.3f}" if len(of) == len(TASKS) else "–",
                *(f"{of[task]['score']:.3f}" if task in of else "–" for task in TASKS),
                signed(row.get("right_minus_chain3")),
                signed(row.get("nats_minus_chain3")),
                signed(row.get("right_minus_full")),
                f"{costs[0]['parameters'] / 1e6:.2f} M",
                f"{sum(cost['flops'] for cost in costs) / len(costs) / 1e12:.1f} T",
                f"{max(cost['memory'] for cost in costs) / 1e9:.2f} GB",
            ]
        )
    head = ["arm", "mean", *TASKS, "− chain3", "− chain3, loss", "− full", "trained", "FLOPs", "memory"]
    return table(head, rows)


def rates() -> str:
    """The chosen learning rates, of how many, and whether at an edge."""
    rows = []
    for row in ranking():
        cells = [row["tasks"].get(task) for task in TASKS]
        rows.append(
            [
                row["arm"],
                *(
                    f"{c['learning_rate']:g} of {c['trials']}{' (edge)' if c['at_edge'] else ''}" if c else "–"
                    for c in cells
                ),
            ]
        )
    return table(["arm", *TASKS], rows)


BLOCKS: dict[str, Callable[[], str]] = {"scout-verdict": verdict, "scout-ranks": ranks, "scout-rates": rates}


def page(fill: Callable[[str, str, str], str]) -> str:
    text = (SCOUT / "README.md").read_text()
    for name, block in BLOCKS.items():
        text = fill(text, name, block() + "\n")
    return text
