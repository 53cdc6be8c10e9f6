"""Giving way to everybody else on this machine who wants to compute, and being called back.

A thread that is last has the highest nice value and, where that can be undone, `SCHED_IDLE`
(sched(7)): with a nice value alone, who wakes up waits until this thread's time slice is over, and
in a step each node wakes up many times. But beside a busy program such a thread hardly computes at
all, and somebody may come to wait for it.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

LAST = 19
"""The highest nice value."""

THREADS = Path("/proc/self/task")


def be_last() -> None:
    """Let the calling thread, and those that it starts, compute where nobody else wants to."""
    if sys.platform != "linux":
        return  # elsewhere a nice value is the whole process's
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, LAST)
        if _may_come_back():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def hurry() -> None:
    """Somebody waits: all threads of this process compute again, with their nice values."""
    if sys.platform != "linux":
        return
    for task in THREADS.iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if os.sched_getscheduler(int(task.name)) == os.SCHED_IDLE:
                os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


@cache
def _may_come_back() -> bool:
    """Whether a thread may leave `SCHED_IDLE`: that takes the right to have its nice value
    (`RLIMIT_NICE`, setrlimit(2)). A thread of its own tries it."""
    able: list[bool] = []

    def attempt() -> None:
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, LAST)
            for policy in (os.SCHED_IDLE, os.SCHED_OTHER):
                os.sched_setscheduler(thread, policy, os.sched_param(0))
            able.append(True)

    trial = threading.Thread(target=attempt)
    trial.start()
    trial.join()
    return bool(able)
