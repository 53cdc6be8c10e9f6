"""Threads that give way, and come back when somebody waits for them."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2pinfer.priority import LAST, be_last, hurry

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority")

DEADLINE_S = 30.0


def mine() -> tuple[int, int]:
    """Nice value and policy of the calling thread."""
    thread = threading.get_native_id()
    return os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)


def test_who_is_last_comes_back() -> None:
    """So do the threads that it has started; nobody else's priority changes."""
    before = mine()
    with ThreadPoolExecutor(1) as loader:
        loader.submit(be_last).result(DEADLINE_S)
        nice, policy = loader.submit(mine).result(DEADLINE_S)
        assert (nice, policy in (os.SCHED_IDLE, os.SCHED_OTHER)) == (LAST, True)
        with loader.submit(ThreadPoolExecutor, 1).result(DEADLINE_S) as packer:
            started = loader.submit(lambda: packer.submit(mine)).result(DEADLINE_S)
            assert started.result(DEADLINE_S) == (nice, policy)
            hurry()
            for thread in (loader, packer):
                assert thread.submit(mine).result(DEADLINE_S) == (LAST, os.SCHED_OTHER)
    assert mine() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="a user may have no right to undo it")
def test_threads_are_idle_where_that_can_be_undone() -> None:
    """A nice value alone would leave time slices to them while a step waits."""
    with ThreadPoolExecutor(1) as loader:
        loader.submit(be_last).result(DEADLINE_S)
        assert loader.submit(mine).result(DEADLINE_S) == (LAST, os.SCHED_IDLE)
