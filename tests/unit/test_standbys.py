"""Standbys: even, in the owner's numeric class, where there is memory, and not moved lightly."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from p2pinfer.core.holdings import owners_of, standby_holdings, standbys_of, validate
from p2pinfer.core.shares import MIN_KV_POSITIONS, least_kv_bytes
from p2pinfer.core.standbys import name_standbys
from p2pinfer.core.topology import position_limit
from p2pinfer.types import Plan
from tests.plan_series import (
    HEAD_BYTES,
    MLP_BYTES,
    MODEL,
    VOCAB_BYTES,
    after,
    member,
    nodes,
    owners,
)


def heads(plan: Plan, owner: int) -> list[tuple[int, ...]]:
    """Standbys, by node number, of the head units of a node."""
    stage = plan.stages[0]
    return [
        tuple(int(plan.members[i].node_id, 16) for i in copies)
        for copies, node in zip(stage.head_standbys, owners(plan), strict=True)
        if node == owner
    ]


def test_no_replicas_are_no_standbys() -> None:
    """Neither where none are wanted nor where there is nobody to be one."""
    for plan in (after(None, nodes(3)), after(None, nodes(1), replicas=2)):
        stage = plan.stages[0]
        assert stage.head_standbys == stage.mlp_standbys == stage.vocab_standbys == ()


def test_each_owners_units_are_spread_over_the_others() -> None:
    """With four equal nodes nobody is named for more than one of the two units of another."""
    plan = after(None, nodes(4), replicas=1)
    for owner in range(4):
        named = heads(plan, owner)
        assert len(set(named)) == 2
        assert (owner,) not in named
    total = Counter(i for owner in range(4) for (i,) in heads(plan, owner))
    assert max(total.values()) - min(total.values()) <= 1


def test_standbys_make_up_for_odd_units() -> None:
    """Of 3, 3 and 2 units those of a dead node of 3 leave the others with 4 each."""
    plan = after(None, nodes(3), replicas=1)
    counts = Counter(owners(plan))
    for owner in range(3):
        gained = Counter(i for (i,) in heads(plan, owner))
        assert all(counts[i] + gained[i] == 4 for i in range(3) if i != owner)


def test_two_replicas_are_on_two_members() -> None:
    """Each unit has two standbys that are not its owner; with two nodes there is only one."""
    plan = after(None, nodes(4), replicas=2)
    assert all(len(set(copies) - {0}) == 2 for copies in heads(plan, 0))
    plan = after(None, nodes(2), replicas=2)
    assert heads(plan, 0) == [(1,)] * 4


def test_the_owners_numeric_class_comes_first() -> None:
    """Another class is only taken where its own has nobody left."""
    members = [
        member(0, numeric_class="x"),
        member(1, numeric_class="y"),
        member(2, numeric_class="x"),
        member(3, numeric_class="y"),
    ]
    plan = after(None, members, replicas=1)
    assert set(heads(plan, 0)) == {(2,)}
    assert set(heads(plan, 3)) == {(1,)}
    plan = after(None, members, replicas=2)
    assert {copies[0] for copies in heads(plan, 0)} == {2}
    assert {copies[1] for copies in heads(plan, 0)} == {1, 3}
    alone = after(None, members[:2], replicas=1)
    assert set(heads(alone, 0)) == {(1,)}


def test_standbys_need_memory() -> None:
    """A member without room for another unit keeps no replica."""
    full = 4 * HEAD_BYTES + 4 * MLP_BYTES + 16 * VOCAB_BYTES
    members = [member(0), member(1, memory_bytes=full + 2 * HEAD_BYTES)]
    plan = after(None, members, replicas=1)
    assert heads(plan, 0) == [(1,), (1,), (), ()]
    assert heads(plan, 1) == [(0,)] * 4
    stage = plan.stages[0]
    assert {owner: set(c) for owner, c in zip(stage.mlp_owners, stage.mlp_standbys, strict=True)}


def test_standbys_need_room_for_the_least_kv_of_all_that_they_have() -> None:
    """A limit of KV is for owned and kept units together; weights without KV are kept all the
    same."""
    least = least_kv_bytes(MODEL, MODEL.num_layers)
    members = [member(0), member(1, kv_bytes=6 * least), member(2, kv_bytes=3 * least - 1)]
    plan = after(None, members[:2], replicas=1)
    assert heads(plan, 0) == [(1,), (1,), (), ()]
    assert {*plan.stages[0].mlp_standbys} == {(0,), (1,)}
    plan = after(None, members, replicas=2)
    assert sum(2 in copies for copies in plan.stages[0].head_standbys) == 0
    assert owners(plan).count(2) == 2


def test_a_request_that_is_under_way_does_not_lose_its_place_to_replicas() -> None:
    """Who keeps a unit has room for as many positions as it may come to; else nobody keeps it."""
    model, longest = msgspec.structs.replace(MODEL, max_positions=8192), 2 * MIN_KV_POSITIONS
    least = least_kv_bytes(model, model.num_layers)
    members = [member(i, kv_bytes=8 * least) for i in range(2)]
    assert position_limit(after(None, members, model=model, replicas=1)) < longest
    plan = after(None, members, model=model, replicas=1, positions=longest)
    assert plan.stages[0].head_standbys == ()
    assert position_limit(plan) >= longest
    assert plan.stages[0].mlp_standbys


def test_warm_standbys_need_memory_for_one_owner_at_a_time() -> None:
    """Who has room for all that one of two others owns keeps what both own."""
    share = after(None, nodes(3)).stages[0]
    least = 3 * HEAD_BYTES + 3 * MLP_BYTES + 11 * VOCAB_BYTES
    kv = 3 * least_kv_bytes(MODEL, MODEL.num_layers)
    assert max(map(Counter(share.head_owners).__getitem__, range(3))) == 3

    def others(**changes: bool) -> int:
        """Units that the third neither owns nor keeps."""
        members = [*nodes(2), member(2, memory_bytes=2 * least + kv, **changes)]
        plan = after(None, members, replicas=2)
        third = [each.name for each in plan.members].index("node02")
        stage = plan.stages[0]
        return sum(
            third not in (owner, *standbys)
            for owners, copies in zip(owners_of(stage), standbys_of(stage), strict=True)
            for owner, standbys in zip(owners, copies, strict=True)
        )

    assert others(keeps_warm=True) == 0
    assert others() > 0


def test_a_heavier_member_is_standby_for_more() -> None:
    """Units are spread by weight, as they would be if the owner were gone."""
    members = [member(0), member(1, weight=3.0), member(2)]
    plan = after(None, members, replicas=1)
    gained = Counter(i for (i,) in heads(plan, 0))
    assert gained[1] >= gained[2]


def test_standbys_stay_while_nothing_changes() -> None:
    """A plan for the same members names the same standbys."""
    before = after(None, nodes(5), replicas=2)
    assert after(before, nodes(5), replicas=2).stages == before.stages


def test_who_has_the_kv_is_kept() -> None:
    """After a death the standbys that live stay with units whose owner lives."""
    before = after(None, nodes(4), replicas=1)
    plan = after(before, nodes(4)[:3], replicas=1)
    for owner in range(3):
        was = dict(
            zip(
                (u for u, o in enumerate(owners(before)) if o == owner),
                heads(before, owner),
                strict=True,
            )
        )
        now = dict(
            zip(
                (u for u, o in enumerate(owners(plan)) if o == owner),
                heads(plan, owner),
                strict=True,
            )
        )
        assert all(now[unit] == named for unit, named in was.items() if named != (3,))


def test_an_owner_becomes_standby_of_what_it_gave_away() -> None:
    """It has the KV already, unlike anybody else."""
    before = after(None, nodes(1))
    plan = after(before, nodes(2), replicas=1)
    assert heads(plan, 1) == [(0,)] * 4
    before = after(None, nodes(2), replicas=1)
    plan = after(before, nodes(3), replicas=1)
    given = zip(owners(before), owners(plan), plan.stages[0].head_standbys, strict=True)
    assert all(named == (old,) for old, new, named in given if new == 2)


def test_a_standby_that_started_again_has_nothing() -> None:
    """It is named like others, not before them."""
    before = after(None, nodes(3), replicas=1)
    plan = after(before, [member(0), member(1), member(2, 2)], replicas=1, rebalance=False)
    validate(plan)
    assert all(named for owner in range(2) for named in heads(plan, owner))


def test_standbys_are_in_the_stage_of_the_owner() -> None:
    """In 2x2 the partner; a member that owns nothing is no standby, nor one in another stage."""
    plan = after(None, nodes(5), layout="2x2", replicas=1)
    for number, pair in enumerate(((0, 1), (2, 3))):
        stage = plan.stages[number]
        for owner, copies in zip(stage.head_owners, stage.head_standbys, strict=True):
            assert {owner, *copies} == set(pair)
    assert plan.stages[0].vocab_standbys == ()
    assert plan.stages[1].vocab_standbys


def test_idle_members_of_heads_are_standbys() -> None:
    """A member that may own units but has none is a standby like others; an unable one is not."""
    before = after(None, nodes(2))
    plan = after(before, nodes(3), replicas=1, rebalance=False)
    assert standby_holdings(plan, 2)[0].head_units
    plan = after(before, nodes(3), able=(0, 1), replicas=1)
    assert standby_holdings(plan, 2) == ()


def test_other_spans_are_no_replicas() -> None:
    """The KV of a unit is of its layers: standbys of other spans count for nothing."""
    before = after(None, nodes(4), layout="2x2", replicas=1)
    plan = after(before, nodes(4), layout="heads", replicas=1)
    assert plan.stages == after(None, nodes(4), replicas=1).stages


def test_owners_are_able() -> None:
    """Standbys for owners that may not own are a defect of the caller."""
    plan = after(None, nodes(2))
    with pytest.raises(AssertionError):
        name_standbys(plan, able={"0" * 16}, replicas=1)
    assert name_standbys(msgspec.structs.replace(plan), able={"0" * 16, f"{1:016x}"}, replicas=0)
