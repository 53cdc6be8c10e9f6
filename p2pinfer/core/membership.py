"""Who is there: the membership table of one node, in the words of SWIM (Das et al., 2002).

Every node hears every other one directly (`MAX_NODES` is small), so a member is declared dead on
direct evidence only; what others say of it (rumours) makes this node look for itself. A member
that hears itself called suspect refutes it with a higher incarnation, and rumours of lower ones
count no more. All times are in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import inf
from statistics import median

from msgspec.structs import replace

from p2pinfer.core.speed import round_trip_ms
from p2pinfer.core.timing import Timing
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Member, RoundTrip
from p2pinfer.wire.messages import Contact, Heartbeat, MemberState, Rumour

FORGET_S = 60.0
"""How long a member that is gone, and that no plan names, is remembered: long enough to be seen in
`status`, and for everybody to have missed it, so that no rumour brings it back."""

HEARD_PERIODS = 2
"""Who was heard within so many heartbeat periods is heard: one heartbeat may be lost."""

TRIPS = 15
"""Of so many of the last round trips to a member the median counts, once there are `LEAST_TRIPS`:
a busy machine answers late now and then."""

LEAST_TRIPS = 5

LIVING = (MemberState.ALIVE, MemberState.SUSPECT)


@dataclass(slots=True)
class Peer:
    """What this node believes of one other member.

    `spoke` is false while it is known from others only; `gone_at` is when it was lost.
    """

    member: Member
    heard_at: float
    spoke: bool
    state: MemberState = MemberState.ALIVE
    incarnation: int = 0
    heartbeat: Heartbeat | None = None
    rtt_s: float | None = None
    gone_at: float = inf
    trips: deque[float] = field(default_factory=lambda: deque(maxlen=TRIPS))
    """The last round trips, in milliseconds."""
    trip: RoundTrip | None = None
    """What is told of them."""

    @property
    def living(self) -> bool:
        """Alive or suspect: not known to be gone."""
        return self.state in LIVING

    @property
    def fence(self) -> Fence:
        """The fence of the plan that this member says it obeys."""
        return self.heartbeat.fence if self.heartbeat else Fence()


class Membership:
    """The members that one node knows, itself (`me`) apart."""

    def __init__(self, me: Member, timing: Timing) -> None:
        self.me = me
        self.incarnation = 0
        self.changed_at = -inf
        """When a member last came or went."""
        self._timing = timing
        self._peers: dict[str, Peer] = {}

    def __getitem__(self, node_id: str) -> Peer:
        return self._peers[node_id]

    def get(self, node_id: str) -> Peer | None:
        """The peer of that id, gone ones included."""
        return self._peers.get(node_id)

    def everybody(self) -> list[Peer]:
        """All known peers, gone ones included, by name."""
        return sorted(self._peers.values(), key=lambda p: (p.member.name, p.member.node_id))

    def living(self) -> list[Peer]:
        """Peers that are alive or suspect, by name."""
        return [peer for peer in self.everybody() if peer.living]

    def members(self) -> tuple[Member, ...]:
        """The living members, this node first."""
        return (self.me, *(peer.member for peer in self.living()))

    def contacts(self) -> tuple[Contact, ...]:
        """Where a client may go on when this node is gone: first members that live and stay.

        Those that are dead may come back; a witness takes no requests.
        """
        peers = [
            peer
            for peer in self.everybody()
            if peer.state is not MemberState.LEFT and not peer.member.witness
        ]
        peers.sort(key=lambda p: (not p.living, p.heartbeat is not None and p.heartbeat.draining))
        found = (Contact(name=p.member.name, address=p.member.address) for p in peers)
        return tuple(found)[:MAX_NODES]

    def lost_ids(self) -> frozenset[str]:
        """Node ids of those known to be dead or to have left."""
        return frozenset(node_id for node_id, peer in self._peers.items() if not peer.living)

    def heard_ids(self, now: float, stretch: float = 1.0) -> frozenset[str]:
        """Node ids of the living peers that were heard lately; `stretch` is the local health's."""
        within = HEARD_PERIODS * self._timing.heartbeat_every * stretch
        return frozenset(
            peer.member.node_id
            for peer in self.living()
            if peer.spoke and now - peer.heard_at <= within
        )

    def is_living(self, member: Member) -> bool:
        """Whether that very incarnation of a member (its boot id) is alive or suspect."""
        if member.node_id == self.me.node_id:
            return member.boot_id == self.me.boot_id
        peer = self._peers.get(member.node_id)
        return peer is not None and peer.living and peer.member.boot_id == member.boot_id

    def join(self, member: Member, now: float, *, spoke: bool) -> bool:
        """Note a member, alive; true if it is new here. `spoke`: we have it from itself.

        That one says so again is no sign of life: whoever does not hear us greets us for ever.
        """
        peer = self._peers.get(member.node_id)
        same = peer is not None and peer.member.boot_id == member.boot_id
        if peer and peer.living and same:
            if spoke:
                heard_at = peer.heard_at if peer.spoke else now
                peer.member, peer.heard_at, peer.spoke = member, heard_at, True
            return False
        new = Peer(member=member, heard_at=now, spoke=spoke)
        if peer and same:
            new.incarnation = peer.incarnation
        self._peers[member.node_id] = new
        self.changed_at = now
        return True

    def describe(self, member: Member) -> None:
        """A living member describes itself anew, in the same boot."""
        peer = self._peers.get(member.node_id)
        if peer and peer.living and peer.member.boot_id == member.boot_id:
            peer.member = member

    def heard(self, heartbeat: Heartbeat, now: float) -> None:
        """A heartbeat of a living peer: it is alive, whatever was suspected."""
        peer = self._peers[heartbeat.node_id]
        peer.heard_at, peer.spoke = now, True
        peer.state = MemberState.ALIVE
        peer.incarnation = max(peer.incarnation, heartbeat.incarnation)
        peer.heartbeat = heartbeat
        if heartbeat.echo_ms:
            peer.rtt_s = max(0.0, now - heartbeat.echo_ms / 1000)
            self._time(peer, 1000 * peer.rtt_s)
        if peer.member.round_trips != heartbeat.round_trips:
            peer.member = replace(peer.member, round_trips=heartbeat.round_trips)

    def _time(self, peer: Peer, ms: float) -> None:
        """A round trip to a peer took so long: tell it, where that is something new."""
        peer.trips.append(ms)
        machine = self.me.machine
        near = bool(machine) and machine == peer.member.machine
        if not near and len(peer.trips) < LEAST_TRIPS:
            return
        before = peer.trip.ms if peer.trip else 0.0
        told = 0.0 if near else round_trip_ms(median(peer.trips), before)
        if peer.trip is None or told != before:
            peer.trip = RoundTrip(node_id=peer.member.node_id, ms=told)
            self._tell_trips()

    def _tell_trips(self) -> None:
        trips = tuple(peer.trip for peer in self.living() if peer.trip)
        self.me = replace(self.me, round_trips=trips[:MAX_NODES])

    def echo_ms(self, node_id: str, now: float) -> int:
        """The peer's clock as it stands, less one way: its last `sent_at_ms` aged by our waiting.

        So the peer has the round trip by subtracting it from its clock, whatever our period.
        """
        peer = self._peers[node_id]
        if peer.heartbeat is None:
            return 0
        return peer.heartbeat.sent_at_ms + round((now - peer.heard_at) * 1000)

    def suspect(self, node_id: str) -> bool:
        """Suspect a peer; false when it was not alive."""
        peer = self._peers[node_id]
        if peer.state is not MemberState.ALIVE:
            return False
        peer.state = MemberState.SUSPECT
        return True

    def lose(self, node_id: str, state: MemberState, now: float) -> None:
        """A peer is `DEAD` or has `LEFT`."""
        peer = self._peers[node_id]
        peer.state, peer.gone_at, peer.trip = state, now, None
        self.changed_at = now
        self._tell_trips()

    def silent(self, now: float, dead_after: float) -> list[Peer]:
        """Living peers that have not been heard for too long."""
        return [peer for peer in self.living() if self._dies_at(peer, dead_after) <= now]

    def next_death(self, dead_after: float) -> float:
        """When the first of the living peers would be silent for too long."""
        return min((self._dies_at(peer, dead_after) for peer in self.living()), default=inf)

    def _dies_at(self, peer: Peer, dead_after: float) -> float:
        patience = dead_after if peer.spoke else max(dead_after, self._timing.first_word)
        return peer.heard_at + patience

    def rumours(self) -> tuple[Rumour, ...]:
        """What this node believes of every peer it knows, for its heartbeats."""
        return tuple(
            Rumour(
                node_id=peer.member.node_id,
                boot_id=peer.member.boot_id,
                state=peer.state,
                incarnation=peer.incarnation,
            )
            for peer in self.everybody()
        )

    def refute(self, rumours: Iterable[Rumour]) -> None:
        """Raise our incarnation above every claim that we are not alive (SWIM, section 4.2)."""
        for rumour in rumours:
            ours = (rumour.node_id, rumour.boot_id) == (self.me.node_id, self.me.boot_id)
            if ours and rumour.state is not MemberState.ALIVE:
                self.incarnation = max(self.incarnation, rumour.incarnation + 1)

    def forget_gone(self, now: float, kept: Collection[str] = ()) -> list[Member]:
        """Forget who has been gone for long, and of too many the longest gone; returns them.

        `kept` are the node ids that the newest plan names: whether they live still matters.
        """
        gone = sorted(
            (p for p in self.everybody() if not p.living and p.member.node_id not in kept),
            key=lambda peer: peer.gone_at,
        )
        too_many = sum(not peer.living for peer in self._peers.values()) - MAX_NODES
        forgotten = [
            peer.member
            for number, peer in enumerate(gone)
            if number < too_many or peer.gone_at + FORGET_S <= now
        ]
        for member in forgotten:
            del self._peers[member.node_id]
        return forgotten
