"""The membership table: states, incarnations, silence and rumours."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from msgspec.structs import replace

from p2pinfer.core.membership import FORGET_S, HEARD_PERIODS, Membership
from p2pinfer.core.timing import LAN
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Member, RoundTrip
from p2pinfer.wire.messages import Heartbeat, MemberState, Rumour


def member(number: int, boot: int = 0) -> Member:
    return Member(
        node_id=f"{number:016x}",
        boot_id=f"{number * 100 + boot:016x}",
        name=f"node{number}",
        address=f"tcp://h{number}:7720",
    )


def heartbeat(who: Member, **values: Any) -> Heartbeat:
    fields = {"incarnation": 0, **values}
    return Heartbeat(node_id=who.node_id, boot_id=who.boot_id, term=1, fence=Fence(1, 2), **fields)


def table_of(*numbers: int) -> Membership:
    table = Membership(member(1), LAN)
    for number in numbers:
        table.join(member(number), 10.0, spoke=True)
    return table


def test_joining_is_new_once_per_life() -> None:
    """The same life of a node joins once; another boot id is another life."""
    table = table_of()
    assert table.join(member(2), 1.0, spoke=False)
    assert not table.join(member(2), 2.0, spoke=True)
    assert not table.join(member(2), 3.0, spoke=False)
    assert table[member(2).node_id].heard_at == 2.0
    assert table.join(member(2, boot=1), 4.0, spoke=True)
    assert table.changed_at == 4.0
    assert not table.is_living(member(2))
    assert table.is_living(member(2, boot=1))


def test_greeting_again_is_no_sign_of_life() -> None:
    """Who has lost this node greets it for ever; only heartbeats say that it is there for us."""
    table = table_of()
    table.join(member(2), 1.0, spoke=True)
    better = replace(member(2), numeric_class="known by now")
    assert not table.join(better, 1.5, spoke=True)
    assert table[member(2).node_id].member == better
    assert table.silent(1.0 + LAN.dead_after, LAN.dead_after) == [table[member(2).node_id]]


def test_a_member_describes_itself_anew() -> None:
    """In the same boot and while it lives; that is neither a join nor a sign of life."""
    table = table_of(2)
    better = replace(member(2), numeric_class="known by now")
    table.describe(better)
    table.describe(replace(member(2, boot=1), numeric_class="of another life"))
    table.describe(member(3))
    peer = table[member(2).node_id]
    assert (peer.member, peer.heard_at, table.changed_at) == (better, 10.0, 10.0)
    assert table.get(member(3).node_id) is None
    table.lose(member(2).node_id, MemberState.DEAD, 11.0)
    table.describe(member(2))
    assert peer.member == better


def test_this_node_lives() -> None:
    """The table counts its own life, and no other one, among the living."""
    table = table_of(2)
    assert table.members() == (member(1), member(2))
    assert table.is_living(member(1))
    assert not table.is_living(member(1, boot=1))
    assert not table.is_living(member(3))


def test_a_lost_member_that_returns_is_new() -> None:
    """A dead member comes back as a new one; what it refuted in that life stays refuted."""
    table = table_of(2)
    table.heard(heartbeat(member(2), incarnation=3), 10.5)
    table.lose(member(2).node_id, MemberState.DEAD, 11.0)
    assert table.living() == []
    assert table.lost_ids() == {member(2).node_id}
    assert table.join(member(2), 12.0, spoke=True)
    assert table.lost_ids() == frozenset()
    assert table[member(2).node_id].incarnation == 3
    assert table.join(member(2, boot=1), 13.0, spoke=True)
    assert table[member(2).node_id].incarnation == 0


def test_heard_is_who_spoke_lately() -> None:
    """Two heartbeat periods, stretched; members known from lists only are not heard."""
    table = table_of(2)
    table.join(member(3), 10.0, spoke=False)
    two, within = member(2).node_id, HEARD_PERIODS * LAN.heartbeat_every
    assert table.heard_ids(10.0) == {two}
    assert table.heard_ids(10.01 + within) == frozenset()
    assert table.heard_ids(10.01 + within, stretch=2.0) == {two}
    table.suspect(two)
    assert table.heard_ids(10.0) == {two}
    table.lose(two, MemberState.DEAD, 10.0)
    assert table.heard_ids(10.0) == frozenset()


def test_suspicion_is_cleared_by_a_heartbeat() -> None:
    """Only an alive member becomes suspect, and its heartbeat makes it alive again."""
    table = table_of(2)
    assert table.suspect(member(2).node_id)
    assert not table.suspect(member(2).node_id)
    table.heard(heartbeat(member(2), incarnation=3), 11.0)
    peer = table[member(2).node_id]
    assert (peer.state, peer.incarnation) == (MemberState.ALIVE, 3)
    assert peer.fence == Fence(1, 2)


def test_silence_is_counted_from_the_last_word() -> None:
    """A member dies dead_after its last word; one that never spoke has a few seconds."""
    table = table_of(2)
    table.join(member(3), 10.0, spoke=False)
    assert table.next_death(1.0) == 11.0
    assert [peer.member.name for peer in table.silent(11.0, 1.0)] == ["node2"]
    assert len(table.silent(10.0 + LAN.first_word, 1.0)) == 2
    assert table_of().next_death(1.0) == inf


def test_the_echo_gives_the_round_trip() -> None:
    """The echo ages with the time that the answer waits; a negative difference counts as none."""
    table = table_of(2)
    assert table.echo_ms(member(2).node_id, 10.0) == 0
    table.heard(heartbeat(member(2), sent_at_ms=500), 11.0)
    assert table.echo_ms(member(2).node_id, 11.25) == 750
    assert table[member(2).node_id].rtt_s is None
    table.heard(heartbeat(member(2), echo_ms=10_990), 11.0)
    assert table[member(2).node_id].rtt_s == pytest.approx(0.01)
    table.heard(heartbeat(member(2), echo_ms=20_000), 11.0)
    assert table[member(2).node_id].rtt_s == 0.0


def test_a_claim_that_we_are_not_alive_is_refuted() -> None:
    """Our incarnation rises above any such claim about this life of ours, and only then."""
    table = table_of(2)

    def claim(who: Member, state: MemberState, incarnation: int) -> Rumour:
        return Rumour(
            node_id=who.node_id, boot_id=who.boot_id, state=state, incarnation=incarnation
        )

    table.refute([claim(member(1), MemberState.ALIVE, 9), claim(member(2), MemberState.DEAD, 9)])
    table.refute([claim(member(1, boot=1), MemberState.DEAD, 9)])
    assert table.incarnation == 0
    table.refute([claim(member(1), MemberState.SUSPECT, 4)])
    assert table.incarnation == 5


def test_rumours_tell_the_whole_table() -> None:
    """A heartbeat carries every known peer with its state."""
    table = table_of(2, 3)
    table.lose(member(3).node_id, MemberState.LEFT, 11.0)
    assert [(r.node_id, r.state.value) for r in table.rumours()] == [
        (member(2).node_id, "alive"),
        (member(3).node_id, "left"),
    ]


def test_ghosts_disappear() -> None:
    """A member that is gone is forgotten after FORGET_S, unless the newest plan names it."""
    table = table_of(2, 3, 4)
    for number in (2, 3):
        table.lose(member(number).node_id, MemberState.DEAD, 20.0)
    planned = [member(2).node_id]
    assert table.forget_gone(20.0 + FORGET_S - 0.1, planned) == []
    assert table.forget_gone(20.0 + FORGET_S, planned) == [member(3)]
    assert table.lost_ids() == {member(2).node_id}
    assert table.forget_gone(20.0 + FORGET_S) == [member(2)]
    assert [rumour.node_id for rumour in table.rumours()] == [member(4).node_id]


def test_the_table_stays_bounded() -> None:
    """Of many members that are gone the oldest are forgotten, so rumours fit a heartbeat."""
    table = table_of()
    for number in range(2, 60):
        table.join(member(number), float(number), spoke=True)
        table.lose(member(number).node_id, MemberState.DEAD, float(number))
        table.forget_gone(float(number), [member(3).node_id])
    assert len(table.rumours()) <= MAX_NODES
    assert table.get(member(2).node_id) is None
    assert table.get(member(3).node_id) is not None
    assert table.get(member(59).node_id) is not None


def test_contacts_are_those_who_take_requests() -> None:
    """First who lives and stays, then who drains or is dead; nobody who left, and no witness."""
    table = table_of(2, 3, 4, 5)
    table.join(replace(member(6), witness=True), 10.0, spoke=True)
    table.lose(member(2).node_id, MemberState.DEAD, 11.0)
    table.lose(member(5).node_id, MemberState.LEFT, 11.0)
    table.heard(heartbeat(member(3), draining=True), 12.0)
    table.heard(heartbeat(member(4)), 12.0)
    assert [(c.name, c.address) for c in table.contacts()] == [
        ("node4", "tcp://h4:7720"),
        ("node3", "tcp://h3:7720"),
        ("node2", "tcp://h2:7720"),
    ]
    everybody = table_of(*range(2, MAX_NODES + 9))
    assert len(everybody.contacts()) == MAX_NODES


def trips(table: Membership) -> list[float]:
    """What a table tells of its round trips, in milliseconds."""
    return [trip.ms for trip in table.me.round_trips]


def test_round_trips_are_told_once_they_are_known() -> None:
    """The median of several counts, so that a late answer now and then is nothing."""
    table = table_of(2)
    for number, late_ms in enumerate((10, 500, 10, 10)):
        now = 20.0 + number
        table.heard(heartbeat(member(2), echo_ms=round(1000 * now) - late_ms), now)
    assert trips(table) == []
    table.heard(heartbeat(member(2), echo_ms=29_990), 30.0)
    assert trips(table) == [pytest.approx(10, rel=0.2)]
    told = table.me
    table.heard(heartbeat(member(2), echo_ms=30_988), 31.0)
    assert table.me is told
    table.lose(member(2).node_id, MemberState.DEAD, 32.0)
    assert trips(table) == []


def test_members_of_one_machine_have_no_round_trip() -> None:
    """What heartbeats take between them is the programs' own time, and needs no second look."""
    table = table_of(2)
    here = "a" * 16
    table.me = replace(table.me, machine=here)
    table.describe(replace(member(2), machine=here))
    table.heard(heartbeat(member(2), echo_ms=10_500), 11.0)
    assert trips(table) == [0.0]


def test_what_a_member_measured_is_part_of_its_description() -> None:
    """So a plan, which lists members, says how far they are from each other."""
    table = table_of(2)
    measured = (RoundTrip(node_id=member(1).node_id, ms=4.0),)
    table.heard(heartbeat(member(2), round_trips=measured), 11.0)
    assert table[member(2).node_id].member.round_trips == measured
