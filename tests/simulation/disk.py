"""A machine's simulated disk: it holds one node's stored state, and outlives its processes.

Writes are done one after the other, the newest that waits first and only that; a crash leaves what
was written before or, by chance, also what was being written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from p2pinfer.core.events import Input, Persist, Persisted, PersistFailed, StoredState

if TYPE_CHECKING:
    from tests.simulation.world import World

Answer = Callable[[Input, StoredState | None], None]
"""Told `Persisted` or `PersistFailed`, and the state that it is about."""

_DECODER = msgspec.json.Decoder(StoredState)
FSYNC_S = (0.0005, 0.008)


class Disk:
    """`slow_s` is added to each write; the next `failures` writes fail."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.slow_s = 0.0
        self.failures = 0
        self.writes = 0
        self._random = world.stream(f"disk/{number}")
        self._content: bytes | None = None
        self._writing: Persist | None = None
        self._waiting: Persist | None = None
        self._owner = 0
        self._untold = 0

    @property
    def pending(self) -> bool:
        """Whether a write has been asked for and not been told done."""
        return self._writing is not None or self._untold > 0

    @property
    def state(self) -> StoredState | None:
        """What a process finds when it starts."""
        return None if self._content is None else _DECODER.decode(self._content)

    def wipe(self) -> None:
        """Everything is lost."""
        self._content = None

    def persist(self, order: Persist, answer: Answer) -> None:
        """Write a state, and call `answer`; what waited and is older need not be written."""
        if self._writing is None:
            self._write(order, answer)
        else:
            self._waiting = order

    def crashed(self) -> None:
        """The process is gone; what was being written may be there or not."""
        if self._writing is not None and self._random.random() < 0.5:
            self._put(self._writing)
        self._writing = self._waiting = None
        self._untold = 0
        self._owner += 1

    def _write(self, order: Persist, answer: Answer) -> None:
        self._writing = order
        self.writes += 1
        wait = self._random.uniform(*FSYNC_S) + self.slow_s
        self.world.later(wait, self._done, self._owner, order, answer)

    def _done(self, owner: int, order: Persist, answer: Answer) -> None:
        if owner != self._owner:
            return
        waiting, self._writing, self._waiting = self._waiting, None, None
        if self.failures:
            self.failures -= 1
            self.world.count("a write to the disk failed")
            event: Input = PersistFailed(reason="the simulated disk failed")
        else:
            self._put(order)
            event = Persisted(number=order.number)
        self._untold += 1
        self.world.later(
            self._random.uniform(0, 0.001), self._tell, owner, event, order.state, answer
        )
        if waiting is not None:
            self._write(waiting, answer)

    def _tell(self, owner: int, event: Input, state: StoredState | None, answer: Answer) -> None:
        if owner == self._owner:
            self._untold -= 1
            answer(event, state)

    def _put(self, order: Persist) -> None:
        self._content = None if order.state is None else msgspec.json.encode(order.state)
