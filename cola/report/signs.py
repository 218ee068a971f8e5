"""Signs that a terminal without UTF-8 has not, in ASCII. Nothing else is imported: it comes before all else."""

import codecs
import sys
from io import TextIOWrapper

NAME = "cola"  # of the codec's error handler
ASCII = {"→": "->", "−": "-", "–": "-", "—": "-", "±": "+-", "×": "x", "·": ".", "…": "...", "≤": "<=", "≥": ">="}
ASCII |= {"‖": "||", "Δ": "d", "Σ": "sum", "σ": "sigma", "α": "alpha", "ₖ": "_k", "₂": "_2", "²": "^2", "∞": "inf"}
ASCII |= {"▾": "v", "▴": "^", "◂": "<", "▸": ">", "│": "|", "‥": "..", "⏎": "\\n", "⇥": "\\t", "�": "?"}
ASCII |= {"“": '"', "”": '"', "‘": "'", "’": "'", "«": '"', "»": '"', "•": "*", "\u00a0": " ", "\u202f": " "}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What takes the place of what an encoding has not: a sign like it, else a question mark."""
    assert isinstance(error, UnicodeEncodeError)  # it is asked for where text is written
    return "".join(ASCII.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error(NAME, _in_ascii)


def showable(text: str, encoding: str) -> str:
    """A text as a terminal of that encoding shows it."""
    return text.encode(encoding, NAME).decode(encoding)


def settle_streams() -> None:
    """Let nothing that is printed fail for want of a sign."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=NAME)
