"""What the labels of a multiple choice mean. No torch."""

import re
from dataclasses import dataclass

from cola.data.fields import lookup, text_of, texts_of
from cola.data.rows import Row
from cola.errors import DataError
from cola.recipe.data_section import Data


@dataclass(frozen=True)
class Label:
    """A row's label."""

    place: str  # the row's
    text: str  # as the row has it
    choices: list[str]  # the row's answers
    golds: dict[str, int]  # the choice that it means, in each reading that fits the row


def label_of(row: Row, place: str, data: Data) -> Label:
    """The choices of a row, and which of them its label may mean. Raises DataError where it is none of them."""
    assert data.label is not None
    text = text_of(row, data.label, place, "data.label")
    choices, names = _choices(row, place, data)
    readings = [data.label_is] if data.label_is else ["index", "text"] if names is None else ["name"]
    meant = {
        "index": int(float(text)) if re.fullmatch(r"[0-9]+(\.0+)?", text) and int(float(text)) < len(choices) else None,
        "text": _place_in(choices, text),
        "name": _place_in(names or [], text),
    }
    golds = {reading: gold for reading in readings if (gold := meant[reading]) is not None}
    if not golds:
        shown = names if readings == ["name"] and names else choices
        raise DataError(
            f"{place}: data.label: {text!r} is none of the choices: {', '.join(shown)}{_hint(text, readings)}"
        )
    return Label(place, text, choices, golds)


def _choices(row: Row, place: str, data: Data) -> tuple[list[str], list[str] | None]:
    """The choices of a row, and their names where they have any."""
    if isinstance(data.choices, dict):
        return list(data.choices.values()), list(data.choices)
    if isinstance(data.choices, list):
        return data.choices, None
    assert data.choices is not None
    own = lookup(row, data.choices, place, "data.choices")
    if not isinstance(own, list | tuple) or len(own) < 2:
        raise DataError(f"{place}: data.choices: field {data.choices!r} is no list of two or more answers")
    choices = texts_of(own, data.choices, place, "data.choices")
    return choices, _names(row, place, data.choice_labels, len(choices))


def _names(row: Row, place: str, given: str | list[str] | None, n_choices: int) -> list[str] | None:
    """Names of a row's own choices, where the recipe says that they have any."""
    if given is None:
        return None
    if isinstance(given, list):
        names = given[:n_choices]  # one row may have fewer choices than another
    elif isinstance(value := lookup(row, given, place, "data.choice_labels"), list | tuple):
        names = texts_of(value, given, place, "data.choice_labels")
    else:
        raise DataError(f"{place}: data.choice_labels: field {given!r} is no list of names")
    if len(names) != n_choices:
        raise DataError(f"{place}: data.choice_labels: {len(names)} names for {n_choices} choices")
    if len(set(names)) < n_choices:
        raise DataError(f"{place}: data.choice_labels: two choices have one name: {', '.join(names)}")
    return names


def _hint(label: str, readings: list[str]) -> str:
    """What may be meant by a label that fits no choice."""
    if "index" in readings and re.fullmatch(r"[0-9]+(\.0+)?", label):
        return "; an index counts from 0"
    if "index" in readings and re.fullmatch(r"[A-Za-z]", label):
        return "; letters that name the choices are said by data.choice_labels, as in [A, B, C, D]"
    if "index" in readings and label in ("true", "false"):
        return "; what true and false mean is said by a mapping, as in choices: {true: 'Yes', false: 'No'}"
    return f" (data.label_is: {readings[0]})" if len(readings) == 1 else ""


def _place_in(names: list[str], label: str) -> int | None:
    """Where a label stands among names, as it is written, or but for case and a number's form if one alone does."""
    if label in names:
        return names.index(label)
    folded = [_folded(name) for name in names]
    return folded.index(_folded(label)) if folded.count(_folded(label)) == 1 else None


def _folded(label: str) -> str:
    """CSV writes True and 1.0 where JSON writes true and 1."""
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", label.strip().casefold())


def golds_of(labels: dict[str, Label]) -> dict[str, int]:
    """The right choice of each example, all labels read in one way. Raises DataError if no reading fits all rows, or
    two of them mean different choices."""
    fitting = dict.fromkeys(reading for label in labels.values() for reading in label.golds)
    for label in labels.values():
        if not any(reading in label.golds for reading in fitting):
            last = next(other for other in labels.values() if not other.golds.keys() & label.golds.keys())
            raise DataError(
                f"{label.place}: data.label: {label.text!r} is the {' or '.join(label.golds)} of a choice, and "
                f"{last.text!r} of {last.place} the {' or '.join(last.golds)} of one; all labels must be of one kind"
            )
        fitting = dict.fromkeys(reading for reading in fitting if reading in label.golds)
    for label in labels.values():
        meant = {reading: label.choices[label.golds[reading]] for reading in fitting}
        if len(set(meant.values())) > 1:
            readings = " and ".join(f"the {reading} of {text!r}" for reading, text in meant.items())
            keys = " or ".join(f"data.label_is: {reading}" for reading in meant)
            raise DataError(f"{label.place}: data.label: {label.text!r} is {readings}; write {keys}")
    reading = next(iter(fitting))
    return {name: label.golds[reading] for name, label in labels.items()}
