"""How long a step may take before it is overdue: ten times what comparable steps took.

Steps are comparable by their number of rows, in buckets of powers of two. A step that is overdue
while everybody lives is a lost frame or a member that stands still; either way a new epoch is the
cure. Should the limit itself be at fault (a machine that became slow), doubling it with every
overdue step lets one finish in the end.
"""

from __future__ import annotations

from collections import deque
from statistics import median

FACTOR = 10.0
LEAST_S = 0.5
"""Shorter than that, a garbage collection or a page fault would do."""

STRANGE_MARGIN = 4.0
"""For a step whose like was not seen yet: attention does not grow by rows alone."""

UNKNOWN_S = 10.0
"""Before the first step: weights may still come from the disk."""

MOST_S = 60.0
MEMORY = 32
"""Steps of a bucket that count."""


class StepClock:
    """What steps took on this node, whole steps with their waits, in seconds.

    No limit is shorter than `least_s`.
    """

    def __init__(self, least_s: float = LEAST_S) -> None:
        self._least_s = least_s
        self._took: dict[int, deque[float]] = {}
        self._patience = 1.0

    def limit(self, rows: int) -> float:
        """Seconds that a step of `rows` positions may take."""
        return min(self._base(_bucket(rows)) * self._patience, MOST_S)

    def finished(self, rows: int, seconds: float) -> None:
        """A step of `rows` positions took that long.

        After one that was overdue, it is the new measure: on a network that became slow, the
        median of many quick steps would make most of the next ones overdue again.
        """
        if self._patience > 1.0:
            self._took.pop(_bucket(rows), None)
        self._took.setdefault(_bucket(rows), deque(maxlen=MEMORY)).append(seconds)
        self._patience = 1.0

    def overdue(self) -> None:
        """A step did not finish in its time: the next one has twice as long."""
        self._patience = min(2 * self._patience, MOST_S / self._least_s)

    def _base(self, bucket: int) -> float:
        if not self._took:
            return UNKNOWN_S
        known = min(self._took, key=lambda other: (abs(other - bucket), other))
        usual = median(self._took[known])
        if known != bucket:
            usual *= STRANGE_MARGIN * max(1.0, 2.0 ** (bucket - known))
        return max(FACTOR * usual, self._least_s)


def _bucket(rows: int) -> int:
    """0 for one row (or none), 1 for two, 2 for up to four, and so on."""
    return max(rows - 1, 0).bit_length()
