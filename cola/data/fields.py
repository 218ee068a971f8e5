"""Values out of the fields of a row, and templates filled with them."""

import math
import string
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from cola.data.rows import Row
from cola.errors import DataError, did_you_mean
from cola.recipe.data_section import label_text


def lookup(row: Row, field: str, place: str, key: str) -> Any:
    """A field of a row; dots go into nested mappings and lists (`answers.text.0`). Raises DataError, with the row, the
    recipe's key and the fields that there are."""
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, dict) or part not in value:
            there = f"it has {', '.join(row)}{did_you_mean(field, row)}"
            raise DataError(f"{key}: {place} has no field {field!r}; {there}")
        value = value[part]
    return _known(value, f"{key}: {place}: field {field!r}")


def _known(value: Any, label: str) -> Any:
    # What no value was known of is null, or NaN in a column of numbers and in the JSON that is made of one.
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        raise DataError(f"{label} is empty")
    return value


def text_of(row: Row, field: str, place: str, key: str) -> str:
    return _as_text(lookup(row, field, place, key), field, f"{key}: {place}: field {field!r}")


def texts_of(values: Sequence[Any], field: str, place: str, key: str) -> list[str]:
    """The items of a field that is a list."""
    whole = {f"{field}.{number}": value for number, value in enumerate(values)}
    labels = {name: f"{key}: {place}: field {name!r}" for name in whole}
    return [_as_text(_known(value, labels[name]), name, labels[name]) for name, value in whole.items()]


def _as_text(value: Any, field: str, label: str) -> str:
    """A value as the text that it is trained on; `label`: the field, as messages call it. Raises DataError if it has
    none."""
    if isinstance(value, dict | list | tuple):
        kind, inside = ("mapping", list(value)) if isinstance(value, dict) else ("list", range(len(value)))
        entries = ", ".join(f"{{{field}.{part}}}" for part in inside) or "it has none"
        raise DataError(f"{label} is a {kind}; name one of its entries: {entries}")
    if isinstance(value, float | Decimal) and math.isinf(value):
        raise DataError(f"{label} is infinite, or a number too large to be read")
    try:
        # 0.0000001 as a file of decimals has it, and not Python's 1E-7.
        decimal = f"{value:f}" if isinstance(value, Decimal) else None
        text = value.decode() if isinstance(value, bytes) else decimal or label_text(value)
        text.encode()
    except UnicodeDecodeError:
        raise DataError(f"{label} holds bytes that are no UTF-8 text") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{label} holds half of a character, {half} alone") from None
    return text


def fill(template: str, row: Row, place: str, key: str) -> str:
    """The template with `{field}` and `{nested.field}` filled in; `{{` and `}}` are braces.

    Only fields are looked up: no index or attribute of Python's own str.format. What a template cannot be is refused
    as the recipe is read.
    """
    pieces = string.Formatter().parse(template)
    return "".join(text + ("" if field is None else text_of(row, field, place, key)) for text, field, _, _ in pieces)
