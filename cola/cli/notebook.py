"""cola in Python and notebooks: a recipe run by a call, and a run's files as tables (docs/python.md)."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cola.compare.records import Summary
from cola.errors import RunFolderError
from cola.report.table import Table
from cola.report.tables import named_tables
from cola.report.verdict import verdict
from cola.run.interrupt import RESUMABLE
from cola.tree.records import Result
from cola.tree.run_folder import RunFolder

COST = ("learning_rate", "scored_step", "steps", "reused_steps", "tokens", "flops", "num_trainable_params")
COST += ("train_seconds", "total_seconds", "train_cpu_seconds", "total_cpu_seconds")


def run_recipe(
    recipe: str | Path,
    overrides: Mapping[str, Any],
    run_folder: str | Path | None = None,
    allow_code: bool = False,
) -> "Run":
    """Run a recipe as `cola run` does, and read what came of it.

    Args:
        recipe: Its file.
        overrides: By dotted key, `{"arms.chain3.links": 4}`; None leaves an arm out.
        run_folder: The run's own folder; default: a new one under the recipe's output.
        allow_code: Let code of your own run that the recipe names.

    Raises:
        ColaError: the recipe, its data or its model cannot be used.
        KeyboardInterrupt: it was interrupted; the same call goes on.
    """
    from cola.cli.train import train
    from cola.recipe.read import read_recipe

    said = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]  # JSON is YAML
    code, path = train(read_recipe(recipe, said), Path(run_folder) if run_folder else None, allow_code)
    if code == RESUMABLE:
        raise KeyboardInterrupt("the same call goes on")
    return load(path)


def load(path: str | Path) -> "Run":
    """A run from its folder. Raises RunFolderError where that is none, or nothing has come to its end in it yet."""
    path = Path(path)
    if (path / "ablation.json").is_file():
        raise RunFolderError(f"{path} is an ablation: load one of its points, {path}/points/...")
    folder = RunFolder.open(path)
    summary = folder.read("summary.json", Summary)
    if summary is None:
        raise RunFolderError(f"{path} holds no summary yet; go on with it by `cola run --resume {path}`")
    return Run(folder, summary)


class Run:
    """What a run measured. Each table has a column `arm`, and one `seed` where it is about one; docs/results.md has the
    units and meanings of the others."""

    def __init__(self, folder: RunFolder, summary: Summary) -> None:
        self.path = folder.path
        self.summary = summary
        self._folder = folder

    def arms(self) -> pd.DataFrame:
        """One row for each arm and seed that came to its end: loss, score and gaps, and what it cost."""
        rows = {(name, one.seed): one.model_dump() for name, arm in self.summary.arms.items() for one in arm.seeds}
        kept = [(arm, seed, info) for arm, seed, info in self._done() if (arm, seed) in rows]
        return pd.DataFrame(
            {"arm": a, **rows[a, s], **{key: getattr(info, key) for key in COST}} for a, s, info in kept
        )

    def scores(self, split: Literal["train", "validation", "test", "general"] = "test") -> pd.DataFrame:
        """One row for each example of a split: `id`, by which arms and seeds are paired, `nats`, `score`, ..."""
        done = ((arm, seed, self._folder.scores(arm, seed, split)) for arm, seed, _ in self._done())
        return pd.DataFrame({"arm": arm, "seed": seed, **row.content()} for arm, seed, rows in done for row in rows)

    def steps(self) -> pd.DataFrame:
        """One row for each optimizer step: its link, loss, gradient norm, learning rate, tokens, seconds."""
        lines = self._lines("metrics.jsonl")
        steps = [
            {key: value for key, value in line.items() if key != "kind"} for line in lines if line["kind"] == "step"
        ]
        return pd.DataFrame(steps)

    def ledger(self) -> pd.DataFrame:
        """One row for each matrix of each knot: what was learned, and what of it arrived."""
        return pd.DataFrame(self._lines("ledger.jsonl"))

    def contrasts(self) -> pd.DataFrame:
        """One row for each pair of arms: the mean paired difference, its interval and p, and whether it is a claim."""
        return pd.DataFrame(contrast.model_dump() for contrast in self.summary.contrasts)

    def _done(self) -> Iterator[tuple[str, int, Any]]:
        """Arm, seed and `train_info` of what came to its end, in the order of the recipe's arms."""
        results = [one for one in self._folder.results() if isinstance(one, Result)]
        order = list(self.summary.arms)
        for one in sorted(results, key=lambda one: (order.index(one.run_info.arm), one.run_info.seed)):
            yield one.run_info.arm, one.run_info.seed, one.train_info

    def _lines(self, name: str) -> list[dict[str, Any]]:
        places = ((arm, seed, self.path / "arms" / arm / f"seed-{seed}" / name) for arm, seed, _ in self._done())
        return [{"arm": arm, "seed": seed, **row} for arm, seed, path in places for row in self._folder.lines(path)]

    def __repr__(self) -> str:
        return f"<run {self.path.name}: {', '.join(self.summary.arms)}; seeds {self.summary.seeds}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: what the numbers allow to be said, and the tables."""
        said = "".join(f"<li>{escape(line)}</li>" for line in verdict(self.summary))
        return f"<ul>{said}</ul>" + "".join(_html(table) for table in named_tables(self.summary).values())


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.texts)
    return f"<table><caption>{escape(table.title)}</caption><tr>{head}</tr>{body}</table>"
