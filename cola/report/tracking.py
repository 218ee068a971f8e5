"""Weights & Biases: one group per run, one W&B run per arm and seed and one for their comparison. The only file that
imports wandb.

Whatever goes wrong in it costs a warning and the rest of the tracking, never the training. Fixed names, of an arm and
seed:

    train/loss  train/grad_norm  train/learning_rate  train/tokens_per_second    per optimizer step (`step`)
    validation/loss  validation/score                                            at evaluation points
    knot/{relative_size,unchanged,error,cosine}_{median,max,min}  knot/drift_*    at knots
    final/{train,validation,test}_{loss,score}  gap/loss  gap/acc  gap/ft        in the summary
    general/loss  general/forgetting                                             likewise

docs/wandb.md has those of the comparison, and what its artifact holds.
"""

import contextlib
import json
import netrc
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cola.compare.records import Summary
from cola.errors import one_line
from cola.files import write_text
from cola.recipe.schema import Tracking
from cola.report.group_report import ARM_MEANS, COMPARISON, OF_CONTRAST, Comparison, group_report, within
from cola.report.numbers import choice_share
from cola.report.table import NONE, Table
from cola.report.verdict import verdict
from cola.tree.run_folder import WANDB_NOTE

INIT_SECONDS = 60.0
FINISH_SECONDS = 120.0
COPIES = "WANDB_DATA_DIR"

T = TypeVar("T")


def comparison_numbers(summary: Summary) -> dict[str, float | str]:
    """A run's summary.json under W&B's fixed names; what is not known has no name."""
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


def typed_rows(table: Table) -> list[Iterable[Any]]:
    """A table's rows for W&B, which sorts and draws a column of numbers: one whose every cell is a plain number or a
    dash holds numbers and None, any other keeps its text. The first column names the rows and stays text."""
    typed = [
        [cell.value for cell in column]
        if number and all(cell.alone or cell.text == NONE for cell in column)
        else [cell.text for cell in column]
        for number, column in enumerate(zip(*table.cells, strict=True))
    ]
    return [list(row) for row in zip(*typed, strict=True)]


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


def mode_of(settings: Tracking) -> str:
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


class NoTracker:
    """A tracker that sends nothing: of a trial, and of what was sent before."""

    mode = "off"

    def start(self, arm: str, seed: int, folder: Path, config: dict[str, Any]) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def finish(self, summary: Mapping[str, Any], status: str = "ok") -> None: ...


@dataclass
class _Note:
    """What a folder keeps of its W&B run between sessions."""

    id: str
    session: str = ""  # its folder's name
    began: int = 0  # the last step that was sent before this session
    logged: int = 0  # the last step that was sent
    clean: bool = True  # whether the session came to its end


