"""The other members as one node sees them: heartbeats, doubts, losses, and the five deaths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.health import LocalHealth, WorkerWatch
from p2pinfer.core.hearing import Hearing
from p2pinfer.core.links import Links
from p2pinfer.core.membership import FORGET_S, Peer
from p2pinfer.core.neighbours import MAX_ROUTES, PROBE_AGAIN_PERIODS, Neighbours
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


# --- heartbeats -----------------------------------------------------------------------------------


def test_heartbeats_go_to_all_who_live() -> None:
    """Every period, or at once when there is news, each living peer gets one with its own echo."""
    bench = Bench()
    bench.near.heard(word(TWO, sent_at_ms=5000), bench.now)
    bench.look()
    sent = {output.address: output.message for output in bench.of(e.Send)}
    assert sorted(sent) == [TWO.address, THREE.address]
    echoes = {a: m.echo_ms for a, m in sent.items() if isinstance(m, Heartbeat)}
    assert echoes == {TWO.address: 5000, THREE.address: 0}
    assert bench.look() == []
    assert bench.near.deadline == bench.now + PERIOD
    bench.near.speak_soon(bench.now)
    assert bench.near.deadline == bench.now
    assert len(bench.look()) == 2


def test_a_heartbeat_tells_what_its_sender_is() -> None:
    """It carries term, leader, fence, counters, flags, and whom its sender hears."""
    bench = Bench()
    stats = e.WorkerStats(
        steps=3, hears_steps=(TWO.node_id, "9" * 16), compute_ms=1.5, kv_used_bytes=8
    )
    own = bench.near.heartbeat(Fence(4, 7), stats, bench.now, hung=True, draining=True)
    assert (own.term, own.leader_id, own.fence) == (4, TWO.node_id, Fence(4, 7))
    assert (own.steps, own.compute_ms, own.kv_used_bytes) == (3, 1.5, 8)
    assert (own.hung, own.draining) == (True, True)
    assert own.hears_control == (TWO.node_id, THREE.node_id)
    assert own.hears_steps == (TWO.node_id,)
    assert own.sent_at_ms == 100_000


def test_alone_there_is_nothing_to_wait_for() -> None:
    """A node whose peers are all gone sends no heartbeats."""
    bench = Bench()
    for who in (TWO, THREE):
        bench.near.lose(bench.near.table[who.node_id], MemberState.LEFT, "bye", bench.now)
    assert bench.near.deadline == float("inf")
    assert [fact.name for fact in bench.take() if isinstance(fact, e.PeerLeft)] == [
        "node2",
        "node3",
    ]


def test_a_heartbeat_of_another_life_changes_nothing() -> None:
    """An old boot id in a heartbeat, or in a rumour, is of a process that is no more."""
    bench = Bench()
    bench.now += 4 * PERIOD
    assert not bench.near.heard(word(member(2, boot=1)), bench.now)
    assert [fact.reason for fact in bench.take() if isinstance(fact, e.FrameDropped)]
    assert bench.near.table[TWO.node_id].heard_at == 100.0
    bench.hear(TWO, rumours=(rumour(member(3, boot=1), MemberState.DEAD),))
    assert bench.take() == []


# --- rumours --------------------------------------------------------------------------------------


def test_a_rumour_of_death_makes_this_node_look_for_itself() -> None:
    """A member that another one lost, and that is not heard here either, is probed once."""
    bench = Bench()
    gone = rumour(THREE, MemberState.DEAD)
    bench.hear(TWO, rumours=(gone,))
    assert bench.take() == []
    bench.now += 4 * PERIOD
    bench.hear(TWO, rumours=(gone,))
    bench.hear(TWO, rumours=(gone,))
    bench.take()
    assert [fact.reason for fact in bench.of(e.PeerSuspected)] == ["node2 has lost it"]
    assert [probe.address for probe in bench.of(e.Probe)] == [THREE.address]


def test_a_refuted_rumour_counts_no_more() -> None:
    """Claims of a lower incarnation than the member has shown are old."""
    bench = Bench()
    bench.hear(THREE, incarnation=2)
    bench.now += 4 * PERIOD
    bench.hear(TWO, rumours=(rumour(THREE, MemberState.DEAD, incarnation=1),))
    assert bench.take() == []


def test_rumours_of_those_known_to_be_gone_change_nothing() -> None:
    """What others believe of a member that this node lost neither revives nor probes it."""
    bench = Bench()
    bench.near.lose(bench.near.table[THREE.node_id], MemberState.DEAD, "test", bench.now)
    bench.take()
    bench.now += 1.0
    for state in MemberState:
        bench.hear(TWO, rumours=(rumour(THREE, state),))
    assert bench.take() == []


def test_this_node_refutes_its_own_death() -> None:
    """Told that it is suspected, this node goes on under a higher incarnation."""
    bench = Bench()
    bench.hear(TWO, rumours=(rumour(ME, MemberState.SUSPECT, 3),))
    assert bench.own().incarnation == 4


def test_an_unknown_member_is_asked_for() -> None:
    """A living stranger in a rumour: the teller is greeted again, for its answer lists members."""
    bench = Bench()
    bench.hear(TWO, rumours=(rumour(member(9), MemberState.DEAD),))
    assert bench.links.to(TWO.node_id)
    bench.hear(TWO, rumours=(rumour(member(9), MemberState.ALIVE),))
    assert [link.address for link in bench.links.due(bench.now)] == [TWO.address]


# --- links and probes -----------------------------------------------------------------------------


def test_connections_are_known_by_their_greeting() -> None:
    """A route is a member's from its HELLO until it is lost; the oldest are forgotten."""
    bench = Bench()
    bench.near.came_by(b"r", TWO.node_id)
    assert bench.near.sender(b"r") == TWO.node_id
    assert bench.near.sender(b"?") == ""
    bench.near.lose(bench.near.table[TWO.node_id], MemberState.DEAD, "test", bench.now)
    assert bench.near.sender(b"r") == ""
    for number in range(MAX_ROUTES + 1):
        bench.near.came_by(b"%d" % number, THREE.node_id)
    assert bench.near.sender(b"0") == ""
    assert bench.near.sender(b"1") == THREE.node_id


