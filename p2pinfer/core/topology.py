"""What a plan means for one member: whom it hears from and sends to within a step, and what.

The plan is data and the data plane runs it blindly; this is that data, worked out once per plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from p2pinfer.core import tree
from p2pinfer.core.holdings import (
    Holding,
    holding,
    sender_of_hidden,
    stage_members,
    standby_holding,
)
from p2pinfer.core.inputs import input_spans
from p2pinfer.core.units import (
    input_bytes_per_position,
    kv_bytes_per_position,
    unit_count,
    unit_weight_bytes,
)
from p2pinfer.limits import MAX_POSITIONS, MAX_REQUESTS
from p2pinfer.types import ModelSpec, Plan, UnitKind


class Topology(Struct, frozen=True, kw_only=True):
    """Members are indices into `plan.members`.

    `parts[half][member]` are the tree nodes whose sums a member of my stage sends in that half
    layer; `units[half]` counts the units. `peers` are the other members of my stage.
    `hidden_from` sends me the hidden states of the previous stage (None in the first one);
    `hidden_to` get mine. `vocab[member]` are the vocab units that a member owns.
    """

    plan: Plan
    me: int
    holding: Holding
    peers: tuple[int, ...]
    units: tuple[int, int]
    parts: tuple[Mapping[int, tuple[int, ...]], Mapping[int, tuple[int, ...]]]
    hidden_from: int | None
    hidden_to: tuple[int, ...]
    vocab: Mapping[int, tuple[int, ...]]

    @property
    def leads(self) -> bool:
        """Whether this member draws the tokens."""
        return self.me == self.plan.leader

    @property
    def others(self) -> tuple[int, ...]:
        """Every member but me."""
        return tuple(i for i in range(len(self.plan.members)) if i != self.me)

    def senders(self, half: int) -> tuple[int, ...]:
        """Peers that send a partial in this half layer."""
        return tuple(p for p in self.peers if self.parts[half].get(p))


def topology(plan: Plan, me: int) -> Topology:
    """Work out `me`'s part in the steps of `plan`; the plan must be valid."""
    mine = holding(plan, me)
    units = (unit_count(plan.model, UnitKind.HEAD), unit_count(plan.model, UnitKind.MLP))
    vocab = {
        member: owned
        for member in range(len(plan.members))
        if (owned := holding(plan, member).vocab_units)
    }
    peers: tuple[int, ...] = ()
    parts: tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]] = ({}, {})
    hidden_from: int | None = None
    hidden_to: tuple[int, ...] = ()
    if mine.stage is not None:
        members = stage_members(plan, mine.stage)
        peers = tuple(m for m in members if m != me)
        held = {member: holding(plan, member) for member in members}
        parts = (
            {m: tree.cover(h.head_units, units[0]) for m, h in held.items() if h.head_units},
            {m: tree.cover(h.mlp_units, units[1]) for m, h in held.items() if h.mlp_units},
        )
        if mine.stage > 0:
            hidden_from = sender_of_hidden(plan, mine.stage, me)
        hidden_to = _receivers(plan, mine.stage, me)
    return Topology(
        plan=plan,
        me=me,
        holding=mine,
        peers=peers,
        units=units,
        parts=parts,
        hidden_from=hidden_from,
        hidden_to=hidden_to,
        vocab=vocab,
    )


def _receivers(plan: Plan, stage: int, me: int) -> tuple[int, ...]:
    """Members of the next stage that get their hidden states from `me`."""
    following = stage + 1
    if following == len(plan.stages):
        return ()
    members = stage_members(plan, following)
    return tuple(m for m in members if sender_of_hidden(plan, following, m) == me)


def position_limit(plan: Plan) -> int:
    """Positions of KV that every member has room for, over all requests, replicas included, and
    the inputs that it keeps.

    A member that says neither how much memory it offers nor how much of it for KV does not limit.
    """
    limit = MAX_POSITIONS * MAX_REQUESTS
    for index in range(len(plan.members)):
        room = kv_room(plan, index)
        row = sum(_kv_bytes_per_position(plan, held) for held in _held(plan, index))
        for span in input_spans(plan, index):
            row += input_bytes_per_position(plan.model, span.end - span.start)
        if room is not None and row:
            limit = min(limit, room // row)
    return limit


def kv_room(plan: Plan, index: int) -> int | None:
    """Bytes of KV, replicas and kept inputs included, that a member has room for beside the weights
    of what it owns and keeps; None when it does not say."""
    member = plan.members[index]
    rooms = []
    if member.memory_bytes:
        weights = sum(weight_bytes(plan.model, held) for held in _held(plan, index))
        rooms.append(max(0, member.memory_bytes - weights))
    if member.kv_bytes:
        rooms.append(member.kv_bytes)
    return min(rooms, default=None)


def _held(plan: Plan, index: int) -> tuple[Holding, Holding]:
    """What a member owns, and what it keeps replicas of."""
    return holding(plan, index), standby_holding(plan, index)


def _kv_bytes_per_position(plan: Plan, held: Holding) -> int:
    layers = held.span.end - held.span.start
    return kv_bytes_per_position(plan.model, layers) * len(held.head_units)


def weight_bytes(model: ModelSpec, held: Holding) -> int:
    """Bytes of the weights of all units that a member holds."""
    layers = held.span.end - held.span.start
    kinds = (
        (UnitKind.HEAD, held.head_units, layers),
        (UnitKind.MLP, held.mlp_units, layers),
        (UnitKind.VOCAB, held.vocab_units, 1),
    )
    return sum(
        unit_weight_bytes(model, kind, unit) * times
        for kind, units, times in kinds
        for unit in units
    )
