"""Units move by stages: nobody owns what it has not ready while the owner lives."""

from __future__ import annotations

from collections.abc import Collection
from math import inf

import msgspec

from p2pinfer.core.holdings import validate
from p2pinfer.core.moves import Progress, Standing, Steps, progress, staged
from p2pinfer.types import Member, Plan
from tests.plan_series import (
    HEAD_BYTES,
    MLP_BYTES,
    VOCAB_BYTES,
    after,
    member,
    moves,
    nodes,
    owners,
)

NOTHING = Progress()
TRIMS = Progress("replicas are complete", trims=True)


def step(
    before: Plan,
    members: list[Member],
    ready: Collection[int] = (),
    *,
    able: Collection[int] | None = None,
    resting: Collection[int] = (),
    replicas: int = 1,
) -> tuple[Plan, bool]:
    """The plan to propose, and whether there is more to do; all members can compute."""
    names = frozenset(f"{i:016x}" for i in ready)
    goal = after(before, members, able=able, replicas=replicas, ready=names)
    standing = Standing(
        here=frozenset(m.node_id for m in members),
        resting=frozenset(f"{i:016x}" for i in resting),
        ready=names,
    )
    found = staged(before, goal, standing)
    validate(found.plan)
    return found.plan, found.moving


def standbys(plan: Plan, unit: int) -> tuple[int, ...]:
    """Node numbers of a head unit's standbys, in their order."""
    copies = plan.stages[0].head_standbys
    return tuple(int(plan.members[i].node_id, 16) for i in copies[unit]) if copies else ()


def test_a_newcomer_is_a_standby_first() -> None:
    """Of all that it is to own; whoever owns and keeps it goes on, and comes before it if the owner
    dies meanwhile."""
    before = after(None, nodes(2), replicas=1)
    plan, moving = step(before, nodes(3), {0, 1})
    assert (moves(before, plan), moving) == ([], True)
    goal = after(before, nodes(3), replicas=1)
    for unit, owner in enumerate(owners(goal)):
        if owner == 2:
            assert standbys(plan, unit) == (*standbys(before, unit), 2)
    lost = int(plan.members[owners(plan)[owners(goal).index(2)]].node_id, 16)
    rest = [each for each in nodes(3) if each.node_id != f"{lost:016x}"]
    assert set(owners(step(plan, rest)[0])) == {1 - lost}


def test_who_is_ready_takes_over_and_the_owner_stays_a_standby() -> None:
    """In one plan; nothing else moves, and the goal is what it was."""
    before = after(None, nodes(3), replicas=1)
    named, _ = step(before, nodes(4), {0, 1, 2})
    plan, moving = step(named, nodes(4), {3})
    assert owners(plan) == owners(after(before, nodes(4), replicas=1))
    assert moving
    assert progress(named, plan) == Progress("node03 ready to take over")
    for unit, (old, new) in enumerate(zip(owners(before), owners(plan), strict=True)):
        if old != new:
            assert old in standbys(plan, unit)


def test_replicas_are_given_up_when_others_are_complete() -> None:
    """Then, and not before, each unit has as many standbys as it should."""
    plan = after(None, nodes(3), replicas=1)
    plan, _ = step(plan, nodes(4), {0, 1, 2})
    plan, _ = step(plan, nodes(4), {3})
    same, moving = step(plan, nodes(4), set())
    assert progress(plan, same) == NOTHING
    assert moving
    last, moving = step(plan, nodes(4), {0, 1, 2, 3})
    assert progress(plan, last) == TRIMS
    assert not moving
    assert [len(standbys(last, unit)) for unit in range(8)] == [1] * 8
    assert progress(last, step(last, nodes(4), {0, 1, 2, 3})[0]) == NOTHING


def test_who_is_not_ready_takes_over_nothing() -> None:
    """However often it is proposed: the owners keep what they have."""
    first = after(None, nodes(2), replicas=1)
    plan = first
    for _ in range(3):
        plan, moving = step(plan, nodes(3), {0, 1})
        assert (moves(first, plan), moving) == ([], True)


def test_without_replicas_there_are_standbys_only_to_move() -> None:
    """They come with the move, and go when whoever gave units away need not keep them any more."""
    plan = after(None, nodes(2))
    plan, _ = step(plan, nodes(3), replicas=0)
    assert {standbys(plan, unit) for unit in range(8)} == {(), (2,)}
    plan, _ = step(plan, nodes(3), {2}, replicas=0)
    assert set(owners(plan)) == {0, 1, 2}
    assert {standbys(plan, unit) for unit in range(8)} == {(), (0,), (1,)}
    last, moving = step(plan, nodes(3), {0, 1, 2}, replicas=0)
    assert (progress(plan, last), moving) == (TRIMS, False)
    assert (owners(last), {standbys(last, unit) for unit in range(8)}) == (owners(plan), {()})


def test_who_gives_a_unit_away_keeps_it_until_a_later_plan() -> None:
    """Even where the goal's standby of it is another one, and has it: all are ready."""
    before = after(None, nodes(3), replicas=1)
    named, _ = step(before, nodes(4), {0, 1, 2})
    plan, _ = step(named, nodes(4), {0, 1, 2, 3})
    given = [unit for unit in range(8) if owners(plan)[unit] != owners(before)[unit]]
    assert given
    assert all(owners(before)[unit] in standbys(plan, unit) for unit in given)


def test_a_lost_owner_is_waited_for_by_nobody() -> None:
    """Its units go to standbys at once: to those that are ready or, where that is not known, that
    are named first."""
    before = after(None, nodes(2), replicas=1)
    named, _ = step(before, nodes(3), {0, 1})
    plan, _ = step(named, [member(0), member(2)], {0})
    assert set(owners(plan)) == {0}
    plan, _ = step(named, [member(0), member(2)], set())
    assert set(owners(plan)) == {0}


