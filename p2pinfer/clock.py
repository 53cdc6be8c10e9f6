"""The time that the core is told: seconds that go on while the machine sleeps, and never go back.

What a node makes of its own standstills is decided in `core/health.py`, where it can be simulated:
it does not take its own silence for that of its peers, however long it was stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def boot_seconds() -> float:
    """Seconds since some fixed moment, those in which the machine slept included."""
    if sys.platform.startswith("linux"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class LoopClock:
    """The clock of one loop; never goes back."""

    def __init__(self, source: Callable[[], float] = boot_seconds) -> None:
        self._source = source
        self._seen = source()

    def __call__(self) -> float:
        """The time now, in seconds."""
        self._seen = max(self._seen, self._source())
        return self._seen
