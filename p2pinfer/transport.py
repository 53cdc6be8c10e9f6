"""ZeroMQ, and nothing else: one ROUTER to receive and one DEALER per peer to send (ZRE's topology).

Knows no message: frames are bytes. No call blocks; a full queue is a value that the caller sees.
A connection is anonymous here: the receiving ROUTER draws a fresh routing id ("route") for each new
connection, so a restarted or reconnected peer is never taken for its former self, no peer can take
over another's route (which is why ROUTER_HANDOVER stays off), and a reply to a connection that is
gone fails visibly. Who is behind a route is said by the first message on it (HELLO, LINK_OPEN).
"""

from __future__ import annotations

import errno
from collections.abc import Container, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from p2pinfer.errors import UsageError

Frame = bytes | memoryview

HEARTBEAT_MS: Final = 1_000
"""ZMTP pings find half-open connections (a cable pulled, a host without power). They come from
libzmq's own thread, so a busy Python loop does not look dead. Members die by the core's heartbeats
much earlier; this only makes the socket itself notice. TCP_KEEPALIVE would add nothing."""

HEARTBEAT_TIMEOUT_MS: Final = 5_000
"""Long enough for one large frame on a slow line, which a ping must wait behind."""

RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 1_000
"""Doubling from 50 ms to 1 s: a restarted peer is met again within a second, one that stays away
costs a connect per second."""

HANDSHAKE_MS: Final = 2_000
"""A stranger that connects and says nothing (a port scanner) holds a connection that long."""

CONNECT_TIMEOUT_MS: Final = 2_000
"""A host that drops our SYN is tried again after that, not after the kernel's two minutes."""

BACKLOG: Final = 128
"""All peers and many clients may connect in the same instant."""

_WATCHED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)


class PairLimits(NamedTuple):
    """What one peer may make this process hold: bytes of one frame, frames queued per peer."""

    max_message_bytes: int
    send_hwm: int
    recv_hwm: int


class LinkKind(StrEnum):
    """What a monitor said of a connection."""

    UP = "up"
    DOWN = "down"
    HANDSHAKE_FAILED = "handshake_failed"
    RETRIED = "retried"


class LinkEvent(NamedTuple):
    """A fact about our link to `address`; with an empty address, about somebody's link to us.

    `RETRIED`: a connect was refused or timed out, and libzmq goes on trying. `DOWN` follows an `UP`
    only. Inbound connections say `HANDSHAKE_FAILED` and `DOWN` (of which connection is unknown).
    """

    address: str
    kind: LinkKind


class Reply(StrEnum):
    """What became of a frame for a route."""

    SENT = "sent"
    FULL = "full"
    GONE = "gone"


