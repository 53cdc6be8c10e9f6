"""A toy worker's bulk socket: what `SocketPair` is, over simulated connections.

The true `BulkLinks` sits on it, since they never wait.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from p2pinfer.transport import LinkEvent, LinkKind
from p2pinfer.wire.codec import decode
from p2pinfer.wire.messages import KvDelta, KvRequest, Message, Plane

if TYPE_CHECKING:
    from tests.simulation.machine import Process

QUEUED = 12
"""Frames that the socket holds; more stay on their way."""

Question = tuple[int, int, int, int]
"""Request, stage, unit and first position of KV that was asked for."""


class ToyPair:
    """Frames that came and were not read yet, and what became of links."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._network = process.network
        self._frames: deque[tuple[bytes, bytes]] = deque()
        self._events: list[LinkEvent] = []
        self._open: dict[str, bool] = {}
        """By address: whether the link is up, as far as `events` has told."""
        self.asked: dict[Question, None] = {}
        """Questions on their way, or on the way back."""
        self.answered = 0

    # --- what the network does --------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether it takes no more frames."""
        return len(self._frames) >= QUEUED

    def arrived(self, route: bytes, frame: bytes) -> None:
        """A frame came."""
        self._frames.append((route, frame))

    def changed(self, address: str, *, up: bool) -> None:
        """A link is connected, or broke."""
        kind = LinkKind.UP if up else LinkKind.DOWN
        self._events.append(LinkEvent(address, kind))

    # --- as SocketPair ----------------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[str, ...]:
        """Links that are open, connected or not."""
        return tuple(self._open)

    def open(self, address: str) -> None:
        """Connect, and go on trying."""
        if address not in self._open:
            self._open[address] = False
            self._network.open(self._process, Plane.BULK, address)

    def close(self, address: str) -> None:
        """Close the link at once."""
        if address in self._open:
            del self._open[address]
            self._network.close(self._process, Plane.BULK, address)

    def is_up(self, address: str) -> bool:
        """Whether a link is connected, as far as `events` has told."""
        return self._open.get(address, False)

    def send(self, address: str, frame: bytes) -> bool:
        """Queue a frame. False: the queue is full, or the link is down."""
        sent = self._network.send(self._process, Plane.BULK, address, frame)
        message = self._note("bulk>" if sent else "bulk!", frame)
        if isinstance(message, KvRequest):
            self.asked[_question(message)] = None
            self._process.world.moment("KvRequest", self._process.number)
        elif isinstance(message, KvDelta) and not sent:
            self._process.world.count("delta KV was lost")
        return sent

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (route, frame), if there is one."""
        if not self._frames:
            return None
        was_full = self.full
        route, frame = self._frames.popleft()
        message = self._note("bulk<", frame)
        if isinstance(message, KvDelta) and _question(message) in self.asked:
            del self.asked[_question(message)]
            self.answered += 1
            self._process.world.count("a question for KV was answered")
        if was_full:
            self._network.resumed(self._process, Plane.BULK)
        return route, frame

    def events(self) -> list[LinkEvent]:
        """What became of links since the last call."""
        events = [event for event in self._events if event.address in self._open]
        self._events.clear()
        for event in events:
            self._open[event.address] = event.kind is LinkKind.UP
        return events

    def _note(self, what: str, frame: bytes) -> Message:
        process = self._process
        message = decode(frame, Plane.BULK)
        process.world.trace.note(process.world.now, process.number, what, frame, message)
        return message


def _question(message: KvRequest | KvDelta) -> Question:
    return message.request_id, message.stage, message.unit, message.start
