"""Ctrl-C and SIGTERM as something to poll for, and a way for threads to end a poll."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, a stop signal only sets `asked` and makes `fileno()` readable.

    For the main thread (signal(2) handlers run there); `wake` may be called from any thread.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> StopSignals:
        """Take over the signals."""
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for each in _SIGNALS:
            self._previous[each] = signal.signal(each, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Readable after a signal or a `wake`, until `drain`."""
        return self._reader.fileno()

    def wake(self) -> None:
        """End the poll that the main thread is in."""
        # A full buffer wakes as well; a closed one has nobody to wake.
        with suppress(OSError):
            self._writer.send(b"\0")

    def drain(self) -> None:
        """Forget the wake-ups so far."""
        with suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
