"""Broken pairs: who does not hear whom, and who of them gives way."""

from __future__ import annotations

from math import inf

import pytest

from p2pinfer.core.hearing import Hearing, Pair, pair_of
from p2pinfer.core.timing import LAN, Timing
from p2pinfer.types import Fence, Member
from p2pinfer.wire.messages import Heartbeat

A, B, C, D = (f"{number:016x}" for number in (1, 2, 3, 4))
PERIOD = LAN.heartbeat_every


def member(node_id: str, *, boot: str = "", witness: bool = False, weight: float = 1.0) -> Member:
    return Member(
        node_id=node_id,
        boot_id=boot or node_id,
        name=f"node{int(node_id, 16)}",
        address=f"tcp://h{int(node_id, 16)}:7720",
        witness=witness,
        weight=weight,
    )


def word(who: Member, at: float, hears: tuple[str, ...]) -> Heartbeat:
    return Heartbeat(
        node_id=who.node_id,
        boot_id=who.boot_id,
        incarnation=0,
        term=1,
        fence=Fence(),
        hears_control=hears,
        sent_at_ms=round(at * 1000),
    )


class Bench:
    """Node A leads B, C and D; `deaf` are the (ear, mouth) that do not work."""

    def __init__(self, *members: Member, timing: Timing = LAN) -> None:
        self.members = members or tuple(member(i) for i in (A, B, C, D))
        self.hearing = Hearing(timing)
        self.now = 100.0
        self.deaf: set[tuple[str, str]] = set()
        self.clock_of: dict[str, float] = {}

    def own(self) -> Heartbeat:
        others = (m.node_id for m in self.members if (A, m.node_id) not in self.deaf)
        return word(self.members[0], self.now, tuple(i for i in others if i != A))

    def say(self, teller: Member, at: float) -> None:
        others = (m.node_id for m in self.members if m.node_id != teller.node_id)
        hears = tuple(i for i in others if (teller.node_id, i) not in self.deaf)
        self.hearing.heard(word(teller, at, hears))

    def broken(self) -> frozenset[Pair]:
        return self.hearing.broken(self.members, self.own(), self.now)

    def run(self, seconds: float) -> frozenset[Pair]:
        """All members send heartbeats for so long; returns the broken pairs at the end."""
        for _ in range(round(seconds / PERIOD)):
            self.now += PERIOD
            for teller in self.members[1:]:
                if (A, teller.node_id) not in self.deaf:
                    self.say(teller, self.now + self.clock_of.get(teller.node_id, 0.0))
            pairs = self.broken()
        return pairs


def test_a_pair_is_broken_when_one_has_been_deaf_for_long() -> None:
    """One direction is enough, and a member's own clock counts."""
    bench = Bench()
    bench.clock_of[B] = 5000.0
    assert bench.run(1.0) == frozenset()
    bench.deaf = {(B, C)}
    assert bench.run(LAN.pair_after) == frozenset()
    assert bench.run(2 * PERIOD) == {(B, C)}


def test_a_follower_that_does_not_hear_the_leader_is_in_a_broken_pair() -> None:
    """The leader hears it, and so knows from its words that it is not heard itself."""
    bench = Bench()
    bench.run(1.0)
    bench.deaf = {(B, A)}
    assert bench.run(1.0) == {(A, B)}


def test_a_member_that_the_leader_does_not_hear_either_is_no_pair() -> None:
    """A member that stands still is missed by all: that is a matter of its silence."""
    bench = Bench()
    bench.run(1.0)
    bench.deaf = {(A, B), (C, B), (D, B)}
    assert bench.run(3.0) == frozenset()


def test_late_news_is_not_long_silence() -> None:
    """A leader that stood still finds two words of a member: their own times tell how far apart."""
    bench = Bench()
    bench.run(1.0)
    bench.deaf = {(B, C)}
    bench.run(PERIOD)
    said_at, bench.now = bench.now, bench.now + 10
    bench.say(bench.members[1], said_at + PERIOD)
    assert bench.broken() == frozenset()


def test_members_that_never_met_have_time_to() -> None:
    """Two members that have not heard each other yet may still be opening their links."""
    bench = Bench()
    bench.deaf = {(B, C), (C, B)}
    assert bench.run(LAN.first_word - 1.0) == frozenset()
    assert bench.run(2.0) == {(B, C)}


def test_a_mended_pair_is_trusted_after_a_while() -> None:
    """A pair that hears again must do so for unable_for without a break."""
    bench = Bench()
    bench.run(1.0)
    bench.deaf = {(B, C)}
    bench.run(1.0)
    bench.deaf = set()
    assert bench.run(LAN.unable_for / 2) == {(B, C)}
    bench.deaf = {(B, C)}
    bench.run(PERIOD)
    bench.deaf = set()
    assert bench.run(LAN.unable_for) == {(B, C)}
    assert bench.run(2 * PERIOD) == frozenset()