def test_who_leaves_hands_over_first_and_keeps_until_others_have_it() -> None:
    """Its standbys are ready, so they take over at once; then the replicas are made anew."""
    before = after(None, nodes(3), replicas=1)
    plan, moving = step(before, nodes(3), {0, 1, 2}, able=(0, 1))
    assert (set(owners(plan)), moving) == ({0, 1}, True)
    assert any(2 in standbys(plan, unit) for unit in range(8))
    last, moving = step(plan, nodes(3), {0, 1, 2}, able=(0, 1))
    assert not any(2 in standbys(last, unit) for unit in range(8))
    assert not moving


def test_who_leaves_owns_until_somebody_is_ready() -> None:
    """No unit is computed by somebody that has to load it first."""
    before = after(None, nodes(3), replicas=1)
    plan, moving = step(before, nodes(3), able=(0, 1))
    assert (moves(before, plan), moving) == ([], True)


def test_who_rests_keeps_what_it_had() -> None:
    """Beside the standbys that units have anyway, so that all comes back as soon as it may."""
    before = after(None, nodes(3), replicas=1)
    rest: dict[str, Collection[int]] = {"able": (0, 1), "resting": (2,)}
    plan = before
    for _ in range(3):
        plan, moving = step(plan, nodes(3), {0, 1, 2}, **rest)  # type: ignore[arg-type]
    assert not moving
    had = [unit for unit, owner in enumerate(owners(before)) if owner == 2]
    for unit in range(8):
        kept = 2 in standbys(before, unit) or unit in had
        assert (2 in standbys(plan, unit)) == kept
        assert len(standbys(plan, unit)) == 1 + kept
    back, _ = step(plan, nodes(3), {0, 1, 2})
    assert [unit for unit, owner in enumerate(owners(back)) if owner == 2] == had


def test_without_memory_units_move_at_once() -> None:
    """There is no room for both: the newcomer can hold just what it is to own."""
    before = after(None, nodes(2))
    goal = after(before, nodes(3))
    share = 2 * HEAD_BYTES + 2 * MLP_BYTES + 10 * VOCAB_BYTES
    members = [*nodes(2), member(2, memory_bytes=share)]
    assert step(before, members)[1]
    swapped = msgspec.structs.replace(goal, members=(*goal.members[:2], members[2]))
    stage = swapped.stages[0]
    other = msgspec.structs.replace(
        stage, head_owners=tuple(2 - i for i in stage.head_owners), head_standbys=()
    )
    aim = msgspec.structs.replace(swapped, stages=(other,))
    found = staged(swapped, aim, Standing(frozenset(m.node_id for m in members), (), ()))  # type: ignore[arg-type]
    assert found == (aim, False)


def test_where_memory_is_short_replicas_make_room_for_those_that_are_to_come() -> None:
    """The new owner and the goal's standbys are named first; who kept a unit keeps it if it can."""
    tight = {"memory_bytes": 2_100_000}
    before = after(None, nodes(3, **tight), replicas=1)
    plan, moving = step(before, nodes(4, **tight), {0, 1, 2})
    assert moving
    assert (standbys(before, 4), standbys(plan, 4)) == ((2,), (3,))
    assert (standbys(before, 2), standbys(plan, 2)) == ((1,), (1, 3))


def test_other_stages_are_reached_at_once() -> None:
    """A unit of other layers is another unit."""
    one = after(None, nodes(1), layout="layers")
    two = after(one, nodes(2), layout="layers")
    everybody = frozenset(m.node_id for m in nodes(2))
    assert staged(one, two, Standing(everybody, frozenset(), frozenset())) == (two, False)
    assert progress(one, two) == NOTHING


def test_a_step_is_found_once() -> None:
    """Plans are made again only when something has changed, and not before it is time."""
    steps, found = Steps(), []

    def look(key: str, now: float) -> str:
        return steps.look(key, find, earliest=5.0, trims_from=9.0, now=now)

    def find() -> Progress:
        found.append(1)
        return Progress("why")

    assert look("a", 4.0) == ""
    assert (steps.deadline, found) == (5.0, [])
    assert [look("a", now) for now in (5.0, 6.0)] == ["why", "why"]
    assert len(found) == 1
    assert look("b", 6.0) == "why"
    assert len(found) == 2


def test_replicas_are_given_up_all_together() -> None:
    """Until others have loaded theirs, or for long enough, nothing is only given up."""
    steps = Steps()
    seen = []
    for now in (5.0, 8.9, 9.0):
        why = steps.look("a", lambda: TRIMS, earliest=5.0, trims_from=9.0, now=now)
        seen.append((why, steps.deadline))
    assert seen == [("", 9.0), ("", 9.0), (TRIMS.why, inf)]


def test_who_leaves_waits_for_no_others_replicas() -> None:
    """A plan by which it is free comes at once; one that only takes a part from it does not."""
    before = after(None, nodes(3), replicas=1)
    leaving = {nodes(3)[2].node_id}
    plan, _ = step(before, nodes(3), {0, 1, 2}, able=(0, 1))
    last, _ = step(plan, nodes(3), {0, 1, 2}, able=(0, 1))
    free = progress(plan, last, leaving)
    assert free == TRIMS._replace(frees=True)
    assert progress(plan, last) == TRIMS
    assert progress(before, plan, leaving).trims is False
    for found, at in ((free, 5.0), (TRIMS, 9.0)):
        steps = Steps()
        seen = [
            now
            for now in (5.0, 9.0)
            if steps.look("a", lambda found=found: found, earliest=5.0, trims_from=9.0, now=now)  # type: ignore[misc]
        ]
        assert seen[0] == at
