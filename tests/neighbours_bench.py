"""Node 1 among two others: its neighbours, with time and heartbeats in the test's hands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from p2pinfer.core import events as e
from p2pinfer.core.links import Links
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence, Member
from p2pinfer.wire.messages import Heartbeat, MemberState, Rumour

T = TypeVar("T")
CLUSTER = "c" * 16
PERIOD = LAN.heartbeat_every


def member(number: int, *, boot: int = 0) -> Member:
    return Member(
        node_id=f"{number:016x}",
        boot_id=f"{number * 100 + boot:016x}",
        name=f"node{number}",
        address=f"tcp://h{number}:7720",
    )


ME, TWO, THREE = member(1), member(2), member(3)


def rumour(who: Member, state: MemberState, incarnation: int = 0) -> Rumour:
    return Rumour(node_id=who.node_id, boot_id=who.boot_id, state=state, incarnation=incarnation)


def word(who: Member, **values: Any) -> Heartbeat:
    fields: dict[str, Any] = {"incarnation": 0, "term": 1, "fence": Fence(), **values}
    return Heartbeat(node_id=who.node_id, boot_id=who.boot_id, **fields)


@dataclass
class Office:
    """Who leads, as an election would tell."""

    term: int = 4
    leader_id: str = TWO.node_id


@dataclass
class Bench:
    """Node 1, which knows nodes 2 and 3, with connected and answered links."""

    now: float = 100.0
    told: list[e.Output] = field(default_factory=list)
    losses: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.links = Links(LAN)
        self.box = Outbox(ME.node_id, self.links.to)
        config = e.NodeConfig(member=ME, model=None, cluster_id=CLUSTER)
        office: Any = Office()
        self.near = Neighbours(config, self.links, office, self.box, self.lost)
        self.near.cluster_id = CLUSTER
        for who in (TWO, THREE):
            self.meet(who)
        self.take()

    def lost(self, peer: Peer, state: MemberState, reason: str, now: float) -> None:
        assert now == self.now
        self.losses.append((peer.member.name, state.value, reason))

    def meet(self, who: Member) -> None:
        """A member greets, and answers on our own link."""
        self.near.add(who, self.now, spoke=True)
        self.links.went_up(who.address)
        self.near.put(self.links.answered(who.address, who.node_id, who.address))

    def take(self) -> list[e.Output]:
        """What came out since the last look."""
        self.told = self.box.take()
        return self.told

    def of(self, kind: type[T]) -> list[T]:
        return [output for output in self.told if isinstance(output, kind)]

    def own(self, **values: Any) -> Heartbeat:
        flags = {"hung": False, "draining": False, **values}
        return self.near.heartbeat(Fence(4, 7), e.WorkerStats(), self.now, **flags)

    def look(self, **values: Any) -> list[e.Output]:
        self.near.look(self.own(), self.now, **values)
        return self.take()

    def hear(self, *speakers: Member, **values: Any) -> None:
        for who in speakers:
            self.near.heard(word(who, **values), self.now)

    def run(self, seconds: float, *speakers: Member, **values: Any) -> list[e.Output]:
        """Time passes, and these members go on sending heartbeats; returns all that came out."""
        outputs = []
        for _ in range(round(seconds / PERIOD)):
            self.now += PERIOD
            self.hear(*speakers, **values)
            outputs += self.look()
        self.told = outputs
        return outputs

    def state(self, who: Member) -> MemberState:
        return self.near.table[who.node_id].state
