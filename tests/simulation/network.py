"""Simulated connections: each keeps the order of what it carries, and loses what it holds when it
breaks, as TCP under ZeroMQ does.

A frame waits where its way is cut or its receiver stands still, and arrives late. Out of order, or
twice, frames come only over two connections: the old one's last frames after the new one's first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from p2pinfer.wire.codec import decode
from p2pinfer.wire.messages import KvDelta, Plane

if TYPE_CHECKING:
    from tests.simulation.world import World

RECONNECT_S = 0.05
RECONNECT_MAX_S = 1.0
SILENT_S = 5.0
"""A connection that carries nothing for so long is closed by ZeroMQ's own pings."""

PROBE_S = 1.0
HWM = {Plane.CONTROL: 1000, Plane.STEPS: 1000, Plane.BULK: 24}
"""Frames that wait for each connection and way."""

LATENCY_S = (0.0003, 0.003)


class Process(Protocol):
    """A running node, as the network sees it."""

    number: int
    """The number of its machine."""

    alive: bool

    def accepts(self) -> bool:
        """Whether its sockets answer (a process that is stopped as a whole does not)."""

    def reads(self, plane: Plane) -> bool:
        """Whether it takes frames out of its queues."""

    def link_up(self, plane: Plane, address: str) -> None:
        """Its link is connected."""

    def link_down(self, plane: Plane, address: str) -> None:
        """Its link lost its connection."""

    def arrived(self, plane: Plane, route: bytes, link: str, frame: bytes) -> None:
        """A frame came over a connection to it (`route`), or back over its own link."""


class Lane:
    """One direction of a connection."""

    __slots__ = ("arrives", "connection", "held_until", "owed", "queue", "receiver", "sender")

    def __init__(self, connection: Connection, sender: Process, receiver: Process) -> None:
        self.connection = connection
        self.sender = sender
        self.receiver = receiver
        self.queue: deque[bytes] = deque()
        self.arrives = 0.0
        self.held_until = 0.0
        """Nothing that is on its way arrives sooner."""
        self.owed = 0
        """Frames whose time has come, but not their way or their receiver."""


class Connection:
    """What a dialer has to a listener; `grace` is until when a broken one still delivers."""

    __slots__ = ("back", "dial", "forth", "grace", "number", "plane", "route", "up")

    def __init__(self, number: int, dial: Dial, listener: Process) -> None:
        self.number = number
        self.dial = dial
        self.plane = dial.plane
        self.route = b"r%d" % number
        self.up = True
        self.grace = -1.0
        self.forth = Lane(self, dial.process, listener)
        self.back = Lane(self, listener, dial.process)


class Dial:
    """A link that a process wants: ZeroMQ goes on connecting."""

    __slots__ = ("address", "again", "closed", "connection", "plane", "process", "retry_s")

    def __init__(self, process: Process, plane: Plane, address: str) -> None:
        self.process = process
        self.plane = plane
        self.address = address
        self.connection: Connection | None = None
        self.retry_s = RECONNECT_S
        self.closed = False
        self.again: list[bytes] = []
        """Frames of the connection before that come once more over the next one."""


Cut = tuple[int, int, Plane]
"""From machine, to machine, plane."""