def test_a_doubt_is_cleared_by_a_heartbeat() -> None:
    """A step waited for it: it is probed and suspect, but whoever speaks is alive."""
    bench = Bench()
    bench.near.doubt(bench.near.table[TWO.node_id], "a step waited for it")
    assert bench.state(TWO) is MemberState.SUSPECT
    assert bench.near.sure_ids(bench.now) == {THREE.node_id}
    bench.hear(TWO)
    assert bench.state(TWO) is MemberState.ALIVE
    bench.look()
    assert [probe.address for probe in bench.of(e.Probe)] == [TWO.address]
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=True), bench.now)
    assert bench.state(TWO) is MemberState.ALIVE


def test_a_second_doubt_is_another_look() -> None:
    """Suspicion is told once; each reason for it has the member probed."""
    bench = Bench()
    bench.near.link_down(TWO.address)
    bench.near.doubt(bench.near.table[TWO.node_id], "a step waited for it")
    bench.take()
    assert len(bench.of(e.PeerSuspected)) == 1
    assert len(bench.of(e.Probe)) == 2


def test_a_living_member_that_greets_again_is_no_news() -> None:
    """HELLO on a second connection joins nobody."""
    bench = Bench()
    bench.near.add(TWO, bench.now, spoke=True)
    assert bench.take() == []


@pytest.mark.parametrize("fate", ["cleared", "reborn"])
def test_an_answer_that_comes_late_kills_nobody(fate: str) -> None:
    """A refused probe of a former doubt, or of a former life at that address, says nothing."""
    bench = Bench()
    bench.near.doubt(bench.near.table[TWO.node_id], "test")
    if fate == "cleared":
        bench.hear(TWO)
    else:
        bench.near.table.join(member(2, boot=1), bench.now, spoke=True)
        bench.near.table.suspect(TWO.node_id)
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=True), bench.now)
    assert bench.losses == []


def test_only_the_living_are_doubted() -> None:
    """A broken connection to one that is gone, or to nobody, is no news."""
    bench = Bench()
    bench.near.link_down("tcp://nobody:1")
    peer = bench.near.table[TWO.node_id]
    bench.near.lose(peer, MemberState.DEAD, "test", bench.now)
    bench.take()
    bench.near.doubt(peer, "again")
    assert bench.take() == []


def test_this_node_opens_no_link_to_itself() -> None:
    """Its own address on a list is passed over."""
    bench = Bench()
    bench.near.open(ME.address)
    assert bench.take() == []


