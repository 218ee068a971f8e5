"""Weights & Biases: one group per run, one W&B run per arm and seed. The only file that imports wandb.

Whatever goes wrong in it costs a warning and the rest of the tracking, never the training. Fixed names:

    train/loss  train/grad_norm  train/learning_rate  train/tokens_per_second    per optimizer step (`step`)
    validation/loss  validation/score                                            at evaluation points
    knot/{relative_size,unchanged,error,cosine}_{median,max,min}  knot/drift_*    at knots
    final/{train,validation,test}_{loss,score}  gap/loss  gap/acc  gap/ft        in the summary
    general/loss  general/forgetting                                             likewise
"""

import contextlib
import json
import netrc
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cola.recipe import Tracking
from cola.record import WANDB_NOTE, write_text

INIT_SECONDS = 60.0
FINISH_SECONDS = 120.0


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
    """How to upload what a run kept offline; None where there is nothing."""
    return f"wandb sync {folder / 'wandb' / 'offline-run-*'}" if any(folder.glob("wandb/offline-run-*")) else None


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
        self.identity = ""
        self.note = folder / WANDB_NOTE
        self.logged = 0  # the last step that was sent
        self.began = 0  # the last step that was sent before this session
        self.session = ""  # its folder's name
        self.waiting: dict[int, dict[str, float]] = {}

    def start(self, arm: str, seed: int, folder: Path, config: dict[str, Any]) -> None:
        """Begin the W&B run of an arm and seed, or go on with the one that its folder names."""
        if self.mode == "off":
            return
        self.note, self.waiting = folder / WANDB_NOTE, {}

        def begin() -> None:
            import wandb

            self._read_note()
            self.run = wandb.init(
                project=self.settings.project,
                entity=self.settings.entity,
                id=self.identity,
                resume="allow",
                group=self.group,
                name=f"{self.prefix}{arm}-seed{seed}",
                job_type=arm,
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
                ),
            )
            if self.mode == "online" and self.run.resumed:
                self.logged = self.run.step - 1  # the server knows what has arrived
            self.began, self.session = self.logged, Path(self.run.settings.sync_dir).name
            self._write_note(clean=False)
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")

        self._guard(begin)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Points of curves at an optimizer step, in the order of steps; one that was sent before is not sent again."""
        if self.run is None or step <= self.logged:
            return
        if any(waiting < step for waiting in self.waiting):
            self._send()
        self.waiting.setdefault(step, {}).update({name: v for name, v in metrics.items() if v is not None})

    def _send(self) -> None:
        """One row of W&B's history for all that is known of a step."""
        for step, metrics in self.waiting.items():
            self.logged = step
            self._guard(lambda step=step, metrics=metrics: self.run.log({"step": step, **metrics}, step=step))
        self.waiting = {}

    def _read_note(self) -> None:
        """Who this W&B run is, and the last step that is safely there.

        A session that was killed offline has lost what W&B had not written yet, thousands of rows perhaps: its part is
        thrown away, unless it was uploaded, and its steps are sent again.
        """
        try:
            known = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        whole = isinstance(known, dict) and known.keys() >= {"id", "session", "began", "logged", "clean"}
        if not whole:
            known = {"id": secrets.token_hex(4), "logged": 0, "clean": True}
        self.identity, self.logged = known["id"], known["logged"]
        self._sweep()
        if not known["clean"] and self.mode == "offline":
            part = self.folder / "wandb" / known["session"]
            if part.name.startswith("offline-run-") and not any(part.glob("*.synced")):
                # Renamed first: W&B's own process outlives a kill by a moment, and may still be writing there.
                with contextlib.suppress(FileNotFoundError):
                    part = part.rename(part.with_name(f"killed-{part.name}"))
                shutil.rmtree(part, ignore_errors=True)
                self.logged = known["began"]

    def _sweep(self) -> None:
        """Remove what a session left that was killed before W&B had begun its file: `wandb sync` cannot read it."""
        for part in self.folder.glob("wandb/offline-run-*"):
            if not any(part.glob("*.wandb")):
                shutil.rmtree(part, ignore_errors=True)

    def _write_note(self, clean: bool) -> None:
        known = {"id": self.identity, "session": self.session, "began": self.began, "logged": self.logged}
        write_text(self.note, json.dumps({**known, "clean": clean}))

    def finish(self, summary: dict[str, Any], status: str = "ok") -> None:
        """End the W&B run, with its final numbers in the summary; `status` is the result's: ok, failed or interrupted.

        The last step of an interrupted run may have more to come (its validation): it is sent when the run goes on.
        """
        if self.run is None:
            return
        if status != "interrupted":
            self._send()

        def end() -> None:
            self.run.summary.update({name: value for name, value in summary.items() if value is not None})
            self.run.finish(exit_code=0 if status == "ok" else 1)
            self._write_note(clean=True)
            self._sweep()

        self._guard(end)
        self.run = None

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        # wandb, its service process and the network fail in many ways, and none of them may stop training.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.warn(f"W&B failed and is off for the rest of this run ({reason}); results are in {self.folder}")
            self.run = None
            self.mode = "off"
