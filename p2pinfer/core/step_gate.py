"""What becomes of a frame on a step link: filed, held, dropped, or the proof that one was lost.

Every frame carries the fence of its plan and its number on the link. A frame of a plan that this
node has acknowledged and that is not in force yet is held, up to `MAX_HELD_BYTES` per peer; any
other foreign frame is dropped. A gap in the numbers means a lost frame: nothing of ours sends
again, so the step is broken, and a new epoch is the cure.
"""

from __future__ import annotations

from collections import defaultdict

from msgspec import Struct

from p2pinfer.core.step_checks import StepMessage, check_frame
from p2pinfer.core.topology import Topology, topology
from p2pinfer.errors import LocalProtocolError, RemoteProtocolError
from p2pinfer.limits import MAX_HELD_BYTES, MAX_NODES
from p2pinfer.types import Plan
from p2pinfer.wire.messages import ControlMessage, DataFrame, LinkOpen, StepAck

MAX_STRANGERS = 2 * MAX_NODES
"""Links of nodes outside every plan known here, which a plan on its way may make members."""

LEAST_HELD_BYTES = 1024
"""What a held frame counts for at least: a small one takes more memory than its bytes."""

Life = tuple[str, str]
"""(node id, boot id): one run of one node."""


class File(Struct, frozen=True):
    """The frame belongs to the plan in force, and its sender (index) may send it."""

    sender: int


class Hold(Struct, frozen=True):
    """The frame belongs to the plan that is loaded, and is kept until that is in force."""


class Drop(Struct, frozen=True):
    """The frame is ignored."""

    reason: str


class Gap(Struct, frozen=True):
    """A frame of this member (index) was lost: the step cannot be finished."""

    sender: int
    node_id: str
    reason: str


Verdict = File | Hold | Drop | Gap


