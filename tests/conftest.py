"""What all tests share: one thread for heavy libraries, how hypothesis looks for examples, and who
gives way to whom."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before anything imports torch: several test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

# No deadline: a busy machine is no failure. The nightly profile looks ten times as far.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

GIVES_WAY = 5
"""As `nice` has it; less than any priority that tests ask for."""

ALONE = ("unit", "property", "simulation")
"""Folders of tests without clusters."""


@pytest.fixture(autouse=True)
def gives_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test without processes of its own does not keep whole clusters waiting.

    These run beside it, and each of their steps would wait for it to use up a time slice: a test of
    10 seconds then takes 40.
    """
    folder = request.path.relative_to(request.config.rootpath / "tests").parts[0]
    if folder not in ALONE or sys.platform != "linux" or os.geteuid():
        yield  # only root may take it back
        return
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(before, GIVES_WAY))
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)
