"""Who holds what by a plan, and who would if a member were gone, as plain values to print."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from p2pinfer.core.choice import prediction_object
from p2pinfer.core.holdings import Holding, holdings, owners_of, standby_holdings, standbys_of
from p2pinfer.core.planner import PlacementError, ordered_members
from p2pinfer.core.quorum import tolerates, voter_ids
from p2pinfer.core.replan import next_plan
from p2pinfer.core.topology import kv_room, position_limit, weight_bytes
from p2pinfer.errors import ClusterError
from p2pinfer.types import Fence, Member, Plan, UnitKind

Json = dict[str, Any]


def plan_object(plan: Plan, paused: AbstractSet[str] = frozenset()) -> Json:
    """The object of `plan --json`; `paused` are node ids.

    `epoch` and `term` are its fence; `kv_positions` the positions of KV, over all requests, that
    all owners have room for, `exact` whether all owners are of one numeric class. Of each member:
    what it owns and keeps replicas of, the bytes of those weights (`weight_bytes` of what it owns),
    the bytes that it offers for weights and KV together, and those that are left of them for KV;
    null where it does not say; and its measured speed, null where it is unknown. `prediction` is
    that of `core/choice`.
    """
    voters = voter_ids(plan)
    classes = {
        plan.members[i].numeric_class
        for stage in plan.stages
        for owners in owners_of(stage)
        for i in owners
    }
    return {
        "term": plan.fence.term,
        "epoch": plan.fence.epoch,
        "layout": plan.layout,
        "model": plan.model.name,
        "quorum": plan.quorum,
        "leader": plan.members[plan.leader].name,
        "voters": [m.name for m in plan.members if m.node_id in voters],
        "exact": len(classes) == 1,
        "kv_positions": position_limit(plan),
        "prediction": prediction_object(plan),
        "members": [
            _member(plan, index) | {"paused": member.node_id in paused}
            for index, member in enumerate(plan.members)
        ],
    }


def preview(plan: Plan, living: Sequence[Member], without: str) -> Json:
    """The object of `plan --without NAME --json`: the cluster after the death of that member.

    `fits` says whether the others can hold the model, `quorum` whether they could still decide
    anything, `survives` whether both; `why` says why not. `plan` is what they would hold
    (null where it does not fit), `moved` the units that would have another owner, by kind, and
    `exact` whether all those would go to a member of the same numeric class. Raises `ClusterError`
    when no living member has that name.
    """
    gone = next((m for m in ordered_members(living) if m.name == without), None)
    if gone is None:
        names = ", ".join(sorted(m.name for m in living))
        raise ClusterError("invalid_request", f"no member is called {without}; there are: {names}")
    listed = any(m.node_id == gone.node_id for m in plan.members)
    ids = frozenset(m.node_id for m in living)
    quorum = not listed or bool(tolerates(plan, ids, lambda node_id: node_id == gone.node_id))
    why = []
    after = None
    try:
        after = _after(plan, living, gone.node_id)
    except PlacementError as error:
        why.append(error.message)
    if not quorum:
        left = [
            m.name for m in plan.members if m.node_id in (voter_ids(plan) & ids) - {gone.node_id}
        ]
        why.append(
            f"of {len(plan.voters)} voters {len(left)} would be left: {', '.join(left) or 'none'}"
        )
    return {
        "without": gone.name,
        "survives": after is not None and quorum,
        "fits": after is not None,
        "quorum": quorum,
        "why": "; ".join(why),
        "moved": _moved(plan, after) if after else None,
        "exact": _stays_exact(plan, after) if after else None,
        "plan": plan_object(after) if after else None,
    }


def fits_without(plan: Plan, living: Sequence[Member], node_id: str) -> bool:
    """Whether the other living members could hold the model of a plan; for `quorum.tolerates`."""
    try:
        _after(plan, living, node_id)
    except PlacementError:
        return False
    return True


def _after(plan: Plan, living: Sequence[Member], gone: str) -> Plan:
    """The plan that would follow the death of a member. Raises `PlacementError`."""
    rest = [member for member in living if member.node_id != gone]
    planned = {(member.node_id, member.boot_id) for member in plan.members}
    able = {
        member.node_id
        for member in rest
        if member.numeric_class or (member.node_id, member.boot_id) in planned
    }
    voters = [member.node_id for member in rest if member.node_id in voter_ids(plan)]
    old = plan.members[plan.leader].node_id
    heirs = [member.node_id for member in ordered_members(rest) if not member.witness]
    heirs.sort(key=lambda node_id: (node_id != old, node_id not in voters))
    if not heirs:
        raise PlacementError("not_ready", "nobody would be left to hold the model", retryable=True)
    named = (copies for stage in plan.stages for kind in standbys_of(stage) for copies in kind)
    return next_plan(
        previous=plan,
        members=rest,
        able=able,
        model=plan.model,
        layout=plan.layout,
        fence=Fence(plan.fence.term + (heirs[0] != old), plan.fence.epoch + 1),
        cluster_id=plan.cluster_id,
        leader_id=heirs[0],
        voters=voters or heirs[:1],
        old_voters=sorted(voter_ids(plan)),
        quorum=plan.quorum,
        layout_auto=plan.layout_auto,
        use_nodes=plan.use_nodes,
        replicas=max(map(len, named), default=0),
        rebalance=False,
    )


def _member(plan: Plan, index: int) -> Json:
    member = plan.members[index]
    owned, kept = holdings(plan, index), standby_holdings(plan, index)
    return {
        "name": member.name,
        "node_id": member.node_id,
        "numeric_class": member.numeric_class,
        "voter": index in plan.voters,
        "witness": member.witness,
        "weight": member.weight,
        "product_gb_s": member.product_gb_s or None,
        "read_gb_s": member.read_gb_s or None,
        "owned": units_by_stage(owned),
        "standby": units_by_stage(kept),
        "weight_bytes": sum(weight_bytes(plan.model, held) for held in owned),
        "standby_bytes": sum(weight_bytes(plan.model, held) for held in kept),
        "memory_bytes": member.memory_bytes or None,
        "kv_room_bytes": kv_room(plan, index),
    }


def units_by_stage(held: Sequence[Holding]) -> list[Json]:
    """Unit numbers by kind, with the span of each stage."""
    return [
        {
            "span": list(each.span),
            "head_units": list(each.head_units),
            "mlp_units": list(each.mlp_units),
            "vocab_units": list(each.vocab_units),
        }
        for each in held
    ]


def _by_unit(plan: Plan) -> dict[tuple[UnitKind, int, int], Member]:
    """The owner of each unit in each layer, of a vocabulary unit in layer 0."""
    return {
        (kind, layer, unit): plan.members[owner]
        for stage in plan.stages
        for kind, owners in zip(UnitKind, owners_of(stage), strict=True)
        for layer in (range(stage.start, stage.end) if kind is not UnitKind.VOCAB else (0,))
        for unit, owner in enumerate(owners)
    }


def _moved(before: Plan, after: Plan) -> dict[str, list[int]]:
    """Numbers of the units that have another owner, in whichever layer."""
    old, new = _by_unit(before), _by_unit(after)
    return {
        kind.value: sorted(
            {
                unit
                for (k, layer, unit), owner in new.items()
                if k is kind and owner.node_id != old[k, layer, unit].node_id
            }
        )
        for kind in UnitKind
    }


def _stays_exact(before: Plan, after: Plan) -> bool:
    """Whether each unit stays in its numeric class."""
    old, new = _by_unit(before), _by_unit(after)
    return all(owner.numeric_class == old[unit].numeric_class for unit, owner in new.items())
