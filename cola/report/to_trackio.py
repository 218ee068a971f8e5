"""trackio, which keeps runs in a database on this machine; the only file that imports trackio. docs/trackers.md says
what is where."""

import contextlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cola.report.group_report import Comparison
from cola.report.sink import Note, Place
from cola.report.table import typed_rows


class ToTrackio:
    """One run of trackio at a time, in TRACKIO_DIR or in trackio's own folder."""

    mode = "local"

    def __init__(self, place: Place) -> None:
        self.place = place
        self.run: Any = None

    def recover(self, note: Note, anew: bool) -> None:
        """trackio writes twice a second, so that a killed session has lost a few rows: its run is taken away, and all
        of it is sent again under the same id."""
        if note.clean and not anew:
            return
        import trackio

        with contextlib.suppress(ValueError):  # the project is not there yet
            for run in trackio.Api().runs(self.place.project):
                if run.id == note.id:
                    run.delete()
        note.logged = 0

    def open(self, note: Note, name: str, job_type: str, config: dict[str, Any]) -> None:
        """A run by its id; trackio.init knows runs by their names alone, which another run folder may have used."""
        from trackio.run import Run
        from trackio.utils import TRACKIO_DIR

        class Local(Run):
            def _get_username(self) -> None:
                """Where a token is there, trackio would ask huggingface.co whose it is, and keep the name."""

        TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
        if not os.access(TRACKIO_DIR, os.W_OK):  # trackio would only warn, from a thread of its own
            raise PermissionError(f"{TRACKIO_DIR} cannot be written to")
        self.run = Local(
            url=None,
            project=self.place.project,
            client=None,
            name=name,
            run_id=note.id,
            group=self.place.group,
            config={"job_type": job_type, **config},
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def compare(self, comparison: Comparison, step: int) -> None:
        import trackio

        tables = {
            f"table/{name}": trackio.Table(columns=[*table.columns], data=typed_rows(table))
            for name, table in comparison.tables.items()
        }
        figures = {f"figure/{name}": trackio.Html(figure, inject=False) for name, figure in comparison.figures.items()}
        self.run.log({**tables, **figures}, step=step)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.place.title)[:100]
        artifact = trackio.Artifact(f"{name}-report", type="report")
        with TemporaryDirectory() as written:
            for name, file in comparison.files.items():
                if isinstance(file, str):
                    path = Path(written, name)
                    path.write_text(file, encoding="utf-8")
                    artifact.add_file(path, name)
                elif file.is_dir():
                    artifact.add_dir(file, name)
                else:
                    artifact.add_file(file, name)
            self.run.log_artifact(artifact, overwrite=True)

    def end(self, numbers: Mapping[str, float | str], status: str, step: int) -> None:
        """trackio has no summary: the final numbers are a row at the last step."""
        if numbers:
            self.run.log(dict(numbers), step=step)
        with contextlib.redirect_stdout(io.StringIO()):  # it would say that it uploads, and does not
            self.run.finish()
        self.run = None
