"""Giving way to everybody else on this machine who wants to compute."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from types import ModuleType

LAST = 19
"""The highest nice value. Not `SCHED_IDLE`: beside busy programs such a thread hardly computes, and
when it does it may hold the interpreter's lock that a step is waiting for."""

STARTING = 10
"""The nice value of a thread that imports: beside one that computes it gets a tenth of a processor,
enough to start in seconds where none is free."""


def be_last() -> None:
    """Give the calling thread, and those that it starts, the lowest priority that leaves it a share
    of the processors, if threads have a priority of their own."""
    _be_nice(LAST)


def imported(name: str) -> ModuleType:
    """A module, imported at a low priority if threads have one of their own: the processors may
    belong to replies of other nodes. What the module raises when it is imported is raised here.

    In a thread, since who is not root cannot take a priority back.
    """
    with ThreadPoolExecutor(1, "import", lambda: _be_nice(STARTING)) as importing:
        return importing.submit(import_module, name).result()


def _be_nice(value: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), value)
