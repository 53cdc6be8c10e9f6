"""Step frames between nodes of one machine: Unix sockets, without a thread of their own.

ZeroMQ passes each frame through a thread of its own at either end, and these compete for the cores
with those that compute. A local link needs none: what is sent is with the peer when `send` returns.
It is a second way for the frames of a step link, in the same topology: a node listens for frames,
and connects to each peer that it sends to. As in `transport`, frames are bytes, nothing blocks, and
whose a connection is says the first frame on it (LINK_OPEN). Section 10.5 of `proto_spec.md`.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

import zmq

from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_NODES, MAX_STEP_BYTES
from p2pinfer.transport import Frame
from p2pinfer.wire.codec import HEADER, frame_length

MAX_INCOMING: Final = 2 * MAX_NODES
"""Connections of others: each peer has one, and one more while it is restarted."""

MAX_UNSENT_BYTES: Final = MAX_STEP_BYTES
"""A link on which more waits for its peer takes no frame."""

READ_BYTES: Final = 1 << 18
"""Of small frames, read at once."""

READS: Final = 64
"""Of one connection, before the others have their turn."""

BUFFER_BYTES: Final = 4 << 20
"""Asked of the kernel, which gives as much of it as it lets anybody have (`net.core.wmem_max`)."""

_CREDENTIALS: Final = struct.Struct("=iII")
"""pid, uid, gid: `struct ucred` of unix(7)."""

Arrival = tuple[bytes, bytes | memoryview | None]
"""(route, frame); None in the place of a frame: this connection has ended."""


def local_address(boot_id: str) -> str:
    """Where a node listens in this boot of it: a name in the abstract namespace.

    That is one of each network namespace, so nobody is found who could not be reached by TCP, and
    nothing stays behind of a process that was killed.
    """
    return f"\0p2pinfer/steps/{boot_id}"


class _Outgoing:
    """Our connection to one peer, and what of the frames for it did not fit yet."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0

    def send(self, frame: Frame) -> bool:
        """Send a frame or keep the rest of it. False: too much waits. Raises `OSError`: broken."""
        if self.unsent_bytes > MAX_UNSENT_BYTES:
            return False
        self.flush()
        sent = 0
        if not self.unsent:
            with suppress(BlockingIOError):
                sent = self.link.send(frame)
        if sent < len(frame):
            rest = memoryview(frame)[sent:]
            self.unsent.append(rest if isinstance(frame, bytes) else memoryview(bytes(rest)))
            self.unsent_bytes += len(rest)
        return True

    def flush(self) -> None:
        """Send on what was kept, as far as it goes now. Raises `OSError` when the link broke."""
        while self.unsent:
            first = self.unsent[0]
            try:
                sent = self.link.send(first)
            except BlockingIOError:
                return
            self.unsent_bytes -= sent
            if sent < len(first):
                self.unsent[0] = first[sent:]
            else:
                self.unsent.popleft()


class _Incoming:
    """A peer's connection to us, cut into frames."""

    def __init__(self, link: socket.socket, route: bytes) -> None:
        self.link = link
        self.route = route
        self._start = b""
        """Of the next frame, less than a header."""
        self._frame = memoryview(b"")
        """Of a frame that is not whole yet: memory for all of it."""
        self._filled = 0

    def read(self, scratch: memoryview, arrived: deque[Arrival]) -> None:
        """Append what has come, and the end of the connection after it.

        What cannot be the header of a frame is handed on as one, for the receiver to count, and
        ends the connection: nothing says where the next frame would begin.
        """
        for _ in range(READS):
            free = self._frame[self._filled :] if self._frame else scratch
            try:
                size = self.link.recv_into(free)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size == 0:
                arrived.append((self.route, None))
                return
            if self._frame:
                self._filled += size
                if self._filled == len(self._frame):
                    arrived.append((self.route, self._frame.toreadonly()))
                    self._frame = memoryview(b"")
            elif not self.cut(self._start + scratch[:size], arrived):
                return
            if size < len(free):
                return

    def cut(self, data: bytes, arrived: deque[Arrival]) -> bool:
        """Append the frames of what has come since the last whole one, as `read` does. False: the
        connection is to end."""
        at = 0
        while len(data) - at >= HEADER.size:
            try:
                end = at + frame_length(data[at : at + HEADER.size])
            except RemoteProtocolError:
                arrived += (self.route, data[at : at + HEADER.size]), (self.route, None)
                return False
            if end > len(data):
                self._frame = memoryview(bytearray(end - at))
                self._filled = len(data) - at
                self._frame[: self._filled] = data[at:]
                at = len(data)
            else:
                arrived.append((self.route, data[at:end]))
                at = end
        self._start = data[at:]
        return True

    @property
    def within_frame(self) -> bool:
        """Whether a part of a frame has come, and the rest of it has not."""
        return bool(self._frame) or bool(self._start)


