"""What a plan means for one member."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.core import tree
from p2pinfer.core.holdings import standby_holding
from p2pinfer.core.planner import holding
from p2pinfer.core.standbys import name_standbys
from p2pinfer.core.topology import kv_room, position_limit, topology, weight_bytes
from p2pinfer.core.units import input_bytes_per_position, kv_bytes_per_position
from tests.model_specs import SIX_LAYERS
from tests.step_plans import Offer, plan_of


@pytest.mark.parametrize(
    ("nodes", "layout"), [(1, "heads"), (3, "heads"), (6, "heads"), (4, "2x2")]
)
def test_the_parts_of_a_stage_make_the_whole_sum(nodes: int, layout: str) -> None:
    """What the members of a stage send in a half layer adds up to the root of the tree."""
    plan = plan_of(nodes, layout)
    for me in range(nodes):
        mine = topology(plan, me)
        for half in (0, 1):
            parts = [node for sent in mine.parts[half].values() for node in sent]
            root = tree.root(mine.units[half])
            additions = tree.plan_additions(parts, mine.units[half])
            assert root in parts or additions[-1][2] == root
            assert set(mine.senders(half)) <= set(mine.peers)
        assert set(mine.others) == set(range(nodes)) - {me}
        assert mine.leads == (me == 0)


def test_hidden_states_reach_every_member_of_the_next_stage_once() -> None:
    """Who sends to me says so of itself, too."""
    plan = plan_of(5, "layers")
    seen = [topology(plan, i) for i in range(5)]
    for mine in seen:
        for receiver in mine.hidden_to:
            assert seen[receiver].hidden_from == mine.me
    receivers = [r for mine in seen for r in mine.hidden_to]
    later = [m.me for m in seen if m.holding.stage]
    assert sorted(receivers) == sorted(later)


def test_a_member_that_holds_nothing_has_no_part() -> None:
    """A spare member hears steps and sends nothing."""
    mine = topology(plan_of(5, "2x2"), 4)
    assert mine.holding.stage is None
    assert (mine.peers, mine.hidden_from, mine.hidden_to) == ((), None, ())


def test_room_for_kv_is_what_weights_leave_and_what_is_allowed() -> None:
    """The least of both bounds a member; the tightest member bounds the cluster."""
    assert kv_room(plan_of(2), 0) is None
    assert position_limit(plan_of(2)) > 1 << 20
    plan = plan_of(2, offer=Offer(memory_bytes=8 << 20))
    left = (8 << 20) - weight_bytes(SIX_LAYERS, holding(plan, 0))
    assert kv_room(plan, 0) == left
    per_position = 2 * kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert position_limit(plan) == left // per_position
    tight = plan_of(2, offer=Offer(memory_bytes=8 << 20, kv_bytes=100 * per_position))
    assert position_limit(tight) == 100


def test_replicas_take_room_like_what_is_owned() -> None:
    """Their weights come off the room for KV, and their KV off the positions."""
    plan = plan_of(2, offer=Offer(memory_bytes=8 << 20))
    kept = name_standbys(plan, able={m.node_id for m in plan.members}, replicas=1)
    weights = weight_bytes(SIX_LAYERS, holding(plan, 0)) + weight_bytes(
        SIX_LAYERS, holding(plan, 1)
    )
    assert kv_room(kept, 0) == (8 << 20) - weights
    per_position = 4 * kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert position_limit(kept) == ((8 << 20) - weights) // per_position
    bounded = plan_of(2, offer=Offer(kv_bytes=SIX_LAYERS.max_positions * per_position))
    kept = name_standbys(bounded, able={m.node_id for m in plan.members}, replicas=1)
    assert (position_limit(bounded), position_limit(kept)) == (1024, SIX_LAYERS.max_positions)


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
    units = len(standby_holding(kept, 2).head_units)
    assert units == 4
    row = kv_bytes_per_position(SIX_LAYERS, SIX_LAYERS.num_layers)
    assert position_limit(kept) == (4 << 20) // (units * row)
