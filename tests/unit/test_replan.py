"""A plan that follows another moves as little as it can."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from p2pinfer.core.holdings import stage_members, validate
from p2pinfer.core.planner import PlacementError
from p2pinfer.core.replan import next_plan
from p2pinfer.errors import LocalProtocolError
from p2pinfer.types import Fence
from tests.plan_series import (
    HEAD_BYTES,
    MLP_BYTES,
    MODEL,
    VOCAB_BYTES,
    after,
    member,
    moves,
    nodes,
    owners,
)


def test_the_first_plan_is_made_anew() -> None:
    """Without a plan before, shares are runs by weight, and all that was asked for is in it."""
    plan = after(None, nodes(2), old_voters=["f" * 16, "0" * 16], quorum="last-man")
    assert owners(plan) == (0,) * 4 + (1,) * 4
    assert plan.voters == (0,)
    assert plan.old_voters == ("0" * 16, "f" * 16)
    assert (plan.fence, plan.quorum, plan.layout) == (Fence(1, 1), "last-man", "heads")


def test_nothing_moves_without_a_reason() -> None:
    """The same members keep what they own, be the order or the model's name another."""
    before = after(None, nodes(3))
    renamed = msgspec.structs.replace(MODEL, name="other")
    plan = after(before, nodes(3)[::-1], model=renamed, layout="auto")
    assert moves(before, plan) == []
    assert plan.model.name == "other"
    assert plan.members[plan.leader].name == "node02"


def test_a_lost_owners_units_are_spread() -> None:
    """Without standbys the others share what it had, and nothing else moves."""
    before = after(None, nodes(3))
    plan = after(before, nodes(3)[:2])
    assert {old for old, _ in moves(before, plan)} == {2}
    assert [Counter(owners(plan, kind)) for kind in range(3)] == [
        {0: 4, 1: 4},
        {0: 4, 1: 4},
        {0: 16, 1: 16},
    ]


def test_spread_units_are_by_weight() -> None:
    """Who has three times the weight of the others gets what it lacks of its share."""
    members = [member(0, weight=3.0), *nodes(3)[1:]]
    before = after(None, members)
    assert Counter(owners(before, 2)) == {0: 19, 1: 7, 2: 6}
    plan = after(before, members[:2])
    assert Counter(owners(plan, 2)) == {0: 24, 1: 8}


def test_a_lost_owners_units_go_to_their_standbys() -> None:
    """Who has the KV takes over, and the shares are even."""
    before = after(None, nodes(4), replicas=1)
    for lost in range(4):
        plan = after(before, [m for i, m in enumerate(nodes(4)) if i != lost], replicas=1)
        assert {old for old, _ in moves(before, plan)} == {lost}
        stage = before.stages[0]
        for kind, copies in enumerate((stage.head_standbys, stage.mlp_standbys)):
            for unit, owner in enumerate(owners(before, kind)):
                if owner == lost:
                    assert owners(plan, kind)[unit] in copies[unit]
        counts = [Counter(owners(plan, kind)).values() for kind in range(3)]
        assert all(max(each) - min(each) <= 1 for each in counts)


def test_with_two_deaths_the_second_standby_takes_over() -> None:
    """A unit whose first standby is gone too goes to the next one."""
    before = after(None, nodes(4), replicas=2)
    plan = after(before, nodes(4)[:2], replicas=2)
    stage = before.stages[0]
    for unit, owner in enumerate(owners(before)):
        if owner > 1:
            assert owners(plan)[unit] in stage.head_standbys[unit]


def test_a_standby_without_memory_is_passed_over() -> None:
    """A member that offers less than before cannot be promoted: another one gets the units."""
    before = after(None, nodes(3), replicas=1)
    stage = before.stages[0]
    full = 3 * HEAD_BYTES + 3 * MLP_BYTES + 11 * VOCAB_BYTES
    plan = after(before, [member(0), member(1, memory_bytes=full)])
    assert any(
        c == (1,) for c, o in zip(stage.head_standbys, stage.head_owners, strict=True) if o == 2
    )
    assert [old for old, _ in moves(before, plan) if old != 2] == []
    assert Counter(owners(plan))[1] == 3


def test_a_restarted_owner_keeps_what_nobody_has() -> None:
    """It has lost its KV, but so have all: loading its own weights again moves nothing."""
    before = after(None, nodes(3))
    plan = after(before, [member(0), member(1, 2), member(2)])
    assert moves(before, plan) == []
    again = after(plan, [member(0, 2), member(1, 3), member(2, 2)])
    assert moves(before, again) == []


def test_a_restarted_owner_gives_way_to_its_standbys() -> None:
    """Those have the KV; without rebalancing it gets nothing back yet."""
    before = after(None, nodes(3), replicas=1)
    members = [member(0), member(1), member(2, 2)]
    plan = after(before, members, replicas=1, rebalance=False)
    assert 2 not in owners(plan)
    assert set(owners(after(before, members, replicas=1))) == {0, 1, 2}


