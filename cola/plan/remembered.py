"""How long steps took that the store has records of: of a link of the same kind, on the same base and this machine."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cola.files import digest, parse_json
from cola.tree.made import machine
from cola.tree.segments import Causes, Lineage

NEWEST = 300  # segments that are looked into: each is a file to read
ALIKE = 2.0  # times as many tokens, or as few, as a step may have to count as one like it
KIND = ("method", "settings", "modules", "dp", "shard")  # of a link's causes, what its steps' time depends on


@dataclass(frozen=True)
class Remembered:
    """Steps on this machine, by the kind of their link."""

    steps: dict[str, list[tuple[int, float]]]  # tokens and seconds of each

    def seconds(self, lineage: Lineage, number: int, tokens: float) -> float | None:
        """Of a step of so many tokens of a lineage's link; None where no step was like it."""
        found = self.steps.get(_kind(lineage.root, lineage.headers[number]), [])
        rates = [seconds / n for n, seconds in found if tokens / ALIKE <= n <= tokens * ALIKE]
        return tokens * median(rates) if rates else None


def remembered(store: Path, threads: str) -> Remembered:
    """What the newest segments of a store say of steps that were made here. `threads`: how a state's record calls this
    device, the number of its threads too."""
    here, steps = machine(), defaultdict[str, list[tuple[int, float]]](list)
    for record, rows in _newest(store):
        made = record.get("made", {})
        if made.get("machine") != here or made.get("device") != threads:
            continue
        # A link's first step makes what later ones have.
        steps[_kind(record["root"], record["causes"]["link"])] += [(row["tokens"], row["seconds"]) for row in rows[1:]]
    return Remembered(dict(steps))


def _kind(root: Causes, link: Causes) -> str:
    optimizer = link["optimizer"]["name"]
    return digest([root, {key: link.get(key) for key in KIND}, optimizer])


def _newest(store: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Records and steps, of those that can be read: another process may be taking one away, and what is damaged is for
    `cola store verify` to say."""
    folders = sorted(store.glob("segments/*/*/"), key=_changed_at, reverse=True)
    for folder in folders[:NEWEST]:
        try:
            record = parse_json((folder / "segment.json").read_bytes())
            lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
            yield record, [json.loads(line) for line in lines]
        except (OSError, ValueError):
            continue


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