class _Link:
    """One DEALER connected to one peer, with its monitor."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, limits: PairLimits):
        self.address = address
        self.up = False
        self.dealer = _socket(context, zmq.DEALER, limits)
        # Only connected peers take frames: none pile up for somebody who is away, and a frame
        # is never delivered to the next process that answers at this address.
        self.dealer.setsockopt(zmq.IMMEDIATE, 1)
        self.dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self.dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        self.dealer.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        if "[" in address:
            # Only for literal IPv6: with it on, `localhost` may mean ::1 where only 127.0.0.1
            # is listened on.
            self.dealer.setsockopt(zmq.IPV6, 1)
        self.monitor = self.dealer.get_monitor_socket(_WATCHED)
        try:
            self.dealer.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"cannot connect to {address}: {error.strerror}") from error

    def events(self) -> Iterator[LinkEvent]:
        for event in _monitored(self.monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.up = True
                yield LinkEvent(self.address, LinkKind.UP)
            elif event == zmq.EVENT_CONNECT_RETRIED:
                yield LinkEvent(self.address, LinkKind.RETRIED)
            elif event != zmq.EVENT_DISCONNECTED:
                yield LinkEvent(self.address, LinkKind.HANDSHAKE_FAILED)
            elif self.up:
                self.up = False
                yield LinkEvent(self.address, LinkKind.DOWN)

    def close(self, linger_ms: int = 0) -> None:
        _close(self.dealer, self.monitor, linger_ms)


class SocketPair:
    """One ROUTER to receive and one DEALER per peer to send, for one plane of one process.

    For one thread. `version` grows whenever `pollables()` changes. `malformed` counts messages that
    were not one frame (never handed on).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *, limits: PairLimits) -> None:
        self._context = context
        self._limits = limits
        self._links: dict[str, _Link] = {}
        self.version = 0
        self.malformed = 0
        self.router = _socket(context, zmq.ROUTER, limits)
        # Without it a frame for a route that is gone or full is dropped silently.
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.BACKLOG, BACKLOG)
        self._router_monitor = self.router.get_monitor_socket(_WATCHED)

    def bind(self, host: str, port: int) -> None:
        """Listen on `tcp://host:port`.

        Raises `UsageError` when the port is taken or the host is no address of this machine.
        """
        if ":" in host:
            self.router.setsockopt(zmq.IPV6, 1)
            host = f"[{host.strip('[]')}]"
        try:
            self.router.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} is taken on {host}: another node may be running there; "
                    "stop it or choose another address with --listen"
                ) from error
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror}; "
                "--listen takes an address of this machine, or 0.0.0.0 for all of them"
            ) from error

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of the links that are open, connected or not."""
        return tuple(self._links)

    def open(self, address: str) -> None:
        """Connect to `tcp://host:port` and keep trying; does nothing when the link is open.

        Raises `UsageError` when the address is no address.
        """
        if address not in self._links:
            self._links[address] = _Link(self._context, address, self._limits)
            self.version += 1

    def close(self, address: str) -> None:
        """Close the link at once and drop what it holds; does nothing when there is none."""
        link = self._links.pop(address, None)
        if link is not None:
            link.close()
            self.version += 1

    def is_up(self, address: str) -> bool:
        """Whether our link to `address` is connected, as far as `events` has told."""
        link = self._links.get(address)
        return link is not None and link.up

    def send(self, address: str, frame: Frame) -> bool:
        """Queue a frame on our link. False: the queue is full, or no such link is connected."""
        link = self._links.get(address)
        if link is None:
            return False
        try:
            link.dealer.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def reply(self, route: bytes, frame: Frame) -> Reply:
        """Queue a frame on the connection that `route` names."""
        try:
            self.router.send_multipart((route, frame), zmq.DONTWAIT)
        except zmq.Again:
            return Reply.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return Reply.GONE
        return Reply.SENT

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (route, frame) that a peer or client sent us, or None."""
        while True:
            try:
                parts = self.router.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            if len(parts) == 2:
                return parts[0], parts[1]
            self.malformed += 1

    def receive_answers(
        self, ready: Container[zmq.Socket[bytes]] | None = None
    ) -> list[tuple[str, bytes]]:
        """All (address, frame) that came back on our own links; `ready` as for `events`."""
        answers = []
        for link in self._links.values():
            while ready is None or link.dealer in ready:
                try:
                    parts = link.dealer.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    break
                if len(parts) == 1:
                    answers.append((link.address, parts[0]))
                else:
                    self.malformed += 1
        return answers

    def events(self, ready: Container[zmq.Socket[bytes]] | None = None) -> list[LinkEvent]:
        """All facts about links since the last call, in order for each link.

        `ready` are those of `pollables()` that have something to read, if that is known: others
        are not looked at, which takes most of the time where nothing is new.
        """
        links = self._links.values()
        told = [link for link in links if ready is None or link.monitor in ready]
        found = [event for link in told for event in link.events()]
        if ready is not None and self._router_monitor not in ready:
            return found
        for event in _monitored(self._router_monitor):
            if event == zmq.EVENT_DISCONNECTED:
                found.append(LinkEvent("", LinkKind.DOWN))
            elif event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                found.append(LinkEvent("", LinkKind.HANDSHAKE_FAILED))
        return found

    def pollables(self) -> list[zmq.Socket[bytes]]:
        """Every socket that may have something to read."""
        sockets = [self.router, self._router_monitor]
        for link in self._links.values():
            sockets += [link.dealer, link.monitor]
        return sockets

    def shutdown(self, linger_ms: int = 0) -> None:
        """Close every socket. Safe to call twice.

        What is queued is dropped or, with `linger_ms`, may still leave in that time while the
        context ends (`zmq_ctx_term` waits for it): a goodbye, say.
        """
        for link in self._links.values():
            link.close(linger_ms)
        self._links.clear()
        self.version += 1
        if not self.router.closed:
            _close(self.router, self._router_monitor, linger_ms)


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, limits: PairLimits
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    # Closing never waits: whoever is told to leave leaves.
    socket.setsockopt(zmq.LINGER, 0)
    # Checked by libzmq from the frame's header, before memory is taken; the connection is dropped.
    socket.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
    socket.setsockopt(zmq.SNDHWM, limits.send_hwm)
    socket.setsockopt(zmq.RCVHWM, limits.recv_hwm)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    # The peer, too, closes its end when it hears nothing from us for that long.
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    # TCP_NODELAY is libzmq's own choice: a small frame leaves at once.
    return socket


def _monitored(monitor: zmq.Socket[bytes]) -> Iterator[int]:
    while True:
        try:
            parts = monitor.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return
        yield int(parse_monitor_message(parts)["event"])


def _close(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], linger_ms: int) -> None:
    socket.disable_monitor()
    monitor.close(0)
    socket.close(linger_ms)