def test_a_newcomer_gets_its_share_with_the_fewest_moves() -> None:
    """Each of the others gives it some, in runs, and nothing moves among them."""
    before = after(None, nodes(2))
    plan = after(before, nodes(3))
    assert {new for _, new in moves(before, plan)} == {2}
    assert [Counter(owners(plan, kind))[2] for kind in range(3)] == [2, 2, 10]
    assert owners(plan) == (2, 0, 0, 0, 2, 1, 1, 1)
    assert owners(plan, 2) == (2,) * 5 + (0,) * 11 + (2,) * 5 + (1,) * 11
    one = after(None, nodes(1))
    assert owners(after(one, nodes(2))) == (1, 1, 1, 1, 0, 0, 0, 0)


def test_donors_give_what_leaves_the_fewest_subtrees() -> None:
    """A newcomer's units are an end of each donor's run, whichever has fewer sums to send."""
    before = after(None, [member(0), member(1, weight=3.0)])
    assert owners(before) == (0, 0, 1, 1, 1, 1, 1, 1)
    plan = after(before, [member(0), member(1, weight=3.0), member(2, weight=4.0)])
    assert owners(plan) == (2, 0, 2, 2, 2, 1, 1, 1)
    assert owners(plan, 2) == (2,) * 4 + (0,) * 4 + (2,) * 12 + (1,) * 12
    assert {new for _, new in moves(before, plan)} == {2}


def test_a_newcomer_that_would_own_nothing_moves_nothing() -> None:
    """A feather's share is less than a unit."""
    before = after(None, nodes(2))
    plan = after(before, [*nodes(2), member(2, weight=0.001)])
    assert moves(before, plan) == []
    assert stage_members(plan, 0) == (0, 1)


def test_without_rebalancing_a_newcomer_waits() -> None:
    """It is listed and owns nothing, unless units are lost anyhow."""
    before = after(None, nodes(2))
    plan = after(before, nodes(3), rebalance=False)
    assert moves(before, plan) == []
    plan = after(before, [member(0), member(2)], rebalance=False)
    assert set(moves(before, plan)) == {(1, 2)}


def test_a_member_that_is_able_again_gets_its_share() -> None:
    """It was left out and owned nothing: it counts as a newcomer."""
    before = after(None, nodes(3))
    without = after(before, nodes(3), able=(0, 1))
    assert {old for old, _ in moves(before, without)} == {2}
    back = after(without, nodes(3))
    assert {new for _, new in moves(without, back)} == {2}
    assert Counter(owners(back, 1)) == {0: 3, 1: 3, 2: 2}


def test_a_member_for_whom_there_were_no_units_is_no_newcomer() -> None:
    """Of twelve members for few units the idle ones stay so, until units are lost."""
    model = msgspec.structs.replace(MODEL, vocab_size=64, intermediate_size=64)
    before = after(None, nodes(10), model=model)
    idle = set(range(10)) - set(owners(before))
    plan = after(before, nodes(10), model=model)
    assert moves(before, plan) == []
    lost = owners(before)[0]
    rest = [m for m in nodes(10) if int(m.node_id, 16) != lost]
    plan = after(before, rest, model=model)
    assert {old for old, _ in moves(before, plan)} == {lost}
    assert owners(plan)[0] in idle


def test_units_move_on_where_memory_does_not_reach() -> None:
    """When the lost units fill others beyond their memory, just as much more moves."""
    tight = 6 * HEAD_BYTES + 4 * MLP_BYTES + 16 * VOCAB_BYTES
    members = [member(0, memory_bytes=tight), member(1, memory_bytes=tight), member(2)]
    before = after(None, members)
    plan = after(before, members[:2])
    assert Counter(owners(plan)) == {0: 4, 1: 4}
    with pytest.raises(PlacementError, match="does not fit"):
        after(before, members[:1])


def test_a_member_that_offers_less_gives_units_away() -> None:
    """Where a plan does not fit as it was, units move until it does."""
    before = after(None, nodes(2))
    small = member(1, memory_bytes=2 * HEAD_BYTES + 2 * MLP_BYTES + 8 * VOCAB_BYTES)
    plan = after(before, [member(0), small])
    assert {old for old, _ in moves(before, plan)} == {1}


def test_a_newcomer_without_memory_changes_nothing() -> None:
    """Where there is no room for shares by weight, what fits stays as it is."""
    exact = 8 * HEAD_BYTES + 8 * MLP_BYTES + 32 * VOCAB_BYTES
    members = [member(0, memory_bytes=exact)]
    before = after(None, members)
    plan = after(before, [*members, member(1, memory_bytes=1)])
    assert moves(before, plan) == []


