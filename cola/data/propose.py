"""What the rows of a file may be trained as: a task and its keys, guessed from their fields. No torch.

A guess goes by what fields are called in the data sets that people share, and by what all rows have in common; the
rows are never asked to be one of some formats. What is guessed is said, for a person to look at.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cola.data.fields import fill
from cola.data.rows import Row
from cola.errors import DataError, listed
from cola.recipe.data_section import label_text

ANSWERS = re.compile(r"(answers?|completion|output|response|reply|target|solution|summary|highlights)(\.text)?", re.I)
LABELS = re.compile(
    r"(.*[ _-])?(labels?|classe?s?|category|sentiment|intent|gold|topic)|answer_?(key|idx|index)?", re.I
)
CHOICES = re.compile(r"(choices|options|endings|candidates)(\.text)?", re.I)
PASSAGES = re.compile(r"(.*[ _-])?(passage|premise|context|article|document|paragraph|story|background)", re.I)
QUESTIONS = re.compile(r"question(_stem)?|query|hypothesis", re.I)
# What is about a row, and not in it; and what leads to the right answer, which a model must not be shown.
ASIDE = re.compile(r"(.*[ _-])?(id|idx|index|uuid|guid|url|link|hash|split|source|date|timestamp)", re.I)
HINTS = re.compile(r"(.*[ _-])?(rationale|explanation|reasoning|steps|solution|support)", re.I)

WORD = re.compile(r"[^\W\d]{2,}")
# One word with a digit, or a date and time: T-1000, 2026-01-01, 1.1.2026 10:30.
CODE = re.compile(r"\S{0,40}[0-9]\S{0,40}|[0-9]{1,4}[-./][0-9]{1,2}[-./][0-9]{1,4}\s[0-9:.]{4,20}")

MOST_CLASSES = 100  # of a field that is called a label
LONGEST_CLASS = 40  # characters
MOST_ANSWERS = 10  # of one that is called an answer, before its values are classes
FEWEST_ROWS = 10  # that differ: some for each of train, validation and test
FIRST_LOOK = {"test": 200, "validation": 60, "train": 240}  # as many as the quickstart has
SHARES = {"test": 0.2, "validation": 0.1, "train": 0.6}  # the rest stands in for rows that are too long


@dataclass(frozen=True)
class Proposal:
    """Keys of the section `data`, and what each was guessed from."""

    keys: dict[str, Any]
    because: dict[str, str] = field(default_factory=dict)  # by key
    rows: dict[str, int] = field(default_factory=dict)  # by split, for a first look
    left_out: list[str] = field(default_factory=list)  # fields that nothing is made of


def propose(rows: Sequence[Row], name: str) -> Proposal:
    """A task for the rows of a file, which messages call by its name. Raises DataError where the fields say too little,
    with the keys to fill, and where there are too few rows for three splits."""
    fields = _fields(rows)
    found = _chat(fields) or _own_choices(fields) or _classes_or_answer(fields)
    found = found or _last_class(fields) or _two_texts(fields) or _text(fields)
    if found is None:
        there = listed(dict.fromkeys(key for row in rows for key in row))
        raise DataError(
            f"--data: {name}: its fields ({there}) do not say what is asked and what is answered; write a recipe by "
            "`cola new`, and in it data.files, data.task, and data.prompt and data.answer (task answer), data.prompt, "
            "data.choices and data.label (task multiple_choice) or data.text (task text)"
        )
    keys, because = found
    template = str(keys.get("prompt") or keys["text"])
    kept = _groups(fields, [path for path in fields if f"{{{path}}}" in template])
    if kept and keys["task"] != "text":
        keys["group"] = kept
        because["group"] = "its texts occur in several rows, which stay in one split"
    n_rows = len(set(fields[kept] if kept else (fill(template, row, name, "--data") for row in rows)))
    if n_rows < FEWEST_ROWS:
        what = f"different texts in {kept!r}, whose rows stay in one split" if kept else "rows with different prompts"
        raise DataError(
            f"--data: {name}: {n_rows} {what}, and train, validation and test share none: at least {FEWEST_ROWS} are "
            "needed"
        )
    counts = {split: min(FIRST_LOOK[split], int(share * n_rows)) for split, share in SHARES.items()}
    named = re.compile(r"\{(.+?)\}").findall(f"{template}{keys.get('answer', '')}")
    used = [*named, *(str(keys.get(key)) for key in ("choices", "choice_labels", "label"))]
    left = [path for path in fields if not any(f"{name}.".startswith(f"{path}.") for name in used)]
    return Proposal(keys, because, {split: counts[split] for split in ("train", "validation", "test")}, left)


Fields = dict[str, list[Any]]  # by path, `meta.title`: the value of each row
Guess = tuple[dict[str, Any], dict[str, str]] | None


def _fields(rows: Sequence[Row]) -> Fields:
    """The fields that every row has a value in and that a template can name."""
    flat = [dict(_flat(row)) for row in rows]
    paths = [path for path in flat[0] if all(_is_known(row.get(path)) for row in flat)]
    return {path: [row[path] for row in flat] for path in paths if not re.search(r"[{}:!]", path)}


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _flat(row: Row, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _texts(fields: Fields) -> list[str]:
    """Those that are texts a model may be asked with: no names of rows, no dates, and no classes."""
    texts = [path for path, values in fields.items() if all(isinstance(v, str) for v in values) and any(values)]
    known = [path for path in texts if QUESTIONS.fullmatch(path) or PASSAGES.fullmatch(path)]
    others = [path for path in texts if not (_is_aside(fields, path) or _is_class(_filled(fields[path]), MOST_ANSWERS))]
    read = [path for path in others if not all(map(CODE.fullmatch, _filled(fields[path])))]
    return [path for path in texts if path in known or path in (read or others)]


def _is_aside(fields: Fields, path: str) -> bool:
    """By its name, unless it holds sentences: the `source` of a translation is no name of a place."""
    return bool(ASIDE.fullmatch(path)) and any(len(WORD.findall(str(value))) < 4 for value in fields[path])


def _filled(values: Sequence[str]) -> list[str]:
    return [value for value in values if value]


def _is_class(values: Sequence[Any], most: int) -> bool:
    """Whether rows share a few short values."""
    names = {label_text(value) if _is_short(value) else "" for value in values}
    return 2 <= len(names) <= min(most, len(values) // 2) and all(names)


def _is_short(value: Any) -> bool:
    if isinstance(value, list | dict) or (isinstance(value, float) and not value.is_integer()):
        return False
    return len(label_text(value)) <= LONGEST_CLASS


def _is_list(values: Sequence[Any], least: int) -> bool:
    return all(
        isinstance(value, list) and len(value) >= least and all(isinstance(item, str) for item in value)
        for value in values
    )


# ---------------------------------------------------------------------------------------------------------
# Guesses, the surest first
def _chat(fields: Fields) -> Guess:
    """A conversation: its first turn and what was answered to it."""
    for path, values in fields.items():
        for role, content in (("role", "content"), ("from", "value")):
            if not all(
                isinstance(turns, list)
                and len(turns) >= 2
                and all(isinstance(turn, dict) and isinstance(turn.get(content), str) for turn in turns)
                for turns in values
            ):
                continue
            n_asked = {
                next((n for n, turn in enumerate(turns) if turn.get(role) in ("assistant", "gpt")), 0)
                for turns in values
            }
            if n_asked in ({1}, {2}):
                (n,) = n_asked
                prompt = "\n".join(f"{{{path}.{turn}.{content}}}" for turn in range(n))
                keys = {"task": "answer", "prompt": prompt, "answer": f"{{{path}.{n}.{content}}}"}
                return keys, {"answer": "the first answer of each conversation; later turns are not read"}
    return None


def _own_choices(fields: Fields) -> Guess:
    """A list of choices in each row, and the field that says which is right."""
    lists = [path for path, values in fields.items() if CHOICES.fullmatch(path) and _is_list(values, 2)]
    for path in lists:
        beside = [other for other in fields if other != path and _is_list(fields[other], 2)]
        for label in [other for other in fields if LABELS.fullmatch(other) or ANSWERS.fullmatch(other)]:
            means = _meaning(fields, path, label, beside)
            prompt = _prompt(fields, [path, label, *beside], "Answer")
            if means and prompt:
                keys = {"task": "multiple_choice", "prompt": prompt, "choices": path, "label": label} | means
                said = "each row's own list of choices"
                return keys, {"choices": said, "label": f"fits the choices of every row, as their {_reading(means)}"}
    return None


def _reading(means: dict[str, Any]) -> str:
    return str(means.get("label_is", "name"))


def _meaning(fields: Fields, choices: str, label: str, beside: Sequence[str]) -> dict[str, Any] | None:
    """What a label is: a name or letter, the place or the text of a choice; None where it is none of them."""
    if any(isinstance(value, list | dict) for value in fields[label]):
        return None
    labels = [label_text(value) for value in fields[label]]
    lists = fields[choices]
    for names in beside:
        pairs = zip(labels, fields[names], lists, strict=True)
        if all(said in own and len(own) == len(texts) for said, own, texts in pairs):
            return {"choice_labels": names}
    if all(said in texts for said, texts in zip(labels, lists, strict=True)):
        return {"label_is": "text"}
    if all(said.isdecimal() and int(said) < len(texts) for said, texts in zip(labels, lists, strict=True)):
        return {"label_is": "index"}
    letters = "ABCDEFGHIJ"[: max(map(len, lists))]
    if all(len(said) == 1 and said in letters[: len(texts)] for said, texts in zip(labels, lists, strict=True)):
        return {"choice_labels": list(letters)}
    return None


def _classes_or_answer(fields: Fields) -> Guess:
    """A field that is called an answer or a label: one of few classes, or a text of its own."""
    named = {path: rank for path in fields if (rank := _rank(fields, path)) is not None}
    for path in sorted(named, key=named.__getitem__):  # of equals the first in the file
        # An answer may be what a label is about; where it is what is trained, no label is shown.
        kept = [other for other in named if named[other] != OPEN or named[path] == OPEN]
        prompt = _prompt(fields, kept, _cue(path))
        if not prompt:
            continue
        if named[path] == OPEN:
            first = ".0" if isinstance(fields[path][0], list) else ""
            why = "the first of each row's right answers" if first else "by its name"
            return {"task": "answer", "prompt": prompt, "answer": f"{{{path}{first}}}"}, {"answer": why}
        return _classes(fields, path, prompt, "by its name")
    return None


def _classes(fields: Fields, path: str, prompt: str, how: str) -> Guess:
    """A multiple choice of the values of a field."""
    names = sorted({label_text(value) for value in fields[path]}, key=lambda text: (len(text), text))
    keys = {"task": "multiple_choice", "prompt": prompt, "choices": {n: n for n in names}, "label": path}
    why = "what stands in the file, and what the model is asked to tell apart: write words that say it better"
    return keys, {"choices": why, "label": f"{how}; {len(names)} values in all rows"}


def _last_class(fields: Fields) -> Guess:
    """No name that is known, and few values in the last field, where people write what they have decided."""
    path = next((path for path in reversed(fields) if not _is_aside(fields, path)), None)
    if path is None or not _is_class(fields[path], MOST_ANSWERS) or not (prompt := _prompt(fields, [path], _cue(path))):
        return None
    return _classes(fields, path, prompt, "the last field, with few values: is it what is asked?")


WORDS, NUMBERS, OPEN, ABOUT = range(4)


def _rank(fields: Fields, path: str) -> int | None:
    """How surely a field is what is answered, the lower the surer: a class in words, one in numbers, a text of its own,
    and a class that may be about the row, such as its topic; None: it is none."""
    values, answers = fields[path], ANSWERS.fullmatch(path)
    if _is_list(values, 1) and answers:
        return OPEN
    if not answers and not LABELS.fullmatch(path):
        return None
    if _is_class(values, MOST_ANSWERS if answers else MOST_CLASSES):
        if not answers and not re.fullmatch(r"(gold_?)?labels?|answer_?(key|idx|index)?", path, re.I):
            return ABOUT
        return WORDS if all(isinstance(value, str) and not value.isdecimal() for value in values) else NUMBERS
    return OPEN if answers and not any(isinstance(value, list | dict) for value in values) else None


def _two_texts(fields: Fields) -> Guess:
    """Two fields of text and no name that is known: the first asks and the second answers."""
    texts = _texts(fields)
    if len(texts) != 2:
        return None
    keys = {"task": "answer", "prompt": _template([texts[0]], _words(texts[1])), "answer": f"{{{texts[1]}}}"}
    return keys, {"prompt": "the first of two fields of text", "answer": "the second of two; are they the right way?"}


def _text(fields: Fields) -> Guess:
    """One text and nothing else."""
    texts = _texts(fields)
    return ({"task": "text", "text": f"{{{texts[0]}}}"}, {"text": "the only text"}) if len(texts) == 1 else None


# ---------------------------------------------------------------------------------------------------------
# Prompts
def _prompt(fields: Fields, answers: Sequence[str], cue: str) -> str:
    """A template over the texts that are neither answer nor hint; empty where there are none."""
    asked = [path for path in _texts(fields) if path not in answers and not HINTS.fullmatch(path)]
    last = (ANSWERS, QUESTIONS)
    asked.sort(key=lambda path: (not PASSAGES.fullmatch(path), [bool(kind.fullmatch(path)) for kind in last]))
    return _template(asked, cue) if asked else ""


def _template(asked: Sequence[str], cue: str) -> str:
    if list(asked) == ["prompt"]:  # which is written to be gone on from
        return "{prompt}"
    return "".join(f"{_words(path)}: {{{path}}}\n" for path in asked) + f"{cue}:"


def _cue(path: str) -> str:
    return "Answer" if path.lower().startswith(("answer", "gold")) else _words(path)


def _words(path: str) -> str:
    """A field's name as words: `gold_label` as `Gold label`."""
    last = path.removesuffix(".text").rpartition(".")[2]
    return re.sub(r"[_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", last)).strip().capitalize() or "Text"


def _groups(fields: Fields, asked: Sequence[str]) -> str | None:
    """A passage that several rows share."""
    for path in asked:
        values = fields[path]
        if PASSAGES.fullmatch(path) and len(asked) > 1 and len(set(values)) < len(values):
            return path
    return None
