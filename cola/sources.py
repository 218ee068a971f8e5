"""Rows as they come: local files, the hub, and procedural generators, each in a reproducible shuffled order."""

import csv
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cola.errors import DataError
from cola.plan import derived_seed
from cola.recipe import SPLITS, Data, Files, Hub, ReasoningGym

Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Rows that one or more splits are drawn from.

    Attributes:
        name: What error messages call it.
        fingerprint: Changes when the rows may have changed.
        size: Rows there are; None for a generator without end.
        row: Row by index from 0.
    """

    name: str
    fingerprint: str
    size: int | None
    row: Callable[[int], Row]

    def order(self, seed: int) -> Iterator[int]:
        """Indices in the order in which they are drawn."""
        if self.size is None:
            # A generator's rows are independent already; the bound stops a search for rows that do not exist.
            return iter(range(1_000_000))
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
    """The pool of each split; splits that are drawn from the same rows share one object.

    Raises:
        DataError: the source cannot be found or read.
    """
    if data.files is not None:
        return _file_pools(data.files)
    if data.hub is not None:
        return _hub_pools(data.hub)
    assert data.reasoning_gym is not None
    return _gym_pools(data.reasoning_gym)


def _from_list(name: str, fingerprint: str, rows: Sequence[Row]) -> Pool:
    return Pool(name, fingerprint, len(rows), rows.__getitem__)


def _file_pools(files: Files) -> dict[str, Pool]:
    paths = {split: Path(getattr(files, split) or files.train) for split in SPLITS}
    opened = {path: _from_file(path, "data.files") for path in set(paths.values())}
    return {split: opened[path] for split, path in paths.items()}


def _from_file(path: Path, key: str) -> Pool:
    return _from_list(path.name, _digest(path, key), _read(path, key, _read_lines))


def _digest(path: Path, key: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{key}: {path} does not exist") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}") from None


def open_texts(path: Path, key: str) -> Pool:
    """A file's texts, each in the field `text` of a row: a text file is one as a whole, any other has one a row.

    Args:
        path: The file.
        key: The recipe's key that names it.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    return _from_list(path.name, _digest(path, key), _read(path, key, _read_whole))


def _read(path: Path, key: str, read_text: Callable[[Path], list[Row]]) -> list[Row]:
    readers = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": read_text,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{key}: {path.name}: unknown kind {path.suffix!r}; known are {', '.join(readers)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path.name}: not UTF-8 text at byte {error.start}") from None
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    if not rows:
        raise DataError(f"{key}: {path.name} holds no rows")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path.name}:{number}: not valid JSON: {error.msg}") from None
                rows.append(_mapping(row, f"{path.name}:{number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: a JSON file holds a list of objects; for one a line use .jsonl")
    return [_mapping(row, f"{path.name} item {number}") for number, row in enumerate(rows)]


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row is an object with named fields, not a {type(row).__name__}")
    return row


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        # Spreadsheets of half the world write .csv with semicolons.
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path.name}:{reader.line_num}: not as many fields as the header has")
                rows.append(row)
        except csv.Error as error:
            raise DataError(f"{path.name}:{reader.line_num}: not valid CSV: {error}") from None
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name}: not a readable Parquet file: {error}") from None


def _read_lines(path: Path) -> list[Row]:
    # Not splitlines, which also ends a line at a form feed and five other characters of a text.
    lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    return [{"text": line} for line in lines if line.strip()]


def _read_whole(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    return [{"text": text}] if text.strip() else []


def _hub_pools(hub: Hub) -> dict[str, Pool]:
    import datasets

    opened: dict[str, Pool] = {}
    pools = {}
    for split in SPLITS:
        source = getattr(hub, split)
        if source not in opened:
            try:
                table = datasets.load_dataset(hub.name, hub.config, split=source, revision=hub.revision)
            # Every layer below (datasets, hub, http client) has its own errors for "not there" and "no network".
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise DataError(
                    f"data.hub: {hub.name} split {source!r} could not be loaded ({type(error).__name__}: {reason}); "
                    "without a network, fetch it elsewhere and name the files under data.files"
                ) from error
            name = f"{hub.name}[{source}]"
            opened[source] = Pool(name, f"{hub.name}/{hub.config}/{table._fingerprint}", len(table), table.__getitem__)
        pools[split] = opened[source]
    return pools


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
            dataset = reasoning_gym.create_dataset(gym.name, size=1_000_000, seed=seed, **gym.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise DataError(f"data.reasoning_gym: {gym.name}: {error or 'an option is out of range'}") from None
        spec = json.dumps([gym.name, seed, gym.options, version("reasoning-gym")], sort_keys=True)
        pools[split] = Pool(f"reasoning_gym {gym.name} ({split})", spec, None, dataset.__getitem__)
    return pools
