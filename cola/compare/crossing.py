"""Where a function crosses 0. scipy.optimize has such, and takes a quarter of what a report imports to be imported."""

import math
from collections.abc import Callable


def crossing(function: Callable[[float], float], low: float, high: float, within: float) -> float:
    """A place between two at which the function has opposite signs, where it has neither, to within that distance.

    Ridders' method (IEEE Transactions on Circuits and Systems 26, 1979): the function is straightened by an exponential
    through its ends and its middle, so that what is convex takes no more looks than what is straight, and each round
    halves the rest at least.
    """
    at_low, at_high, last = function(low), function(high), math.inf
    if 0 in (at_low, at_high):
        return low if at_low == 0 else high
    assert (at_low > 0) != (at_high > 0), "the ends have one sign"
    while True:
        middle = (low + high) / 2
        at_middle = function(middle)
        slope = math.copysign(1.0, at_low - at_high) / math.sqrt(at_middle**2 - at_low * at_high)
        place = middle + (middle - low) * slope * at_middle
        at_place = function(place)
        if at_place == 0 or abs(place - last) <= within or abs(high - low) <= within:
            return place
        last = place
        if (at_middle > 0) != (at_place > 0):
            low, at_low, high, at_high = middle, at_middle, place, at_place
        elif (at_low > 0) != (at_place > 0):
            high, at_high = place, at_place
        else:
            low, at_low = place, at_place
