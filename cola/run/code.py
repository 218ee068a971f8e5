"""Code that a recipe names: found and read once, refused unless the command allows it, copied into the run folder."""

import hashlib
from pathlib import Path

from cola.errors import IdeaError, RecipeError, RunChanged
from cola.files import without_home
from cola.link.ideas import door
from cola.recipe.ideas import Idea, read_code
from cola.recipe.recipe import Recipe
from cola.tree.run_folder import RunFolder

COPIES = "code"


def need_leave(recipe: Recipe, allowed: bool) -> None:
    """Raise RecipeError where a recipe names code of the user's and the command does not allow it to run, IdeaError
    where it may and does not, or has no such functions or options."""
    for file, named in recipe.own_code.items():
        source = read_code(file, named[0][0])
        if not allowed:
            where, idea = named[0]
            raise RecipeError(
                f"{where}: {idea} is Python code of {file} (SHA-256 {hashlib.sha256(source).hexdigest()[:16]}), which "
                "would run with your rights; where you trust it, add --allow-code"
            )
        _admit(file, source, named)


def _admit(file: str, source: bytes, named: list[tuple[str, Idea]]) -> None:
    door.admit(file, source)
    for where, idea in named:
        try:
            door.function_of(idea)
        except IdeaError as error:
            raise IdeaError(f"{where}: {error}") from error


def admit_code(recipe: Recipe, folder: RunFolder) -> dict[str, str]:
    """Let the code that a recipe names run, and keep a copy of it in the run folder; returns the SHA-256 of each file.

    A RunChanged where a file is not what it was as the run began, an IdeaError where one does not run, or has no such
    function or options.
    """
    sources = {file: read_code(file, named[0][0]) for file, named in recipe.own_code.items()}
    digests = {file: hashlib.sha256(source).hexdigest() for file, source in sources.items()}
    before = folder.provenance()
    for file, digest in digests.items():
        if before is not None and before.code.get(without_home(file)) != digest:
            raise RunChanged(
                f"{folder.path}: {file} is not what it was when this run began (a copy is in {folder.path / COPIES}): "
                "put it back, or start a new run"
            )
        _admit(file, sources[file], recipe.own_code[file])
        folder.write_text(Path(COPIES) / f"{digest[:8]}-{Path(file).name}", sources[file].decode())
    return digests
