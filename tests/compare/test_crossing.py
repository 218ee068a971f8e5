"""Where a function crosses 0. Run: pytest tests/compare/test_crossing.py"""

import math
from collections.abc import Callable

import pytest
from scipy.optimize import root_scalar
from scipy.special import ndtri

from cola.compare.crossing import crossing

FUNCTIONS: list[tuple[Callable[[float], float], float, float]] = [
    (lambda x: x - 0.3, 0.0, 1.0),
    (lambda x: math.exp(x) - 1e3, 0.0, 100.0),
    (lambda x: 1.7 - float(ndtri(1 - x / 2)), 1e-8, 1 - 1e-6),  # the size of a test
    (lambda x: (x + 1) ** 9, -3.0, 0.5),  # flat where it crosses
    (lambda x: -1.0 if x < 0.123 else 1.0, 0.0, 1.0),  # a step
    (lambda x: math.atan(1e6 * (x - 0.9)), -1e3, 1.0),
]


@pytest.mark.parametrize(("function", "low", "high"), FUNCTIONS)
def test_a_crossing_is_where_scipy_finds_it(function: Callable[[float], float], low: float, high: float) -> None:
    want = root_scalar(function, bracket=(low, high), method="bisect", xtol=1e-12).root
    within = 1e-2 if abs(function(want + 1e-3)) < 1e-20 else 1e-8  # where a flat one crosses is lost in rounding
    for ends in ((low, high), (high, low)):
        assert crossing(function, *ends, 1e-9) == pytest.approx(want, abs=within)
    assert crossing(lambda x: -function(x), low, high, 1e-9) == pytest.approx(want, abs=within)


def test_an_end_at_which_a_function_is_0_is_its_crossing() -> None:
    assert crossing(lambda x: x, 0.0, 1.0, 1e-9) == 0.0
    assert crossing(lambda x: x - 1, 0.0, 1.0, 1e-9) == 1.0


def test_a_crossing_takes_few_looks() -> None:
    looks = []
    crossing(lambda x: looks.append(x) or 1.7 - float(ndtri(1 - x / 2)), 1e-8, 1 - 1e-6, 1e-9)
    assert len(looks) < 30
