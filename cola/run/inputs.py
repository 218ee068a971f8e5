"""What a run is given, by content: where all of it is as it was, the same command has nothing to do. No torch."""

import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cola.errors import ColaError
from cola.files import digest, file_digest, package_file, sha256, store_path, without_home
from cola.link.checkpoint import TEXTS, content_digest, weight_names
from cola.recipe.recipe import Recipe
from cola.recipe.schema import SAMPLE, is_remote
from cola.tree.made import PACKAGES, version_of

CODE = Path(__file__).parent.parent  # cola's own
DRIVERS = ("/proc/driver/nvidia/gpus/*/information", "/sys/class/kfd/kfd/topology/nodes/*/gpu_id", "/dev/dxg")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # which of them torch may use


def inputs_of(recipe: Recipe) -> dict[str, str] | None:
    """SHA-256 of every file that a run of the recipe reads (base, rows, general text, code of the user's) and of cola's
    own code; versions of libraries, which cards there are, which store it uses. None where they cannot be told without
    the libraries that fetch them (a base or rows of the hub, code that comes with a base), or one is not there."""
    if recipe.data.hub is not None or recipe.model.trust_remote_code:
        return None
    try:
        files = [*_base(recipe.model.name_or_path), *_texts(recipe), *map(Path, recipe.own_code)]
        found = {without_home(str(file.absolute())): content_digest(file) for file in files}
        if recipe.data.reasoning_gym is not None:
            found["reasoning-gym"] = version("reasoning-gym")
    except (ColaError, OSError, PackageNotFoundError, LookupError):
        return None  # which is said where it is asked for
    here = {"cola": _own(), "libraries": _libraries(), "cards": _cards(), "store": str(store_path(recipe.store))}
    return {**found, **{name: without_home(said) for name, said in here.items()}}


def _base(name: str) -> list[Path]:
    """The files of a base; a LookupError where it is none of this disk's."""
    if name.startswith("package://"):
        return [package_file(name)]
    folder = Path(name).expanduser()
    if is_remote(name) or not folder.exists():
        raise LookupError(name)
    if folder.is_file():
        return [folder]
    texts = {file for pattern in TEXTS for file in folder.glob(pattern)}
    return sorted(texts | {folder / weights for weights in weight_names(folder)})


def _texts(recipe: Recipe) -> list[Path]:
    """The files of the rows, and of the general text where it is the user's."""
    files, text = recipe.data.files, recipe.evaluation.general_text
    own = [files.train, files.validation, files.test] if files is not None else []
    return [Path(file) for file in [*own, None if text == SAMPLE else text] if file is not None]


@cache
def _own() -> str:
    """What cola's code says, be it committed or not."""
    return sha256("".join(file_digest(file) for file in sorted(CODE.rglob("*.py"))))


def _libraries() -> str:
    """The versions of what computes, and of what makes tokens of a text."""
    return digest({"python": sys.version, **{name: version_of(name) for name in (*PACKAGES, "tokenizers", "gguf")}})


def _cards() -> str:
    """What the system tells of the cards that torch may find."""
    found = [file for pattern in DRIVERS for file in sorted(Path("/").glob(pattern[1:]))]
    said = [file.read_text() if file.is_file() else str(file) for file in found]
    return digest([said, {name: os.environ.get(name) for name in VISIBLE}])
