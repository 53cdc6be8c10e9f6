"""The time slices that Linux gives threads, as far as it tells."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from p2pinfer.priority import be_prompt

MINE = Path("/proc/thread-self/sched")
DEADLINE_S = 10.0


def time_slice(of: Path = MINE) -> int:
    """Of a thread, by default the calling one, in nanoseconds. Raises `OSError` or `StopIteration`
    where the system does not tell."""
    return next(
        int(line.split(":")[1]) for line in of.read_text().splitlines() if "se.slice" in line
    )


def grants_time_slices() -> bool:
    """Linux 6.12 and later, where it was built to tell, and nothing filters the wish."""
    try:
        usual = time_slice()
        with ThreadPoolExecutor(1) as other:
            other.submit(be_prompt).result(DEADLINE_S)
            return other.submit(time_slice).result(DEADLINE_S) < usual
    except (OSError, StopIteration):
        return False
