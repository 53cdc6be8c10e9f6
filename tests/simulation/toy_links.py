"""A toy worker's step links: the true gate and true frames over simulated connections.

What `p2pinfer/step_links.py` does with ZeroMQ is done here with the simulated network, without
waiting: whoever waits looks again when something has been filed.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from p2pinfer.core.step_checks import StepMessage
from p2pinfer.core.step_gate import Drop, File, Gap, StepGate
from p2pinfer.core.step_paths import Trouble, needed, trouble
from p2pinfer.core.topology import Topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Member
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    Candidates,
    Hidden,
    LinkOpen,
    Message,
    Partial,
    Plane,
    Step,
    StepAck,
)

if TYPE_CHECKING:
    from tests.simulation.machine import Process

EVENTS_S = 0.05
"""How late at most a worker sees that a link is up or down."""


class StepBroken(Exception):
    """A step cannot be finished; `node_id` is the member at fault."""

    def __init__(self, node_id: str, reason: str) -> None:
        super().__init__(reason)
        self.node_id = node_id
        self.reason = reason


class Inbox:
    """Frames of the plan in force by what they are for, then by who sent them."""

    def __init__(self) -> None:
        self.steps: deque[Step] = deque()
        self.partials: dict[tuple[int, int, int], dict[int, Partial]] = {}
        self.hidden: dict[tuple[int, int], dict[int, Hidden]] = {}
        self.candidates: dict[int, dict[int, Candidates]] = {}

    def forget_before(self, step: int) -> None:
        """Drop what came for steps that are over."""
        for key in [key for key in self.partials if key[0] < step]:
            del self.partials[key]
        for place in [place for place in self.hidden if place[0] < step]:
            del self.hidden[place]
        for number in [number for number in self.candidates if number < step]:
            del self.candidates[number]


def steps_address(member: Member) -> str:
    """Where a member hears steps: its control address' port + 1."""
    host, port = member.address.rsplit(":", 1)
    return f"{host}:{int(port) + 1}"


