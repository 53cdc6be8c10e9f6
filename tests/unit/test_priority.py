"""Threads that give way, and threads that others wait for."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from p2pinfer.priority import (
    LAST,
    PROMPT_NS,
    STARTING,
    be_last,
    be_prompt,
    imported,
    keep_off,
    stay_on,
    unhurried,
)
from tests.time_slices import grants_time_slices, time_slice

DEADLINE_S = 30.0
NAME = "imported_at_a_low_priority"


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


@pytest.mark.skipif(not grants_time_slices(), reason="the system grants no time slices")
def test_who_is_prompt_has_short_slices_until_it_is_last() -> None:
    """So have the threads that it starts; who is last afterwards has those of everybody else."""
    usual = time_slice()
    assert usual > PROMPT_NS
    with ThreadPoolExecutor(1) as stepper:
        stepper.submit(be_prompt).result(DEADLINE_S)
        assert stepper.submit(time_slice).result(DEADLINE_S) == PROMPT_NS
        with stepper.submit(ThreadPoolExecutor, 1).result(DEADLINE_S) as helper:
            started = stepper.submit(lambda: helper.submit(time_slice)).result(DEADLINE_S)
            assert started.result(DEADLINE_S) == PROMPT_NS
            helper.submit(be_last).result(DEADLINE_S)
            assert helper.submit(time_slice).result(DEADLINE_S) == usual
    assert time_slice() == usual


def zeromqs_threads(context: zmq.Context) -> set[int]:
    """Those that carry the frames of a context; the one that made its first socket is none."""
    prefix, found = context.get(zmq.THREAD_NAME_PREFIX), set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            if (task / "comm").read_text().startswith(f"{prefix}/ZMQbg/IO"):
                found.add(int(task.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no policy")
def test_zeromqs_thread_is_unhurried_where_its_first_socket_is_made_so() -> None:
    """Nobody else's policy changes, and the socket is for the caller to use."""
    before, context = mine(), zmq.Context()
    # From now on the C library remembers this thread's policy, for those that it starts too.
    policy, priority = ctypes.c_int(), ctypes.c_int()
    thread = ctypes.c_ulong(threading.get_ident())
    library = ctypes.CDLL(None)
    library.pthread_getschedparam(thread, ctypes.byref(policy), ctypes.byref(priority))
    context.set(zmq.THREAD_NAME_PREFIX, 7)  # other tests of this process may have left contexts
    try:
        socket = unhurried(lambda: context.socket(zmq.PULL))
        sender = context.socket(zmq.PUSH)
        sender.connect(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        sender.send(b"sent")
        assert socket.poll(1000 * DEADLINE_S)
        assert socket.recv() == b"sent"
        # Only now has the thread given itself its name for certain.
        policies = [os.sched_getscheduler(thread) for thread in zeromqs_threads(context)]
        assert policies == [os.SCHED_BATCH]
        assert mine() == before
    finally:
        context.destroy(linger=0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no choice of processors")
def test_others_keep_off_a_workers_processors() -> None:
    """Where there are any besides, and nobody else's choice changes."""
    before = os.sched_getaffinity(0)
    first = min(before)
    for cpus, left in (
        ((), before),
        ((first,), before - {first} or before),
        (tuple(before), before),
    ):
        with ThreadPoolExecutor(1) as other:
            other.submit(keep_off, cpus).result(DEADLINE_S)
            assert other.submit(os.sched_getaffinity, 0).result(DEADLINE_S) == left
    with ThreadPoolExecutor(1) as other:
        other.submit(stay_on, (first,)).result(DEADLINE_S)
        assert other.submit(os.sched_getaffinity, 0).result(DEADLINE_S) == {first}
    assert os.sched_getaffinity(0) == before


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that nobody has imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return tmp_path / f"{NAME}.py"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_module_is_imported_at_a_low_priority_and_nothing_else_is(module: Path) -> None:
    """Nodes of this machine that compute come first."""
    module.write_text("import os, threading\nat = os.getpriority(0, threading.get_native_id())\n")
    usual = mine()
    assert imported(NAME).at == max(STARTING, usual[0])
    assert mine() == usual


def test_what_a_module_raises_is_not_lost(module: Path) -> None:
    """It is raised where the module was asked for."""
    module.write_text("raise RuntimeError('no such kernel')\n")
    with pytest.raises(RuntimeError, match="no such kernel"):
        imported(NAME)
