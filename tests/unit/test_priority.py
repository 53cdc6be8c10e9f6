"""Threads that give way."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2pinfer.priority import LAST, PROMPT_NS, STARTING, be_last, be_prompt, imported

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


def time_slice() -> int:
    """Of the calling thread, in nanoseconds, as the system has it."""
    facts = (Path("/proc/thread-self") / "sched").read_text().splitlines()
    return next(int(line.split(":")[1]) for line in facts if line.startswith("se.slice"))


def tells_time_slices() -> bool:
    """Linux 6.12 and later, where it was built to tell."""
    try:
        return time_slice() > 0
    except (OSError, StopIteration):
        return False


@pytest.mark.skipif(not tells_time_slices(), reason="the system does not tell time slices")
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
    assert imported(NAME).at == STARTING
    assert mine() == usual


def test_what_a_module_raises_is_not_lost(module: Path) -> None:
    """It is raised where the module was asked for."""
    module.write_text("raise RuntimeError('no such kernel')\n")
    with pytest.raises(RuntimeError, match="no such kernel"):
        imported(NAME)