class ToyLinks:
    """Sends to and hears from the other members of a plan."""

    def __init__(self, process: Process, on_event: Callable[[], None]) -> None:
        self.inbox = Inbox()
        self.lost: list[str] = []
        self.deaf: set[int] = set()
        self.on_ack: Callable[[int, int], None] | None = None
        self.gate = StepGate((process.config.member.node_id, process.boot_id))
        self.dropped = 0
        self._process = process
        self._network = process.network
        self._random = process.world.stream(f"links/{process.boot_id}")
        self._on_event = on_event
        self._opening: LinkOpen | None = None
        self._open: dict[str, bool] = {}
        """Links, and whether LINK_OPEN was sent on the present connection."""
        self._needed: frozenset[str] = frozenset()
        self._names: dict[str, str] = {}
        self._sequence_out: dict[int, int] = defaultdict(int)
        self._events: list[tuple[str, bool]] = []
        self._heard: dict[str, float] = {}

    # --- plans ------------------------------------------------------------------------------------

    def open(self, mine: Topology) -> None:
        """Connect to every other member of a plan and say whose link this is."""
        plan, process = mine.plan, self._process
        self.close()
        self.gate.load(plan)
        wanted = {steps_address(m): m for i, m in enumerate(plan.members) if i != mine.me}
        for address in [address for address in self._open if address not in wanted]:
            del self._open[address]
            self._network.close(process, Plane.STEPS, address)
        member = process.config.member
        self._opening = LinkOpen(node_id=member.node_id, boot_id=member.boot_id, fence=plan.fence)
        self._names = {address: m.node_id for address, m in wanted.items()}
        self._needed = frozenset(steps_address(plan.members[i]) for i in needed(mine))
        for address in wanted:
            if address in self._open:
                self._open[address] = self._say_open(address)
            else:
                self._open[address] = False
                self._network.open(process, Plane.STEPS, address)

    def unconnected(self) -> str:
        """A member whose link the loaded plan's steps need and which is not connected, or ""."""
        lacking = [address for address in self._needed if not self._open[address]]
        return self._names[min(lacking)] if lacking else ""

    def activate(self, mine: Topology) -> None:
        """The plan given to `open` is in force: number frames from 0 and file those held."""
        self._sequence_out.clear()
        for route, message in self.gate.activate(mine):
            self._accept(route, 0, message)

    def close(self) -> None:
        """Stop obeying any plan; links stay connected."""
        self.gate.close()
        self.inbox = Inbox()
        self.deaf = set()
        self.on_ack = None

    # --- sending ----------------------------------------------------------------------------------

    def next_sequence(self, member: int) -> int:
        """The number of the next frame to `member`."""
        number = self._sequence_out[member]
        self._sequence_out[member] = number + 1
        return number

    def send(self, member: int, message: Message) -> None:
        """Send one numbered frame; raises `StepBroken` when a link that is needed takes no more."""
        active = self.gate.active
        assert active is not None
        address = steps_address(active.plan.members[member])
        self._open[address] = ready = self._open[address] or self._say_open(address)
        if not (ready and self._put_out(address, message)):
            self._trouble(active, member, "takes no frame")

    def _put_out(self, address: str, message: Message) -> bool:
        frame = encode(message)
        process = self._process
        process.world.trace.note(process.world.now, process.number, "step>", frame, message)
        return self._network.send(process, Plane.STEPS, address, frame)

    def _say_open(self, address: str) -> bool:
        assert self._opening is not None
        return self._put_out(address, self._opening)

    # --- links ------------------------------------------------------------------------------------

    def changed(self, address: str, *, up: bool) -> None:
        """A link is connected, or broke: it is seen a little later."""
        if not self._events:
            self._process.world.later(self._random.uniform(0, EVENTS_S), self._on_event)
        self._events.append((address, up))

    def look(self) -> None:
        """A link that comes back is opened again; one that broke may have held frames."""
        events, self._events = self._events, []
        down = set()
        for address, up in events:
            if address not in self._open:
                continue
            self._open[address] = up and self._opening is not None and self._say_open(address)
            if not up:
                down.add(address)
        active = self.gate.active
        if active is None or not down:
            return
        broken = [i for i in active.others if steps_address(active.plan.members[i]) in down]
        self.lost += [active.plan.members[member].node_id for member in broken]
        for member in broken:
            self._trouble(active, member, "broke")

    def _trouble(self, active: Topology, member: int, what: str) -> None:
        match trouble(active, member):
            case Trouble.DEAF:
                self.deaf.add(member)
            case Trouble.BREAKS:
                name = active.plan.members[member]
                raise StepBroken(name.node_id, f"the step link of {name.name} {what}")

    def heard_within(self, seconds: float) -> tuple[str, ...]:
        """Node ids heard on step links lately."""
        now = self._process.world.now
        return tuple(n for n, at in self._heard.items() if now - at <= seconds)

    # --- receiving --------------------------------------------------------------------------------

    def file(self, route: bytes, frame: bytes) -> None:
        """Take in a frame. Raises `StepBroken` where one was lost."""
        message = decode(frame, Plane.STEPS)
        process = self._process
        process.world.trace.note(process.world.now, process.number, "step<", frame, message)
        if isinstance(message, LinkOpen):
            member = self.gate.opened(route, message)
            if member is not None and self.gate.active is not None:
                self._trouble(self.gate.active, member, "broke and came back")
            return
        self._accept(route, len(frame), message)

    def _accept(self, route: bytes, nbytes: int, message: Message) -> None:
        match self.gate.arrived(route, nbytes, message):
            case File(sender=sender):
                assert isinstance(message, StepMessage)
                self._put(message, sender)
            case Drop():
                self.dropped += 1
            case Gap(sender=sender, reason=reason):
                assert self.gate.active is not None
                self._process.world.count("a gap on a step link")
                self._trouble(self.gate.active, sender, f"lost something: {reason}")
                self.dropped += 1

    def _put(self, message: StepMessage, sender: int) -> None:
        active, inbox = self.gate.active, self.inbox
        assert active is not None
        self._heard[active.plan.members[sender].node_id] = self._process.world.now
        match message:
            case Step():
                inbox.steps.append(message)
            case StepAck():
                self._acknowledged(sender, message.step)
            case Partial():
                key = (message.step, message.layer, message.half)
                inbox.partials.setdefault(key, {})[sender] = message
            case Hidden():
                inbox.hidden.setdefault((message.step, message.stage), {})[sender] = message
            case Candidates():
                inbox.candidates.setdefault(message.step, {})[sender] = message

    def _acknowledged(self, sender: int, step: int) -> None:
        try:
            if self.on_ack is not None:
                self.on_ack(sender, step)
        except RemoteProtocolError:
            self.dropped += 1
