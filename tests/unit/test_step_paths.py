"""Which step links the steps of a plan need."""

from __future__ import annotations

from msgspec.structs import replace

from p2pinfer.core.step_paths import Trouble, may_stay_awake, needed, trouble
from p2pinfer.core.topology import topology
from p2pinfer.types import Plan
from tests.step_plans import plan_of

HEADS = plan_of(3)
SPARE = plan_of(5, "2x2")
"""Members 0 and 1 hold the first stage, 2 and 3 the second, 4 nothing."""


def troubles(plan: Plan, me: int) -> dict[int, Trouble]:
    """What the loss of frames means between a member and each other one."""
    others = (member for member in range(len(plan.members)) if member != me)
    return {member: trouble(topology(plan, me), member) for member in others}


def test_a_leader_must_reach_all_other_owners() -> None:
    """A member without units is told of steps, and left out where that does not work."""
    assert needed(topology(HEADS, 0)) == {1, 2}
    assert needed(topology(SPARE, 0)) == {1, 2, 3}
    owning, spare = Trouble.BREAKS, Trouble.DEAF
    assert troubles(SPARE, 0) == {1: owning, 2: owning, 3: owning, 4: spare}


def test_a_leader_without_units_needs_all_owners() -> None:
    """It sends steps and hears candidates, though it computes nothing itself."""
    plan = replace(SPARE, leader=4)
    assert needed(topology(plan, 4)) == {0, 1, 2, 3}
    assert set(troubles(plan, 4).values()) == {Trouble.BREAKS}


def test_an_owner_needs_its_leader_its_peers_and_the_stages_beside_it() -> None:
    """It sends hidden states on, and waits for those of the stage before; others are nothing to
    it."""
    assert needed(topology(HEADS, 1)) == {0, 2}
    assert needed(topology(SPARE, 1)) == {0, topology(SPARE, 1).roles[0].hidden_to[0]}
    last = topology(SPARE, 3)
    assert needed(last) == {0, 2}
    exchanged = {0, 2, last.roles[0].hidden_from}
    assert {m for m, what in troubles(SPARE, 3).items() if what is Trouble.BREAKS} == exchanged
    assert troubles(SPARE, 3)[4] is Trouble.NONE


def test_who_waits_stays_awake_where_that_takes_the_core_from_nobody() -> None:
    """All others must be on this machine, and each thread of theirs and mine have a core."""
    mine = topology(HEADS, 1)
    assert may_stay_awake(mine, {0, 2}, 3)
    assert not may_stay_awake(mine, {0, 2}, 2)
    assert not may_stay_awake(mine, {0}, 3)
    alone = topology(plan_of(1), 0)
    assert not may_stay_awake(alone, set(), 3)


def test_a_member_without_units_needs_to_reach_nobody() -> None:
    """What its leader sends to it may not be lost all the same."""
    assert needed(topology(SPARE, 4)) == frozenset()
    assert troubles(SPARE, 4) == {
        0: Trouble.BREAKS,
        **dict.fromkeys((1, 2, 3), Trouble.NONE),
    }
