"""What a scheduler's signal does before torch is loaded, and what a terminal without UTF-8 shows.

Run: pytest tests/cli/test_first_seconds.py
"""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import SHORT, go

from cola.report.signs import ASCII, showable

LORA = ["arms.full=null", "arms.base=null", "arms.chain3=null", "comparison.primary=null", *SHORT]


def started(*words: object, **environment: str) -> subprocess.Popen[str]:
    """A command line as a process of its own, its output line by line."""
    return subprocess.Popen(
        [sys.executable, "-m", "cola", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **environment},
    )


def handles(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say which signals are handled")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_torch_is_loaded_is_one_to_go_on_later(recipe_file: Path, number: signal.Signals) -> None:
    process = started("run", recipe_file, *LORA)
    while not handles(process, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.001)
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(number)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 75
    assert said.splitlines()[-1] == "interrupted; the same command goes on"


def test_a_signal_while_all_is_being_imported_leaves_a_folder_that_the_same_command_takes(
    recipe_file: Path, tmp_path: Path
) -> None:
    process = started("run", recipe_file, *LORA)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tiny: lora; seeds 0")  # the folder is there
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 75
    folders = list((tmp_path / "runs").glob("tiny-*"))
    again = started("run", recipe_file, *LORA)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0
    if folders:  # where nothing was trained yet it may have been taken away again
        assert said.startswith("going on with tiny")
        assert list((tmp_path / "runs").glob("tiny-*")) == folders


def test_another_command_ends_by_a_signal_as_any_process_does() -> None:
    process = started("doctor")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf_8_is_shown_signs_that_it_has(recipe_file: Path, encoding: str) -> None:
    folder, _ = go(recipe_file, *LORA)
    for words in (["report", folder.path], ["verify", folder.path], ["--help"], ["run", recipe_file, "links→3"]):
        process = started(*words, PYTHONIOENCODING=encoding)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err
        assert process.returncode == (2 if words[0] == "run" else 0), err
        out.encode(encoding)
        assert words[0] != "run" or "links->3" in err


def test_every_sign_that_is_printed_has_one_in_ascii() -> None:
    signs = set()
    for path in (Path(__file__).parents[2] / "cola").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents]
        signs |= {sign for node in texts if isinstance(node.value, str) for sign in node.value if not sign.isascii()}
    surrogates = {chr(0xD800), chr(0xDFFF)}  # which are looked for, and never printed
    assert signs - surrogates <= ASCII.keys()
    assert showable("→", "ascii") == "->"
    assert all(text.isascii() for text in ASCII.values())
