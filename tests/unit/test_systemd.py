"""The service unit is valid and confined, and the notify protocol reaches a real socket."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pinfer.cli import node
from p2pinfer.config import NodeSettings
from p2pinfer.notify import READY, STOPPING, notify, watchdog_interval

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "p2pinfer.service"
MAX_EXPOSURE = 20
"""Tenths of the 0 to 10 that `systemd-analyze security` gives; 20 is its `OK`."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze and return what it said."""
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the program of this checkout in place of the installed one."""
    text = UNIT.read_text().replace("/opt/p2pinfer/bin/p2pinfer", str(ROOT / "bin" / "p2pinfer"))
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    return copy


@needs_systemd
def test_unit_is_valid(unit: Path) -> None:
    """systemd itself finds nothing to say about the unit."""
    done = analyze("verify", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_unit_is_confined(unit: Path) -> None:
    """systemd rates the unit's exposure as at most 2.0 of 10."""
    done = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", unit)
    if "Unknown option" in done.stderr or "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot rate a file")
    assert done.returncode == 0, done.stdout[-400:] + done.stderr


def test_unit_starts_with_flags_that_exist() -> None:
    """The flags in ExecStart are flags of `node start`."""
    line = re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert line is not None and " node start " in line[1]
    known = {name for option in node.start.params for name in option.opts}
    assert set(re.findall(r"--[a-z-]+", line[1])) <= known


def test_unit_leaves_time_to_hand_over() -> None:
    """A node that is stopped is killed only well after its default --drain-timeout."""
    line = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert line is not None
    assert int(line[1]) >= NodeSettings().drain_timeout + 5


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A datagram socket like systemd's, named in NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@p2pinfer-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        receiver.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield receiver


def test_states_reach_the_manager(manager: socket.socket) -> None:
    """Each state arrives as one datagram, on a path and on an abstract address."""
    assert notify(READY) and notify(STOPPING)
    assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize("address", [None, "", "relative", "/nonexistent/socket", "@p2pinfer-none"])
def test_no_manager_is_no_error(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a manager that listens, `notify` says so and does nothing else."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify(READY) is False


@pytest.mark.parametrize(
    ("allowed", "owner", "expected"),
    [
        ("20000000", None, 10.0),
        ("20000000", "this process", 10.0),
        ("20000000", "another", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_watchdog_interval_is_half_of_what_is_allowed(
    allowed: str | None,
    owner: str | None,
    expected: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interval is half of WATCHDOG_USEC if it is meant for this process, else None."""
    pids = {"this process": str(os.getpid()), "another": "1"}
    for name, value in (("WATCHDOG_USEC", allowed), ("WATCHDOG_PID", pids.get(owner or ""))):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_interval() == expected
