"""Runs sent to a tracker: one group per run, one run at the tracker per arm and seed and one for their comparison.

Whatever goes wrong in it costs a warning and the rest of the tracking, never the training. Fixed names, of an arm and
seed, whichever the tracker:

    train/loss  train/grad_norm  train/learning_rate  train/tokens_per_second    per optimizer step (`step`)
    validation/loss  validation/score                                            at evaluation points
    knot/{relative_size,unchanged,error,cosine}_{median,max,min}  knot/drift_*    at knots
    final/{train,validation,test}_{loss,score}  gap/loss  gap/acc  gap/ft        at the end
    general/loss  general/forgetting                                             likewise

docs/trackers.md has those of the comparison, and what goes with it.
"""

import json
import re
import secrets
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cola.compare.records import Summary
from cola.errors import one_line
from cola.files import need_package, write_text
from cola.recipe.schema import Tracking
from cola.report.group_report import ARM_MEANS, COMPARISON, OF_CONTRAST, Comparison
from cola.report.numbers import choice_share
from cola.report.sink import Note, Place, Sink
from cola.report.to_mlflow import ToMlflow, local_store, mode_of_mlflow
from cola.report.to_trackio import ToTrackio
from cola.report.to_wandb import ToWandb, mode_of_wandb, sync_command
from cola.report.verdict import verdict
from cola.tree.run_folder import TRACKER_NOTES

TITLES = {"wandb": "W&B", "trackio": "trackio", "mlflow": "MLflow"}
EXTRAS = {"trackio": ["trackio"], "mlflow": ["mlflow", "sqlalchemy", "alembic"]}  # the packages that each needs
SECRET = re.compile(r"//\S+@")  # of an address: a name, and perhaps a password
LONGEST = 10_000  # characters of an error in which one is looked for

T = TypeVar("T")


def comparison_numbers(summary: Summary) -> dict[str, float | str]:
    """A run's summary.json under a tracker's fixed names; what is not known has no name."""
    found: dict[str, Any] = {}
    for name, arm in summary.arms.items():
        found |= {f"arm/{name}/{key}": spread.mean for key in ARM_MEANS if (spread := getattr(arm, key)) is not None}
        for key in ("gap_loss_interval", "gap_acc_interval", "ft_gap", "closed"):
            estimate, label = getattr(arm, key), f"arm/{name}/{key.removesuffix('_interval')}"
            if label.endswith(key):
                found[label] = getattr(estimate, "value", estimate)  # or why there is none
            found |= {f"{label}_{end}": getattr(estimate, end, None) for end in ("low", "high")}
    for name, search in summary.trials.items():
        found[f"arm/{name}/choice_share"] = choice_share(search)
    for one in summary.contrasts:
        found |= {f"contrast/{one.first}-{one.second}/{key}": getattr(one, key) for key in OF_CONTRAST}
    found["verdict"] = "\n".join(verdict(summary))
    return {name: value for name, value in found.items() if value is not None}


def mode_of(settings: Tracking) -> str:
    """`off`, or where the tracker's runs are kept first: W&B's `online` or `offline`; `local`, or a variable's name."""
    match settings.tracker:
        case "wandb":
            return mode_of_wandb(settings)
        case "trackio":
            return ToTrackio.mode
        case "mlflow":
            return mode_of_mlflow()


def need_tracker(settings: Tracking) -> None:
    """Raises ModelError where the tracker that a recipe names is not installed."""
    for package in EXTRAS.get(settings.tracker, ()):
        need_package(package, f"tracking.tracker: {settings.tracker}", settings.tracker)


def home_of(group: str | None, folder: Path) -> Path:
    """The folder of a run's group: its own, or that of the ablation whose point it is."""
    return folder.resolve().parent.parent if group else folder


def command_after(settings: Tracking, group: str | None, folder: Path) -> str | None:
    """How to upload what W&B kept offline, or to look at what another tracker keeps here; None where there is nothing
    of a run or an ablation, or it is elsewhere."""
    if settings.tracker == "wandb":
        return sync_command(folder)
    note = TRACKER_NOTES[settings.tracker]
    if not any(any(folder.glob(place)) for place in (note, f"arms/*/*/{note}", f"points/*/arms/*/*/{note}")):
        return None
    if settings.tracker == "trackio":
        return f"trackio show --project {shlex.quote(settings.project)}"
    if mode_of_mlflow() != "local":
        return None
    return f"mlflow ui --backend-store-uri {shlex.quote(local_store(home_of(group, folder)))}"


class NoTracker:
    """A tracker that sends nothing: of a trial, and of what was sent before."""

    mode = "off"

    def start(self, arm: str, seed: int, folder: Path, config: dict[str, Any]) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def finish(self, summary: Mapping[str, Any], status: str = "ok") -> None: ...


