"""The step links of one node: frames of the active plan go out, and are filed as they come in.

Every data frame carries the fence of its plan and its number on the link. A frame of a plan that
is loaded but not yet active is held, up to `MAX_HELD_BYTES` per peer; any other foreign frame is
dropped and counted. A gap in a link's numbers means a lost frame: nothing of ours sends again, so
the step is broken, and a new epoch is the cure.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import zmq
from numpy.typing import NDArray
from torch import Tensor

from p2pinfer.core.step_checks import StepMessage, check_frame
from p2pinfer.core.topology import Topology
from p2pinfer.errors import P2pinferError, RemoteProtocolError
from p2pinfer.limits import MAX_HELD_BYTES, MAX_NODES
from p2pinfer.transport import LinkEvent, LinkKind, SocketPair
from p2pinfer.types import Member, Plan
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    Candidates,
    ControlMessage,
    DataFrame,
    Hidden,
    LinkOpen,
    Logits,
    LogitsRequest,
    Message,
    Partial,
    Plane,
    Step,
)
from p2pinfer.wire.tensors import Tensor as WireTensor
from p2pinfer.wire.tensors import WireDType

EVENTS_EVERY_S = 0.05
"""How often the monitors of the links are looked at: they stay off the path of a token."""

STEP_PORT_OFFSET = 1

STEP_TIMEOUT_S = 120.0
"""One wait for a peer within a step; longer, and the step is broken, whoever is alive."""

MAX_FILED = 4096
"""Frames of one kind filed and not yet used: a peer is one exchange ahead at most, by layers."""

MAX_STRANGERS = 2 * MAX_NODES
"""Links of nodes outside every plan known here, which a plan on its way may make members."""

LINK_TIMEOUT_S = 10.0
"""How long links to the members of a new plan may take to connect."""


class StepBroken(P2pinferError):
    """A step cannot be finished; `node_id` is the member at fault."""

    def __init__(self, node_id: str, reason: str) -> None:
        super().__init__(f"{reason} (member {node_id})")
        self.node_id = node_id
        self.reason = reason


Key = TypeVar("Key", int, tuple[int, int, int])
Frame = TypeVar("Frame")


@dataclass
class Traffic:
    """What this node sent and dropped, and how long it waited for others, in seconds."""

    messages: int = 0
    bytes: int = 0
    dropped: int = 0
    wait_s: float = 0.0


@dataclass
class Inbox:
    """Frames of the active plan by what they are for, then by who sent them (logits: by unit)."""

    steps: deque[Step] = field(default_factory=deque)
    requests: deque[LogitsRequest] = field(default_factory=deque)
    partials: dict[tuple[int, int, int], dict[int, Partial]] = field(default_factory=dict)
    hidden: dict[int, dict[int, Hidden]] = field(default_factory=dict)
    candidates: dict[int, dict[int, Candidates]] = field(default_factory=dict)
    logits: dict[int, dict[int, Logits]] = field(default_factory=dict)

    def forget_before(self, step: int) -> None:
        """Drop what came for steps that are over (a duplicate, or a frame nobody waited for)."""
        for key in [key for key in self.partials if key[0] < step]:
            del self.partials[key]
        for number in [number for number in self.hidden if number < step]:
            del self.hidden[number]
        for number in [number for number in self.candidates if number < step]:
            del self.candidates[number]
        for number in [number for number in self.logits if number < step]:
            del self.logits[number]

    def full(self) -> bool:
        """Whether a peer has sent more than any plan has use for."""
        sizes = (
            len(self.steps),
            len(self.requests),
            len(self.partials),
            len(self.hidden),
            len(self.candidates),
            len(self.logits),
        )
        return max(sizes) >= MAX_FILED


def port_shifted(address: str, offset: int) -> str:
    """`tcp://host:port` with `offset` added to the port."""
    host, port = address.rsplit(":", 1)
    return f"{host}:{int(port) + offset}"


def to_wire(values: Tensor | NDArray[np.float32] | NDArray[np.int32]) -> WireTensor:
    """A float32 or int32 tensor or array as it lies on the wire (no copy, if it is contiguous)."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.ascontiguousarray(values)
    kind = WireDType.INT32 if array.dtype == np.int32 else WireDType.FLOAT32
    return WireTensor(kind, tuple(array.shape), array.data.cast("B"))


def from_wire(tensor: WireTensor) -> Tensor:
    """A writable copy of a float32 wire tensor."""
    out = torch.empty(tensor.shape, dtype=torch.float32)
    np.copyto(out.numpy(), np.frombuffer(tensor.data, dtype=np.float32).reshape(tensor.shape))
    return out


def is_finite(tensor: WireTensor) -> bool:
    """Whether a float32 wire tensor has no infinity and no NaN (its sum of squares keeps either,
    as it would a number beyond 1e18, which no model that works has)."""
    values = np.frombuffer(tensor.data, np.float32)
    return math.isfinite(np.dot(values, values))


