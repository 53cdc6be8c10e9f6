"""Writing the node's state in a thread of its own, so that heartbeats never wait for the disk."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread

from p2pinfer.core.events import Persisted, PersistFailed, StoredState
from p2pinfer.state_dir import StateDir

Order = tuple[int, StoredState | None]


class DiskWriter:
    """Writes states one after the other, the newest that waits; says so in `done` after `wake`.

    For one thread to use; `wake` is called from another. A state of None removes what is there.
    """

    def __init__(self, folder: StateDir, wake: Callable[[], None]) -> None:
        self._folder = folder
        self._wake = wake
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._results: SimpleQueue[Persisted | PersistFailed] = SimpleQueue()
        self._thread = Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    def write(self, number: int, state: StoredState | None) -> None:
        """Have `state` on the disk, for good; `Persisted` of this number or a later one says so."""
        self._orders.put((number, state))

    def done(self) -> list[Persisted | PersistFailed]:
        """What came of it, since the last call."""
        results = []
        while True:
            try:
                results.append(self._results.get_nowait())
            except Empty:
                return results

    def close(self) -> None:
        """Write what still waits, and end. Safe to call twice."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        ending = False
        while not ending:
            order = self._orders.get()
            newest = None
            while True:
                if order is None:
                    ending = True
                else:
                    newest = order
                try:
                    order = self._orders.get_nowait()
                except Empty:
                    break
            if newest is not None:
                self._write(*newest)

    def _write(self, number: int, state: StoredState | None) -> None:
        try:
            if state is None:
                self._folder.forget()
            else:
                self._folder.write(state)
        except OSError as error:
            self._results.put(PersistFailed(reason=str(error)))
        else:
            self._results.put(Persisted(number=number))
        self._wake()
