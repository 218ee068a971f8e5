"""What of two studies must be the same, and what a killed one may leave."""

import json
import re
from pathlib import Path
from typing import Any

from offline import Curves, sent
from runs import outcome

# Of a summary: how long it took, where it lies, with what it was made, and what was expected (by the memory in use).
TIMES = re.compile(r"seconds|memory|bytes|per_second|reused|^meta$|^tracking$|^store$|^foreseen$")


def same_numbers(run: Path, export: Path) -> dict[str, Any]:
    """All files of a run and an export whose bits are those of an undisturbed one's, by name."""
    found = dict(outcome(run).files)
    for path in sorted(run.rglob("spectrum.json")):
        found[str(path.relative_to(run))] = untimed(json.loads(path.read_text()))
    found["summary.json"] = untimed(json.loads((run / "summary.json").read_text()))
    for path in sorted(export.glob("*.safetensors")):
        found[f"export/{path.name}"] = path.read_bytes()
    if (run / "wandb").is_dir():
        found |= {f"wandb/{name}": of_curves(curves) for name, curves in sent(run).items()}
    return found


def of_curves(curves: Curves) -> dict[str, Any]:
    """Of all parts of one run at W&B: that it is one, has each step once, and the final numbers. A kill may lose the
    row that was on its way, so the steps' number is left out."""
    steps = curves.steps("train/loss")
    final = {
        key: value for key, value in curves.final.items() if key.startswith(("final/", "gap/", "arm/", "contrast/"))
    }
    return {"runs": len(curves.ids), "each once": len(steps) == len(set(steps)), "final": untimed(final)}


def untimed(value: Any) -> Any:
    """A JSON value without times and provenance."""
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if not TIMES.search(key) and key != "made"}
    return [untimed(one) for one in value] if isinstance(value, list) else value


# What a kill may leave for good, as docs/segments.md says.
NAMED = {
    r"run/(.*/)?\.[^/]+\.[0-9a-f]{8}": "a file that was being written in the run's folder",
    r"run/workers(/.*)?": "a worker's log",
    r"run/\.lease/.*": "the run's lease",
    r"run/wandb/.*": "parts of W&B's offline run",
    r"tmp/.*": "W&B's files in the system's temporary folder",
    r"\.adapter\.new(/.*)?": "the folder aside of an export that was killed",
    r"store/leases/.*": "leases in the store",
}


def left_behind(folder: Path, whole: Path) -> tuple[set[str], set[str]]:
    """Of a study that was killed: what it has left that the docs name, in words, and what else is in it or in
    an undisturbed one alone."""
    mine, theirs = ({str(path.relative_to(place)) for path in place.rglob("*")} for place in (folder, whole))
    named, others = set(), set()
    for path in mine ^ theirs:
        what = next((words for pattern, words in NAMED.items() if re.fullmatch(pattern, path)), None)
        if what is None and not path.startswith(("store/measured/", "store/runs/")):
            others.add(f"{path} {'is there' if path in mine else 'is not there'}")
        elif what is not None and path in mine:
            named.add(what)
    return named, others
