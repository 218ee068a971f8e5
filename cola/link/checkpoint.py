"""What a Hugging Face folder says of itself, and what its files hold. No torch."""

import json
from pathlib import Path, PurePosixPath
from time import time
from typing import Any

from cola.errors import ModelError
from cola.files import file_digest

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]  # beside the weights: config and tokenizer
SETTLED_SECONDS = 2.0  # the coarsest clock of a file system that is in use


def read_json(folder: Path, file: str) -> dict[str, Any]:
    """A file of the folder; empty where there is none. Raises ModelError where it is no JSON object."""
    if not (folder / file).is_file():
        return {}
    try:
        said = json.loads((folder / file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model.name_or_path: {folder / file} is no JSON: {error}") from None
    if not isinstance(said, dict):
        raise ModelError(f"model.name_or_path: {folder / file} is no JSON object, {{...}}")
    return said


def weight_names(folder: Path) -> list[str]:
    """Names of the safetensors files that transformers reads a folder's weights from, sorted: what config.json names,
    else `model.safetensors`, else what the index names; maybe none. Raises ModelError where the index does not say
    which files, or others than safetensors inside the folder."""
    first = str(read_json(folder, "config.json").get("transformers_weights") or "")
    if not first:
        first = SINGLE if (folder / SINGLE).is_file() else INDEX
    names = [first]
    if first.endswith(".index.json"):
        if not (folder / first).is_file():
            return []
        shards = read_json(folder, first).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(
                f"model.name_or_path: {folder / first} has no weight_map that names a file for each weight"
            )
        names = sorted(set(shards.values()))
    for name in names:
        path = PurePosixPath(name)
        if path.suffix != ".safetensors" or path.is_absolute() or ".." in path.parts:
            where = "config.json" if names == [first] else first
            raise ModelError(
                f"model.name_or_path: {folder / where} names {name!r:.80}; only safetensors files inside the "
                "folder are read"
            )
    return names


def content_digest(file: Path) -> str:
    """SHA-256 of a file's content, which is read once by each process that asks.

    No stat says what a file holds: images and archives give every file one time and one inode, a network file system
    may make them up, and a write through a memory map may move no time at all. So nothing is remembered between
    processes. Within one it tells whether a file has been replaced; one that has changed a moment ago may do so again
    within one tick of the clock, and is read again.
    """
    state = file.stat()
    seen = (file, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev)
    if seen in _digests:
        return _digests[seen]
    digest = file_digest(file)
    if time() - state.st_ctime >= SETTLED_SECONDS:
        _digests[seen] = digest
    return digest


_digests: dict[tuple[Path, int, int, int, int, int], str] = {}  # of files that lay still, in this process
