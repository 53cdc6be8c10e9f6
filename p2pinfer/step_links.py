"""The step links of one node: frames of the active plan go out, and are filed as they come in.

Every data frame carries the fence of its plan and its number on the link. A frame of a plan that
is loaded but not yet active is held, up to `MAX_HELD_BYTES` per peer; any other foreign frame is
dropped and counted. A gap in a link's numbers means a lost frame: nothing of ours sends again, so
the step is broken, and a new epoch is the cure.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import zmq
from torch import Tensor

from p2pinfer.core.topology import Topology
from p2pinfer.errors import P2pinferError, RemoteProtocolError
from p2pinfer.limits import MAX_HELD_BYTES, MAX_NODES, MAX_STEP_TOKENS
from p2pinfer.transport import LinkEvent, LinkKind, SocketPair
from p2pinfer.types import Fence, Member, Plan
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
MAX_ROUTES = 4 * MAX_NODES
"""Connections whose owner is remembered; each reconnect makes one more, the oldest goes."""

LINK_TIMEOUT_S = 10.0
"""How long links to the members of a new plan may take to connect."""

StepMessage = Step | Partial | Hidden | Candidates | LogitsRequest | Logits


class StepBroken(P2pinferError):
    """A step cannot be finished; `node_id` is the member at fault."""

    def __init__(self, node_id: str, reason: str) -> None:
        super().__init__(f"{reason} (member {node_id})")
        self.node_id = node_id
        self.reason = reason


@dataclass
class Traffic:
    """What this node sent, and how long it waited for others, in seconds."""

    messages: int = 0
    bytes: int = 0
    dropped: int = 0
    wait_s: float = 0.0


@dataclass
class Inbox:
    """Frames of the active plan by what they are for."""

    steps: deque[Step] = field(default_factory=deque)
    partials: dict[tuple[int, int, int], dict[int, Partial]] = field(default_factory=dict)
    hidden: dict[int, Hidden] = field(default_factory=dict)
    candidates: dict[int, dict[int, Candidates]] = field(default_factory=dict)
    logits: dict[int, dict[int, Logits]] = field(default_factory=dict)
    requests: deque[LogitsRequest] = field(default_factory=deque)


def port_shifted(address: str, offset: int) -> str:
    """`tcp://host:port` with `offset` added to the port."""
    host, port = address.rsplit(":", 1)
    return f"{host}:{int(port) + offset}"


def to_wire(tensor: Tensor) -> WireTensor:
    """A float32 or int32 CPU copy of a tensor, as it lies on the wire."""
    array = tensor.detach().cpu().contiguous().numpy()
    kind = WireDType.INT32 if array.dtype == np.int32 else WireDType.FLOAT32
    return WireTensor(kind, tuple(array.shape), array.data.cast("B"))


def from_wire(tensor: WireTensor) -> Tensor:
    """A writable copy of a float32 wire tensor."""
    out = torch.empty(tensor.shape, dtype=torch.float32)
    np.copyto(out.numpy(), np.frombuffer(tensor.data, dtype=np.float32).reshape(tensor.shape))
    return out


def is_finite(tensor: WireTensor) -> bool:
    """Whether a float32 wire tensor has no infinity and no NaN (a sum keeps either)."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.frombuffer(tensor.data, np.float32).sum()))