def test_scattered_units_are_gathered() -> None:
    """Where somebody would send too many subtrees, the plan is made anew."""
    model = msgspec.structs.replace(MODEL, num_attention_heads=512, num_key_value_heads=512)
    before = after(None, nodes(2), model=model)
    stage = before.stages[0]
    heads = tuple(0 if unit % 8 < 4 else 1 for unit in range(512))
    standbys = tuple((2 + unit % 2,) if heads[unit] else (1,) for unit in range(512))
    stage = msgspec.structs.replace(stage, head_owners=heads, head_standbys=standbys)
    before = msgspec.structs.replace(before, stages=(stage,), members=tuple(nodes(4)))
    validate(before)
    plan = after(before, [member(0), *nodes(4)[2:]], model=model)
    assert list(owners(plan)) == sorted(owners(plan))


@pytest.mark.parametrize(
    "change",
    [{"layout": "2x1"}, {"model": msgspec.structs.replace(MODEL, model_id="a" * 64)}],
)
def test_another_layout_or_model_is_planned_anew(change: dict[str, Any]) -> None:
    """Units of another model, or other spans, are nobody's yet."""
    before = after(None, nodes(2))
    swapped = msgspec.structs.replace(
        before.stages[0], head_owners=before.stages[0].head_owners[::-1]
    )
    before = msgspec.structs.replace(before, stages=(swapped,))
    assert owners(after(before, nodes(2), **change))[0] == 0


def test_layers_are_planned_anew_when_their_node_dies() -> None:
    """A stage of one has nobody left: the layers are shared out again."""
    before = after(None, nodes(3), layout="layers")
    plan = after(before, nodes(2), layout="layers")
    assert [(s.start, s.end) for s in plan.stages] == [(0, 2), (2, 4)]


def test_layers_are_planned_anew_for_a_newcomer_with_a_stage() -> None:
    """Only if it gets layers, and the others can hold what they would."""
    before = after(None, nodes(2), layout="layers")
    assert len(after(before, nodes(3), layout="layers").stages) == 3
    assert after(before, nodes(3), layout="layers", rebalance=False).stages == before.stages
    feather = [*nodes(2), member(2, weight=0.001)]
    assert after(before, feather, layout="layers").stages == before.stages
    assert after(before, nodes(2), layout="layers").stages == before.stages


def test_a_newcomer_does_not_spoil_layers_that_fit() -> None:
    """Where a plan with it would not fit, the one before stays."""
    model = msgspec.structs.replace(MODEL, num_layers=2)
    members = [
        member(0, memory_bytes=6 * HEAD_BYTES),
        member(1, memory_bytes=38 * HEAD_BYTES),
        member(2, memory_bytes=10 * HEAD_BYTES, weight=2.0),
    ]
    newcomer = member(3, memory_bytes=17 * HEAD_BYTES, weight=3.0)
    before = after(None, members, layout="layers", model=model)
    with pytest.raises(PlacementError):
        after(None, [*members, newcomer], layout="layers", model=model)
    plan = after(before, [*members, newcomer], layout="layers", model=model)
    assert plan.stages == before.stages


def test_a_stage_of_a_mixed_layout_lives_on_with_fewer() -> None:
    """2x2 with one node dead: its partner takes over, and a newcomer fills the gap."""
    before = after(None, nodes(4), layout="2x2")
    plan = after(before, nodes(4)[:3], layout="2x2")
    assert set(owners(plan, 0, 1)) == {2}
    assert set(moves(before, plan)) == {(3, 2)}
    joined = after(plan, [*nodes(3), member(5)], layout="2x2")
    assert {new for _, new in moves(plan, joined)} == {5}
    assert set(owners(joined, 0, 1)) == {2, 5}
    with pytest.raises(PlacementError, match="needs 4 nodes"):
        after(plan, nodes(2), layout="2x2")


def test_a_spare_of_a_mixed_layout_takes_a_dead_ones_place() -> None:
    """Of five members of 2x2 one owns nothing, until one of the others dies."""
    before = after(None, nodes(5), layout="2x2")
    assert set(moves(before, after(before, nodes(5), layout="2x2"))) == set()
    plan = after(before, [*nodes(3), member(4)], layout="2x2")
    assert set(moves(before, plan)) == {(3, 4)}


def test_a_plan_names_its_own() -> None:
    """Leader and voters that are not members, or too many members, are defects."""
    for wrong in ({"leader_id": "f" * 16}, {"voters": ["f" * 16]}, {"members": nodes(17)}):
        given: dict[str, Any] = {
            "members": nodes(1),
            "leader_id": "0" * 16,
            "voters": ["0" * 16],
            **wrong,
        }
        with pytest.raises(LocalProtocolError):
            next_plan(
                previous=None,
                able=frozenset(),
                model=MODEL,
                layout="heads",
                fence=Fence(1, 1),
                cluster_id="c" * 16,
                **given,
            )


def test_nobody_able_is_no_plan() -> None:
    """With all members unable the leader waits, whatever was before."""
    before = after(None, nodes(2))
    with pytest.raises(PlacementError, match="cannot hold units now"):
        after(before, nodes(2), able=())
