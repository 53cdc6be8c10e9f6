"""Giving way to everybody else on this machine who wants to compute, or to the worker on its own
processors; and being there at once when one is waited for."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Final, TypeVar

LAST: Final = 19
"""The highest nice value. Not `SCHED_IDLE`: beside busy programs such a thread hardly computes, and
when it does it may hold the interpreter's lock that a step is waiting for."""

STARTING: Final = 10
"""The nice value of a thread that imports: beside one that computes it gets a tenth of a processor,
enough to start in tens of seconds where none is free."""

PROMPT_NS: Final = 100_000
"""The time slice, in nanoseconds, of threads that others wait for; the least that Linux grants.
Whoever wakes up with a shorter slice than who is computing need not wait for the end of that one's
(EEVDF: Stoica and Abdel-Wahab, 1995; Linux 6.12 and later), which may be four milliseconds: more
than a half layer takes."""

USUAL_NS: Final = 0
"""The length that the system chooses."""

Made = TypeVar("Made")

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""Number of the system call, for which most C libraries have no function."""


class _Attributes(ctypes.Structure):
    """`struct sched_attr` of sched_setattr(2), in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def be_last() -> None:
    """Give the calling thread, and those that it starts, the lowest priority that leaves it a share
    of the processors, if threads have a priority of their own."""
    _be_nice(LAST)


def imported(name: str) -> ModuleType:
    """A module, imported at a low priority if threads have one of their own: the processors may
    belong to replies of other nodes. What the module raises when it is imported is raised here.

    In a thread, since who is not root cannot take a priority back. Threads that the module starts
    while it is imported keep the low one. Ctrl-C is obeyed when the import has ended.
    """
    with ThreadPoolExecutor(1, "import", lambda: _be_nice(STARTING)) as importing:
        return importing.submit(import_module, name).result()


def unhurried(make: Callable[[], Made]) -> Made:
    """What `make` returns; threads that it starts let whoever computes go on when they are woken
    (`SCHED_BATCH`), until the end of its time slice, if the system grants that.

    For what nobody waits for: work that comes bit by bit is done at once then, and takes the
    processor once.
    """
    with ThreadPoolExecutor(1, "unhurried", _be_unhurried) as making:
        return making.submit(make).result()


def _be_unhurried() -> None:
    """By way of the C library, which remembers a thread's policy and gives it to those that the
    thread starts: ZeroMQ's take it from there, whatever the system has."""
    if sys.platform == "linux":
        library, priority = ctypes.CDLL(None), ctypes.c_int(0)
        thread = ctypes.c_ulong(threading.get_ident())
        library.pthread_setschedparam(thread, os.SCHED_BATCH, ctypes.byref(priority))


def _be_nice(value: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            usual = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, max(value, usual))
            _slice(USUAL_NS)


def stay_on(cpus: Collection[int]) -> None:
    """Let the calling thread, and those that it starts, use these processors only. Does nothing
    where the system has no such choice."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def keep_off(cpus: Collection[int]) -> None:
    """Leave these processors to others, where the calling thread, and those that it starts, may use
    any besides. Does nothing where the system has no such choice."""
    if cpus and hasattr(os, "sched_setaffinity"):
        besides = os.sched_getaffinity(0).difference(cpus)
        if besides:
            stay_on(besides)


def be_prompt() -> None:
    """Let the calling thread, and those that it starts, compute soon after they are woken, beside
    others that compute for long; its share of the processors is the same. Does nothing where the
    system knows no such wish, or does not grant it."""
    if sys.platform == "linux":
        with suppress(OSError):
            _slice(PROMPT_NS)


def _slice(nanoseconds: int) -> None:
    """Ask for time slices of this length for the calling thread, if it has the usual policy. A
    refusal is no error."""
    thread = threading.get_native_id()
    call = _SCHED_SETATTR.get(platform.machine())
    if call is None or os.sched_getscheduler(thread) != os.SCHED_OTHER:
        return
    wanted = _Attributes(
        size=ctypes.sizeof(_Attributes),
        policy=os.SCHED_OTHER,
        nice=os.getpriority(os.PRIO_PROCESS, thread),
        runtime=nanoseconds,
    )
    # Older systems take the length and ignore it; what filters system calls refuses it.
    flags = 0
    ctypes.CDLL(None).syscall(
        ctypes.c_long(call), ctypes.c_long(thread), ctypes.byref(wanted), ctypes.c_long(flags)
    )
