"""Local data files, row for row, with the line that each row stands on. No torch.

What is a row of which kind of file is said in `recipe.data_section.Files`. Only a newline ends a line, lines that are
blank are no rows, and there are no comments: a line that begins with # is one like any other.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cola.errors import DataError, one_line
from cola.files import sha256

Row = dict[str, Any]
Numbered = tuple[int, Row]  # the line on which a row begins, or its number where a file has no lines; from 1

BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "UTF-8-SIG",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
JSON_SPACE = re.compile(r"[ \t\r\n]*")


def read_file(path: Path, key: str, whole: bool = False) -> tuple[str, list[Numbered]]:
    """The SHA-256 of a data file, which the recipe's `key` names, and its rows; `whole`: a text file is one row. Raises
    DataError if it is not there, cannot be read, or is ambiguous."""
    unpack = UNPACKERS.get(path.suffix.lower())
    kind = Path(path.stem if unpack else path.name).suffix.lower()
    if kind not in READERS and not path.is_dir():
        packed = ", ".join(UNPACKERS)
        raise DataError(
            f"{key}: {path.name}: unknown kind {kind!r}; known are {', '.join(READERS)}, and these packed as {packed}"
        )
    try:
        raw = path.read_bytes()
        read = _read_whole if whole and kind == ".txt" else READERS[kind]
        numbered = list(read(_unpacked(raw, path.name, unpack) if unpack else raw, path.name))
    except FileNotFoundError:
        raise DataError(f"{key}: {path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{key}: {path} is a folder; name a file") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    if not numbered:
        raise DataError(f"{key}: {path.name} holds no rows")
    return sha256(raw), numbered


def _unzstd(raw: bytes) -> bytes:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read()


UNPACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unzstd,
}


def _unpacked(raw: bytes, name: str, unpack: Callable[[bytes], bytes]) -> bytes:
    try:
        return unpack(raw)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{name}: not a whole {Path(name).suffix} file: {one_line(error, 200)}") from None


def _text(raw: bytes, name: str) -> str:
    mark = next((mark for mark in BYTE_ORDER_MARKS if raw.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "UTF-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1  # of UTF-16, too, but for a few rare characters
        fault = f"not {encoding.removesuffix('-SIG')} text at byte {error.start}, 0x{raw[error.start]:02x}"
        raise DataError(f"{name}:{line}: {fault}; save it as UTF-8") from None
    if (at := text.find("\0")) >= 0:
        raise DataError(
            f"{name}:{text.count(chr(10), 0, at) + 1}: holds a NUL character, as UTF-16 without a byte order mark does "
            "and text does not; save it as UTF-8"
        )
    return text


def _lines(raw: bytes, name: str) -> list[str]:
    """A text's lines without their ends. Not splitlines: that ends one at a form feed too, and at six others."""
    text = _text(raw, name)
    if "\r" in text.rstrip("\r") and "\n" not in text:
        raise DataError(f"{name}: its lines end in a carriage return alone, as old Macs wrote them; end them in \\n")
    return text.replace("\r\n", "\n").split("\n")


def _read_lines(raw: bytes, name: str) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(raw, name), start=1):
        if line.strip():
            yield number, {"text": line}


def _read_whole(raw: bytes, name: str) -> Iterator[Numbered]:
    text = _text(raw, name).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


# ---------------------------------------------------------------------------------------------------------
# JSON
def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"an object has the key {twice!r} twice; which one counts?")
    return row


JSON = json.JSONDecoder(object_pairs_hook=_object)


def _json_at(text: str, at: int, place: Callable[[int], str]) -> tuple[Any, int]:
    """The JSON value that begins at a place of a text, and where it ends; `place`: what a line, from 1, is called."""
    try:
        return JSON.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _not_json(error, place) from None
    except DataError as error:
        why = str(error)
    except RecursionError:
        why = "JSON that is nested too deeply"
    except ValueError:  # of Python's own limit
        why = f"a whole number of more than {sys.get_int_max_str_digits()} digits"
    raise DataError(f"{place(text.count(chr(10), 0, at) + 1)}: {why}")


def _not_json(error: json.JSONDecodeError, place: Callable[[int], str]) -> DataError:
    return DataError(f"{place(error.lineno)}: not valid JSON: {error.msg} at character {error.colno}")


def _skip(text: str, at: int) -> int:
    space = JSON_SPACE.match(text, at)
    assert space is not None  # nothing is a match too
    return space.end()


def _check_end(text: str, at: int, place: Callable[[int], str]) -> None:
    if (rest := _skip(text, at)) < len(text):
        raise _not_json(json.JSONDecodeError("Extra data", text, rest), place)


