"""What a plan means for one member."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.core import tree
from p2pinfer.core.holdings import standby_holdings, validate
from p2pinfer.core.planner import holdings
from p2pinfer.core.standbys import name_standbys
from p2pinfer.core.topology import kv_room, position_limit, topology, weight_bytes
from p2pinfer.core.units import input_bytes_per_position, kv_bytes_per_position
from tests.model_specs import SIX_LAYERS
from tests.step_plans import Offer, inherited, plan_of


@pytest.mark.parametrize(
    ("nodes", "layout"), [(1, "heads"), (3, "heads"), (6, "heads"), (4, "2x2")]
)
def test_the_parts_of_a_stage_make_the_whole_sum(nodes: int, layout: str) -> None:
    """What the members of a stage send in a half layer adds up to the root of the tree."""
    plan = plan_of(nodes, layout)
    for me in range(nodes):
        mine = topology(plan, me)
        for half in (0, 1):
            (role,) = mine.roles
            parts = [node for sent in role.parts[half].values() for node in sent]
            root = tree.root(mine.units[half])
            additions = tree.plan_additions(parts, mine.units[half])
            assert root in parts or additions[-1][2] == root
            assert set(role.senders(half)) <= set(role.peers)
        assert set(mine.others) == set(range(nodes)) - {me}
        assert mine.leads == (me == 0)


def test_hidden_states_reach_every_member_of_the_next_stage_once() -> None:
    """Who sends to me says so of itself, too."""
    plan = plan_of(5, "layers")
    seen = [topology(plan, i) for i in range(5)]
    for mine in seen:
        for receiver in mine.roles[0].hidden_to:
            assert seen[receiver].roles[0].hidden_from == mine.me
    receivers = [r for mine in seen for r in mine.roles[0].hidden_to]
    later = [m.me for m in seen if m.holdings[0].stage]
    assert sorted(receivers) == sorted(later)


def test_a_member_of_two_stages_has_a_role_in_each() -> None:
    """Hidden states between two stages of its own go nowhere; others get and send as ever."""
    plan = inherited(plan_of(3, "layers"), 1, 2)
    both, first = topology(plan, 2), topology(plan, 0)
    assert [held.stage for held in both.holdings] == [1, 2]
    assert [(role.hidden_from, role.hidden_to) for role in both.roles] == [(0, ()), (None, ())]
    assert (first.roles[0].hidden_to, first.role(1), both.role(0)) == ((2,), None, None)
    assert (both.sends_to, both.hears_from) == (frozenset(), {0})
    assert topology(plan, 1).roles == ()


def test_hidden_states_pass_through_others_and_come_back() -> None:
    """A member of the first and the last stage of three sends to the second and hears from it."""
    mine = topology(inherited(plan_of(3, "layers"), 2, 0), 0)
    assert [(role.hidden_from, role.hidden_to) for role in mine.roles] == [(None, (1,)), (1, ())]
    assert mine.sends_to == mine.hears_from == {1}
    assert mine.vocab_units == tuple(range(10))


def test_those_of_two_stages_are_sent_nothing_between_them() -> None:
    """Who joins only the second stage is served in turns by all of the first."""
    plan = plan_of(5, "1x2")
    half, (whole,) = SIX_LAYERS.num_layers // 2, plan.stages
    first = msgspec.structs.replace(whole, end=half, vocab_owners=())
    (shared,) = inherited(plan, 1, 3, 4, 1).stages
    last = msgspec.structs.replace(shared, start=half)
    moved = msgspec.structs.replace(plan, stages=(first, last))
    validate(moved)
    heard = {m: topology(moved, m).roles[-1].hidden_from for m in (0, 1, 3, 4)}
    assert heard == {0: None, 1: None, 3: 0, 4: 1}


def test_a_member_that_holds_nothing_has_no_part() -> None:
    """A spare member hears steps and sends nothing."""
    mine = topology(plan_of(5, "2x2"), 4)
    assert mine.roles == mine.holdings == mine.vocab_units == ()
    assert mine.sends_to == mine.hears_from == frozenset()


def test_room_for_kv_is_what_weights_leave_and_what_is_allowed() -> None:
    """The least of both bounds a member; the tightest member bounds the cluster."""
    assert kv_room(plan_of(2), 0) is None
    assert position_limit(plan_of(2)) > 1 << 20
    plan = plan_of(2, offer=Offer(memory_bytes=8 << 20))
    left = (8 << 20) - weight_bytes(SIX_LAYERS, *holdings(plan, 0))
    assert kv_room(plan, 0) == left
    per_position = 2 * kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert position_limit(plan) == left // per_position
    tight = plan_of(2, offer=Offer(memory_bytes=8 << 20, kv_bytes=100 * per_position))
    assert position_limit(tight) == 100


def test_replicas_take_room_like_what_is_owned() -> None:
    """Their weights come off the room for KV, and their KV off the positions."""
    plan = plan_of(2, offer=Offer(memory_bytes=8 << 20))
    kept = name_standbys(plan, able={m.node_id for m in plan.members}, replicas=1)
    weights = weight_bytes(SIX_LAYERS, *holdings(plan, 0)) + weight_bytes(
        SIX_LAYERS, *holdings(plan, 1)
    )
    assert kv_room(kept, 0) == (8 << 20) - weights
    per_position = 4 * kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert position_limit(kept) == ((8 << 20) - weights) // per_position
    bounded = plan_of(2, offer=Offer(kv_bytes=SIX_LAYERS.max_positions * per_position))
    kept = name_standbys(bounded, able={m.node_id for m in plan.members}, replicas=1)
    assert (position_limit(bounded), position_limit(kept)) == (1024, SIX_LAYERS.max_positions)


def test_of_warm_replicas_those_of_one_owner_take_room() -> None:
    """Those of the owner who gives the most: they are loaded when it is gone."""
    plan = plan_of(3, offer=Offer(memory_bytes=8 << 20))
    members = tuple(msgspec.structs.replace(m, keeps_warm=True) for m in plan.members)
    able = {m.node_id for m in plan.members}
    hot = name_standbys(plan, able=able, replicas=2)
    warm = msgspec.structs.replace(hot, members=members)
    owned = [weight_bytes(SIX_LAYERS, *holdings(plan, i)) for i in range(3)]
    assert kv_room(hot, 0) == (8 << 20) - sum(owned)
    assert kv_room(warm, 0) == (8 << 20) - owned[0] - max(owned[1:])


def test_kept_inputs_take_room_too() -> None:
    """As many bytes per position whatever a member owns; none where it owns nothing."""
    plan = plan_of(2, offer=Offer(kv_bytes=4 << 20))
    row = 2 * kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    inputs = input_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert inputs == SIX_LAYERS.hidden_size * SIX_LAYERS.num_layers * 2
    keeping = [msgspec.structs.replace(m, keeps_inputs=True) for m in plan.members]
    for members in (keeping, [plan.members[0], keeping[1]]):
        kept = msgspec.structs.replace(plan, members=tuple(members))
        assert position_limit(kept) == (4 << 20) // (row + inputs)
    assert position_limit(plan) == (4 << 20) // row
    spare = msgspec.structs.replace(keeping[1], node_id="f" * 16, name="z", kv_bytes=1)
    idle = msgspec.structs.replace(plan, members=(*plan.members, spare))
    assert position_limit(idle) == (4 << 20) // row


def test_who_only_keeps_replicas_limits_too() -> None:
    """A member that owns nothing has no more room than it has."""
    plan = plan_of(2)
    spare = msgspec.structs.replace(plan.members[1], node_id="f" * 16, name="z", kv_bytes=4 << 20)
    plan = msgspec.structs.replace(plan, members=(*plan.members, spare))
    kept = name_standbys(plan, able={m.node_id for m in plan.members}, replicas=2)
    (held,) = standby_holdings(kept, 2)
    units = len(held.head_units)
    assert units == 4
    row = kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert position_limit(kept) == (4 << 20) // (units * row)


def test_who_neither_leads_nor_owns_is_not_needed() -> None:
    """Steps do without it; a leader that owns nothing draws the tokens."""
    plan = plan_of(2)
    spare = msgspec.structs.replace(plan.members[1], node_id="f" * 16, name="z")
    plan = msgspec.structs.replace(plan, members=(*plan.members, spare))
    assert [topology(plan, me).is_needed for me in range(3)] == [True, True, False]
    assert topology(msgspec.structs.replace(plan, leader=2), 2).is_needed
