"""Plans of several stages that follow another: what a stage that loses everybody becomes."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from p2pinfer.core.holdings import holdings, standby_holdings, standbys_of
from p2pinfer.core.planner import PlacementError
from p2pinfer.types import Member, Plan
from tests.plan_series import HEAD_BYTES, MLP_BYTES, MODEL, after, member, moves, nodes, owners

LAYERS = {"layout": "layers", "replicas": 1}
SQUARE = {"layout": "2x2", "replicas": 1}


def owned(plan: Plan) -> list[set[int]]:
    """Node numbers that own anything, by stage."""
    return [
        set().union(*(owners(plan, kind, number) for kind in range(3)))
        for number in range(len(plan.stages))
    ]


def kept(plan: Plan) -> list[set[int]]:
    """Node numbers that keep a replica of anything, by stage."""
    return [
        {
            int(plan.members[i].node_id, 16)
            for each in standbys_of(stage)
            for named in each
            for i in named
        }
        for stage in plan.stages
    ]


def there(*numbers: int) -> list[Member]:
    """Nodes of these numbers, in their first boots."""
    return [member(number) for number in numbers]


def test_in_layers_the_next_one_keeps_a_stage() -> None:
    """All of a stage has one standby, in a circle, and all members keep as many."""
    plan = after(None, nodes(4), **LAYERS)
    assert owned(plan) == [{0}, {1}, {2}, {3}]
    assert kept(plan) == [{1}, {2}, {3}, {0}]
    twice = after(None, nodes(4), layout="layers", replicas=2)
    assert Counter(i for each in kept(twice) for i in each) == dict.fromkeys(range(4), 2)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_stage_goes_to_its_standby(lost: int) -> None:
    """Beside its own: nothing else moves, the layers stay, and others keep replicas of both."""
    before = after(None, nodes(3), **LAYERS)
    heir = (lost + 1) % 3
    rest = [i for i in range(3) if i != lost]
    plan = after(before, there(*rest), **LAYERS)
    assert set(moves(before, plan)) == {(lost, heir)}
    assert [(s.start, s.end) for s in plan.stages] == [(s.start, s.end) for s in before.stages]
    index = rest.index(heir)
    assert [held.stage for held in holdings(plan, index)] == sorted({lost, heir})
    other = rest[1 - index]
    assert kept(plan) == [{heir if owned(plan)[n] == {other} else other} for n in range(3)]
    assert [held.stage for held in standby_holdings(plan, rest.index(other))] == [
        held.stage for held in holdings(plan, index)
    ]


@pytest.mark.parametrize("comer", [member(1), member(1, 2), member(7)])
def test_who_comes_gets_the_stage(comer: Member) -> None:
    """The same node in whichever boot, or another: the layers stay, and those that had the stage's
    KV keep replicas of it."""
    before = after(None, nodes(3), **LAYERS)
    lost = after(before, there(0, 2), **LAYERS)
    assert owned(lost) == [{0}, {2}, {2}]
    waiting = after(lost, [*there(0, 2), comer], **LAYERS, rebalance=False)
    assert owned(waiting) == [{0}, {2}, {2}]
    plan = after(waiting, [*there(0, 2), comer], **LAYERS, rebalance=True)
    number = int(comer.node_id, 16)
    assert sorted(map(min, owned(plan))) == sorted({0, 2, number})
    assert [(s.start, s.end) for s in plan.stages] == [(s.start, s.end) for s in before.stages]
    (stage,) = (n for n, who in enumerate(owned(plan)) if who == {number})
    assert kept(plan)[stage] <= {0, 2}
    assert len(set(map(min, kept(plan)))) == 3
    assert moves(plan, after(plan, [*there(0, 2), comer], **LAYERS)) == []


def test_an_idle_member_is_the_first_to_keep_a_stage() -> None:
    """In four layers of five nodes the fifth owns nothing: it takes over whichever stage is lost,
    and the others stay as they are."""
    before = after(None, nodes(5), **LAYERS)
    assert owned(before) == [{0}, {1}, {2}, {3}]
    assert kept(before) == [{4}] * 4
    plan = after(before, there(0, 1, 3, 4), **LAYERS)
    assert owned(plan) == [{0}, {1}, {4}, {3}]
    assert moves(plan, after(plan, nodes(5), **LAYERS)) == []


def test_several_stages_may_fall_to_one_member() -> None:
    """Down to the last one, without a plan made anew; and each that comes takes one over."""
    plan = after(None, nodes(4), layout="layers", replicas=3)
    spans = [(s.start, s.end) for s in plan.stages]
    for rest in ((0, 2, 3), (0, 2), (2,)):
        plan = after(plan, there(*rest), layout="layers", replicas=3)
        assert [(s.start, s.end) for s in plan.stages] == spans
    assert owned(plan) == [{2}] * 4
    for count, rest in ((2, (2, 5)), (3, (2, 5, 6)), (4, (2, 5, 6, 7))):
        before, plan = plan, after(plan, there(*rest), **LAYERS)
        assert len(set().union(*owned(plan))) == count
        assert {(old, new) for old, new in moves(before, plan)} == {(2, rest[-1])}
    assert all(len(each) == 1 for each in owned(plan))


def test_without_replicas_layers_are_planned_anew() -> None:
    """So they are where both the owner and its only standby are lost."""
    before = after(None, nodes(3), layout="layers")
    assert len(after(before, there(0, 2), layout="layers").stages) == 2
    before = after(None, nodes(3), **LAYERS)
    assert len(after(before, there(0), **LAYERS).stages) == 1


def test_an_owner_of_two_stages_that_started_again_keeps_both() -> None:
    """Nobody else has them, so it loads them again."""
    plan = after(after(None, nodes(2), **LAYERS), there(1), layout="layers", replicas=0)
    assert owned(plan) == [{1}, {1}]
    again = after(plan, [member(1, 2)], layout="layers")
    assert again.stages == plan.stages


def test_a_mixed_layouts_stage_is_kept_by_its_own_members_first() -> None:
    """A second replica is shared by two of the other stage; so is the first of a lone member."""
    before = after(None, nodes(4), **SQUARE)
    assert kept(before) == [{0, 1}, {2, 3}]
    assert kept(after(None, nodes(4), layout="2x2", replicas=2)) == [{0, 1, 2, 3}] * 2
    alone = after(before, there(1, 2, 3), **SQUARE)
    assert owned(alone) == [{1}, {2, 3}]
    assert kept(alone) == [{2, 3}, {2, 3}]


def test_both_owners_of_a_mixed_layouts_stage_may_die() -> None:
    """One after the other: the other stage's members share it, until others come."""
    before = after(None, nodes(4), **SQUARE)
    alone = after(before, there(1, 2, 3), **SQUARE)
    plan = after(alone, there(2, 3), **SQUARE)
    assert owned(plan) == [{2, 3}, {2, 3}]
    assert {old for old, _ in moves(alone, plan)} == {1}
    one = after(plan, there(2, 3, 8), **SQUARE)
    assert owned(one) == [{8}, {2, 3}]
    two = after(one, there(2, 3, 8, 9), **SQUARE)
    assert owned(two) == [{8, 9}, {2, 3}]
    assert moves(two, after(two, there(2, 3, 8, 9), **SQUARE)) == []