# --- coming back ----------------------------------------------------------------------------------


def test_a_lost_member_is_back_when_it_answers_us() -> None:
    """Its greeting alone shows only that we hear it; it is greeted in turn, and its answer counts:
    so a cut in one direction does not bring it back each second."""
    bench = Bench()
    bench.run(1.0, THREE)
    assert bench.state(TWO) is MemberState.DEAD
    bench.near.add(TWO, bench.now, spoke=True)
    assert bench.state(TWO) is MemberState.DEAD
    assert bench.take() == [e.OpenLink(address=TWO.address)]
    bench.near.add(TWO, bench.now, spoke=False)
    assert [fact.member for fact in bench.take() if isinstance(fact, e.PeerJoined)] == [TWO]
    assert bench.state(TWO) is MemberState.ALIVE


def test_a_restarted_member_is_the_same_node_in_another_life() -> None:
    """A new boot id comes in by its greeting; there is one entry for the node."""
    bench = Bench()
    again = member(2, boot=1)
    bench.near.lose(bench.near.table[TWO.node_id], MemberState.DEAD, "it started again", bench.now)
    bench.near.add(again, bench.now, spoke=True)
    assert bench.near.table.is_living(again)
    assert not bench.near.table.is_living(TWO)
    assert [peer.member.name for peer in bench.near.table.everybody()] == ["node2", "node3"]


def test_ghosts_disappear_with_their_links() -> None:
    """Who is gone for long is forgotten and not looked for, unless the newest plan names it."""
    bench = Bench()
    bench.run(1.0, THREE)
    bench.near.open(TWO.address)
    bench.take()
    bench.now += FORGET_S
    bench.hear(THREE)
    assert e.CloseLink(address=TWO.address) not in bench.look(kept=[TWO.node_id])
    assert TWO.node_id in bench.near.table.lost_ids()
    assert e.CloseLink(address=TWO.address) in bench.look()
    assert bench.near.table.get(TWO.node_id) is None


def test_the_leaders_loss_leaves_the_others() -> None:
    """The table goes on whoever is lost."""
    bench = Bench()
    bench.run(1.0, THREE)
    assert bench.near.table.members() == (ME, THREE)


@pytest.mark.parametrize("answered", [True, False])
def test_another_node_at_the_address_of_a_lost_one_keeps_its_link(answered: bool) -> None:
    """A node without its state comes back as another one: the old one's end is not its end."""
    bench = Bench()
    heir = replace(member(4), address=TWO.address)
    bench.near.add(heir, bench.now, spoke=True)
    bench.links.went_down(TWO.address)
    bench.links.went_up(TWO.address)
    if answered:
        bench.near.put(bench.links.answered(TWO.address, heir.node_id, heir.address))
    bench.take()
    bench.near.lose(bench.near.table[TWO.node_id], MemberState.DEAD, "test", bench.now)
    links = [o for o in bench.take() if isinstance(o, e.OpenLink | e.CloseLink)]
    anew = [e.CloseLink(address=TWO.address), e.OpenLink(address=TWO.address)]
    assert links == ([] if answered else anew)


# --- the five deaths, told apart ------------------------------------------------------------------


def test_death_1_killed() -> None:
    """Its connection breaks and its port is closed: dead at once, long before any silence."""
    bench = Bench()
    bench.near.link_down(TWO.address)
    bench.take()
    assert [fact.reason for fact in bench.of(e.PeerSuspected)] == ["its connection broke"]
    bench.now += 0.01
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=True), bench.now)
    assert bench.losses == [("node2", "dead", "it refuses connections")]


def test_death_1_killed_while_its_port_still_answers() -> None:
    """A suspect that stays silent is probed again: a dying process closes its port last."""
    bench = Bench()
    bench.near.link_down(TWO.address)
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=False), bench.now)
    assert bench.losses == []
    bench.take()
    again = bench.run((PROBE_AGAIN_PERIODS + 1) * PERIOD, THREE)
    assert [output.address for output in again if isinstance(output, e.Probe)] == [TWO.address]
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=True), bench.now)
    assert bench.losses == [("node2", "dead", "it refuses connections")]


