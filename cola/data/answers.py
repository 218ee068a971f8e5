"""What of a decoded text is the answer, and which texts are the same answer. No torch."""

import string
from collections.abc import Iterable, Sequence

STOPS = ("\n", "\n\n")  # what ends an answer where the recipe does not say: the first that leaves every right one whole


def normalized(text: str, steps: Sequence[str]) -> str:
    """The text with what exact match ignores taken out."""
    if "lowercase" in steps:
        text = text.lower()
    if "punctuation" in steps:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if "whitespace" in steps:
        text = " ".join(text.split())
    return text


def up_to(text: str, stops: Iterable[str]) -> str:
    """The text before the first occurrence of any of the strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def is_cut_short(answer: str, stop: str, steps: Sequence[str]) -> bool:
    """Whether a right answer that stands alone, or before white space, would be another one once the string has cut it.

    `.` and a newline cut "12." in two where a line follows, though the answer itself does not contain them.
    """

    def begins_at(n: int) -> bool:
        rest = stop[len(answer) - n :]
        return answer.startswith(stop, n) or (stop.startswith(answer[n:]) and rest[:1].isspace())

    cuts = filter(begins_at, range(len(answer)))
    return any(normalized(answer[:n], steps) != normalized(answer, steps) for n in cuts)


def usual_stops(answers: Iterable[str], steps: Sequence[str]) -> list[str]:
    """What ends an answer where the recipe does not say, given the right answers of the data."""
    answers = list(answers)
    return next(([stop] for stop in STOPS if not any(is_cut_short(answer, stop, steps) for answer in answers)), [])
