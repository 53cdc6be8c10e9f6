"""Tell systemd how the daemon is: the sd_notify protocol (sd_notify(3)), a datagram per state.

Does nothing where systemd did not ask for it (no `NOTIFY_SOCKET`), so callers need no condition.
"""

from __future__ import annotations

import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"

_MICROSECONDS = 1e-6


def notify(state: str) -> bool:
    """Send `state` (lines of `NAME=value`, e.g. `READY=1`); whether systemd could be told.

    The address may be a path or, with a leading `@`, an abstract socket. Never blocks for long and
    never raises: a daemon must not fail because its manager does not listen.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.connect(address)
            channel.sendall(state.encode())
    except OSError:
        return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two `WATCHDOG=1`, half of what the unit allows; None if not asked for.

    Half, as sd_watchdog_enabled(3) advises. A variable meant for another process is ignored.
    """
    try:
        allowed = int(os.environ["WATCHDOG_USEC"])
        owner = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    if allowed <= 0 or owner != os.getpid():
        return None
    return allowed * _MICROSECONDS / 2
