"""What all jobs of a run share."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from cola.data import Example, Splits
from cola.evaluate import Evaluator
from cola.interrupt import Signals
from cola.measure import Measurements, rows_digest
from cola.model import Source
from cola.recipe import Recipe
from cola.record import RunFolder
from cola.segments import Lineage, Tree
from cola.store import Store
from cola.terminal import RunProgress
from cola.tracking import Tracker

PROBE_ROWS = 4  # training rows whose logits tell what a knot changed


@dataclass(frozen=True)
class Bench:
    """What all jobs of a run share.

    Attributes:
        skeleton: The base without weights.
        rows: Digest of each split's examples.
        scoring: What a score depends on besides the state and the rows.
        meta: What a result says of how it was made.
        tracked: Arms, seeds and final states that W&B has been sent.
        used: Names of the segments and measurements that the run's results rest on.
    """

    recipe: Recipe
    folder: RunFolder
    source: Source
    skeleton: PreTrainedModel
    splits: Splits
    rows: dict[str, str]
    evaluator: Evaluator
    scoring: dict[str, Any]
    store: Store
    tree: Tree
    signals: Signals
    progress: RunProgress
    tracker: Tracker
    tracked: set[str]
    meta: dict[str, Any]
    used: dict[str, set[str]]

    @property
    def probe_rows(self) -> list[Example]:
        """The rows whose logits tell what a knot changed."""
        return self.splits.train[:PROBE_ROWS]

    def measurements(self, lineage: Lineage) -> Measurements:
        """What was and will be measured of a job's states."""
        probe = rows_digest(self.probe_rows)
        return Measurements(self.store, lineage, self.rows, self.scoring, probe, self.used["measured"])

    def write_references(self) -> None:
        """Note in the run folder what the store must not prune."""
        self.folder.write_json("segments.json", {kind: sorted(names) for kind, names in self.used.items()})
