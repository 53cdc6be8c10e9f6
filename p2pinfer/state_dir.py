"""A node's folder of state: its identity, kept over restarts, and held by one process at a time.

Beside it lies what the node must not forget of its cluster (`core/durable.py`): a line of JSON and
the SHA-256 of that line, replaced as a whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from p2pinfer.core.events import StoredState
from p2pinfer.errors import UsageError

NODE_ID_FILE: Final = "node_id"
CLUSTER_FILE: Final = "cluster.json"

_IDENTITY: Final = re.compile(r"[0-9a-f]{16}\n?")


def new_identity() -> str:
    """A fresh node, boot or cluster id: 64 random bits in hexadecimal."""
    return os.urandom(8).hex()


def _checksum(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode()


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
        except BaseException:  # nobody else could give a folder free that was never returned
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

    # --- the state of the cluster -----------------------------------------------------------------

    def read(self) -> StoredState | None:
        """What `write` wrote last; None if nothing, or it was forgotten.

        Raises `UsageError` where the file is damaged or cannot be read.
        """
        file = self.path / CLUSTER_FILE
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(
                f"{file} cannot be read: {error.strerror}; make it readable for this user"
            ) from error
        line, _, rest = content.partition(b"\n")
        if rest.strip() != _checksum(line):
            raise self._damaged(file, "its checksum does not match")
        try:
            return msgspec.json.decode(line, type=StoredState)
        except msgspec.DecodeError as error:
            raise self._damaged(file, str(error)) from error

    def write(self, state: StoredState) -> None:
        """Put `state` in place of what was there, for good. Raises `OSError`."""
        line = msgspec.json.encode(state)
        file = self.path / CLUSTER_FILE
        fresh = file.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with open(fd, "wb") as new:
            new.write(line + b"\n" + _checksum(line) + b"\n")
            new.flush()
            os.fsync(fd)
        fresh.replace(file)
        self._sync_folder()

    def forget(self) -> None:
        """Remove what `write` wrote, for good. Raises `OSError`."""
        (self.path / CLUSTER_FILE).unlink(missing_ok=True)
        self._sync_folder()

    def _sync_folder(self) -> None:
        """Make the names in the folder last, too (fsync(2))."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _damaged(self, file: Path, what: str) -> UsageError:
        # Not an older copy: with it the node would break promises that it does not know it gave.
        return UsageError(
            f"{file} is damaged: {what}; restore exactly this file, never an older copy, or remove "
            "it and start with --join: the node then has no vote until the cluster gives it one"
        )

    # --- the identity -----------------------------------------------------------------------------

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
