"""The object that `status --json` prints: one node's picture of the cluster, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from p2pinfer.core.events import WorkerStats
from p2pinfer.core.holdings import holdings, standby_holdings
from p2pinfer.core.membership import Membership, Peer
from p2pinfer.core.preview import fits_without, units_by_stage
from p2pinfer.core.quorum import tolerates
from p2pinfer.core.units import unit_count
from p2pinfer.types import Member, ModelSpec, Plan, UnitKind
from p2pinfer.wire.messages import Heartbeat, MemberState

Json = dict[str, Any]


def make_status(
    *,
    cluster_id: str,
    leader_id: str,
    term: int,
    ready: bool,
    waiting: str,
    plan: Plan | None,
    model: ModelSpec | None,
    membership: Membership,
    own: Heartbeat,
    stats: WorkerStats,
    restored: Mapping[str, int],
) -> Json:
    """The status object; `plan` is the one in force here, `own` this node's present heartbeat.

    Fields: as the README lists them; `rtt_ms` is null where none was measured, `waiting` is null
    when the cluster is ready. Members that are gone are listed with their state, and own nothing.
    `model` has the fields of `ModelSpec`, and how many units of each kind there are.
    `counters` are those of the answering node's worker: `steps` and the times but `wait_s` since
    the plan in force was adopted, the rest since it started; and `restored`: how often, by rung,
    requests went on under a new plan since this node leads.
    """
    peers: list[tuple[Member, Peer | None]] = [(membership.me, None)]
    peers += [(peer.member, peer) for peer in membership.everybody()]
    peers.sort(key=lambda pair: (pair[0].name, pair[0].node_id))
    names = {member.node_id: member.name for member, _ in peers}
    known = plan.model if plan else model
    return {
        "cluster_id": cluster_id,
        "leader": names.get(leader_id, ""),
        "term": term,
        "epoch": plan.fence.epoch if plan else 0,
        "ready": ready,
        "waiting": None if ready else waiting,
        "layout": plan.layout if plan else "",
        "model": _model(known) if known else None,
        "voters": [plan.members[index].name for index in plan.voters] if plan else [],
        "tolerates": _tolerated(plan, membership) if plan and ready else [],
        "members": [_member(member, peer, plan, own) for member, peer in peers],
        "counters": _counters(stats) | {"restored": dict(restored)},
    }


def _tolerated(plan: Plan, membership: Membership) -> list[str]:
    """Names of the members whose death, one at a time, the cluster survives as it stands."""
    living = membership.members()
    ids = frozenset(member.node_id for member in living)
    return list(tolerates(plan, ids, lambda node_id: fits_without(plan, living, node_id)))


def _counters(stats: WorkerStats) -> Json:
    fields: Json = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in msgspec.structs.asdict(stats).items()
        if name != "fence"
    }
    return fields | {"hears_steps": list(stats.hears_steps)}


def _model(model: ModelSpec) -> Json:
    fields: Json = msgspec.to_builtins(model)
    return fields | {"num_units": {kind.value: unit_count(model, kind) for kind in UnitKind}}


def _member(member: Member, peer: Peer | None, plan: Plan | None, own: Heartbeat) -> Json:
    health = peer.heartbeat if peer else own
    there = plan is not None and (peer is None or peer.living)
    index = _index(member, plan) if plan and there else None
    owned = units_by_stage(holdings(plan, index)) if plan and index is not None else []
    standby = units_by_stage(standby_holdings(plan, index)) if plan and index is not None else []
    return {
        "name": member.name,
        "node_id": member.node_id,
        "boot_id": member.boot_id,
        "numeric_class": member.numeric_class,
        "state": (peer.state if peer else MemberState.ALIVE).value,
        "pid": member.pid,
        "address": member.address,
        "witness": member.witness,
        "hung": health.hung if health else False,
        "draining": health.draining if health else False,
        "paused": health.paused if health else False,
        "owned": owned,
        "standby": standby,
        "head_units": [unit for part in owned for unit in part["head_units"]],
        "standby_head_units": [unit for part in standby for unit in part["head_units"]],
        "standby_state": _standby_state(health) if health and standby else None,
        "rtt_ms": round(peer.rtt_s * 1000, 1) if peer and peer.rtt_s is not None else None,
        "tokens_per_s": health.tokens_per_s if health else 0.0,
        "kv": {
            "used_bytes": health.kv_used_bytes if health else 0,
            "limit_bytes": health.kv_limit_bytes if health else 0,
            "inputs_bytes": health.kv_inputs_bytes if health else 0,
        },
    }


def _standby_state(health: Heartbeat) -> Json:
    """How far a member is with what it keeps for others."""
    return {
        "units": health.standby_units,
        "units_ready": health.standby_units_ready,
        "units_warm": health.standby_units_warm,
        "behind": health.standby_behind,
        "ready": health.standbys_ready,
        "error": health.standby_error or None,
    }


def _index(member: Member, plan: Plan) -> int | None:
    """A member's place in the plan, if the plan means this very boot of it."""
    for index, planned in enumerate(plan.members):
        if (planned.node_id, planned.boot_id) == (member.node_id, member.boot_id):
            return index
    return None
