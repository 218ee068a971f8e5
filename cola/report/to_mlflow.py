"""MLflow; the only file that imports mlflow. docs/trackers.md says what is where."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, time
from typing import Any

from cola.report.group_report import Comparison
from cola.report.sink import Note, Place

URI = "MLFLOW_TRACKING_URI"
SETTINGS = {  # where the user's environment says nothing else
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A server that does not answer must not hold up the training; MLflow would try for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
BETWEEN_SECONDS = 1.0  # two writes, each of which is waited for
MANY_METRICS = 800  # are written at once: with the next step's they are still one write,
MOST_METRICS = 1000  # which takes so many, and is whole or not there
LONGEST_TEXT = 5000  # of a tag
STATUS = {"ok": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
RUN_ID = "cola_id"  # the tag by which a run is found again


def mode_of_mlflow() -> str:
    """`local`, or by whose word it is elsewhere; the address itself may hold a password."""
    return URI if os.environ.get(URI) else "local"


def local_store(home: Path) -> str:
    """The address of the database that a run or an ablation has to itself."""
    return f"sqlite:///{home.absolute() / 'mlflow/mlflow.db'}"


class ToMlflow:
    """One run of MLflow at a time, at MLFLOW_TRACKING_URI or in the folder of the run or ablation."""

    def __init__(self, place: Place) -> None:
        self.mode = mode_of_mlflow()
        self.place = place
        self.client: Any = None
        self.run = ""  # the id of the open one
        self.rows: list[Any] = []  # that were not written yet
        self.written = 0.0

    def recover(self, note: Note, anew: bool) -> None:
        """Nothing is to be thrown away: a write is whole or not there, and the store is asked for its last step."""

    def open(self, note: Note, name: str, job_type: str, config: dict[str, Any]) -> None:
        """The run with the note's id; steps that it holds are not sent again."""
        for variable, value in SETTINGS.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for library in ("mlflow", "alembic"):  # they tell of every table that they make
            logging.getLogger(library).setLevel(logging.WARNING)
        if self.mode == "local":
            (self.place.home / "mlflow").mkdir(parents=True, exist_ok=True)
        self.client = self.client or MlflowClient(os.environ.get(URI) or local_store(self.place.home))
        experiment = self._experiment()
        found = self.client.search_runs([experiment], f"tags.{RUN_ID} = '{note.id}'", max_results=1)
        if found:
            self.run = found[0].info.run_id
            note.logged = int(found[0].data.metrics.get("step", 0))
            self.client.update_run(self.run, status="RUNNING")
        else:
            tags = {RUN_ID: note.id, "group": self.place.group, "job_type": job_type}
            self.run = self.client.create_run(experiment, run_name=name, tags=tags).info.run_id
            note.logged = 0
        scalars = {key: value for key, value in config.items() if isinstance(value, str | int | float)}
        there = found[0].data.params if found else {}
        self.client.log_batch(self.run, params=[Param(key, str(scalars[key])) for key in scalars.keys() - there.keys()])
        self.client.log_dict(self.run, config, "config.json")

    def _experiment(self) -> str:
        """The id of the project's experiment."""
        from mlflow import MlflowException

        artifacts = (self.place.home.absolute() / "mlflow/artifacts").as_uri() if self.mode == "local" else None
        if (found := self.client.get_experiment_by_name(self.place.project)) is None:
            try:
                return self.client.create_experiment(self.place.project, artifact_location=artifacts)
            except MlflowException:  # another process was quicker
                if (found := self.client.get_experiment_by_name(self.place.project)) is None:
                    raise
        return found.experiment_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, {"step": step, **metrics})
        if monotonic() - self.written > BETWEEN_SECONDS or len(self.rows) > MANY_METRICS:
            self._write()

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time() * 1000)
        self.rows += [Metric(name, float(value), now, step) for name, value in metrics.items()]

    def _write(self) -> None:
        for first in range(0, len(self.rows), MOST_METRICS):
            self.client.log_batch(self.run, metrics=self.rows[first : first + MOST_METRICS])
        self.rows, self.written = [], monotonic()

    def compare(self, comparison: Comparison, step: int) -> None:
        """MLflow shows the files themselves: pages, figures and tables."""
        for name, file in comparison.files.items():
            if isinstance(file, str):
                self.client.log_text(self.run, file, name)
            elif file.is_dir():
                self.client.log_artifacts(self.run, str(file), name)
            else:
                self.client.log_artifact(self.run, str(file))

    def end(self, numbers: Mapping[str, float | str], status: str, step: int) -> None:
        self._write()
        self._add(step, {name: value for name, value in numbers.items() if not isinstance(value, str)})
        self._write()
        for name, text in numbers.items():
            if isinstance(text, str):
                self.client.set_tag(self.run, name, text[:LONGEST_TEXT])
        self.client.set_terminated(self.run, STATUS[status])
        self.run = ""
