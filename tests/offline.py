"""What an offline run of W&B holds."""

import json
import subprocess
from pathlib import Path

from wandb.util import get_core_path


def records(folder: Path) -> list[dict]:
    """The records of one offline run, as `wandb leet inspect --json` prints them, without its second of Python."""
    [file] = folder.glob("*.wandb")
    words = [get_core_path(), "leet", "inspect", "--json", "--no-observability", "-run-file", str(file)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
