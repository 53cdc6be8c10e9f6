"""The bulk links of one node: delta KV to standbys, and what these grant and ask.

Nothing here ever breaks a step, and nothing is sent again: what a link does not take is lost, and
the standby asks for it. A frame counts only under the plan in force, and only from the member that
opened its link. What owners' standbys say of a plan that is loaded here, and not in force yet, is
kept: they may be in force a moment earlier, and grant their credit once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from p2pinfer.core.step_gate import MAX_STRANGERS, Life
from p2pinfer.core.topology import Topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.step_links import port_shifted
from p2pinfer.transport import LinkKind, SocketPair
from p2pinfer.types import Member, Plan
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest, LinkOpen, Plane

BULK_PORT_OFFSET = 2

BULK_HWM = 256
"""Frames queued per bulk link and way. Credit bounds their bytes; this bounds small ones, which are
of single tokens: a standby that does not read for some dozens of tokens has to ask for the rest."""

MAX_EARLY = 64
"""Frames kept of each member for a plan that is not in force here yet: a grant and some questions.
Whoever asks more asks again."""

BulkMessage = KvDelta | KvRequest | Credit | LinkOpen


class Arrival(NamedTuple):
    """One frame off the socket, of `nbytes`; `message` is None where it was dropped or kept.

    `sender` is the member (index) of the plan in force that sent it. A LINK_OPEN says that its link
    begins anew.
    """

    nbytes: int
    sender: int = -1
    message: BulkMessage | None = None


@dataclass
class BulkTraffic:
    """Bytes of KV_DELTA frames sent and taken, and how many frames of any kind were dropped."""

    sent_bytes: int = 0
    received_bytes: int = 0
    dropped: int = 0


class BulkLinks:
    """Sends to and hears from the members that this one exchanges KV with. `me`: its life."""

    def __init__(self, pair: SocketPair, me: Life) -> None:
        self.pair = pair
        self.traffic = BulkTraffic()
        self._me = me
        self._routes: dict[bytes, Life] = {}
        self._plan: Plan | None = None
        """The plan that is loaded, or in force."""
        self._partners: dict[int, str] = {}
        """Addresses of the members to exchange KV with by that plan."""
        self._in_force = False
        self._early: deque[Arrival] = deque()
        self._early_of: defaultdict[int, int] = defaultdict(int)
        self._opening = b""
        self._opened: set[str] = set()
        """Addresses that know whose link this is since it is connected."""
        self._begun: set[int] = set()
        self._numbers: defaultdict[int, int] = defaultdict(int)

    @property
    def known_routes(self) -> int:
        """How many links of others are open, as far as is remembered."""
        return len(self._routes)

    # --- plans ------------------------------------------------------------------------------------

    def load(self, mine: Topology, partners: Iterable[int]) -> None:
        """Begin to connect to `partners`, members of a plan; links to others are closed.

        Frames of any plan before are dropped from now on. Raises `UsageError` for an address that
        is none.
        """
        self.close()
        plan = mine.plan
        self._plan = plan
        self._partners = {i: _address(plan.members[i]) for i in sorted(set(partners))}
        node_id, boot_id = self._me
        self._opening = encode(LinkOpen(node_id=node_id, boot_id=boot_id, fence=plan.fence))
        wanted = set(self._partners.values())
        for address in tuple(self.pair.addresses):
            if address not in wanted:
                self.pair.close(address)
        for address in sorted(wanted):
            self.pair.open(address)
        for member in self._partners:
            self.ready(member)
        self._forget_strangers()

    def activate(self) -> None:
        """The plan given to `load` is in force."""
        self._in_force = True
        self._begun.clear()

    def close(self) -> None:
        """Obey no plan; links stay connected, and it stays known whose each route is."""
        self._plan = None
        self._partners = {}
        self._in_force = False
        self._early.clear()
        self._early_of.clear()
        self._opening = b""
        self._opened.clear()
        self._begun.clear()
        self._numbers.clear()

    # --- sending ----------------------------------------------------------------------------------

    def next_number(self, member: int) -> int:
        """The number of the next KV_DELTA to `member`."""
        number = self._numbers[member]
        self._numbers[member] = number + 1
        return number

    def ready(self, member: int) -> bool:
        """Whether the link to a partner is connected; says whose it is before any other frame."""
        address = self._partners[member]
        # A link that goes down takes frames for a moment longer, and loses them: hence `is_up`.
        if (
            address not in self._opened
            and self.pair.is_up(address)
            and self.pair.send(address, self._opening)
        ):
            self._opened.add(address)
            self._begun.add(member)
        return address in self._opened

    def send(self, member: int, message: KvDelta | KvRequest | Credit) -> bool:
        """Send a frame to a partner. False: its link is down or full, and the frame is lost."""
        if not self.ready(member):
            return False
        frame = encode(message)
        if not self.pair.send(self._partners[member], frame):
            return False
        if isinstance(message, KvDelta):
            self.traffic.sent_bytes += len(frame)
        return True

    def look(self) -> None:
        """See which links broke and came back; those are opened again."""
        by_address = {address: member for member, address in self._partners.items()}
        for event in self.pair.events():
            if event.kind is LinkKind.DOWN:
                self._opened.discard(event.address)
            elif event.kind is LinkKind.UP and event.address in by_address:
                self.ready(by_address[event.address])

    def begun(self) -> frozenset[int]:
        """Partners (indices) to whom a link of ours began anew since the last call."""
        begun, self._begun = frozenset(self._begun), set()
        return begun

    # --- receiving --------------------------------------------------------------------------------

    def receive(self) -> Arrival | None:
        """The next frame, judged; None: nothing has arrived."""
        if self._in_force and self._early:
            return self._early.popleft()
        received = self.pair.receive()
        if received is None:
            return None
        route, frame = received
        try:
            arrival = self._judge(route, frame)
        except RemoteProtocolError:
            self.traffic.dropped += 1
            arrival = Arrival(len(frame))
        return arrival

    def _judge(self, route: bytes, frame: bytes) -> Arrival:
        """Whose frame that is. Raises `RemoteProtocolError` for one that is to be dropped."""
        message, nbytes = decode(frame, Plane.BULK), len(frame)
        if isinstance(message, LinkOpen):
            return self._take_route(route, message, nbytes)
        assert isinstance(message, BulkMessage), "nothing else belongs on the bulk plane"
        plan, life = self._plan, self._routes.get(route)
        if plan is None or life is None or message.fence != plan.fence:
            raise RemoteProtocolError("a frame of another plan, or on a link that nobody opened")
        sender = index_of(plan, life)
        if sender is None or sender not in self._partners:
            raise RemoteProtocolError("a frame from a node with which the plan exchanges no KV")
        if isinstance(message, KvDelta) and message.sender != sender:
            raise RemoteProtocolError("a frame that names another sender")
        arrival = Arrival(nbytes, sender, message)
        if not self._in_force:
            return self._keep(arrival)
        if isinstance(message, KvDelta):
            self.traffic.received_bytes += nbytes
        return arrival

    def _keep(self, arrival: Arrival) -> Arrival:
        """Keep what may be said before a plan is in force here."""
        if isinstance(arrival.message, KvDelta) or self._early_of[arrival.sender] >= MAX_EARLY:
            raise RemoteProtocolError("KV, or too many frames, before the plan is in force")
        self._early_of[arrival.sender] += 1
        self._early.append(arrival)
        return Arrival(arrival.nbytes)

    def _take_route(self, route: bytes, message: LinkOpen, nbytes: int) -> Arrival:
        """A node says that this route is its link; a new one takes the place of what it had."""
        life = (message.node_id, message.boot_id)
        for other in [r for r, whose in self._routes.items() if r != route and whose == life]:
            del self._routes[other]
        self._routes[route] = life
        self._forget_strangers()
        plan = self._plan
        if self._in_force and plan is not None and message.fence == plan.fence:
            sender = index_of(plan, life)
            if sender is not None and sender in self._partners:
                return Arrival(nbytes, sender, message)
        return Arrival(nbytes)

    def _forget_strangers(self) -> None:
        """A plan on its way may make a stranger a member, so some are remembered."""
        members = {(m.node_id, m.boot_id) for m in self._plan.members} if self._plan else set()
        strangers = [route for route, life in self._routes.items() if life not in members]
        for route in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
            del self._routes[route]


def index_of(plan: Plan, life: Life) -> int | None:
    """Which member of a plan that run of a node is."""
    for index, member in enumerate(plan.members):
        if (member.node_id, member.boot_id) == life:
            return index
    return None


def _address(member: Member) -> str:
    return port_shifted(member.address, BULK_PORT_OFFSET)
