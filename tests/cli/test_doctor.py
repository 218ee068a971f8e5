"""cola doctor. Run: pytest tests/cli/test_doctor.py"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from runs import cola

from cola.files import pip_install


def line(output: str, head: str) -> str:
    (found,) = [line for line in output.splitlines() if line.startswith(f"{head:<10}")]
    return found[10:]


def test_what_is_there_is_said_and_no_name_or_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "jane_doe"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "some").write_bytes(b"x" * 5000)
    other = tmp_path / "scratch" / "jane_doe" / "store"
    for name, value in {
        "HOME": str(home),
        "LOGNAME": "jane_doe",
        "COLA_CACHE": str(home / "cache"),
        "COLA_STORE": str(other),
        "WANDB_API_KEY": "5ecret" * 8,
        "HF_TOKEN": "hf_5ecret",
        "TRACKIO_DIR": str(home / "trackio"),
        "MLFLOW_TRACKING_URI": "http://jane_doe:5ecret@mlflow.example",
    }.items():
        monkeypatch.setenv(name, value)
    result = cola("doctor")
    assert result.exit_code == 0, result.output
    assert "torch " in line(result.stdout, "packages")
    assert line(result.stdout, "cache").startswith("~/cache, 5.00 kB, ")
    assert line(result.stdout, "store").startswith(f"{tmp_path}/scratch/USER/store, not there yet, ")
    assert line(result.stdout, "W&B") == "online; an API key is configured"
    assert "a token is configured" in line(result.stdout, "hub")
    assert line(result.stdout, "trackio") in ("not installed", "in ~/trackio, by TRACKIO_DIR")
    assert line(result.stdout, "MLflow") in ("not installed", "as MLFLOW_TRACKING_URI says")
    for secret in ("jane_doe", "5ecret", socket.gethostname()):
        assert secret not in result.stdout


@pytest.mark.slow
def test_what_is_missing_or_too_old_is_named_with_the_command_that_brings_it(tmp_path: Path) -> None:
    about = tmp_path / "chain_of_lora-9.9.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: chain-of-lora", "Version: 9.9", "Requires-Python: >=3.99"]
    lines += ["Requires-Dist: torch>=999", "Requires-Dist: no-such-thing>=1", "Requires-Dist: numpy>=1"]
    lines += ['Requires-Dist: neither>=2; extra == "quantized"', 'Requires-Dist: windows>=2; sys_platform == "win32"']
    (about / "METADATA").write_text("\n".join([*lines, "", ""]))
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "cola", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert line(done.stdout, "cola").startswith("9.9, Python 3.")
    assert "warning: Python >=3.99 is needed" in said
    for line_of in (
        r"warning: torch is .*, too old: .*pip install .*'torch>=999'",
        r"warning: no-such-thing is missing: .*pip install .*'no-such-thing>=1'",
        r"optional: neither, for nf4 and int8 bases: .*pip install .*'neither>=2'",
    ):
        assert any(re.fullmatch(line_of, one) for one in said), line_of
    assert "windows" not in done.stdout
    assert said[-1] == "cola cannot run here"
    assert "hub       offline by HF_HUB_OFFLINE" in done.stdout


def test_what_is_missing_goes_into_the_environment_that_cola_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tmp_path / "home/tool/bin/python", tmp_path / "bin/pip"
    for path in (own, own.with_name("pip"), other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", str(own.parent))
    assert pip_install("x") == "pip install x"
    monkeypatch.setenv("PATH", str(other.parent))
    assert pip_install("x") == f"{own} -m pip install x"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert pip_install("x", "~/tool/bin/python") == "uv pip install --python ~/tool/bin/python x"


def test_the_hub_is_asked_and_any_answer_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert line(cola("doctor").stdout, "hub").startswith("reachable; ")
    server.shutdown()
    server.server_close()
    assert line(cola("doctor").stdout, "hub").startswith("not reachable (")
