"""docs/commands.md, from the commands themselves."""

import inspect
import re
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from cola.cli.app import app

HEAD = """# Commands

Generated from the commands in [`cola/cli/`](../cola/cli) by `docs/generate.py`; a test keeps it true. `cola COMMAND
--help` says the same. A mistake of the user's is one line on standard error and exit code 2; Ctrl-C before anything has
begun is 130.
"""


def page() -> str:
    """Every command: what it does, its exit codes, its arguments and options."""
    return "\n".join([HEAD, *_commands(get_command(app), "cola")])


def _commands(command: Any, name: str) -> Iterator[str]:  # of typer's own classes, whose module is private
    for word, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _commands(inner, f"{name} {word}")
            continue
        words = [name, word, *(_name(one) for one in inner.params if not _is_option(one))]
        words += [f"{_name(one)} {one.name.upper()}" for one in inner.params if _is_option(one) and one.required]
        yield f"## {name} {word}\n"
        yield f"    {' '.join(words)}\n"
        yield (
            re.sub(r"^(For example:) (.*)$", r"\1\n\n    \2\n", inspect.cleandoc(inner.help), flags=re.MULTILINE) + "\n"
        )
        if rows := [_row(one) for one in inner.params]:
            yield "\n".join(["| | value | default | meaning |", "| :-- | :-- | :-- | :-- |", *rows, ""])


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def _name(parameter: Any) -> str:
    """An option's word, or an argument as help shows it: `[OVERRIDES]...` where it may be left out or be several."""
    if _is_option(parameter):
        return " ".join(parameter.opts)
    name = str(parameter.metavar or parameter.name.upper()).removesuffix("...")
    name = name if parameter.required else f"[{name}]"
    return f"{name}..." if parameter.nargs == -1 else name


def _row(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind)  # of a list, what it is of
    words = {bool: "", str: "text", int: "whole number", Path: "path"}
    kind = ", ".join(f"`{word}`" for word in kind) if isinstance(kind, EnumType) else words[kind]
    several = ", several" if parameter.multiple or parameter.nargs == -1 else ""
    default = "" if parameter.default in (None, False) else f"`{parameter.default}`"
    default = "**required**" if parameter.required else default
    return f"| `{_name(parameter)}` | {kind}{several} | {default} | {_cells(parameter.help)} |"


def _cells(text: str) -> str:
    return text.replace("|", "\\|")
