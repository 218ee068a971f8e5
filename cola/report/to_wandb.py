"""Weights & Biases; the only file that imports wandb. docs/trackers.md says what is where."""

import contextlib
import netrc
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cola.recipe.schema import Tracking
from cola.report.group_report import COMPARISON, Comparison, group_report, within
from cola.report.sink import Note, Place
from cola.report.table import typed_rows

INIT_SECONDS = 60.0
FINISH_SECONDS = 120.0
COPIES = "WANDB_DATA_DIR"


def has_api_key() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def mode_of_wandb(settings: Tracking) -> str:
    """`online`, `offline` or `off`; WANDB_MODE decides where the recipe leaves it to `auto`."""
    if settings.wandb != "auto":
        return settings.wandb
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("disabled", "dryrun", "offline", "online"):
        return {"disabled": "off", "dryrun": "offline"}.get(asked, asked)
    return "online" if has_api_key() else "offline"


def sync_command(folder: Path) -> str | None:
    """How to upload what a run or an ablation kept offline; None where there is nothing."""
    places = [place for place in ("wandb/offline-run-*", "points/*/wandb/offline-run-*") if any(folder.glob(place))]
    return f"wandb sync {' '.join(str(folder / place) for place in places)}" if places else None


class ToWandb:
    """One W&B run at a time."""

    def __init__(self, settings: Tracking, place: Place) -> None:
        self.mode = mode_of_wandb(settings)
        self.place = place
        self.entity = settings.entity  # once a run is open: to whom it belongs
        self.run: Any = None

    def recover(self, note: Note, anew: bool) -> None:
        """A session that was killed offline has lost what W&B had not written yet, thousands of rows perhaps: its part
        is thrown away, unless it was uploaded, and its steps are sent again."""
        self._sweep()
        if (anew or not note.clean) and self.mode == "offline":
            part = self.place.folder / "wandb" / note.session
            if part.name.startswith("offline-run-") and not any(part.glob("*.synced")):
                # Renamed first: W&B's own process outlives a kill by a moment, and may still be writing there.
                with contextlib.suppress(FileNotFoundError):
                    part = part.rename(part.with_name(f"killed-{part.name}"))
                shutil.rmtree(part, ignore_errors=True)
                note.logged = note.began

    def _sweep(self) -> None:
        """Remove what a session left that was killed before W&B had begun its file: `wandb sync` cannot read it."""
        for part in self.place.folder.glob("wandb/offline-run-*"):
            if not any(part.glob("*.wandb")):
                shutil.rmtree(part, ignore_errors=True)

    def open(self, note: Note, name: str, job_type: str, config: dict[str, Any]) -> None:
        """Open the W&B run that the note names."""
        import wandb

        self.run = wandb.init(
            project=self.place.project,
            entity=self.entity,
            id=note.id,
            resume="allow",
            group=self.place.group,
            name=name,
            job_type=job_type,
            config=config,
            dir=str(self.place.folder),
            mode="online" if self.mode == "online" else "offline",
            reinit="finish_previous",
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,  # a server lost in mid-run must not hold up the next arm
                silent=True,
                console="off",
                x_disable_meta=True,  # the machine is in provenance.json; host and user names are nobody's business
                x_disable_machine_info=True,
                x_save_requirements=False,  # they are there too, and W&B would read all that is installed for each run
                host="",
            ),
        )
        if self.mode == "online" and self.run.resumed:
            note.logged = self.run.step - 1  # the server knows what has arrived
        self.entity = self.run.entity
        note.session = Path(self.run.settings.sync_dir).name
        if job_type != COMPARISON:
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, **metrics}, step=step)

    def compare(self, comparison: Comparison, step: int) -> None:
        import wandb

        tables = {
            f"table/{name}": wandb.Table(columns=[*table.columns], data=[*typed_rows(table)])
            for name, table in comparison.tables.items()
        }
        figures = {
            f"figure/{name}": wandb.Html(figure, inject=False, data_is_not_path=True)
            for name, figure in comparison.figures.items()
        }
        with self._copies_here():
            self.run.log({**tables, **figures}, step=step)
            self.run.log_artifact(self._artifact(comparison.files))

    def _artifact(self, files: Mapping[str, str | Path]) -> Any:
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.place.title)[:100]
        artifact = wandb.Artifact(f"{name}-report", type="report")
        for name, file in files.items():
            if isinstance(file, str):
                with artifact.new_file(name, encoding="utf-8") as opened:
                    opened.write(file)
            elif file.is_dir():
                for path in sorted(file.iterdir()):  # add_dir would say so on the terminal
                    artifact.add_file(str(path), f"{name}/{path.name}", skip_cache=True)
            else:
                artifact.add_file(str(file), name, skip_cache=True)
        return artifact

    @contextlib.contextmanager
    def _copies_here(self) -> Iterator[None]:
        """W&B copies what an artifact holds, and syncs the copies: they belong beside the W&B run in the run folder and
        not in the user's home. It asks its environment where, and knows no other way to be told."""
        before = {COPIES: os.environ[COPIES]} if COPIES in os.environ else {}
        os.environ[COPIES] = str(Path(self.run.settings.sync_dir).absolute() / "copies")
        try:
            yield
        finally:
            del os.environ[COPIES]
            os.environ.update(before)

    def end(self, numbers: Mapping[str, float | str], status: str, step: int) -> None:
        self.run.summary.update(dict(numbers))
        self.run.finish(exit_code=0 if status == "ok" else 1)
        self.run = None
        self._sweep()

    def publish(self, comparison: Comparison) -> str:
        """Create a W&B Report of the group that was compared; returns its address."""
        place = self.place
        report = group_report(comparison, place.group, place.title, place.project, self.entity or "")
        return within(FINISH_SECONDS, lambda: report.save().url)
