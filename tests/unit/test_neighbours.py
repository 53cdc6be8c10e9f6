"""The other members as one node sees them: heartbeats, rumours, doubts and returns."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.membership import FORGET_S
from p2pinfer.core.neighbours import MAX_ROUTES
from p2pinfer.types import Fence
from p2pinfer.wire.messages import Heartbeat, MemberState
from tests.neighbours_bench import ME, PERIOD, THREE, TWO, Bench, member, rumour, word

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
