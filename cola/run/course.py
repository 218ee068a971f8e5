"""The course of a job: its steps, looks at validation and knots, found or made, and the best so far."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import numpy as np

from cola.chain import Knot
from cola.clock import Took
from cola.link.drift import Drift
from cola.link.ideas.door import Seen, function_of
from cola.link.residual import Applied
from cola.measure.scores import ExampleScore, mean_loss, mean_score
from cola.recipe.ideas import Idea
from cola.recipe.plan import Link
from cola.recipe.schema import Evaluation
from cola.run.assignment import Assignment

MAX_DRIFT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}  # what rounding can explain, see knot.max_drift


SEEN = tuple(Seen.__dataclass_fields__)


@dataclass(frozen=True)
class Best:
    """The best evaluation point so far."""

    key: tuple[float, float]
    step: int


class LinkEnded(Exception):
    """A link has ended by its rule, after this step."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass
class Course:
    """What is known of a job so far; all that is noted here is written down and shown."""

    given: Assignment
    metrics: TextIO  # metrics.jsonl, open
    at: int = 0  # steps that were found or made
    reused: int = 0  # those that were found
    steps: list[dict[str, Any]] = field(default_factory=list)  # the record of each
    looks: dict[int, dict[str, Any]] = field(default_factory=dict)  # loss and score on validation, by step
    knots: list[dict[str, Any]] = field(default_factory=list)  # the record of each, without its matrices
    best: Best | None = None  # look; None where the last step is scored whatever the looks say
    _ledger: list[dict[str, Any]] = field(default_factory=list)  # of each knot's matrices

    @property
    def scored_step(self) -> int:
        """The step that is scored at the end."""
        return self.best.step if self.best else self.given.n_steps

    def note_step(self, record: dict[str, Any], made: bool = False) -> None:
        """One more step is there: made now, or found. LinkEnded where its link ends with it, by its rule."""
        given, self.at = self.given, record["step"]
        number, n_links = given.lineage.link_of(self.at) + 1, len(given.links)
        self.steps.append(record)
        self._write("step", {"link": number, **record})
        name = f"link {number}/{n_links}" if n_links > 1 else "training"
        given.bench.progress.step(name, record["loss"], record["tokens"], record["seconds"], made)
        curves = {f"train/{key}": record[key] for key in ("loss", "grad_norm", "learning_rate")}
        if record.get("update_norm") is not None:
            curves["train/update_norm"] = record["update_norm"]
        curves["train/tokens_per_second"] = record["tokens"] / max(record["seconds"], 1e-9)
        given.tracker.log(self.at, curves)
        link = given.links[number - 1]
        asked = link.until is not None and number > len(given.job.ended) and self.at < link.last_step
        if asked and function_of(link.until)(self.seen(link)):
            raise LinkEnded(self.at)

    def seen(self, link: Link) -> list[Seen]:
        """What was logged of a link so far."""
        unlogged: dict[str, Any] = {"update_norm": None}  # by an earlier version
        rows = (unlogged | row for row in self.steps[link.first_step : link.last_step])
        return [Seen(**{key: row[key] for key in SEEN}) for row in rows]

    def note_look(self, step: int, scores: list[ExampleScore]) -> None:
        """Validation was scored after a step."""
        link = self.given.lineage.link_of(step) + 1
        look = {"step": step, "link": link, "loss": mean_loss(scores), "score": mean_score(scores)}
        self.looks[step] = look
        self.best = better(self.given.recipe.evaluation, self.best, step, scores)
        self._write("validation", look)
        self.given.tracker.log(step, {"validation/loss": look["loss"], "validation/score": look["score"]})

    def note_knot(self, record: dict[str, Any]) -> None:
        """The next link is tied."""
        knot = {key: value for key, value in record.items() if key != "matrices"}
        self.knots.append(knot)
        if not record["matrices"]:
            return
        matrices = record["matrices"].items()
        self._ledger += [{"link": knot["link"], "module": name, **applied} for name, applied in matrices]
        self.given.bench.folder.write_jsonl(self.given.file("ledger.jsonl"), self._ledger)
        self._write("knot", knot)
        numbers = {f"knot/{key}": number for key, number in knot.items() if isinstance(number, float)}
        self.given.tracker.log(knot["step"], numbers)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({"kind": kind, **row}) + "\n")


def better(evaluation: Evaluation, best: Best | None, step: int, scores: list[ExampleScore]) -> Best | None:
    """The best look once one more is known, the earlier of equal ones; None where the last step is scored anyway."""
    if evaluation.checkpoint != "best":
        return None
    key = selection_key(evaluation.select_by, mean_loss(scores), mean_score(scores))
    return Best(key, step) if best is None or key > best.key else best


def selection_key(select_by: str, loss: float, score: float | None) -> tuple[float, float]:
    """Orders looks at validation: the larger key is the better."""
    if not math.isfinite(loss):
        return (-math.inf, -math.inf)  # a model that has diverged is the worst, whatever it happens to score
    return (score if select_by == "score" and score is not None else 0.0, -loss)


def knot_record(given: Assignment, number: int, knot: Knot, moved: float | None, took: Took) -> dict[str, Any]:
    """What result.json and ledger.jsonl say of a knot that tied the link of that number, from 0. `moved`: change of the
    outputs by the link's start; `took`: how long."""
    link, followed = given.links[number], number + 1 < len(given.links)
    by_rule = followed and isinstance(given.arm.rules.merge_fraction, Idea)
    return {
        "link": number + 1,
        "step": link.last_step,
        "seed": link.seed,
        "merge": given.measured.tie["merge"] if knot.applied else None,
        **{f"drift_{name}": value for name, value in asdict(knot.drift).items()},
        **_over_matrices(list(knot.applied.values())),
        **({} if moved is None else {"start_moved": moved}),
        **({"fraction": knot.share} if by_rule else {}),
        "matrices": {name: asdict(applied) for name, applied in knot.applied.items()},
        **took._asdict(),
    }


def allowed_drift(given: Assignment) -> float:
    """Relative change of a logit that rounding explains in the base's number format."""
    base = given.arm.base
    # On a GPU int8 products round the activations too, so that rounding moves codes.
    coarse = base.quantization == "int8" and given.accelerator.device.type == "cuda"
    return MAX_DRIFT["float16" if coarse else base.dtype]


def check_drift(given: Assignment, record: dict[str, Any]) -> None:
    """Raise KnotDrift where a knot moved more than rounding explains, unless its rules move the outputs themselves."""
    rules, followed = given.arm.rules, record["link"] < len(given.links)
    share = record.get("fraction", 1.0 if isinstance(rules.merge_fraction, Idea) else rules.merge_fraction)
    lets_go = min(share.values() if isinstance(share, dict) else [share]) < 1
    moves = rules.merge == "naive" or (lets_go and followed)
    allowed = rules.max_drift or (math.inf if moves else allowed_drift(given))
    Drift(**{key: record[f"drift_{key}"] for key in Drift.__dataclass_fields__}).check(allowed)


def _over_matrices(entries: Sequence[Applied]) -> dict[str, float | None]:
    """Median and worst of what the matrices were given."""
    numbers: dict[str, float | None] = {}
    for key, worst in (("relative_size", max), ("unchanged", max), ("error", max), ("cosine", min)):
        values = [value for entry in entries if (value := getattr(entry, key)) is not None]
        numbers[f"{key}_median"] = float(np.median(values)) if values else None
        numbers[f"{key}_{worst.__name__}"] = worst(values, default=None)
    return numbers
