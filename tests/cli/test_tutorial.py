"""docs/tutorial.md, block by block, with a tiny model for the bundled one. Run: pytest tests/cli/test_tutorial.py"""

import re
import shlex
from pathlib import Path

import pytest
from conftest import tiny_model
from runs import cola
from transformers import PreTrainedTokenizerFast

from cola.cli import new

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parents[2] / "docs/tutorial.md").read_text()
INSTALLS = ("python -m venv", "pip install")  # which download; test_wheel.py installs the wheel alone


@pytest.mark.slow
def test_every_block_of_the_tutorial_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    monkeypatch.setattr(new, "BUNDLED", "./tiny")
    said = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(block, {})
            continue
        assert language == "bash"
        for line in block.splitlines():
            if not line.startswith(INSTALLS):
                program, *words = shlex.split(line)
                assert program == "cola"
                result = cola(*words)
                assert result.exit_code == 0, (line, result.output)
                said.append(result.output)
    doctor, proposed, looked, planned, first, second, third = said
    assert "all that cola needs is there" in doctor
    assert "not used: Request ID, Room" in proposed
    assert "  data.label: by its name" in proposed
    assert "▸" in looked
    assert all(arm in planned for arm in ("base", "lora", "chain3", "full"))
    assert "chain3 − lora = " in first
    assert "report.html" in first.replace("\n", "")
    assert re.search(r"segments: \d+ needed, \d+ found in .*, 0 to be trained", second.replace("\n", " "))
    assert "(2 seeds)" in third
