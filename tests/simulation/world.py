"""Simulated time, the queue of what will happen, and the record of what did.

Everything random comes from a seed, through streams with names: a part that is left out does not
change what the others draw. The record is hashed, so that two runs can be compared byte by byte.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import defaultdict
from collections.abc import Callable
from struct import Struct
from typing import Any

import msgspec

from tests.simulation.story import describe

_ENTRY = Struct("<dH")
_ENCODER = msgspec.msgpack.Encoder()

Moment = Callable[[int], None]
"""Called with the number of the machine at which something happened."""


class Violation(Exception):
    """What may never happen has happened."""


class Trace:
    """SHA-256 over every input and output with its time; on request also readable lines."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self.tell = tell
        self.entries = 0
        self._hash = hashlib.sha256()

    def note(self, now: float, machine: int, what: str, payload: bytes, told: Any = None) -> None:
        """`payload` is hashed; `told` (or `payload`) is what a line shows of it."""
        self.entries += 1
        self._hash.update(_ENTRY.pack(now, machine))
        self._hash.update(what.encode())
        self._hash.update(payload)
        if self.tell is not None:
            shown = describe(payload if told is None else told)
            self.tell(f"{now:9.4f}  node{machine}  {what:<5} {shown}")

    def value(self, now: float, machine: int, what: str, value: msgspec.Struct) -> None:
        """As `note`, of a struct, by its type's name and its fields."""
        name = type(value).__name__
        self.note(now, machine, what, name.encode() + _ENCODER.encode(value), value)

    def digest(self) -> str:
        """The hash so far, in hexadecimal."""
        return self._hash.hexdigest()


class World:
    """The clock and the queue. Times in seconds since the beginning."""

    def __init__(self, seed: int, tell: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.trace = Trace(tell)
        self.counters: dict[str, int] = defaultdict(int)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._watchers: dict[str, list[Moment]] = defaultdict(list)

    def stream(self, name: str) -> random.Random:
        """Random numbers of their own for one purpose (seeding by text does not use `hash`)."""
        return random.Random(f"{self.seed}/{name}")

    # --- time -------------------------------------------------------------------------------------

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        """Call `what` at a time; what is asked for first comes first at the same time."""
        self._number += 1
        heapq.heappush(self._queue, (max(when, self.now), self._number, what, arguments))

    def later(self, wait: float, what: Callable[..., None], *arguments: Any) -> None:
        """Call `what` after so many seconds."""
        self.at(self.now + wait, what, *arguments)

    def run_until(self, end: float, done: Callable[[], bool] | None = None) -> bool:
        """Let time pass until `done` (looked at after every event) or `end`; whether `done`."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= end:
            self.now, _, what, arguments = pop(queue)
            what(*arguments)
            if done is not None and done():
                return True
        self.now = max(self.now, end)
        return False

    # --- what others want to know -----------------------------------------------------------------

    def count(self, name: str) -> None:
        """One more of something."""
        self.counters[name] += 1

    def watch(self, moment: str, watcher: Moment) -> None:
        """Call `watcher` whenever `moment` happens anywhere."""
        self._watchers[moment].append(watcher)

    def moment(self, name: str, machine: int) -> None:
        """Something of interest to the faults happens at a machine right now."""
        for watcher in tuple(self._watchers.get(name, ())):
            watcher(machine)

    def tell(self, machine: int, text: str) -> None:
        """A line of the story that is no input and no output: a fault, say."""
        self.trace.note(self.now, machine, "!", text.encode(), text)


def check(holds: bool, message: str) -> None:
    """Raise `Violation` unless something holds."""
    if not holds:
        raise Violation(message)