def test_standbys_of_other_stages_need_room_for_what_they_own_too() -> None:
    """What is owned of all stages and kept counts together; where there is no room there is no
    standby, and the one with room comes first."""
    whole = 8 * HEAD_BYTES + 8 * MLP_BYTES
    tight = [member(i, memory_bytes=whole) for i in range(3)]
    plan = after(None, tight, layout="layers", replicas=2)
    for index in range(3):
        held = (*holdings(plan, index), *standby_holdings(plan, index))
        layers = sum((h.span.end - h.span.start) * len(h.head_units) for h in held)
        assert layers * HEAD_BYTES <= 4 * whole
    roomy = [member(0), member(1, memory_bytes=whole // 2), member(2)]
    assert kept(after(None, roomy, **LAYERS)) == [{2}, {0}, {0}]


def test_a_guest_without_memory_for_more_gives_a_stage_back() -> None:
    """A member that offers less than two stages take cannot keep both: the layers are planned
    anew."""
    before = after(None, nodes(2), **LAYERS)
    plan = after(before, there(0), **LAYERS)
    assert owned(plan) == [{0}, {0}]
    half = 6 * (HEAD_BYTES + MLP_BYTES)
    with pytest.raises(PlacementError):
        after(plan, [member(0, memory_bytes=half)], **LAYERS)
    two = [member(0, memory_bytes=half), member(1, memory_bytes=half)]
    assert set().union(*owned(after(plan, two, **LAYERS))) == {0, 1}


def test_standbys_of_another_class_come_last() -> None:
    """An idle member of another numeric class comes after one of the owner's that owns a stage."""
    members = [member(i, numeric_class="a" if i < 2 else "b") for i in range(3)]
    model = msgspec.structs.replace(MODEL, num_layers=2)
    plan = after(None, members, model=model, **LAYERS)
    assert owned(plan) == [{0}, {1}]
    assert kept(plan) == [{1}, {0}]
    assert kept(after(None, members, model=model, layout="layers", replicas=2)) == [{1, 2}, {0, 2}]


def test_a_member_that_is_able_again_gets_a_stage_that_has_only_guests() -> None:
    """It was listed meanwhile, and owned nothing."""
    before = after(None, nodes(3), **LAYERS)
    lost = after(before, nodes(3), able=(0, 2), **LAYERS, rebalance=False)
    assert owned(lost) == [{0}, {2}, {2}]
    plan = after(lost, nodes(3), **LAYERS)
    assert sorted(map(min, owned(plan))) == [0, 1, 2]