def test_death_2_hung_whole() -> None:
    """Its process stands still, connections and port stay: dead by silence of dead_after."""
    bench = Bench()
    bench.run(LAN.dead_after - PERIOD, THREE)
    assert bench.losses == []
    bench.run(2 * PERIOD, THREE)
    assert bench.losses == [("node2", "dead", "it fell silent")]
    dead = bench.of(e.PeerDead)
    assert [fact.silence_s for fact in dead] == [pytest.approx(LAN.dead_after, abs=PERIOD)]


def test_death_2_is_found_later_by_a_node_in_doubt_of_itself() -> None:
    """Local health stretches dead_after."""
    bench = Bench()
    for _ in range(12):
        bench.now += PERIOD
        bench.hear(THREE)
        bench.look(stretch=2.0)
    assert bench.losses == []
    assert bench.near.deadline <= 100.0 + 2 * LAN.dead_after
    bench.run(PERIOD, THREE)
    assert bench.losses == [("node2", "dead", "it fell silent")]


def test_death_3_hung_in_compute() -> None:
    """Its worker reports no more, its control plane speaks on: it says so, and nobody is lost."""
    bench = Bench()
    watch = WorkerWatch(LAN)
    watch.said(bench.now)
    bench.run(1.0, TWO, THREE)
    assert bench.own(hung=watch.hung(bench.now)).hung
    bench.hear(TWO, hung=True)
    bench.look()
    heartbeat = bench.near.table[TWO.node_id].heartbeat
    assert heartbeat is not None
    assert heartbeat.hung
    assert bench.losses == []


def cut_off(hears: Callable[[str, str], bool]) -> tuple[Bench, frozenset[str]]:
    """Node 1 leads for two seconds while only some hear some; who is to own nothing then?"""
    bench, hearing, out = Bench(), Hearing(LAN), frozenset[str]()
    names = {who.node_id: who.name for who in (ME, TWO, THREE)}
    for turn in range(20):
        bench.now += PERIOD
        for who in (TWO, THREE):
            others = [i for i in names if i != who.node_id]
            heard = [i for i in others if turn < 5 or hears(who.name, names[i])]
            living = bench.near.table.is_living(who)
            if living and (turn < 5 or hears("node1", who.name)):
                heartbeat = word(
                    who, hears_control=tuple(heard), sent_at_ms=round(bench.now * 1000)
                )
                bench.near.heard(heartbeat, bench.now)
                hearing.heard(heartbeat, bench.now)
        bench.look()
        members = bench.near.table.members()
        pairs = hearing.broken(members, bench.own(), bench.now)
        out = hearing.outcasts(pairs, [m.node_id for m in members], ME.node_id)
    return bench, out


def test_death_4_cut_off_from_all() -> None:
    """Nothing comes from it: dead by silence, and no pair is to blame."""
    bench, out = cut_off(lambda ear, mouth: "node2" not in (ear, mouth))
    assert bench.losses == [("node2", "dead", "it fell silent")]
    assert out == frozenset()


def test_death_4_cut_off_in_one_direction() -> None:
    """It speaks but hears nobody: it stays a member, but its pairs are broken."""
    bench, out = cut_off(lambda ear, mouth: ear != "node2")
    assert bench.losses == []
    assert out == {TWO.node_id}


def test_death_4_cut_off_from_one_peer() -> None:
    """Two members do not hear each other: both live, and one of them gives way."""
    bench, out = cut_off(lambda ear, mouth: {ear, mouth} != {"node2", "node3"})
    assert bench.losses == []
    assert out == {THREE.node_id}


def test_death_5_slow() -> None:
    """A slow member speaks as all do: only its computing tells, and nobody is lost."""
    bench = Bench()
    bench.run(2.0, TWO, THREE, compute_ms=500.0)
    assert bench.losses == []
    heartbeat = bench.near.table[TWO.node_id].heartbeat
    assert heartbeat is not None
    assert heartbeat.compute_ms == 500.0


def test_this_nodes_own_standstill_kills_nobody() -> None:
    """Stopped for ten seconds it reads its queues first; by awake time no peer is overdue."""
    bench, health = Bench(), LocalHealth(LAN)
    bench.look()
    health.look(float("inf"), bench.now)
    bench.now = health.look(bench.near.deadline, bench.now + 10.0)
    bench.look(stretch=health.stretch)
    assert bench.losses == []
    assert health.score == LAN.max_health
    bench.run(1.0, TWO, THREE)
    assert bench.losses == []
