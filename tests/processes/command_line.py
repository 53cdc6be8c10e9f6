"""The command line run as its user runs it: in a process, with its output in pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

DEADLINE_S = 60.0


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs (one that ended and waits to be reaped does not)."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def start_cli(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `p2pinfer` with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "p2pinfer", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and output of a command that ends by itself."""
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def node_flags(folder: Path, port: int, name: str = "lone") -> list[str]:
    """`node start` on the loopback with its own state folder."""
    return [
        "node",
        "start",
        "--listen",
        f"127.0.0.1:{port}",
        "--name",
        name,
        "--threads",
        "1",
        "--state-dir",
        str(folder / name),
    ]