def _read_jsonl(raw: bytes, name: str) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(raw, name), start=1):
        if (start := _skip(line, 0)) < len(line):
            place = f"{name}:{number}"
            value, end = _json_at(line, start, lambda _, place=place: place)
            _check_end(line, end, lambda _, place=place: place)
            yield number, _mapping(value, place)


def _read_json(raw: bytes, name: str) -> Iterator[Numbered]:
    """The items of a list; or, as many files called .json have them, objects one after the other, each on its line."""

    def place(line: int) -> str:
        return f"{name} line {line}"

    text = _text(raw, name)
    at = _skip(text, 0)
    if text[at : at + 1] == "[":
        for number, value in enumerate(_items(text, at + 1, place), start=1):
            yield number, _mapping(value, f"{name}:{number}")
        return
    rows: list[Numbered] = []
    line, counted = 1, 0
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        if rows and rows[-1][0] == line:
            raise DataError(f"{name}: two objects on line {line}; write a list of objects, or one object a line")
        value, at = _json_at(text, at, place)
        rows.append((line, _mapping(value, f"{name}:{line}")))
        at = _skip(text, at)
    if len(rows) == 1:
        _check_is_row(rows[0][1], name)
    yield from rows


def _items(text: str, at: int, place: Callable[[int], str]) -> Iterator[Any]:
    """The items of a list, from what stands behind its bracket on."""
    at = _skip(text, at)
    closed = text[at : at + 1] == "]"
    while not closed:
        value, at = _json_at(text, at, place)
        yield value
        at = _skip(text, at)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                raise _not_json(json.JSONDecodeError("Expecting ',' delimiter", text, at), place)
            at = _skip(text, at + 1)
    _check_end(text, at + 1, place)


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row is an object with named fields, not a {type(row).__name__}")
    return row


def _check_is_row(only: Row, name: str) -> None:
    """Refuse the one object of a file that holds rows, or columns, and is no row."""
    for key, value in only.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            raise DataError(
                f"{name}: one object, and its rows may be the list of {len(value)} objects in {key!r}; write the list "
                "alone, or one object a line"
            )
    if only and all(isinstance(value, list | dict) for value in only.values()):
        raise DataError(f"{name}: one object of columns; write a list of rows, or one row a line")


# ---------------------------------------------------------------------------------------------------------
# Tables
def _read_csv(raw: bytes, name: str) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
    text = _text(raw, name)
    end = "\n" if "\n" in text else "\r"
    header = next((line for line in text.split(end) if line.strip()), "")
    if ".tsv" in [suffix.lower() for suffix in Path(name).suffixes[-2:]]:
        delimiter = "\t"
    else:  # spreadsheets of half the world write .csv with semicolons
        delimiter = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    # "question, answer": the blanks belong to the commas, and a quote may stand behind them.
    behind = next(csv.reader([header.replace("\r", " ")], delimiter=delimiter), [])[1:]
    spaced = bool(behind) and all(cell.startswith(" ") for cell in behind)
    reader = csv.reader(io.StringIO(text, newline=end), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    names: list[str] | None = None
    begins = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            alone = "new-line character" in str(error)
            why = "a carriage return in a cell without quotes" if alone else error
            raise DataError(f"{name}:{begins}: not valid CSV: {why}") from None
        if cells is None:
            return
        place, begins = begins, reader.line_num + 1
        if not cells or (len(cells) == 1 and cells[0].isspace() and (names is None or len(names) > 1)):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            _check_names(names, f"{name}:{place}")
        elif len(cells) != len(names):
            raise DataError(f"{name}:{place}: not as many fields as the header has: {len(cells)}, not {len(names)}")
        elif len(names) > 1 and [cell.strip() for cell in cells] == names:
            raise DataError(f"{name}:{place}: the header again, as where two files are put together; take it out")
        else:
            # Spreadsheets and pandas write an index under no name, which no template could name.
            yield place, {column: cell for column, cell in zip(names, cells, strict=True) if column}


def _check_names(names: list[str], place: str) -> None:
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{place}: two columns are called {twice!r}; which one counts?")


def _read_parquet(raw: bytes, name: str) -> Iterator[Numbered]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(raw)).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {one_line(error, 200)}") from None
    _check_names(table.schema.names, name)
    for number, column in enumerate(table.schema):
        if column.type == pa.float32():
            # 0.1 of 32 bits is 0.1, and not the 0.10000000149011612 of 64 that is nearest to it.
            shortest = pc.cast(pc.cast(table.column(number), pa.string()), pa.float64())
            table = table.set_column(number, column.name, shortest)
    try:
        rows = table.to_pylist(maps_as_pydicts="strict")
    except (pa.ArrowException, KeyError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: its values cannot be read: {one_line(error, 200)}") from None
    yield from enumerate(rows, start=1)


READERS: dict[str, Callable[[bytes, str], Iterator[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
