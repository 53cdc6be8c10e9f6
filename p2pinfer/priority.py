"""Giving way to everybody else on this machine who wants to compute."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress


def be_last() -> None:
    """Let the calling thread run only where nobody else wants to, if threads have a policy of their
    own, for as long as it lives.

    The highest nice value is not enough: who wakes up then waits until this thread's time slice is
    over, and in a step each node wakes up many times (sched(7), `SCHED_IDLE`).
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