class StepGate:
    """Knows whose each route is, and judges what comes on it. `identity`: (node id, boot id)."""

    def __init__(self, identity: Life) -> None:
        self._identity = identity
        self._routes: dict[bytes, LinkOpen] = {}
        self._local: set[bytes] = set()
        self._pending: Topology | None = None
        self._active: Topology | None = None
        self._members: dict[bytes, int] = {}
        """By route, the members (indices) of the plan in force that have sent frames of it."""
        self._held: list[tuple[bytes, StepMessage]] = []
        self._held_bytes: dict[int, int] = defaultdict(int)
        self._numbers: dict[int, int] = defaultdict(int)
        self._step = 0

    @property
    def active(self) -> Topology | None:
        """The plan in force here, as it looks from this node."""
        return self._active

    @property
    def held_bytes(self) -> int:
        """What the frames that are held count for, over all peers."""
        return sum(self._held_bytes.values())

    # --- plans ------------------------------------------------------------------------------------

    def load(self, plan: Plan) -> None:
        """Obey no plan; hold the frames of this one. Raises `LocalProtocolError` if not in it."""
        self.close()
        me = _index(plan, self._identity)
        if me is None:
            raise LocalProtocolError("a plan to load in which this node is no member")
        self._pending = topology(plan, me)

    def activate(self, mine: Topology) -> list[tuple[bytes, StepMessage]]:
        """The plan that was loaded is in force: numbers and steps begin anew.

        Returns what was held, in order: it is to be passed to `arrived` again.
        """
        held = self._held
        self.close()
        self._active = mine
        return held

    def close(self) -> None:
        """Obey no plan, and hold nothing; it stays known whose each route is."""
        self._active = self._pending = None
        self._members.clear()
        self._held = []
        self._held_bytes.clear()
        self._numbers.clear()
        self._step = 0

    def began(self, step: int) -> None:
        """This step is being computed: what comes for those before it is late."""
        self._step = step

    # --- links ------------------------------------------------------------------------------------

    def opened(self, route: bytes, message: LinkOpen, *, local: bool = False) -> int | None:
        """A node says that this route is its link; a new one takes the place of what it had.

        A node may have one link over the network and one that is `local`, within this machine. It
        sends all frames of a fence on one of them, or their numbers would tell. Returns the member
        (index) of the plan in force whose link broke and came back: what the old one still held may
        be lost.
        """
        life = (message.node_id, message.boot_id)
        others = [
            other
            for other, opening in self._routes.items()
            if other != route and _life(opening) == life and (other in self._local) == local
        ]
        for other in others:
            self._forget(other)
        self._routes[route] = message
        self._members.pop(route, None)
        if local:
            self._local.add(route)
        self._forget_strangers()
        active = self._active
        if not others or active is None or message.fence != active.plan.fence:
            return None
        return _index(active.plan, life)

    def lost(self, route: bytes) -> int | None:
        """The connection of this route is gone.

        Returns whose it was, if a member's (index) of the plan in force.
        """
        member = self.whose(route)
        self._forget(route)
        return member

    def whose(self, route: bytes) -> int | None:
        """The member (index) of the plan in force that opened this route; None: nobody of it."""
        opening = self._routes.get(route)
        if opening is None or self._active is None:
            return None
        return _index(self._active.plan, _life(opening))

    def _forget_strangers(self) -> None:
        """A plan that others have already, and this node not yet, may make a stranger a member."""
        known = [mine.plan for mine in (self._pending, self._active) if mine is not None]
        members = {(m.node_id, m.boot_id) for plan in known for m in plan.members}
        strangers = [route for route, m in self._routes.items() if _life(m) not in members]
        for route in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
            self._forget(route)

    def _forget(self, route: bytes) -> None:
        self._routes.pop(route, None)
        self._members.pop(route, None)
        self._local.discard(route)

    # --- frames -----------------------------------------------------------------------------------

    def local_route(self, member: int) -> bytes | None:
        """The route within this machine on which a member has sent frames of the plan in force."""
        for route, sender in self._members.items():
            if sender == member and route in self._local:
                return route
        return None

    def due(self, member: int) -> int:
        """The number of the next frame of a member of the plan in force."""
        return self._numbers[member]

    def took(self, member: int) -> None:
        """The frame that was due from a member came on its `local_route`, and is one that `arrived`
        would file: of the fence in force, with the number that was due, of the step in hand, with
        the parts and the shape that the plan has for it."""
        self._numbers[member] += 1

    def arrived(self, route: bytes, nbytes: int, message: ControlMessage | DataFrame) -> Verdict:
        """Judge a frame of `nbytes` that came on `route`."""
        opening = self._routes.get(route)
        if opening is None or not isinstance(message, StepMessage):
            return Drop("a step frame on a link that nobody opened")
        try:
            if self._pending is not None and message.fence == self._pending.plan.fence:
                return self._hold(self._pending, route, opening, nbytes, message)
            if self._active is None or message.fence != self._active.plan.fence:
                return Drop("a frame of a foreign fence")
            return self._judge(self._active, route, opening, message)
        except RemoteProtocolError as error:
            return Drop(str(error))

    def _hold(
        self,
        mine: Topology,
        route: bytes,
        opening: LinkOpen,
        nbytes: int,
        message: StepMessage,
    ) -> Verdict:
        sender = _sender(mine.plan, opening)
        _check_sender(sender, message)
        check_frame(mine, sender, message)
        counted = self._held_bytes[sender] + max(nbytes, LEAST_HELD_BYTES)
        if counted > MAX_HELD_BYTES:
            return Drop("more bytes than may be held for a plan")
        self._held_bytes[sender] = counted
        self._held.append((route, message))
        return Hold()

    def _judge(
        self, mine: Topology, route: bytes, opening: LinkOpen, message: StepMessage
    ) -> Verdict:
        sender = self._members.get(route)
        if sender is None:
            sender = self._members[route] = _sender(mine.plan, opening)
        _check_sender(sender, message)
        expected = self._numbers[sender]
        if message.link_seq != expected:
            reason = f"frame {message.link_seq} came where {expected} was due"
            return Gap(sender, opening.node_id, reason)
        self._numbers[sender] = expected + 1
        if message.step < self._step and not isinstance(message, StepAck):
            return Drop(f"a frame of step {message.step} during step {self._step}")
        check_frame(mine, sender, message)
        return File(sender)


def _life(message: LinkOpen) -> Life:
    return (message.node_id, message.boot_id)


def _index(plan: Plan, life: Life) -> int | None:
    """Which member of a plan that run of a node is."""
    for index, member in enumerate(plan.members):
        if (member.node_id, member.boot_id) == life:
            return index
    return None


def _sender(plan: Plan, opening: LinkOpen) -> int:
    """The member that opened the link."""
    index = _index(plan, _life(opening))
    if index is None:
        raise RemoteProtocolError("a frame from a node outside the plan")
    return index


def _check_sender(member: int, message: StepMessage) -> None:
    """A frame may not speak for another."""
    if isinstance(message, DataFrame) and message.sender != member:
        raise RemoteProtocolError("a frame that names another sender")
