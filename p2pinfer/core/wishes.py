"""Clients of this node that wait for a member to do something: to leave, to pause, to go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from p2pinfer.core.events import ReplyTo
from p2pinfer.core.outbox import Outbox
from p2pinfer.wire.messages import Done, Drain, Pause

GRACE_S = 2.0
"""How much longer than `drain_timeout` the asked node waits for another one to hand over."""

MAX_WISHES = 64
"""Clients that wait for a member; the oldest is turned away first."""


Asked = TypeVar("Asked", Drain, Pause)


@dataclass(frozen=True, slots=True)
class Wish(Generic[Asked]):
    """A client, by its route, waits until `until` for the member `node_id` to do as it asked."""

    route: bytes
    message: Asked
    node_id: str
    until: float


class Wishes(Generic[Asked]):
    """Those not answered yet, the oldest first. Times in seconds."""

    def __init__(self, drain_timeout: float, box: Outbox) -> None:
        self._patience = drain_timeout + GRACE_S
        self._box = box
        self._waiting: list[Wish[Asked]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def deadline(self) -> float:
        """When the first of them has waited long enough."""
        return min((wish.until for wish in self._waiting), default=inf)

    def add(self, message: Asked, route: bytes, node_id: str, now: float) -> None:
        """Another client waits."""
        self._waiting.append(Wish(route, message, node_id, now + self._patience))
        while len(self._waiting) > MAX_WISHES:
            reason = f"{MAX_WISHES} such wishes have come since"
            self.fail(self._waiting.pop(0), "overloaded", reason)

    def take(self, which: Callable[[Wish[Asked]], bool]) -> list[Wish[Asked]]:
        """Those that are to be answered now: they wait no more."""
        taken: list[Wish[Asked]] = []
        waiting: list[Wish[Asked]] = []
        for wish in self._waiting:
            (taken if which(wish) else waiting).append(wish)
        self._waiting = waiting
        return taken

    def about(self, node_id: str) -> list[Wish[Asked]]:
        """Those about a member, which wait no more."""
        return self.take(lambda wish: wish.node_id == node_id)

    def too_old(self, now: float) -> list[Wish[Asked]]:
        """Those that have waited long enough, and wait no more."""
        return self.take(lambda wish: now >= wish.until)

    def turn_away(self, reason: str) -> None:
        """This node leaves: whoever still waits is told, and may ask another."""
        for wish in self.take(lambda wish: True):
            self.fail(wish, "leaving", reason)

    def done(self, wish: Wish[Asked]) -> None:
        """Answer a client that it is as it asked."""
        done = Done(request_id=wish.message.request_id)
        self._box.add(ReplyTo(route=wish.route, message=done))

    def fail(self, wish: Wish[Asked], code: str, reason: str) -> None:
        """Answer a client that it will not be as it asked."""
        self.refuse(wish.message, wish.route, code, reason)

    def refuse(self, message: Asked, route: bytes, code: str, reason: str) -> None:
        """Answer a client that does not begin to wait."""
        self._box.refuse(route, message.request_id, code, reason)
