"""A node's folder of state: its identity, kept over restarts, and held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Final

from p2pinfer.errors import UsageError

NODE_ID_FILE: Final = "node_id"

_IDENTITY: Final = re.compile(r"[0-9a-f]{16}\n?")


def new_identity() -> str:
    """A fresh node, boot or cluster id: 64 random bits in hexadecimal."""
    return os.urandom(8).hex()


class StateDir:
    """The folder while this process holds it; `node_id` is the node's identity. A context manager.

    The file that holds the identity is also the lock (flock(2)), which ends with the process: no
    lock file stays behind. Raises `UsageError` when the folder cannot be used, another process
    holds it, or the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        file = path / NODE_ID_FILE
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._lock()
            self.node_id = self._read_or_draw(file)
        except OSError as error:
            self.close()
            raise UsageError(
                f"--state-dir {path}: cannot be used: {error.strerror}; "
                "give a folder that this user may write to, on a disk with room"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StateDir:
        """The folder itself; leaving gives it free."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the folder free."""
        self.close()

    def close(self) -> None:
        """Give the folder free. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"--state-dir {self.path}: another node of this machine is using it; stop that "
                "node, or give this one a --name or --state-dir of its own"
            ) from error

    def _read_or_draw(self, file: Path) -> str:
        text = os.read(self._fd, 64).decode("ascii", "replace")
        if _IDENTITY.fullmatch(text):
            return text.strip()
        if text:
            raise UsageError(
                f"{file} is damaged: it holds no node id (16 hexadecimal digits); "
                "restore it, or remove it to become a new node"
            )
        node_id = new_identity()
        os.write(self._fd, f"{node_id}\n".encode())
        os.fsync(self._fd)
        return node_id
