"""Giving way to everybody else on this machine who wants to compute."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

LAST = 19
"""The highest nice value. Not `SCHED_IDLE`: beside busy programs such a thread hardly computes, and
when it does it may hold the interpreter's lock that a step is waiting for."""


def be_last() -> None:
    """Give the calling thread, and those that it starts, the lowest priority that leaves it a share
    of the processors, if threads have a priority of their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)
