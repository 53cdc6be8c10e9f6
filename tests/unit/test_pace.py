"""Who computes much slower than its share predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from msgspec.structs import replace

from p2pinfer.core.pace import DEAF_S, IDLE_S, Pace
from p2pinfer.core.planner import make_plan
from p2pinfer.core.timing import LAN
from p2pinfer.types import DType, Fence, Member, ModelSpec, Plan
from p2pinfer.wire.messages import Heartbeat

MODEL = ModelSpec(
    name="m",
    model_id="0" * 64,
    num_layers=4,
    hidden_size=64,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=16,
    intermediate_size=12 * 128,
    vocab_size=12 * 64,
    max_positions=512,
    dtype=DType.BFLOAT16,
    kv_dtype=DType.BFLOAT16,
)


def member(number: int, weight: float = 1.0, boot: int = 0) -> Member:
    return Member(
        node_id=f"{number:016x}",
        boot_id=f"{number + 100 * boot:016x}",
        name=f"node{number}",
        address=f"tcp://h{number}:7720",
        weight=weight,
    )


def plan_of(*members: Member) -> Plan:
    return make_plan(
        members=members,
        model=MODEL,
        layout="heads",
        fence=Fence(1, 1),
        cluster_id="c" * 16,
        leader_id=members[0].node_id,
    )


class Bench:
    """The first member leads; every member's step takes what `ms` says."""

    def __init__(self, *members: Member) -> None:
        self.members = list(members)
        self.plan = plan_of(*members)
        self.pace = Pace(LAN)
        self.now = 50.0
        self.steps = 0

    def word(self, who: Member, ms: float) -> Heartbeat:
        return Heartbeat(
            node_id=who.node_id,
            boot_id=who.boot_id,
            incarnation=0,
            term=1,
            fence=Fence(1, 1),
            steps=self.steps,
            compute_ms=ms,
        )

    def run(self, seconds: float, ms: Sequence[float], *, busy: bool = True) -> Mapping[str, float]:
        """Heartbeats of all for so long; returns who is slow at the end."""
        slow: Mapping[str, float] = {}
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            self.steps += busy
            for who, took in zip(self.members[1:], ms[1:], strict=True):
                self.pace.heard(self.word(who, took), self.now)
            slow = self.pace.slow(self.plan, self.word(self.members[0], ms[0]), self.now)
        return slow


def test_a_member_three_times_slower_is_slow_after_a_while() -> None:
    """It must have been so for slow_after, and is told with its factor; the others are not."""
    bench = Bench(member(1), member(2), member(3))
    assert bench.run(LAN.slow_after - 0.5, (10, 10, 35)) == {}
    assert bench.run(1.5, (10, 10, 35)) == {member(3).node_id: pytest.approx(3.5)}


def test_a_little_slower_is_not_slow() -> None:
    """Less than slow_factor is what a plan of equal shares has to bear."""
    bench = Bench(member(1), member(2), member(3))
    assert bench.run(3 * LAN.slow_after, (10, 10, 25)) == {}


def test_whom_no_step_reaches_is_deaf() -> None:
    """While the leader finishes steps, and who was just heard of is given time; in an idle cluster
    who has finished fewer."""
    bench = Bench(member(1), member(2), member(3))
    leader = member(1).node_id
    assert bench.pace.deaf(leader, bench.now) == frozenset()
    bench.run(1.0, (10, 10, 10))
    deafened = bench.word(member(3), 10)
    for _ in range(5):
        bench.now += 0.5
        bench.steps += 1
        for who in (1, 2):
            bench.pace.heard(bench.word(member(who), 10), bench.now)
        bench.pace.heard(deafened, bench.now)
    assert bench.pace.deaf(leader, bench.now) == {member(3).node_id}
    bench.pace.heard(bench.word(member(4), 10), bench.now)
    assert bench.pace.deaf(leader, bench.now) == {member(3).node_id}
    assert bench.pace.deaf(leader, bench.now + DEAF_S + 0.1) == {member(3).node_id}
    bench.pace.heard(bench.word(member(3), 10), bench.now)
    assert bench.pace.deaf(leader, bench.now + DEAF_S + 0.1) == frozenset()
    bench.now += DEAF_S + 0.1
    bench.steps += 1
    bench.pace.heard(bench.word(member(1), 10), bench.now)
    assert bench.pace.deaf(leader, bench.now) == frozenset()


def test_the_leader_may_be_slow_too() -> None:
    """The leader goes on leading, but may own nothing for a while."""
    bench = Bench(member(1), member(2))
    assert bench.run(LAN.slow_after + 1.0, (50, 10)) == {member(1).node_id: pytest.approx(5.0)}


def test_slowness_with_a_break_begins_anew() -> None:
    """One fine step in between, and the time counts from the next slow one."""
    bench = Bench(member(1), member(2))
    bench.run(LAN.slow_after - 1.0, (10, 50))
    bench.run(0.5, (10, 10))
    assert bench.run(LAN.slow_after - 1.0, (10, 50)) == {}


def test_an_idle_cluster_slows_nobody() -> None:
    """While no step is finished nothing is learned, and what was learned grows old."""
    bench = Bench(member(1), member(2))
    bench.run(2.0, (10, 50))
    assert bench.run(3 * LAN.slow_after, (10, 50), busy=False) == {}
    assert bench.run(LAN.slow_after - 1.0, (10, 50)) == {}
    assert bench.run(IDLE_S, (10, 50)) != {}


def test_weights_predict_speed() -> None:
    """A member said to be four times slower has a fourth of the work, and is not slow for that."""
    bench = Bench(member(1, 4.0), member(2, 4.0), member(3, 1.0))
    assert bench.run(2 * LAN.slow_after, (10, 10, 11)) == {}
    assert bench.run(2 * LAN.slow_after, (10, 10, 40)) != {}


def test_who_holds_nobody_up_is_not_slow() -> None:
    """A small share that takes less long than the others' does no harm, at whatever speed."""
    bench = Bench(member(1), member(2))
    bench.plan = replace(plan_of(member(1, 5.0), member(2, 1.0)), members=(member(1), member(2)))
    assert bench.run(2 * LAN.slow_after, (10, 9.9)) == {}
    assert bench.run(2 * LAN.slow_after, (10, 10)) != {}


def test_steps_too_short_to_measure_are_not_judged() -> None:
    """A model so small that the system's noise decides has no slow members."""
    bench = Bench(member(1), member(2))
    assert bench.run(2 * LAN.slow_after, (0.1, 1.5)) == {}


def test_a_slow_member_is_tried_again_and_rests_longer_each_time() -> None:
    """It owns nothing for unable_for, then twice as long; a good while makes that forgotten."""
    bench = Bench(member(1), member(2))

    def rest() -> float:
        while not bench.run(0.5, (10, 50)):
            pass
        began = bench.now
        while bench.run(0.5, (10, 0), busy=False):
            pass
        return bench.now - began

    assert rest() == LAN.unable_for
    assert rest() == 2 * LAN.unable_for
    bench.run(LAN.slow_after + 1.0, (10, 10))
    assert rest() == LAN.unable_for


def test_only_owners_in_their_present_life_are_judged() -> None:
    """Members without units, members that started again and strangers have no pace."""
    bench = Bench(member(1), member(2), member(3, weight=0.0))
    assert bench.run(LAN.slow_after - 1.0, (10, 50, 90)) == {}
    bench.members[1] = member(2, boot=1)
    assert bench.run(2 * LAN.slow_after, (10, 50, 90)) == {}
    bench.pace.heard(bench.word(member(9), 10.0), bench.now)
    assert bench.run(0.5, (10, 50, 90)) == {}
