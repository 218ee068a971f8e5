"""How numbers are written: one form for each kind, as cells that keep the number beside its text."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cola.report.table import NONE, Cell

if TYPE_CHECKING:  # what prints a duration waits for no scipy
    from cola.compare.records import ArmSummary, Difference, Interval, Matched, Search, Spread, TaskContrast
    from cola.compare.statistics import Estimate

COUNTS = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def shown(digits: str, rest: str = "", unit: float = 1) -> Cell:
    """The cell of a number that is written: its digits, what stands behind them, and in which unit it is."""
    value = float(digits) * unit
    return Cell(digits + rest, value, not rest) if math.isfinite(value) else Cell(digits + rest)


def number(value: float | None, form: str) -> Cell:
    """In a format of Python's: `.3f`, `+.3f`, `.1%`, `d`."""
    if value is None:
        return Cell(NONE)
    text = f"{value:{form}}"
    return shown(text[:-1], "%", 0.01) if form.endswith("%") else shown(text)


def rounded(value: float | None) -> Cell:
    """A whole number, with one digit where a median or mean has made it fractional."""
    return number(value, ".0f" if value is None or value == int(value) else ".1f")


def small(value: float | None, signed: bool = False) -> Cell:
    """In one digit: 4e-08."""
    return Cell("0", 0.0, alone=True) if value == 0 else number(value, "+.0e" if signed else ".0e")


def given(text: str) -> Cell:
    """A value as the user wrote it."""
    try:
        return shown(text)
    except ValueError:
        return Cell(text)


def duration(seconds: float) -> Cell:
    """38 s, 4 min 10 s, 2 h 5 min."""
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 60:
        return Cell(f"{whole} s", float(whole))
    if whole < 3600:
        return Cell(f"{whole // 60} min {whole % 60} s", float(whole))
    return Cell(f"{minutes // 60} h {minutes % 60} min", 60.0 * minutes)


def duration_if_known(seconds: float | None) -> Cell:
    """A duration, or ? where nobody knows it."""
    return Cell("?") if seconds is None else duration(seconds)


def p_value(value: float | None) -> Cell:
    """In two digits, or as many as it takes not to round across the level of a claim."""
    if value is None or value < 1e-4:
        return Cell(NONE if value is None else "< 0.0001")
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return shown(next(text for text in texts if (float(text) < 0.05) == (value < 0.05)))


def spread(values: "Spread | None", signed: bool = False) -> Cell:
    """Mean ± standard deviation over seeds."""
    if values is None:
        return Cell(NONE)
    return shown(f"{values.mean:{'+' if signed else ''}.3f}", "" if values.sd is None else f" ± {values.sd:.3f}")


def interval(estimate: "Interval | Difference | TaskContrast | Estimate | str | None") -> Cell:
    """Estimate [low, high], with their signs, or why there is none."""
    if estimate is None or isinstance(estimate, str):
        return Cell(estimate or NONE)
    ends = "" if estimate.low is None else f" [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return shown(f"{estimate.value:+.3f}", ends)


def gap(estimate: "Interval | None", values: "Spread | None") -> Cell:
    """A gap with its interval; where it has none, with its spread over seeds."""
    return interval(estimate) if estimate and estimate.low is not None else spread(values, signed=True)


def size(n_bytes: float | None) -> Cell:
    """Bytes in three digits: 412 MB, 2.31 GB."""
    return Cell(NONE) if n_bytes is None else _three_digits(n_bytes, BYTES, " B")


def count(value: float) -> Cell:
    """In three digits: 2.44 M."""
    return _three_digits(value, COUNTS) if math.isfinite(value) else Cell(NONE)


def _three_digits(value: float, units: Mapping[str, float], below: str = "") -> Cell:
    """In the largest unit that the number, once it is rounded, has one of; what stands behind one below all of them."""
    unit = next((unit for unit, least in units.items() if float(f"{value:.3g}") >= least), None)
    if unit is None:
        return shown(f"{value:.0f}", below)
    return shown(f"{value / units[unit]:#.3g}".rstrip("."), f" {unit}", units[unit])


def value_range(values: Iterable[float | None]) -> Cell:
    """One number where all seeds agree, else the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell(NONE)
    low, high = f"{min(known):.6g}", f"{max(known):.6g}"
    return shown(low, "" if low == high else f"–{high}")


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def choice_share(search: "Search") -> float | None:
    """In which share of resampled trials the choice is the same; mean over the seeds that choose for themselves."""
    return mean_known(choice.trials[choice.chosen].share for choice in search.choices)


def states_text(arm: "ArmSummary") -> str:
    """How an arm's seeds ended: ok, or how many did not."""
    counts = Counter(sorted(arm.states.values(), key=lambda state: (state != "ok", state)))
    return ", ".join(f"{n} {state}" for state, n in counts.items()) if len(counts) > 1 else next(iter(counts))


def matched_text(matched: "Matched") -> str:
    """What all trained arms were given the same of."""
    budget = {"steps": "optimizer steps", "tokens": "positions", "flops": "training FLOPs"}[matched.by]
    if matched.per_link or not matched.used:
        return f"matched: {budget}{' of each link' if matched.per_link else ''}"
    low, high = (f"{n:.0f}" if matched.by == "steps" else str(count(n)) for n in matched.used)
    return f"matched: {budget} ({low if low == high else f'{low} to {high}'})"


def sample_text(train_sample: int | None) -> str:
    """On what the training numbers stand, after what else a title says; nothing where it is all training rows."""
    return "" if train_sample is None else f"; train and gap: a sample of {train_sample} rows"


def value_text(value: Any) -> str:
    """A searched value."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def values_text(values: dict[str, Any]) -> str:
    """Searched keys and their values: `learning_rate=0.001, rank=8`."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in values.items())
