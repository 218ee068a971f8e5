"""Rows as they come: local files, the hub, and procedural generators, each in a reproducible shuffled order."""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cola.data.rows import Row, read_file
from cola.errors import DataError, one_line
from cola.recipe.data_section import Data, Files, Hub, ReasoningGym
from cola.recipe.plan import derived_seed
from cola.recipe.schema import MOST_GENERATED, SPLITS


@dataclass(frozen=True)
class Pool:
    """Rows that one or more splits are drawn from."""

    name: str  # as messages call it
    fingerprint: str  # changes when the rows may have changed
    size: int | None  # None: a generator without end
    row: Callable[[int], Row]  # by index from 0
    place: Callable[[int], str]  # `test.jsonl:18`: file and line, or number from 1 where there are no lines

    def order(self, seed: int) -> Iterator[int]:
        """Indices in the order in which they are drawn."""
        if self.size is None:
            # A generator's rows are independent already; the bound stops a search for rows that do not exist.
            return iter(range(MOST_GENERATED))
        indices = list(range(self.size))
        random.Random(derived_seed("rows", seed)).shuffle(indices)
        return iter(indices)


def shuffled(items: Sequence[int], *causes: object) -> Iterator[int]:
    """The items in a random order that depends on the causes and the items alone; no more is shuffled than is drawn."""
    rng, moved = random.Random(derived_seed(*causes)), {}
    for place in range(len(items)):
        other = rng.randrange(place, len(items))
        yield moved.get(other, items[other])
        moved[other] = moved.pop(place, items[place])


def open_pools(data: Data) -> dict[str, Pool]:
    """The pool of each split; splits that are drawn from the same rows share one object. Raises DataError if the source
    cannot be found or read."""
    if data.files is not None:
        return _file_pools(data.files)
    if data.hub is not None:
        return _hub_pools(data.hub)
    assert data.reasoning_gym is not None
    return _gym_pools(data.reasoning_gym)


def _file_pools(files: Files) -> dict[str, Pool]:
    paths = {split: Path(getattr(files, split) or files.train) for split in SPLITS}
    # A link to another split's file is that file, unless it is to be read as another kind.
    sources = {split: (os.path.realpath(path), *path.suffixes) for split, path in paths.items()}
    named = {sources[split]: path for split, path in reversed(paths.items())}
    names = [path.name for path in named.values()]
    opened = {
        source: _from_file(path, path.name if names.count(path.name) == 1 else str(path), "data.files")
        for source, path in named.items()
    }
    return {split: opened[source] for split, source in sources.items()}


def _from_file(path: Path, name: str, key: str, whole: bool = False) -> Pool:
    sha256, rows = read_file(path, key, whole)
    # Both are in the examples: what a row is called, and how the file was read, which its suffix says.
    return Pool(name, f"{name} {sha256}", len(rows), lambda n: rows[n][1], lambda n: f"{name}:{rows[n][0]}")


def open_texts(path: Path, key: str) -> Pool:
    """A file's texts, each in the field `text` of a row: a text file is one as a whole, any other has one a row. Raises
    DataError if what the recipe's `key` names is not there, or cannot be read."""
    return _from_file(path, path.name, key, whole=True)


def _hub_pools(hub: Hub) -> dict[str, Pool]:
    import datasets

    opened: dict[str, Pool] = {}
    sources = {split: getattr(hub, split) for split in SPLITS}
    for source in dict.fromkeys(sources.values()):
        try:
            table = datasets.load_dataset(hub.name, hub.config, split=source, revision=hub.revision)
        # Every layer below (datasets, hub, http client) has its own errors for "not there" and "no network".
        except Exception as error:
            raise DataError(
                f"data.hub: {hub.name} split {source!r} could not be loaded "
                f"({type(error).__name__}: {one_line(error, 200)}); "
                "without a network, fetch it elsewhere and name the files under data.files"
            ) from error
        name = f"{hub.name}[{source}]"
        fingerprint = f"{hub.name}/{hub.config}/{table._fingerprint}"
        opened[source] = Pool(name, fingerprint, len(table), table.__getitem__, _numbered(name))
    return {split: opened[source] for split, source in sources.items()}


def _gym_pools(gym: ReasoningGym) -> dict[str, Pool]:
    try:
        import reasoning_gym
    except ImportError:
        raise DataError("data.reasoning_gym needs the package: pip install reasoning-gym") from None
    pools = {}
    for number, split in enumerate(SPLITS):
        # Item i of seed s is item i - 1 of seed s + 1, so the splits' seeds lie ten million apart.
        seed = gym.seed * 100_000_000 + number * 10_000_000
        try:
            dataset = reasoning_gym.create_dataset(gym.name, size=MOST_GENERATED, seed=seed, **gym.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise DataError(f"data.reasoning_gym: {gym.name}: {error or 'an option is out of range'}") from None
        spec = json.dumps([gym.name, seed, gym.options, version("reasoning-gym")], sort_keys=True)
        name = f"reasoning_gym {gym.name} ({split})"
        pools[split] = Pool(name, spec, None, dataset.__getitem__, _numbered(name))
    return pools


def _numbered(name: str) -> Callable[[int], str]:
    return lambda index: f"{name}:{index + 1}"
