"""A client's connection to one node, for one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import zmq

from p2pinfer.errors import (
    ClusterError,
    InvalidRequestError,
    LocalProtocolError,
    RemoteProtocolError,
)
from p2pinfer.limits import MAX_CONTROL_BYTES
from p2pinfer.transport import LinkKind, PairLimits, SocketPair
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import ControlMessage, Plane

GOODBYE_MS: Final = 300
"""How long a CANCEL may take to leave when a call is broken off."""

_QUEUE: Final = 65_536
"""Frames held for a caller that handles events slowly; then the node holds them."""


@contextmanager
def client_sockets() -> Iterator[SocketPair]:
    """Sockets for one call, closed at its end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pair = SocketPair(context, limits=PairLimits(MAX_CONTROL_BYTES, _QUEUE, _QUEUE))
    try:
        yield pair
    finally:
        pair.shutdown(GOODBYE_MS)
        context.term()


class ClientLink:
    """The one open link of `pair`: to the node at `address`, which is connected to at once.

    Raises `UsageError` for an address that is none.
    """

    def __init__(self, pair: SocketPair, address: str) -> None:
        pair.open(address)
        self.address = address
        self._pair = pair
        self._answers: list[bytes] = []
        self._down = False
        self._poller = zmq.Poller()
        for each in pair.pollables():
            self._poller.register(each, zmq.POLLIN)

    def is_up(self, within: float) -> bool:
        """Wait until the node has answered the connect; False if it does not, or refuses."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            self._poll(deadline)
            for event in self._pair.events():
                if event.address:
                    return event.kind is LinkKind.UP
        return False

    def close(self) -> None:
        """Break the connection, and drop what has not left."""
        self._pair.close(self.address)

    def send(self, message: ControlMessage) -> None:
        """Queue a message; a connection that is gone shows when an answer is awaited."""
        try:
            self._pair.send(self.address, encode(message))
        except LocalProtocolError as error:
            raise InvalidRequestError(str(error)) from error

    def receive(self, within: float) -> ControlMessage | None:
        """The next message from the node; None when none comes within so many seconds.

        Raises `ClusterError` when the connection breaks, or what comes is no message.
        """
        deadline = time.monotonic() + within
        while not self._answers:
            self._poll(deadline)
            self._down |= any(event.kind is LinkKind.DOWN for event in self._pair.events())
            # What came before the connection broke still counts.
            self._answers = [frame for _, frame in self._pair.receive_answers()]
            if self._answers:
                break
            if self._down:
                raise _lost(f"the connection to the node at {self.address} broke")
            if time.monotonic() >= deadline:
                return None
        try:
            message = decode(self._answers.pop(0), Plane.CONTROL)
        except RemoteProtocolError as error:
            raise _lost(f"{self.address} does not speak as a node: {error}") from error
        assert isinstance(message, ControlMessage)
        return message

    def silent(self, seconds: float) -> ClusterError:
        """The error to raise when nothing came for so long."""
        return _lost(
            f"the node at {self.address} has been silent for {seconds:g} s: it hangs, or another "
            "program listens there"
        )

    def _poll(self, deadline: float) -> None:
        self._poller.poll(max(1, int((deadline - time.monotonic()) * 1000)))


def _lost(message: str) -> ClusterError:
    return ClusterError("node_lost", message, retryable=True)