def test_another_life_begins_anew() -> None:
    """What was said by or about a former life of a member does not count."""
    bench = Bench()
    bench.run(1.0)
    bench.deaf = {(B, C)}
    assert bench.run(1.0)
    bench.say(bench.members[1], bench.now)
    reborn = member(B, boot="f" * 16)
    bench.members = (bench.members[0], reborn, *bench.members[2:])
    assert bench.broken() == frozenset()


@pytest.mark.parametrize("other", [{"witness": True}, {"weight": 0.0}])
def test_members_that_own_nothing_are_in_no_pair(other: dict[str, bool]) -> None:
    """A witness, or a member of no weight, exchanges nothing with owners but the leader."""
    bench = Bench(member(A), member(B), member(C, **other))
    bench.run(1.0)
    bench.deaf = {(B, C), (C, B)}
    assert bench.run(6.0) == frozenset()


def test_two_failed_steps_in_a_row_break_a_pair() -> None:
    """A pair blamed twice in a row rests for unable_for, then is tried again."""
    bench = Bench()
    hearing = bench.hearing
    hearing.also_failed(B, C, bench.now)
    hearing.step_failed(B, C, bench.now)
    hearing.step_failed(C, D, bench.now)
    hearing.step_failed(C, B, bench.now)
    assert bench.broken() == frozenset()
    hearing.step_failed(B, C, bench.now)
    assert bench.broken() == {(B, C)}
    assert hearing.deadline == bench.now + LAN.unable_for
    bench.now = hearing.deadline
    assert bench.broken() == frozenset()
    assert hearing.deadline == inf


@pytest.mark.parametrize("explained", ["success", "death"])
def test_failures_with_something_between_are_not_in_a_row(explained: str) -> None:
    """Tokens committed, or a member lost, between two failures: each stands alone."""
    bench = Bench()
    bench.hearing.step_failed(B, C, bench.now)
    if explained == "success":
        bench.hearing.step_succeeded()
    else:
        bench.hearing.member_lost()
    bench.hearing.step_failed(B, C, bench.now)
    assert bench.broken() == frozenset()


def test_who_waits_for_a_third_one_is_not_to_blame() -> None:
    """The leader waits for B, which waits for C and is waited for by it: B and C are the pair."""
    bench = Bench()
    for _ in range(2):
        bench.hearing.step_failed(A, B, bench.now)
        bench.hearing.also_failed(B, C, bench.now)
        bench.hearing.also_failed(C, B, bench.now)
    assert bench.broken() == {(B, C)}


def test_a_failure_that_names_nobody_says_nothing() -> None:
    """A step that failed for nobody's, or for the reporter's own sake, breaks no pair."""
    bench = Bench()
    for about in ("", B, "", B):
        bench.hearing.step_failed(B, about, bench.now)
    assert bench.broken() == frozenset()


def test_a_pair_that_fails_again_rests_longer() -> None:
    """Each further failure of a pair doubles its rest up to unable_max, until it has done well."""
    bench = Bench()
    rests = []
    for _ in range(9):
        bench.hearing.step_failed(B, C, bench.now)
        bench.hearing.step_failed(B, C, bench.now)
        bench.broken()
        rests.append(bench.hearing.deadline - bench.now)
        bench.now = bench.hearing.deadline
    assert rests[:3] == [LAN.unable_for, 2 * LAN.unable_for, 4 * LAN.unable_for]
    assert rests[-1] == LAN.unable_max
    bench.now += LAN.unable_max
    bench.broken()
    bench.hearing.step_failed(B, C, bench.now)
    bench.hearing.step_failed(B, C, bench.now)
    bench.broken()
    assert bench.hearing.deadline == bench.now + LAN.unable_for


@pytest.mark.parametrize(
    ("pairs", "out"),
    [
        ([], []),
        ([(B, C)], [C]),
        ([(A, B)], [B]),
        ([(A, D), (C, D)], [D]),
        ([(B, C), (B, D)], [B]),
        ([(A, B), (B, C)], [B]),
        ([(A, C), (B, D)], [C, D]),
        ([(A, B), (A, C), (A, D)], [B, C, D]),
        ([(B, C), (C, D), (B, D)], [C, D]),
        ([(B, "9" * 16)], []),
    ],
)
def test_the_one_with_fewer_links_gives_way(pairs: list[Pair], out: list[str]) -> None:
    """Of a broken pair the less connected goes, then the higher id; the leader stays."""
    assert sorted(Hearing.outcasts(pairs, [A, B, C, D], A)) == out


def test_a_pair_has_one_name() -> None:
    """The two ends of a pair are in order, whoever complains."""
    assert pair_of(B, A) == pair_of(A, B) == (A, B)
