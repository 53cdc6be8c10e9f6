"""The step links of one node: frames of the plan in force go out, and are filed as they come in.

Frames for peers on this machine go by `local_links`, where a connection is there when a plan comes
into force; the link over TCP stays, and takes over with the next plan when the local one breaks.

What becomes of a frame is decided by `core/step_gate.py`. A link that breaks or comes back, and a
gap in its numbers, mean that frames were lost: nothing of ours sends again, so the step is broken,
and a new epoch is the cure. Only links that carry what a step needs count: a member without units
that the leader cannot reach is left out until the next plan (it is *deaf*).
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import zmq

from p2pinfer.core.echoes import Echoes
from p2pinfer.core.step_checks import StepMessage
from p2pinfer.core.step_gate import Drop, File, Gap, StepGate
from p2pinfer.core.step_paths import Trouble, may_stay_awake, needed, trouble
from p2pinfer.core.topology import Topology
from p2pinfer.errors import LinkBroken, RemoteProtocolError, StepBroken, StepOverdue
from p2pinfer.inbox import Inbox
from p2pinfer.local_links import LocalLinks
from p2pinfer.transport import Frame, LinkEvent, LinkKind, SocketPair
from p2pinfer.types import Member
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    Candidates,
    ControlMessage,
    DataFrame,
    EchoReply,
    EchoRequest,
    Hidden,
    LinkOpen,
    Logits,
    LogitsRequest,
    Message,
    Partial,
    Plane,
    Step,
    StepAck,
)
from p2pinfer.wire.partial_frame import PartialFrame

EVENTS_EVERY_S = 0.05
"""How often the monitors of the links are looked at: they stay off the path of a token."""

AWAKE_S = 0.001
"""Where all others are on this machine, and it has a core for each thread, a wait begins so long
without sleep: most sums of others are there by then."""

STEP_PORT_OFFSET = 1

LINK_TIMEOUT_S = 5.0
"""How long the links that a new plan's steps need may take to connect: a connect that is lost is
tried again after 2 s."""


Key = TypeVar("Key", int, tuple[int, int], tuple[int, int, int])
Filed = TypeVar("Filed")


@dataclass
class Traffic:
    """What this node sent and dropped, and how long it waited for others, in seconds."""

    messages: int = 0
    local_messages: int = 0
    bytes: int = 0
    dropped: int = 0
    wait_s: float = 0.0


def port_shifted(address: str, offset: int) -> str:
    """`tcp://host:port` with `offset` added to the port."""
    host, port = address.rsplit(":", 1)
    return f"{host}:{int(port) + offset}"


class StepLinks:
    """Sends to and hears from the other members of a plan. `me`: (node id, boot id).

    `interrupt` is called when the control plane's pipe becomes readable during a wait, and several
    times a second; it may raise to leave the wait. `on_pause` is called as often, waiting or not.
    """

    def __init__(
        self,
        pair: SocketPair,
        me: tuple[str, str],
        *,
        pipe_fd: int,
        interrupt: Callable[[], None],
        on_pause: Callable[[], None],
    ) -> None:
        self.pair = pair
        self.traffic = Traffic()
        self.inbox = Inbox()
        self.lost: list[str] = []
        """Node ids of members of a plan whose step link broke; the caller takes them out."""
        self.deaf: set[int] = set()
        """Members without units that can no longer be reached, on the leader."""
        self.on_ack: Callable[[int, int], None] | None = None
        """Called with (member, step) for each STEP_ACK; may raise `RemoteProtocolError`."""
        self.echoes = Echoes()
        self._idle = False
        """No step is in hand, and the links are waited on."""
        self._gate = StepGate(me)
        self._identity = me
        self._interrupt = interrupt
        self._on_pause = on_pause
        self._deadline = math.inf
        self._pipe_fd = pipe_fd
        self._poller = zmq.Poller()
        self._poller.register(pipe_fd, zmq.POLLIN)
        self._poller.register(pair.router, zmq.POLLIN)
        self.local = LocalLinks(self._poller)
        self._near: set[int] = set()
        """Members to whom all frames of the plan in force go over a local link."""
        self._patience_s = 0.0
        """How long local links are looked at before this node sleeps."""
        self._events_at = 0.0
        self._opening = b""
        self._opened: set[str] = set()
        """Addresses that know whose link this is since it is connected."""
        self._sequence_out: dict[int, int] = defaultdict(int)
        self._heard: dict[str, float] = {}

    def bind(self, host: str, port: int, *, local: bool) -> None:
        """Listen for peers, with `local` also for those on this machine; raises `UsageError`."""
        self.pair.bind(host, port)
        if local:
            self.local.listen(self._identity[1])

    def shutdown(self) -> None:
        """Close every socket at once. Safe to call twice."""
        self.local.shutdown()
        self.pair.shutdown()

    # --- plans ------------------------------------------------------------------------------------

    def reach(self, mine: Topology) -> None:
        """Begin to connect to every other member of a plan; links to others are closed.

        From now on frames of the plan in force are no longer accepted.
        """
        self.close()
        wanted = {self._address(mine.plan.members[i]) for i in mine.others}
        for address in tuple(self.pair.addresses):
            if address not in wanted:
                self.pair.close(address)
        for address in sorted(wanted):
            self.pair.open(address)
        self.local.reach(mine.plan.members[i].boot_id for i in mine.others)

    def open(self, mine: Topology) -> None:
        """Say to every other member of a plan, after `reach`, whose link this is.

        Frames of the plan are held from now on. Only links that its steps need are waited for:
        raises `StepBroken` when one of those does not connect within `LINK_TIMEOUT_S`.
        """
        plan = mine.plan
        self._gate.load(plan)
        node_id, boot_id = self._identity
        self._opening = encode(LinkOpen(node_id=node_id, boot_id=boot_id, fence=plan.fence))
        self._opened.clear()
        waited_for = needed(mine)
        deadline = time.monotonic() + LINK_TIMEOUT_S
        for index in mine.others:
            member = plan.members[index]
            self.local.send(member.boot_id, self._opening)
            address = self._address(member)
            while not self._introduce(address) and index in waited_for:
                if time.monotonic() > deadline:
                    raise StepBroken(
                        member.node_id,
                        f"no step link to {member.name} at {address}: is the port open?",
                    )
                self._poll(deadline)

    def _introduce(self, address: str) -> bool:
        """Say on a link whose it is, once it is connected; no frame goes before that."""
        if self.pair.send(address, self._opening):
            self._opened.add(address)
        return address in self._opened

    def activate(self, mine: Topology) -> None:
        """The plan given to `open` is in force: number frames from 0 and file those held."""
        self._sequence_out.clear()
        members = mine.plan.members
        self._near = {i for i in mine.others if self.local.reaches(members[i].boot_id)}
        self._patience_s = AWAKE_S if may_stay_awake(mine, self._near, os.cpu_count() or 1) else 0.0
        for route, message in self._gate.activate(mine):
            self._accept(route, 0, message)

    def close(self) -> None:
        """Stop obeying any plan; links stay connected."""
        self._gate.close()
        self.echoes.close(time.monotonic())
        self.inbox = Inbox()
        self.deaf = set()
        self.on_ack = None
        self._deadline = math.inf

    @staticmethod
    def _address(member: Member) -> str:
        return port_shifted(member.address, STEP_PORT_OFFSET)

    # --- sending ----------------------------------------------------------------------------------

    def next_sequence(self, member: int) -> int:
        """The number of the next frame to `member`."""
        number = self._sequence_out[member]
        self._sequence_out[member] = number + 1
        return number

    def send(self, member: int, message: Message) -> None:
        """Send one numbered frame; raises `StepBroken` when a link that is needed takes no more."""
        self._send(member, encode(message))

    def send_partial(self, member: int, partial: PartialFrame, step: int, layer: int) -> None:
        """Send the partial of a layer; raises `StepBroken` as `send` does."""
        partial.stamp(step, self.next_sequence(member), layer)
        self._send(member, partial.sealed())

    def _send(self, member: int, frame: Frame) -> None:
        active = self._gate.active
        assert active is not None
        if not self._put_out(active, member, frame):
            self._trouble(active, member, "takes no frame")
            return
        self.traffic.messages += 1
        self.traffic.local_messages += member in self._near
        self.traffic.bytes += len(frame)

    def _put_out(self, active: Topology, member: int, frame: Frame) -> bool:
        """Send by the way that is the member's while the plan is in force; whether it is taken."""
        peer = active.plan.members[member]
        if member in self._near:
            return self.local.send(peer.boot_id, frame)
        address = self._address(peer)
        ready = address in self._opened or self._introduce(address)
        return ready and self.pair.send(address, frame)

    # --- receiving --------------------------------------------------------------------------------

    def begin(self, step: int, limit_s: float) -> None:
        """A step is being computed: all of it must be there within `limit_s`."""
        self._gate.began(step)
        self.echoes.disturb()
        self.inbox.forget_before(step)
        self._deadline = time.monotonic() + limit_s

    def collect(
        self,
        box: dict[Key, dict[int, Filed]],
        key: Key,
        wanted: Mapping[int, int],
        *,
        awake: bool = True,
    ) -> dict[int, Filed]:
        """Wait until `box[key]` has every name in `wanted` and take it; not `awake` where that was
        tried before. `wanted` maps a name (a member, or a vocab unit) to the member that owes it.
        Raises `StepOverdue`, naming the first that did not come in the step's time.
        """
        began = time.perf_counter()
        try:
            while not wanted.keys() <= (arrived := box.get(key, {})).keys():
                if time.monotonic() > self._deadline:
                    active = self._gate.active
                    assert active is not None
                    owing = next(member for name, member in wanted.items() if name not in arrived)
                    raise StepOverdue(active.plan.members[owing].node_id, "a step is overdue")
                self._poll(self._deadline, awake=awake)
        finally:
            self.traffic.wait_s += time.perf_counter() - began
        return box.pop(key, {})

    def awake_until(self) -> float:
        """When a wait that begins now is to sleep (monotonic, seconds)."""
        return time.monotonic() + self._patience_s

    def receive_due(
        self, member: int, due: PartialFrame, step: int, layer: int, until: float
    ) -> bool:
        """Receive the partial of a layer that is due from a member into the memory of `due`, where
        it comes on a local link `until` then, and nothing of it with what comes before. False: it
        did not; what came instead is filed, and `collect` waits for the rest. Raises `StepBroken`
        as `collect` does.
        """
        active, filed = self._gate.active, self.inbox.partials
        route, key = self._gate.local_route(member), (step, layer, due.half)
        while active is not None and route is not None and member not in filed.get(key, ()):
            began = time.monotonic()
            due.stamp(step, self._gate.due(member), layer)
            size = self.local.receive_into(route, due.memory, until)
            now = time.monotonic()
            self.traffic.wait_s += now - began
            if size == len(due.memory) and due.arrived():
                self._gate.took(member)
                self._heard[active.plan.members[member].node_id] = now
                return True
            if not size:
                break
            self.local.put_back(route, bytes(due.memory[:size]))
            self._take(far=False)
        return False

    def idle(self, timeout_s: float, also: zmq.Socket[bytes] | None = None) -> None:
        """Wait for a frame or an order, or until `also` has something to read, at most
        `timeout_s`. Only now are echoes sent and answered."""
        if also is not None:
            self._poller.register(also, zmq.POLLIN)
        self._idle = True
        try:
            self._echo()
            self._poll(time.monotonic() + timeout_s)
        finally:
            self._idle = False
            if also is not None:
                self._poller.unregister(also)

    def breathe(self) -> None:
        """Called within long computations: several times a second, look at links and orders."""
        if time.monotonic() - self._events_at >= EVENTS_EVERY_S:
            self._interrupt()
            self.pump()

    def _poll(self, deadline: float, *, awake: bool = True) -> None:
        now = time.monotonic()
        patience_s = self._patience_s if awake else 0.0
        if now - self._events_at < EVENTS_EVERY_S and self.local.glance(patience_s):
            self._take(far=False)
            return
        left = min(EVENTS_EVERY_S, max(0.0, deadline - now))
        ready = dict(self._poller.poll(int(left * 1000)))
        if self._pipe_fd in ready:
            self._interrupt()
        self.local.read(ready)
        self._take(far=self.pair.router in ready)

    def pump(self) -> None:
        """File everything that has arrived; now and then look at the links and pause."""
        self.local.read()
        self._take(far=True)

    def _take(self, *, far: bool) -> None:
        while (arrival := self.local.receive()) is not None:
            route, frame = arrival
            if frame is None:
                self._ended(route)
            else:
                self._file(route, frame, local=True)
        while far and (received := self.pair.receive()) is not None:
            self._file(*received)
        now = time.monotonic()
        if now - self._events_at >= EVENTS_EVERY_S:
            self._events_at = now
            self._on_pause()
            self._look(self.pair.events())

    def _look(self, events: list[LinkEvent]) -> None:
        """A link that comes back is opened again; one that broke may have held frames."""
        for event in events:
            if event.kind is LinkKind.DOWN:
                self._opened.discard(event.address)
            elif event.kind is LinkKind.UP and self._opening:
                self._introduce(event.address)
        active = self._gate.active
        if active is None:
            return
        down = {event.address for event in events if event.kind is LinkKind.DOWN}
        broken = [i for i in active.others if self._address(active.plan.members[i]) in down]
        self.lost += [active.plan.members[member].node_id for member in broken]
        for member in broken:
            self._trouble(active, member, "broke")

    def _ended(self, route: bytes) -> None:
        """A peer's local connection is closed, by its end or by its choice: what it had not sent is
        lost. With this boot of the peer all goes over TCP from now on."""
        active, member = self._gate.active, self._gate.lost(route)
        if active is not None and member is not None:
            peer = active.plan.members[member]
            self.local.give_up(peer.boot_id)
            self.lost.append(peer.node_id)
            self._trouble(active, member, "broke")

    def _trouble(self, active: Topology, member: int, what: str) -> None:
        """A link to or from a member may have lost frames: does a step need them?"""
        match trouble(active, member):
            case Trouble.DEAF:
                self.deaf.add(member)
            case Trouble.BREAKS:
                name = active.plan.members[member]
                raise LinkBroken(name.node_id, f"the step link of {name.name} {what}")

    def heard_within(self, seconds: float) -> tuple[str, ...]:
        """Node ids heard on step links lately."""
        now = time.monotonic()
        self._heard = {n: at for n, at in self._heard.items() if now - at <= seconds}
        return tuple(self._heard)

    def _file(self, route: bytes, frame: bytes | memoryview, *, local: bool = False) -> None:
        try:
            message = decode(frame, Plane.STEPS)
        except RemoteProtocolError:
            self.traffic.dropped += 1
            return
        if isinstance(message, EchoRequest | EchoReply):
            self._echoed(route, message)
            return
        if isinstance(message, LinkOpen):
            member = self._gate.opened(route, message, local=local)
            if member is not None and self._gate.active is not None:
                self._trouble(self._gate.active, member, "broke and came back")
            return
        self._accept(route, len(frame), message)

    def _echoed(self, route: bytes, message: EchoRequest | EchoReply) -> None:
        now = time.monotonic()
        member = self._gate.whose(route)
        if member is None:
            self.traffic.dropped += 1
        elif isinstance(message, EchoReply):
            self.traffic.dropped += not self.echoes.replied(member, message, now)
        else:
            self.echoes.asked(member, message, late=not self._idle)
            if self._idle:
                self._echo()

    def _echo(self) -> None:
        """Answer echoes, and send the next of one's own. They are no part of a step: a link that
        takes none is no trouble."""
        if self._gate.active is None:
            return
        for member, reply in self.echoes.due():
            self._send_echo(member, reply)
        if (following := self.echoes.next()) is not None:
            self.echoes.sent(*self._send_echo(*following))

    def _send_echo(self, member: int, message: EchoRequest | EchoReply) -> tuple[bool, float]:
        """Whether the link took it, and when it was given to it (seconds)."""
        active = self._gate.active
        assert active is not None, "echoes end with their plan"
        frame = encode(message)
        began = time.monotonic()
        return self._put_out(active, member, frame), began

    def _accept(self, route: bytes, nbytes: int, message: ControlMessage | DataFrame) -> None:
        match self._gate.arrived(route, nbytes, message):
            case File(sender=sender):
                assert isinstance(message, StepMessage)
                self._put(message, sender)
            case Drop():
                self.traffic.dropped += 1
            case Gap(sender=sender, reason=reason):
                assert self._gate.active is not None
                self._trouble(self._gate.active, sender, f"lost something: {reason}")
                self.traffic.dropped += 1

    def _put(self, message: StepMessage, sender: int) -> None:
        active, inbox = self._gate.active, self.inbox
        assert active is not None
        self._heard[active.plan.members[sender].node_id] = time.monotonic()
        if inbox.full():
            self.traffic.dropped += 1
            return
        match message:
            case Step():
                inbox.steps.append(message)
            case StepAck():
                self._acknowledged(sender, message.step)
            case LogitsRequest():
                inbox.requests.append(message)
            case Partial():
                whole = active.is_whole(message.stage, message.half, message.parts)
                box = inbox.wholes if whole else inbox.partials
                key = (message.step, message.layer, message.half)
                box.setdefault(key, {})[sender] = message
            case Hidden():
                inbox.hidden.setdefault((message.step, message.stage), {})[sender] = message
            case Candidates():
                inbox.candidates.setdefault(message.step, {})[sender] = message
            case Logits():
                inbox.logits.setdefault(message.step, {})[message.unit] = message

    def _acknowledged(self, sender: int, step: int) -> None:
        try:
            if self.on_ack is not None:
                self.on_ack(sender, step)
        except RemoteProtocolError:
            self.traffic.dropped += 1