class StepLinks:
    """Sends to and hears from the other members of a plan.

    `interrupt` is called whenever the control plane's pipe becomes readable during a wait; it may
    raise to leave the wait.
    """

    def __init__(
        self, pair: SocketPair, me: tuple[str, str], pipe_fd: int, interrupt: Callable[[], None]
    ) -> None:
        self.pair = pair
        self.traffic = Traffic()
        self.inbox = Inbox()
        self.topology: Topology | None = None
        self.step = 0
        """The step being computed or last computed: peers are at most one ahead of it."""
        self._identity = me
        self._interrupt = interrupt
        self._pipe_fd = pipe_fd
        self._poller = zmq.Poller()
        self._poller.register(pipe_fd, zmq.POLLIN)
        self._poller.register(pair.router, zmq.POLLIN)
        self._events_at = 0.0
        self._opening = b""
        self._routes: dict[bytes, LinkOpen] = {}
        self._sequence_out: dict[int, int] = defaultdict(int)
        self._sequence_in: dict[int, int] = defaultdict(int)
        self._pending: Fence | None = None
        self._held: dict[bytes, list[bytes]] = defaultdict(list)
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
        self._pending = plan.fence
        self._held.clear()
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
        held, self._held = self._held, defaultdict(list)
        for route, frames in held.items():
            for frame in frames:
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

    def wait(
        self, ready: Callable[[], bool], deadline: float, waiting_for: Callable[[], str]
    ) -> None:
        """File frames until `ready()`; raises `StepBroken` at `deadline` (monotonic seconds),
        blaming the member whose node id `waiting_for()` returns."""
        if ready():
            return
        began = time.perf_counter()
        try:
            while not ready():
                if time.monotonic() > deadline:
                    raise StepBroken(waiting_for(), "a step is overdue")
                self._poll(deadline)
        finally:
            self.traffic.wait_s += time.perf_counter() - began

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
        """File everything that has arrived."""
        while (received := self.pair.receive()) is not None:
            self._file(*received)
        now = time.monotonic()
        if now - self._events_at >= EVENTS_EVERY_S:
            self._events_at = now
            for event in self.pair.events():
                self._note(event)

    def _note(self, event: LinkEvent) -> None:
        """A link that breaks is told to the control plane; one that comes back is opened again."""
        if event.kind is LinkKind.UP and self._opening:
            self.pair.send(event.address, self._opening)
        elif event.kind is LinkKind.DOWN and self.topology is not None:
            for member in self.topology.plan.members:
                if self._address(member) == event.address:
                    self.lost.append(member.node_id)
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
                self._routes[route] = message
                while len(self._routes) > MAX_ROUTES:
                    del self._routes[next(iter(self._routes))]
                return
            self._accept(route, frame, message)
        except RemoteProtocolError:
            self.traffic.dropped += 1

    def _accept(self, route: bytes, frame: bytes, message: ControlMessage | DataFrame) -> None:
        opened = self._routes.get(route)
        if opened is None or not isinstance(message, StepMessage):
            raise RemoteProtocolError("a step frame on a link that nobody opened")
        if self._pending is not None and message.fence == self._pending:
            held = self._held[route]
            if sum(map(len, held)) + len(frame) > MAX_HELD_BYTES:
                raise RemoteProtocolError("more frames than may be held for a plan")
            held.append(frame)
            return
        topology = self.topology
        if topology is None or message.fence != topology.plan.fence:
            raise RemoteProtocolError("a frame of a foreign fence")
        sender = self._sender(topology, opened, message)
        expected = self._sequence_in[sender]
        if message.link_seq != expected:
            raise StepBroken(opened.node_id, f"frame {expected} was lost before {message.link_seq}")
        self._sequence_in[sender] = expected + 1
        self._heard[opened.node_id] = time.monotonic()
        if not isinstance(message, Step) and not self.step <= message.step <= self.step + 1:
            raise RemoteProtocolError(f"a frame of step {message.step} during step {self.step}")
        self._check(topology, sender, message)
        self._put(message, sender)

    @staticmethod
    def _sender(topology: Topology, opened: LinkOpen, message: StepMessage) -> int:
        """The member that opened the link; a frame may not speak for another."""
        for index, member in enumerate(topology.plan.members):
            if (member.node_id, member.boot_id) == (opened.node_id, opened.boot_id):
                if isinstance(message, DataFrame) and message.sender != index:
                    raise RemoteProtocolError("a frame that names another sender")
                return index
        raise RemoteProtocolError("a frame from a node outside the plan")

    @staticmethod
    def _check(topology: Topology, sender: int, message: StepMessage) -> None:
        """What the plan says that this member may send: raises `RemoteProtocolError` otherwise."""
        plan = topology.plan
        hidden_size = plan.model.hidden_size
        match message:
            case Step() | LogitsRequest():
                fits = sender == plan.leader
            case Partial():
                span = topology.holding.span
                fits = (
                    sender in topology.peers
                    and span.start <= message.layer < span.end
                    and message.parts == topology.parts[message.half].get(sender)
                    and message.tensor.shape[1] <= MAX_STEP_TOKENS
                    and message.tensor.shape[2] == hidden_size
                    and message.tensor.dtype == WireDType.FLOAT32
                )
            case Hidden():
                fits = (
                    sender == topology.hidden_from
                    and message.tensor.shape[0] <= MAX_STEP_TOKENS
                    and message.tensor.shape[1] == hidden_size
                    and message.tensor.dtype == WireDType.FLOAT32
                )
            case Candidates():
                fits = topology.leads and message.units == topology.vocab.get(sender)
            case Logits():
                fits = topology.leads and message.unit in topology.vocab.get(sender, ())
        if not fits:
            raise RemoteProtocolError("a frame that the plan does not allow this member to send")

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
                inbox.hidden[message.step] = message
            case Candidates():
                inbox.candidates.setdefault(message.step, {})[sender] = message
            case Logits():
                inbox.logits.setdefault(message.step, {})[message.unit] = message
