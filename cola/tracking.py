"""Weights & Biases: one group per run, one W&B run per arm and seed. The only file that imports wandb.

Whatever goes wrong in it costs a warning and the rest of the tracking, never the training. Fixed names:

    train/loss  train/grad_norm  train/learning_rate  train/tokens_per_second    per optimizer step (`step`)
    validation/loss  validation/score                                            at evaluation points
    knot/drift  knot/relative_size                                               at knots
    final/{train,validation,test}_{loss,score}  gap/loss  gap/acc  gap/ft        in the summary
"""

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cola.recipe import Tracking

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

    def __init__(self, settings: Tracking, group: str, folder: Path, warn: Callable[[str], None]) -> None:
        self.settings = settings
        self.group = group
        self.folder = folder
        self.warn = warn
        self.mode = mode_of(settings)
        self.run: Any = None

    def start(self, arm: str, seed: int, config: dict[str, Any]) -> None:
        """Begin the W&B run of an arm and seed."""
        if self.mode == "off":
            return

        def begin() -> None:
            import wandb

            self.run = wandb.init(
                project=self.settings.project,
                entity=self.settings.entity,
                group=self.group,
                name=f"{arm}-seed{seed}",
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
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")

        self._guard(begin)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Points of curves at an optimizer step."""
        if self.run is not None:
            known = {name: value for name, value in metrics.items() if value is not None}
            self._guard(lambda: self.run.log({"step": step, **known}))

    def finish(self, summary: dict[str, Any], failed: bool = False) -> None:
        """End the W&B run, with its final numbers in the summary."""
        if self.run is None:
            return

        def end() -> None:
            self.run.summary.update({name: value for name, value in summary.items() if value is not None})
            self.run.finish(exit_code=1 if failed else 0)

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
