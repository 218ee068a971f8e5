"""The scout's results as one JSON file, with the smallest gain of full fine-tuning that the study could detect.

python experiments/001-does-chaining-pay/scout/collect.py RUN...

Two seeds say little about the variance between seeds, so it is the mean over candidates; that between examples is each
candidate's own. Both are scaled to the study's seeds and rows; docs/numbers.md has the formula.

It ran at commit b6dce85, which made results/candidates.json: the statistics that it takes apart have had
other shapes since then.
"""

import json
import sys
from pathlib import Path

import numpy as np
import yaml

from cola.compare.statistics import Estimate, Parts
from cola.compare.tasks import open_runs, tasks_of

HERE = Path(__file__).parent
SEEDS, ROWS, TASKS = 6, 500, 3  # the study's


def main(paths: list[Path]) -> None:
    runs, notes = open_runs(paths, np.random.default_rng(0))
    found = {}
    for task in tasks_of(runs, notes):
        scores = task.scores(["full", "lora"], by_loss=False)
        assert scores is not None
        sums_ASG, sizes_G = scores.of_groups()
        run = task.runs[0]
        summary = json.loads((run.folder.path / "summary.json").read_text())
        arms = summary["arms"]
        found[task.label.removeprefix("scout-")] = {
            "data": yaml.safe_load((run.folder.path / "recipe.yaml").read_text())["data"],
            "made": {key: summary["meta"][key] for key in ("started", "machine", "packages")},
            "trials": summary["trials"],
            "arms": {
                name: {key: arms[name][key] for key in ("seeds", "learning_rate", "at_grid_edge", "train_seconds")}
                for name in ("base", "lora", "full")
            },
            "parts": Parts.of(sums_ASG[0] - sums_ASG[1], sizes_G),
            "of": scores.scores_ASN.shape[1:],
        }
    of_seeds = np.mean([one["parts"].of_seeds * one["of"][0] for one in found.values()])
    for one in found.values():
        parts, (_, rows) = one.pop("parts"), one.pop("of")
        se = float(np.sqrt(of_seeds / SEEDS + parts.of_groups * rows / ROWS))
        one["gain"] = [
            full["test_score"] - lora["test_score"]
            for full, lora in zip(one["arms"]["full"]["seeds"], one["arms"]["lora"]["seeds"], strict=True)
        ]
        one["se"], one["detectable"] = se, Estimate(0.0, None, None, se, SEEDS - 1).minimum_detectable
    chosen = sorted(found, key=lambda name: -sum(found[name]["gain"]))[:TASKS]
    together = float(np.sqrt(sum(found[name]["se"] ** 2 for name in chosen))) / TASKS
    over_tasks = Estimate(0.0, None, None, together, TASKS * (SEEDS - 1))
    record = {"candidates": found, "chosen": chosen, "detectable": over_tasks.minimum_detectable}
    (HERE / "results/candidates.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