class Tracker:
    """Sends one run at a time to a tracker; after the first failure it is silent."""

    def __init__(self, settings: Tracking, group: str | None, folder: Path, warn: Callable[[str], None]) -> None:
        self.group = group or folder.name
        self.prefix = f"{folder.name} " if group else ""  # tells the points of an ablation apart
        self.title = TITLES[settings.tracker]
        self.folder = folder
        self.warn = warn
        self.sink = _sink(
            settings, Place(settings.project, self.group, f"{self.prefix}{self.group}", folder, home_of(group, folder))
        )
        self.mode = self.sink.mode
        self.is_open = False  # whether the tracker has a run open
        self.opens: Callable[[], None] | None = None  # opens the run of the arm and seed at hand, until that is done
        self.note_name = TRACKER_NOTES[settings.tracker]
        self.note, self.note_path = Note(""), folder / self.note_name
        self.waiting: dict[int, dict[str, float]] = {}

    def start(self, arm: str, seed: int, folder: Path, config: dict[str, Any]) -> None:
        """What comes next is of this arm and seed: of a new run, or of the one that its folder names. It is opened when
        there is something to send, since the first one takes seconds, for which no first step need wait."""
        if self.mode == "off":
            return
        self.waiting = {}
        self._guard(lambda: self._read_note(folder))
        self.opens = (lambda: self._open(f"{arm}-seed{seed}", arm, config)) if self.mode != "off" else None

    def _read_note(self, folder: Path, anew: bool = False) -> None:
        """Who the folder's run at the tracker is, and the last step that is safely there."""
        self.note_path = folder / self.note_name
        try:
            self.note = Note(**json.loads(self.note_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.note = Note(secrets.token_hex(4))
        self.sink.recover(self.note, anew)

    def _open(self, name: str, job_type: str, config: dict[str, Any]) -> None:
        self._write_note(clean=False)  # a process that is killed while the run is begun must find it again
        self.sink.open(self.note, f"{self.prefix}{name}", job_type, config)
        self.is_open = True
        self.note.began = self.note.logged
        self._write_note(clean=False)

    def _write_note(self, clean: bool) -> None:
        self.note.clean = clean
        write_text(self.note_path, json.dumps(asdict(self.note)))

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Points of curves at an optimizer step, in the order of steps; one that was sent before is not sent again."""
        if (not self.is_open and self.opens is None) or step <= self.note.logged:
            return
        if any(waiting < step for waiting in self.waiting):
            self._send()
        self.waiting.setdefault(step, {}).update({name: v for name, v in metrics.items() if v is not None})

    def _send(self) -> None:
        """One row of the tracker's history for all that is known of a step; the run is opened for the first."""
        if self.opens is not None:
            opens, self.opens = self.opens, None
            self._guard(opens)
        for step, metrics in self.waiting.items():
            if self.is_open and step > self.note.logged:  # which the tracker may know better than the note
                self.note.logged = step
                self._guard(lambda step=step, metrics=metrics: self.sink.log(step, metrics))
        self.waiting = {}

    def finish(self, summary: Mapping[str, Any], status: str = "ok") -> None:
        """End the run, with its final numbers; `status` is the result's. The last step of an interrupted run may have
        more to come (its validation): it is sent when the run goes on."""
        if status != "interrupted":
            self._send()
        self.opens = None
        if self.is_open:
            self._guard(lambda: self._end(summary, status))
        self.is_open = False

    def _end(self, numbers: Mapping[str, Any], status: str) -> None:
        known = {name: value for name, value in numbers.items() if value is not None}
        self.sink.end(known, status, self.note.logged)
        self._write_note(clean=True)

    def compare(self, comparison: Comparison, config: dict[str, Any]) -> None:
        """Send what a whole group found, as a run of its own; sent again, it takes the place of what was there."""
        if self.mode == "off":
            return

        def send() -> None:
            self._read_note(self.folder, anew=True)
            self._open(COMPARISON, COMPARISON, config)
            self.note.logged += 1
            self.sink.compare(comparison, self.note.logged)
            self._end(comparison.numbers, "ok")

        self._guard(send)
        self.is_open = False

    def publish(self, comparison: Comparison) -> str | None:
        """Create a W&B Report of the group that `compare` has sent; returns its address, None where that failed."""
        sink = self.sink
        assert isinstance(sink, ToWandb)  # the one that is ever online
        return self._guard(lambda: sink.publish(comparison))

    def _guard(self, action: Callable[[], T]) -> T | None:
        """What an action returns; None where it fails, and the tracker is off from then on."""
        try:
            return action()
        # Trackers' libraries, their processes and the network fail in many ways, and none of them may stop training.
        except Exception as error:
            reason = SECRET.sub("//***@", one_line(error, LONGEST))[:200]
            self.warn(
                f"{self.title} failed and is off for the rest of this run ({reason}); results are in {self.folder}"
            )
            self.is_open = False
            self.mode = "off"
            return None


def _sink(settings: Tracking, place: Place) -> Sink:
    match settings.tracker:
        case "wandb":
            return ToWandb(settings, place)
        case "trackio":
            return ToTrackio(place)
        case "mlflow":
            return ToMlflow(place)
