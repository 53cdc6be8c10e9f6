"""Threads that give way."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2pinfer.priority import LAST, be_last

DEADLINE_S = 30.0


def mine() -> tuple[int, int]:
    """Nice value and policy of the calling thread."""
    thread = threading.get_native_id()
    return os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority")
def test_who_is_last_still_has_a_share() -> None:
    """So have the threads that it starts; nobody else's priority changes."""
    before = mine()
    with ThreadPoolExecutor(1) as loader:
        loader.submit(be_last).result(DEADLINE_S)
        assert loader.submit(mine).result(DEADLINE_S) == (LAST, os.SCHED_OTHER)
        with loader.submit(ThreadPoolExecutor, 1).result(DEADLINE_S) as packer:
            started = loader.submit(lambda: packer.submit(mine)).result(DEADLINE_S)
            assert started.result(DEADLINE_S) == (LAST, os.SCHED_OTHER)
    assert mine() == before
