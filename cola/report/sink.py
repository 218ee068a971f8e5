"""What a tracker does for cola, whichever library it is of: to_wandb.py, to_trackio.py and to_mlflow.py are that."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cola.report.group_report import Comparison


@dataclass
class Note:
    """What a folder keeps of its run at the tracker between sessions, so that a resumed one goes on with it."""

    id: str
    session: str = ""  # W&B's folder of it
    began: int = 0  # the last step that was sent before this session
    logged: int = 0  # the last step that was sent
    clean: bool = True  # whether the session came to its end


@dataclass(frozen=True)
class Place:
    """Where a tracker's runs belong."""

    project: str
    group: str
    title: str  # of the group; a point of an ablation adds its own name
    folder: Path  # the run folder
    home: Path  # the group's folder: the same, or the ablation's


class Sink(Protocol):
    """Takes one run at a time. It raises whatever goes wrong, which is Tracker's to deal with."""

    mode: str

    def recover(self, note: Note, anew: bool) -> None:
        """Before a run is opened: what a killed session left that is not whole is thrown away, and with `anew` what any
        session left, since this one sends everything; `note.logged` is then the last step that is not sent again."""

    def open(self, note: Note, name: str, job_type: str, config: dict[str, Any]) -> None:
        """Open the run that the note names, or begin it. What the tracker knows better of `note.logged` it corrects."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All that is known of a step; steps rise."""

    def compare(self, comparison: Comparison, step: int) -> None:
        """Tables, figures and files of a whole group, in the open run."""

    def end(self, numbers: Mapping[str, float | str], status: str, step: int) -> None:
        """End the run with its final numbers; `status` as a result has it, `step` the last one."""