class LocalLinks:
    """One listening socket to receive and one connection per peer to send, for one thread.

    Until `listen` it connects to nobody, and nobody to it. Registers with `poller` what is to be
    waited for: file descriptors that `poller` reports are for `read`.
    """

    def __init__(self, poller: zmq.Poller) -> None:
        self._poller = poller
        self._listener: socket.socket | None = None
        self._outgoing: dict[str, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._waiting: dict[int, str] = {}
        """Boot ids of peers that take no more for now, by file descriptor."""
        self._given_up: set[str] = set()
        self._by_route: dict[bytes, _Incoming] = {}
        self._arrived: deque[Arrival] = deque()
        self._accepted = 0
        self._scratch = memoryview(bytearray(READ_BYTES))

    # --- connections ------------------------------------------------------------------------------

    def listen(self, boot_id: str) -> None:
        """Let peers of this machine connect; where that cannot be had there are no local links."""
        if sys.platform != "linux":
            return  # neither abstract names nor SO_PEERCRED
        try:
            listener = _socket()
        except OSError:
            return
        try:
            listener.bind(local_address(boot_id))
            listener.listen(MAX_INCOMING)
        except OSError:
            listener.close()
            return
        self._listener = listener
        self._poller.register(listener.fileno(), zmq.POLLIN)

    def reach(self, boot_ids: Iterable[str]) -> None:
        """Connect to the peers, by the boot ids of their nodes, that are on this machine and run by
        this user; connections to others are closed."""
        wanted = set(boot_ids)
        for boot_id in self._outgoing.keys() - wanted:
            self._close(boot_id)
        self._given_up &= wanted
        if self._listener is None:
            return
        for boot_id in sorted(wanted - self._outgoing.keys() - self._given_up):
            link = _connect(boot_id)
            if link is not None:
                self._outgoing[boot_id] = _Outgoing(link)

    def reaches(self, boot_id: str) -> bool:
        """Whether there is a connection to send on."""
        return boot_id in self._outgoing

    def give_up(self, boot_id: str) -> None:
        """Send nothing more to that boot of a peer: a connection with it broke."""
        self._given_up.add(boot_id)
        self._close(boot_id)

    def shutdown(self) -> None:
        """Close every socket, and drop what they hold. Safe to call twice."""
        self._stop_listening()
        for boot_id in tuple(self._outgoing):
            self._close(boot_id)
        for descriptor in tuple(self._incoming):
            self._end(descriptor)

    # --- frames -----------------------------------------------------------------------------------

    def send(self, boot_id: str, frame: Frame) -> bool:
        """Send a frame, or keep what does not fit until `read`; memory that is not bytes is the
        caller's again.

        False: there is no connection to that peer, it broke, or too much waits for the peer; the
        peer is then given up.
        """
        peer = self._outgoing.get(boot_id)
        if peer is None:
            return False
        try:
            taken = peer.send(frame)
        except OSError:
            taken = False
        if not taken:
            self.give_up(boot_id)
            return False
        descriptor = peer.link.fileno()
        if peer.unsent and descriptor not in self._waiting:
            self._waiting[descriptor] = boot_id
            self._poller.register(descriptor, zmq.POLLOUT)
        return True

    def read(self, ready: Collection[object] | None = None) -> None:
        """Take in what has come and send on what was kept, for these file descriptors, or all."""
        for descriptor, boot_id in tuple(self._waiting.items()):
            if ready is None or descriptor in ready:
                self._send_on(descriptor, boot_id)
        for descriptor, peer in tuple(self._incoming.items()):
            if ready is None or descriptor in ready:
                peer.read(self._scratch, self._arrived)
                if self._arrived and self._arrived[-1] == (peer.route, None):
                    self._end(descriptor)
        if self._listener and (ready is None or self._listener.fileno() in ready):
            self._accept(self._listener)

    def glance(self, patience_s: float) -> bool:
        """Take in what has come, without sleeping; returns whether there was anything.

        For `patience_s` seconds it looks again and again. Who sleeps is woken late: another process
        has taken the core meanwhile, or the host of a virtual machine has.
        """
        until = time.perf_counter() + patience_s
        while True:
            self.read(self._incoming)
            if self._arrived or time.perf_counter() >= until:
                return bool(self._arrived)

    def receive_into(self, route: bytes, memory: memoryview, until: float) -> int:
        """Receive what comes next on a connection, at most as much as `memory` holds.

        Returns how many bytes came `until` that time (monotonic), without sleeping; 0 also where
        something that came before is still to be received, and where the connection has ended,
        which `read` will tell.
        """
        peer = self._by_route.get(route)
        if peer is None or self._arrived or peer.within_frame:
            return 0
        while True:
            try:
                return peer.link.recv_into(memory)
            except BlockingIOError:
                if time.monotonic() >= until:
                    return 0
            except OSError:
                return 0

    def put_back(self, route: bytes, data: bytes) -> None:
        """What `receive_into` received is for `receive`, as if `read` had taken it in."""
        peer = self._by_route[route]
        if not peer.cut(data, self._arrived):
            self._end(peer.link.fileno())

    def receive(self) -> Arrival | None:
        """The next frame that `read` took in, or the end of a connection after its last one."""
        return self._arrived.popleft() if self._arrived else None

    # --- within -----------------------------------------------------------------------------------

    def _send_on(self, descriptor: int, boot_id: str) -> None:
        peer = self._outgoing[boot_id]
        try:
            peer.flush()
        except OSError:
            self.give_up(boot_id)
            return
        if not peer.unsent:
            del self._waiting[descriptor]
            self._poller.unregister(descriptor)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                link, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # No file descriptor is left: the listener would stay readable, and those who wait
                # behind it are told by its end that there are no local links.
                self._stop_listening()
                return
            if len(self._incoming) >= MAX_INCOMING or not _same_user(link):
                link.close()
                continue
            link.setblocking(False)
            self._accepted += 1
            route = b"local" + self._accepted.to_bytes(8, "little")
            self._incoming[link.fileno()] = self._by_route[route] = _Incoming(link, route)
            self._poller.register(link.fileno(), zmq.POLLIN)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._poller.unregister(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _close(self, boot_id: str) -> None:
        peer = self._outgoing.pop(boot_id, None)
        if peer is None:
            return
        if self._waiting.pop(peer.link.fileno(), None) is not None:
            self._poller.unregister(peer.link.fileno())
        peer.link.close()

    def _end(self, descriptor: int) -> None:
        peer = self._incoming.pop(descriptor)
        del self._by_route[peer.route]
        self._poller.unregister(descriptor)
        peer.link.close()


def _socket() -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.setblocking(False)
    return link


def _connect(boot_id: str) -> socket.socket | None:
    """A connection to the node of that boot; None where it is not here, or not this user's."""
    try:
        link = _socket()
    except OSError:
        return None
    with suppress(OSError):
        link.connect(local_address(boot_id))
        if _same_user(link):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            return link
    link.close()
    return None


def _same_user(link: socket.socket) -> bool:
    """Whether who connected, or listened, does so as the user of this process."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return bool(uid == os.geteuid())