class Tracker:
    """Sends one run at a time to W&B; after the first failure it is silent."""

    def __init__(self, settings: Tracking, group: str | None, folder: Path, warn: Callable[[str], None]) -> None:
        self.settings = settings
        self.group = group or folder.name
        self.prefix = f"{folder.name} " if group else ""  # tells the points of an ablation apart
        self.folder = folder
        self.warn = warn
        self.mode = mode_of(settings)
        self.run: Any = None
        self.opens: Callable[[], None] | None = None  # opens the run of the arm and seed at hand, until that is done
        self.entity: str | None = None  # to whom the last online run belongs
        self.note, self.note_path = _Note(""), folder / WANDB_NOTE
        self.waiting: dict[int, dict[str, float]] = {}

    def start(self, arm: str, seed: int, folder: Path, config: dict[str, Any]) -> None:
        """What comes next is of this arm and seed: of a new W&B run, or of the one that its folder names. It is opened
        when there is something to send, since the first one takes seconds, for which no first step need wait."""
        if self.mode == "off":
            return
        self.waiting = {}
        self._guard(lambda: self._open_note(folder))

        def opens() -> None:
            self._init(f"{arm}-seed{seed}", arm, config)
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")

        self.opens = opens if self.mode != "off" else None

    def _init(self, name: str, job_type: str, config: dict[str, Any]) -> None:
        """Open the W&B run that the note names."""
        import wandb

        self.run = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            id=self.note.id,
            resume="allow",
            group=self.group,
            name=f"{self.prefix}{name}",
            job_type=job_type,
            config=config,
            dir=str(self.folder),
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
            self.note.logged = self.run.step - 1  # the server knows what has arrived
        self.entity = self.run.entity
        self.note.began, self.note.session = self.note.logged, Path(self.run.settings.sync_dir).name
        self._write_note(clean=False)

    def compare(self, comparison: Comparison, config: dict[str, Any]) -> bool:
        """Send what a whole group found, as a W&B run of its own; sent again, it takes the place of what was there.
        Returns whether it was sent, or kept for `wandb sync`."""
        if self.mode == "off":
            return False

        def send() -> None:
            import wandb

            self._open_note(self.folder, anew=True)
            self._init(COMPARISON, COMPARISON, config)
            self.note.logged += 1
            tables = {
                f"table/{name}": wandb.Table(columns=[*table.columns], data=typed_rows(table))
                for name, table in comparison.tables.items()
            }
            figures = {
                f"figure/{name}": wandb.Html(figure, inject=False, data_is_not_path=True)
                for name, figure in comparison.figures.items()
            }
            self.run.summary.update(comparison.numbers)
            with self._copies_here():
                self.run.log({**tables, **figures}, step=self.note.logged)
                self.run.log_artifact(self._artifact(comparison.files))
            self.run.finish()
            self._write_note(clean=True)
            self.run = None

        self._guard(send)
        return self.mode != "off"

    def _artifact(self, files: Mapping[str, str | Path]) -> Any:
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{self.prefix}{self.group}")[:100]
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

    def publish(self, comparison: Comparison) -> str | None:
        """Create a W&B Report of the group that `compare` has sent; returns its address, None where that failed."""

        def create() -> str:
            title = f"{self.prefix}{self.group}"
            report = group_report(comparison, self.group, title, self.settings.project, self.entity or "")
            return within(FINISH_SECONDS, lambda: report.save().url)

        return self._guard(create)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Points of curves at an optimizer step, in the order of steps; one that was sent before is not sent again."""
        if (self.run is None and self.opens is None) or step <= self.note.logged:
            return
        if any(waiting < step for waiting in self.waiting):
            self._send()
        self.waiting.setdefault(step, {}).update({name: v for name, v in metrics.items() if v is not None})

    def _send(self) -> None:
        """One row of W&B's history for all that is known of a step; the run is opened for the first."""
        if self.opens is not None:
            opens, self.opens = self.opens, None
            self._guard(opens)
        for step, metrics in self.waiting.items():
            if self.run is not None and step > self.note.logged:  # which a server knows better than the note
                self.note.logged = step
                self._guard(lambda step=step, metrics=metrics: self.run.log({"step": step, **metrics}, step=step))
        self.waiting = {}

    def _open_note(self, folder: Path, anew: bool = False) -> None:
        """Who the folder's W&B run is, and the last step that is safely there.

        A session that was killed offline has lost what W&B had not written yet, thousands of rows perhaps: its part is
        thrown away, unless it was uploaded, and its steps are sent again. `anew`: and so is any other's, since this
        session sends everything.
        """
        self.note_path = folder / WANDB_NOTE
        try:
            self.note = _Note(**json.loads(self.note_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.note = _Note(secrets.token_hex(4))
        self._sweep()
        if (anew or not self.note.clean) and self.mode == "offline":
            part = self.folder / "wandb" / self.note.session
            if part.name.startswith("offline-run-") and not any(part.glob("*.synced")):
                # Renamed first: W&B's own process outlives a kill by a moment, and may still be writing there.
                with contextlib.suppress(FileNotFoundError):
                    part = part.rename(part.with_name(f"killed-{part.name}"))
                shutil.rmtree(part, ignore_errors=True)
                self.note.logged = self.note.began

    def _write_note(self, clean: bool) -> None:
        self.note.clean = clean
        write_text(self.note_path, json.dumps(asdict(self.note)))
        if clean:
            self._sweep()

    def _sweep(self) -> None:
        """Remove what a session left that was killed before W&B had begun its file: `wandb sync` cannot read it."""
        for part in self.folder.glob("wandb/offline-run-*"):
            if not any(part.glob("*.wandb")):
                shutil.rmtree(part, ignore_errors=True)

    def finish(self, summary: Mapping[str, Any], status: str = "ok") -> None:
        """End the W&B run, with its final numbers in the summary; `status` is the result's. The last step of an
        interrupted run may have more to come (its validation): it is sent when the run goes on."""
        if status != "interrupted":
            self._send()
        self.opens = None
        if self.run is None:
            return

        def end() -> None:
            self.run.summary.update({name: value for name, value in summary.items() if value is not None})
            self.run.finish(exit_code=0 if status == "ok" else 1)
            self._write_note(clean=True)

        self._guard(end)
        self.run = None

    def _guard(self, action: Callable[[], T]) -> T | None:
        """What an action returns; None where it fails, and W&B is off from then on."""
        try:
            return action()
        # wandb, its service process and the network fail in many ways, and none of them may stop training.
        except Exception as error:
            reason = one_line(error, 200)
            self.warn(f"W&B failed and is off for the rest of this run ({reason}); results are in {self.folder}")
            self.run = None
            self.mode = "off"
            return None
