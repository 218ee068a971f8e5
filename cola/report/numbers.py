"""How numbers are written: one form for each kind."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from cola.compare.choice import SURE
from cola.report.table import SIZES


def duration(seconds: float) -> str:
    """38 s, 4 min 10 s, 2 h 5 min."""
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


NONE = "–"


def states_text(arm: dict[str, Any]) -> str:
    """How an arm's seeds ended: ok, or how many did not."""
    states = list(arm["states"].values())
    counts = {state: states.count(state) for state in sorted(set(states), key=lambda s: (s != "ok", s))}
    if len(counts) == 1:
        return states[0]
    return ", ".join(f"{n} {state}" for state, n in counts.items())


def matched_text(matched: dict[str, Any]) -> str:
    """What all trained arms were given the same of."""
    what = {"steps": "optimizer steps", "tokens": "positions", "flops": "training FLOPs"}[matched["by"]]
    if matched["per_link"]:
        return f"matched: {what} of each link"
    if not matched.get("used"):
        return f"matched: {what}"
    low, high = (f"{n:.0f}" if matched["by"] == "steps" else count_text(n) for n in matched["used"])
    return f"matched: {what} ({low if low == high else f'{low} to {high}'})"


def number_text(number: float | None, digits: int = 0) -> str:
    """Rounded; a whole number that a median or mean has made fractional keeps one digit."""
    if number is None:
        return NONE
    if digits == 0 and number != int(number):
        digits = 1
    return f"{number:.{digits}f}"


def small_text(number: float | None, signed: bool = False) -> str:
    if number is None:
        return NONE
    return "0" if number == 0 else f"{number:+.0e}" if signed else f"{number:.0e}"


def mean_text(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def choice_share(search: dict[str, Any]) -> float | None:
    """In which share of resampled trials the choice is the same; mean over the seeds that choose for themselves."""
    return mean_text(choice["trials"][choice["chosen"]]["share"] for choice in search["choices"])


def over_choices(values: list[float | None]) -> str:
    mean = mean_text(values)
    return NONE if mean is None else f"{mean:.3f}"


def values_text(values: dict[str, Any]) -> str:
    """Searched keys and their values: `learning_rate=0.001, rank=8`."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in values.items())


def uncertain_text(summary: dict[str, Any]) -> list[str]:
    """Of each arm whose value resampled trials would often not choose, what else they would."""
    lines = []
    for arm, search in summary["trials"].items():
        if search["per"] == "seed":
            continue  # the choice is in the intervals
        (choice,) = search["choices"]
        shares = [trial["share"] for trial in choice["trials"]]
        if shares[choice["chosen"]] is None or shares[choice["chosen"]] >= SURE:
            continue
        others = sorted((n for n in range(len(shares)) if n != choice["chosen"]), key=lambda n: -(shares[n] or 0))
        first, second = (choice["trials"][n] for n in (choice["chosen"], others[0]))
        lines.append(
            f"{arm}: {values_text(first['values'])} is chosen in {first['share']:.0%} of resampled trials and "
            f"{values_text(second['values'])} in {second['share'] or 0:.0%}: the choice is uncertain, and no interval "
            "carries that; a search per: seed would."
        )
    return lines


def value_text(value: Any) -> str:
    """A searched value."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float | int) else str(value)


# Beside every table of contrasts.
OF_P = (
    "p, as the interval: for other seeds and other test examples, with one seed for other examples alone (the level at "
    "which the interval ends at 0). "
    "p (Holm): of the secondary contrasts, corrected for their number. p, these rows: sign flips over runs, for other "
    "seeds on these test rows, and the smallest that so many runs can reach. Claims rest on the first two."
)


def role_text(one: dict[str, Any]) -> str:
    """A contrast's role in words."""
    return "not named before" if one["role"] == "later" else one["role"]


def p_value_text(value: float | None) -> str:
    if value is None or value < 1e-4:
        return NONE if value is None else "< 0.0001"
    # In two digits, or as many as it takes not to round across the level of a claim.
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next(text for text in texts if (float(text) < 0.05) == (value < 0.05))


def cost_cells(arm: dict[str, Any]) -> list[str]:
    """Trained parameters, optimizer steps and time of an arm."""
    return [count_text(arm["num_trainable_params"]), f"{arm['steps']:.0f}", duration(arm["total_seconds"])]


def spread(number: dict[str, Any] | None, signed: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    if number is None:
        return NONE
    mean = f"{number['mean']:+.3f}" if signed else f"{number['mean']:.3f}"
    return mean if number["sd"] is None else f"{mean} ± {number['sd']:.3f}"


def gap_text(arm: dict[str, Any], key: str) -> str:
    """A gap with its interval; where it has none, with its spread over seeds."""
    found = arm.get(f"{key}_interval")
    return interval(found) if found and found["low"] is not None else spread(arm[key], signed=True)


def interval(number: dict[str, Any] | str | None, signed: bool = True) -> str:
    """Estimate [low, high], or why there is none; a sign before what is a difference."""
    if number is None:
        return NONE
    if isinstance(number, str):
        return number
    form = "+.3f" if signed else ".3f"
    value = f"{number['value']:{form}}"
    return value if number["low"] is None else f"{value} [{number['low']:{form}}, {number['high']:{form}}]"


def size(n_bytes: float | None) -> str:
    """Bytes in three digits: 412 MB, 2.31 GB."""
    return NONE if n_bytes is None else _three_digits(n_bytes, ("TB", "GB", "MB", "kB")) or f"{n_bytes:.0f} B"


def count_text(number: float) -> str:
    return (
        _three_digits(number, ("Z", "E", "P", "T", "B", "M", "k")) or f"{number:.0f}" if math.isfinite(number) else NONE
    )


def _three_digits(number: float, units: Sequence[str]) -> str | None:
    """In the largest unit that the number, once it is rounded, has one of; None below all."""
    unit = next((unit for unit in units if float(f"{number:.3g}") >= SIZES[unit]), None)
    return None if unit is None else f"{number / SIZES[unit]:#.3g} {unit}".replace(". ", " ")


def range_text(values: list[Any]) -> str:
    """One number where all seeds agree, else the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    low, high = f"{min(known):.6g}", f"{max(known):.6g}"
    return low if low == high else f"{low}–{high}"