class StepLinks:
    """Sends to and hears from the other members of a plan.

    `interrupt` is called whenever the control plane's pipe becomes readable during a wait; it may
    raise to leave the wait. `on_pause` is called several times a second, waiting or not.
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
        self.topology: Topology | None = None
        self.step = 0
        """The step being computed or last computed: peers are at most one ahead of it."""
        self._identity = me
        self._interrupt = interrupt
        self._on_pause = on_pause
        self._waiting = False
        self._pipe_fd = pipe_fd
        self._poller = zmq.Poller()
        self._poller.register(pipe_fd, zmq.POLLIN)
        self._poller.register(pair.router, zmq.POLLIN)
        self._events_at = 0.0
        self._opening = b""
        self._routes: dict[bytes, LinkOpen] = {}
        self._sequence_out: dict[int, int] = defaultdict(int)
        self._sequence_in: dict[int, int] = defaultdict(int)
        self._pending: Plan | None = None
        self._held: list[tuple[bytes, bytes]] = []
        self._held_bytes: dict[bytes, int] = defaultdict(int)
        self._heard: dict[str, float] = {}
        self.lost: list[str] = []

    # --- plans ------------------------------------------------------------------------------------

    def open(self, plan: Plan, me: int) -> None:
        """Connect to every other member of `plan` and say whose link this is.

        Frames of the active plan are no longer accepted; those of `plan` are held. Raises
        `StepBroken` when a member cannot be reached within `LINK_TIMEOUT_S`.
        """
        self.topology = None
        self.inbox = Inbox()
        self._pending = plan
        self._held.clear()
        self._held_bytes.clear()
        wanted = {self._address(m): m for i, m in enumerate(plan.members) if i != me}
        for address in tuple(self.pair.addresses):
            if address not in wanted:
                self.pair.close(address)
        for address in wanted:
            if address not in self.pair.addresses:
                self.pair.open(address)
        node_id, boot_id = self._identity
        opening = encode(LinkOpen(node_id=node_id, boot_id=boot_id, fence=plan.fence))
        self._opening = opening
        deadline = time.monotonic() + LINK_TIMEOUT_S
        for address, member in wanted.items():
            while not self.pair.send(address, opening):
                if time.monotonic() > deadline:
                    raise StepBroken(
                        member.node_id,
                        f"no step link to {member.name} at {address}: is the port open?",
                    )
                self._poll(deadline)

    def activate(self, topology: Topology) -> None:
        """The plan given to `open` is in force: number frames from 0 and file those held."""
        self.topology = topology
        self.step = 0
        self._pending = None
        self._sequence_out.clear()
        self._sequence_in.clear()
        held, self._held = self._held, []
        self._held_bytes.clear()
        for route, frame in held:
            self._file(route, frame)

    def close(self) -> None:
        """Stop obeying any plan; links stay connected."""
        self.topology = None
        self._pending = None
        self.inbox = Inbox()

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
        """Send one numbered frame; raises `StepBroken` when the link takes no more."""
        assert self.topology is not None
        frame = encode(message)
        target = self.topology.plan.members[member]
        if not self.pair.send(self._address(target), frame):
            raise StepBroken(target.node_id, f"the step link to {target.name} takes no frame")
        self.traffic.messages += 1
        self.traffic.bytes += len(frame)

    # --- receiving --------------------------------------------------------------------------------

    def collect(
        self, box: dict[Key, dict[int, Frame]], key: Key, wanted: Mapping[int, int]
    ) -> dict[int, Frame]:
        """Wait until `box[key]` has every name in `wanted` and take it.

        `wanted` maps a name (a member, or a vocab unit) to the member that owes it. Raises
        `StepBroken`, naming the first that did not come within `STEP_TIMEOUT_S`.
        """
        began = time.perf_counter()
        deadline = time.monotonic() + STEP_TIMEOUT_S
        self._waiting = True
        try:
            while not wanted.keys() <= (arrived := box.get(key, {})).keys():
                if time.monotonic() > deadline:
                    assert self.topology is not None
                    owing = next(member for name, member in wanted.items() if name not in arrived)
                    node_id = self.topology.plan.members[owing].node_id
                    raise StepBroken(node_id, f"a step is overdue by {STEP_TIMEOUT_S:g} s")
                self._poll(deadline)
        finally:
            self._waiting = False
            self.traffic.wait_s += time.perf_counter() - began
        return box.pop(key, {})

    def idle(self, timeout_s: float) -> None:
        """Wait for a frame or an order, at most `timeout_s`."""
        self._poll(time.monotonic() + timeout_s)

    def _poll(self, deadline: float) -> None:
        left = min(EVENTS_EVERY_S, max(0.0, deadline - time.monotonic()))
        for socket, _ in self._poller.poll(int(left * 1000)):
            if socket == self._pipe_fd:
                self._interrupt()
        self.pump()

    def pump(self) -> None:
        """File everything that has arrived; now and then look at the links and pause."""
        while (received := self.pair.receive()) is not None:
            self._file(*received)
        now = time.monotonic()
        if now - self._events_at >= EVENTS_EVERY_S:
            self._events_at = now
            for event in self.pair.events():
                self._note(event)
            self._on_pause()

    def _note(self, event: LinkEvent) -> None:
        """A link that breaks is told to the control plane; one that comes back is opened again."""
        if event.kind is LinkKind.UP and self._opening:
            self.pair.send(event.address, self._opening)
        elif event.kind is LinkKind.DOWN and self.topology is not None:
            for member in self.topology.plan.members:
                if self._address(member) == event.address:
                    self.lost.append(member.node_id)
                    if self._waiting:
                        # What the connection still held is gone, and nobody sends it again.
                        raise StepBroken(member.node_id, f"the step link to {member.name} broke")

    def heard_within(self, seconds: float) -> tuple[str, ...]:
        """Node ids heard on step links lately."""
        now = time.monotonic()
        return tuple(n for n, at in self._heard.items() if now - at <= seconds)

    def _file(self, route: bytes, frame: bytes) -> None:
        try:
            message = decode(frame, Plane.STEPS)
            if isinstance(message, LinkOpen):
                self._opened(route, message)
                return
            self._accept(route, frame, message)
        except RemoteProtocolError:
            self.traffic.dropped += 1

    def _opened(self, route: bytes, message: LinkOpen) -> None:
        """One route for each life of a node: a reconnect takes the place of what broke."""
        life = (message.node_id, message.boot_id)
        for other in [r for r, m in self._routes.items() if (m.node_id, m.boot_id) == life]:
            del self._routes[other]
        self._routes[route] = message
        plans = [p for p in (self._pending, self.topology and self.topology.plan) if p]
        members = {(m.node_id, m.boot_id) for plan in plans for m in plan.members}
        # A plan that others have already, and this node not yet, may make a stranger a member.
        strangers = [r for r, m in self._routes.items() if (m.node_id, m.boot_id) not in members]
        for stranger in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
            del self._routes[stranger]

    def _accept(self, route: bytes, frame: bytes, message: ControlMessage | DataFrame) -> None:
        opened = self._routes.get(route)
        if opened is None or not isinstance(message, StepMessage):
            raise RemoteProtocolError("a step frame on a link that nobody opened")
        if self._pending is not None and message.fence == self._pending.fence:
            _index(self._pending, opened, message)
            self._hold(route, frame)
            return
        topology = self.topology
        if topology is None or message.fence != topology.plan.fence:
            raise RemoteProtocolError("a frame of a foreign fence")
        sender = _index(topology.plan, opened, message)
        expected = self._sequence_in[sender]
        if message.link_seq != expected:
            raise StepBroken(opened.node_id, f"frame {expected} was lost before {message.link_seq}")
        self._sequence_in[sender] = expected + 1
        self._heard[opened.node_id] = time.monotonic()
        if message.step < self.step:
            raise RemoteProtocolError(f"a frame of step {message.step} during step {self.step}")
        check_frame(topology, sender, message)
        if self.inbox.full():
            raise RemoteProtocolError("more frames than any step has use for")
        self._put(message, sender)

    def _hold(self, route: bytes, frame: bytes) -> None:
        """Keep a member's frame of the plan that is loaded here and not yet in force."""
        if self._held_bytes[route] + len(frame) > MAX_HELD_BYTES:
            raise RemoteProtocolError("more bytes than may be held for a plan")
        self._held_bytes[route] += len(frame)
        self._held.append((route, frame))

    def _put(self, message: StepMessage, sender: int) -> None:
        inbox = self.inbox
        match message:
            case Step():
                inbox.steps.append(message)
            case LogitsRequest():
                inbox.requests.append(message)
            case Partial():
                key = (message.step, message.layer, message.half)
                inbox.partials.setdefault(key, {})[sender] = message
            case Hidden():
                inbox.hidden.setdefault(message.step, {})[sender] = message
            case Candidates():
                inbox.candidates.setdefault(message.step, {})[sender] = message
            case Logits():
                inbox.logits.setdefault(message.step, {})[message.unit] = message


def _index(plan: Plan, opened: LinkOpen, message: StepMessage) -> int:
    """The member that opened the link; a frame may not speak for another."""
    for index, member in enumerate(plan.members):
        if (member.node_id, member.boot_id) == (opened.node_id, opened.boot_id):
            if isinstance(message, DataFrame) and message.sender != index:
                raise RemoteProtocolError("a frame that names another sender")
            return index
    raise RemoteProtocolError("a frame from a node outside the plan")