class Network:
    """All links of all processes. Addresses are those that processes listen on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.listeners: dict[tuple[Plane, str], Process] = {}
        self.machines: dict[str, int] = {}
        """Machine numbers by address, either plane's."""

        self.dark: set[int] = set()
        """Machines without power: nothing answers, nothing refuses."""

        self.hwm: dict[int, int] = {}
        self.slow: dict[Cut, float] = {}
        """Seconds added to each frame's way."""

        self.losing: dict[Cut, Callable[[bytes], bool]] = {}
        """The next frame like that vanishes; its connection stays."""

        self._cuts: dict[Cut, int] = {}
        self._dials: dict[tuple[Process, Plane, str], Dial] = {}
        self._connections: dict[bytes, Connection] = {}
        self._numbers = 0
        self._random = world.stream("network")

    # --- what processes do ------------------------------------------------------------------------

    def listen(self, process: Process, plane: Plane, address: str) -> None:
        """A process listens; what was connected to this address before breaks."""
        for connection in self._of(address, plane):
            self.break_connection(connection)
        self.listeners[plane, address] = process
        self.machines[address] = process.number

    def open(self, process: Process, plane: Plane, address: str) -> None:
        """Connect, and go on trying."""
        assert (process, plane, address) not in self._dials, "a link is opened twice"
        dial = self._dials[process, plane, address] = Dial(process, plane, address)
        self.world.later(2 * self._random.uniform(*LATENCY_S), self._connect, dial)

    def close(self, process: Process, plane: Plane, address: str, linger_s: float = 0.0) -> None:
        """Close a link at once; what is on its way may still arrive, within `linger_s` it does."""
        dial = self._dials.pop((process, plane, address), None)
        if dial is not None:
            dial.closed = True
            if dial.connection is not None:
                self._end(dial.connection, linger_s or self._random.uniform(0, 0.005))

    def send(self, process: Process, plane: Plane, address: str, frame: bytes) -> bool:
        """Queue a frame on a link; False: it is not connected, or its queue is full."""
        dial = self._dials.get((process, plane, address))
        if dial is None or dial.connection is None:
            return False
        return self._push(dial.connection.forth, frame)

    def reply(self, process: Process, route: bytes, frame: bytes) -> bool:
        """Queue a frame on the connection that `route` names."""
        connection = self._connections.get(route)
        if connection is None or connection.back.sender is not process:
            return False
        return self._push(connection.back, frame)

    def probe(self, process: Process, address: str) -> tuple[float, bool]:
        """How long a fresh connect takes, and whether it is refused."""
        machine = self.machines.get(address, process.number)
        if machine in self.dark or self._blocked_either_way(process.number, machine, Plane.CONTROL):
            return PROBE_S, False
        listener = self.listeners.get((Plane.CONTROL, address))
        return 2 * self._random.uniform(*LATENCY_S), listener is None or not listener.alive

    # --- what happens to processes ----------------------------------------------------------------

    def died(self, process: Process, *, silent: bool, linger_s: float = 0.0) -> None:
        """A process is gone. `silent`: its machine lost its power, so nobody is told.

        `linger_s`: it ended in good order, and its last words may take so long.
        """
        for key in [key for key in self._dials if key[0] is process]:
            self.close(*key, linger_s)
        for connection in tuple(self._connections.values()):
            if connection.forth.receiver is process:
                if silent:
                    wait = SILENT_S + self._random.random()
                    self.world.later(wait, self.break_connection, connection)
                else:
                    self.break_connection(connection)

    def resumed(self, process: Process, plane: Plane) -> None:
        """A process reads again: it gets what waits for it, connection by connection."""
        for connection in tuple(self._connections.values()):
            if connection.plane is plane:
                for lane in (connection.back, connection.forth):
                    if lane.receiver is process:
                        self._catch_up(lane, at_once=True)

    # --- faults -----------------------------------------------------------------------------------

    def connections(self, *machines: int) -> list[Connection]:
        """Living connections; with `machines` those with an end on one of them."""
        return [
            c
            for c in self._connections.values()
            if not machines
            or c.forth.sender.number in machines
            or c.forth.receiver.number in machines
        ]

    def break_connection(
        self, connection: Connection, *, late_s: float = 0.0, twice: bool = False
    ) -> None:
        """Reset: what is on its way is lost or, for `late_s`, still comes over the old connection.

        `twice`: control messages that were on their way also come over the next connection.
        """
        if not connection.up:
            return
        dial = connection.dial
        if twice and connection.plane is Plane.CONTROL:
            dial.again = list(connection.forth.queue)
        for lane in (connection.forth, connection.back) if late_s else ():
            lane.held_until = self.world.now + self._random.uniform(0, late_s)
        self._end(connection, late_s or self._random.uniform(0, 0.002))
        if dial.process.alive and not dial.closed:
            self.world.later(self._random.uniform(0, 0.01), self._went_down, dial)

    def cut(self, source: int, target: int, plane: Plane) -> None:
        """Nothing passes in that direction any more; nobody is told."""
        key = (source, target, plane)
        self._cuts[key] = self._cuts.get(key, 0) + 1
        for lane in self._lanes(key):
            self.world.later(SILENT_S + self._random.random(), self._silent, lane.connection, key)

    def heal(self, source: int, target: int, plane: Plane, *, reset: bool) -> None:
        """The way is free again: what waited arrives, or is lost with its connection."""
        key = (source, target, plane)
        self._cuts[key] = max(0, self._cuts.get(key, 0) - 1)
        if self._cuts[key]:
            return
        for lane in self._lanes(key):
            if reset:
                self.break_connection(lane.connection)
            else:
                self._catch_up(lane, at_once=False)

    def blocked(self, source: int, target: int, plane: Plane) -> bool:
        """Whether nothing passes from one machine to another."""
        if not (self._cuts or self.dark):
            return False
        return bool(self._cuts.get((source, target, plane))) or bool(self.dark & {source, target})

    # --- the rest ---------------------------------------------------------------------------------

    def _blocked_either_way(self, one: int, other: int, plane: Plane) -> bool:
        return self.blocked(one, other, plane) or self.blocked(other, one, plane)

    def _connect(self, dial: Dial) -> None:
        if dial.closed or dial.connection is not None or not dial.process.alive:
            return
        process, target = dial.process, self.listeners.get((dial.plane, dial.address))
        if (
            target is None
            or not target.alive
            or not target.accepts()
            or not process.accepts()
            or self._blocked_either_way(process.number, target.number, dial.plane)
        ):
            dial.retry_s = min(2 * dial.retry_s, RECONNECT_MAX_S)
            self.world.later(dial.retry_s * self._random.uniform(0.9, 1.1), self._connect, dial)
            return
        dial.retry_s = RECONNECT_S
        self._numbers += 1
        connection = dial.connection = Connection(self._numbers, dial, target)
        self._connections[connection.route] = connection
        process.link_up(dial.plane, dial.address)
        again, dial.again = dial.again, []
        for frame in again:
            self._push(connection.forth, frame)

    def _went_down(self, dial: Dial) -> None:
        if not dial.closed and dial.process.alive:
            dial.process.link_down(dial.plane, dial.address)
            self.world.later(dial.retry_s * self._random.uniform(0.9, 1.1), self._connect, dial)

    def _end(self, connection: Connection, grace_s: float) -> None:
        connection.up = False
        connection.grace = self.world.now + grace_s
        if connection.dial.connection is connection:
            connection.dial.connection = None
        self._connections.pop(connection.route, None)

    def _push(self, lane: Lane, frame: bytes) -> bool:
        sender, receiver = lane.sender.number, lane.receiver.number
        plane = lane.connection.plane
        hwm = HWM[plane]
        if len(lane.queue) >= min(self.hwm.get(sender, hwm), self.hwm.get(receiver, hwm)):
            return False
        if self.losing and self._loses((sender, receiver, plane), frame):
            return True
        lane.queue.append(frame)
        latency = self._random.uniform(*LATENCY_S)
        if self.slow:
            latency += self.slow.get((sender, receiver, plane), 0.0)
        lane.arrives = max(lane.arrives, self.world.now + latency)
        self.world.at(lane.arrives, self._arrive, lane)
        return True

    def _loses(self, key: Cut, frame: bytes) -> bool:
        loses = self.losing.get(key)
        if loses is None or not loses(frame):
            return False
        del self.losing[key]
        self.world.count("a frame was lost on a link that stayed")
        self._lost(key[2], [frame])
        return True

    def _lost(self, plane: Plane, frames: Iterable[bytes]) -> None:
        """Frames will never arrive; of bulk, nothing else tells of it."""
        if plane is Plane.BULK:
            for frame in frames:
                delta = isinstance(decode(frame, plane), KvDelta)
                self.world.count("delta KV was lost" if delta else "credit or a question was lost")

    def _arrive(self, lane: Lane) -> None:
        connection, receiver = lane.connection, lane.receiver
        if self.world.now < lane.held_until:
            self.world.at(lane.held_until, self._arrive, lane)
            return
        if not connection.up and self.world.now > connection.grace:
            self._lost(connection.plane, lane.queue)
            lane.queue.clear()
            return
        if not lane.queue or not receiver.alive:
            return
        if not receiver.reads(connection.plane) or self.blocked(
            lane.sender.number, receiver.number, connection.plane
        ):
            lane.owed += 1
            return
        frame = lane.queue.popleft()
        if lane is connection.forth:
            receiver.arrived(connection.plane, connection.route, "", frame)
        else:
            receiver.arrived(connection.plane, b"", connection.dial.address, frame)

    def _catch_up(self, lane: Lane, *, at_once: bool) -> None:
        owed, lane.owed = lane.owed, 0
        for _ in range(owed):
            if at_once:
                self._arrive(lane)
            else:
                lane.arrives = max(lane.arrives, self.world.now + self._random.uniform(*LATENCY_S))
                self.world.at(lane.arrives, self._arrive, lane)

    def _silent(self, connection: Connection, key: Cut) -> None:
        if connection.up and self._cuts.get(key):
            self.break_connection(connection)

    def _lanes(self, key: Cut) -> Iterator[Lane]:
        source, target, plane = key
        for connection in tuple(self._connections.values()):
            if connection.plane is plane:
                for lane in (connection.forth, connection.back):
                    if (lane.sender.number, lane.receiver.number) == (source, target):
                        yield lane

    def _of(self, address: str, plane: Plane) -> list[Connection]:
        return [
            c for c in self._connections.values() if c.plane is plane and c.dial.address == address
        ]
