"""Every command and flag, with its default and help's first line, as committed: a change of the interface is a visible
diff. Write it anew: python tests/cli/test_interface.py > tests/cli/interface.txt
"""

import os
import re
import shlex
import subprocess
import sys
from enum import EnumType
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cola.cli.app import app

ROOT = Path(__file__).parents[2]


def interface() -> str:
    lines = []

    def describe(command: Any, name: str) -> None:  # of typer's own classes, whose module is private
        lines.append(f"{name}: {(command.help or '').strip().splitlines()[0]}")
        for parameter in command.params:
            names = " ".join(parameter.opts) if parameter.param_type_name == "option" else parameter.metavar
            kind = parameter.type_descriptor.annotation
            kind = "|".join(map(str, kind)) if isinstance(kind, EnumType) else getattr(kind, "__name__", kind)
            more = " ..." if parameter.multiple or parameter.nargs == -1 else ""
            default = "required" if parameter.required else f"default {parameter.default}"
            lines.append(f"  {names or parameter.name.upper()} ({kind}{more}, {default}): {parameter.help}")
        for word, inner in getattr(command, "commands", {}).items():
            lines.append("")
            describe(inner, f"{name} {word}")

    describe(get_command(app), "cola")
    return "\n".join(lines) + "\n"


def test_the_interface_is_the_one_that_is_written_down() -> None:
    assert interface() == Path(__file__).with_name("interface.txt").read_text()


def commands_in(text: str) -> list[list[str]]:
    """The commands of cola in a page's blocks, as words, without what is said of them."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [*re.findall(r"^    (cola .*)", text, re.MULTILINE), *blocks.splitlines()]
    bare = (re.sub(r"^\w+=\S+ ", "", re.split(r" & |\s&$|;| {2,}", line)[0]) for line in lines)
    return [shlex.split(line) for line in bare if line.startswith("cola ")]


def test_every_command_that_a_page_shows_can_be_typed() -> None:
    shown = [words for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")) for words in commands_in(page.read_text())]
    assert len(shown) > 50
    for _, *words in shown:
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context("cola", words)  # raises where there is no such option, or one is wanted


@pytest.mark.parametrize(
    ("words", "offered"), [("cola ex", ["export"]), ("cola new mine.yaml --from q", ["quickstart", "qwen1_8b_chain3"])]
)
def test_a_shell_completes_commands_and_names_of_recipes(words: str, offered: list[str]) -> None:
    asked = {"_COLA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "from cola.cli.app import app; app(prog_name='cola')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == offered


if __name__ == "__main__":
    print(interface(), end="")
