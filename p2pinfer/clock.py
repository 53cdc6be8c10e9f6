"""The time that the core is told: seconds that go on while the machine sleeps, without our stalls.

A daemon that did not get to run for a second (a busy machine, a thread that held the interpreter)
finds its peers' heartbeats in its queues afterwards; it must not take its own silence for theirs.
Lifeguard (Dadgar, Phillips and Currey, 2018) draws the same lesson for SWIM.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final

LATE_S: Final = 0.2
EXCUSED_S: Final = 5.0
"""A pause beyond the first is a stall and does not count; beyond the second it does: a machine that
slept shall know it."""


def boot_seconds() -> float:
    """Seconds since some fixed moment, those in which the machine slept included."""
    if sys.platform.startswith("linux"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class LoopClock:
    """The clock of one loop, which looks at it all the time; never goes back."""

    def __init__(self, source: Callable[[], float] = boot_seconds) -> None:
        self._source = source
        self._seen = source()
        self._planned = 0.0
        self._excused = 0.0

    def plan_sleep(self, seconds: float) -> None:
        """The loop is about to wait for so long at most: that is no stall."""
        self._planned = max(0.0, seconds)

    def __call__(self) -> float:
        """The time now, in seconds."""
        raw = self._source()
        stall = raw - self._seen - self._planned
        if LATE_S < stall <= EXCUSED_S:
            self._excused += stall
        self._seen, self._planned = raw, 0.0
        return raw - self._excused
