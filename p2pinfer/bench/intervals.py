"""The interval of a median, without a guess at how its values are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Between which of the values the median of all that could have been measured lies.

    The narrowest pair of order statistics that has it with this confidence or more (as in the sign
    test). None where there are too few values: less than 6 for 95 %.
    """
    ordered, count = sorted(values), len(values)
    rank, below = 0, 0
    # `below` of 2 ** count equally likely ways put the median below the value of that rank.
    while rank < count:
        below += comb(count, rank)
        if 2 * below > (1 - confidence) * 2**count:
            break
        rank += 1
    if rank == 0:
        return None
    return Interval(ordered[rank - 1], ordered[count - rank])
