"""Reading a plan: who holds what by it, and whether a plan from the wire is one at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from p2pinfer.core import tree
from p2pinfer.core.units import Slice, unit_count
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_PARTS
from p2pinfer.types import Plan, Stage, UnitKind

Units = tuple[int, ...]
"""Owners by unit, or unit numbers."""

Copies = tuple[tuple[int, ...], ...]
"""Standbys by unit."""


class Holding(Struct, frozen=True, kw_only=True):
    """What one member owns, or keeps for others, in one stage: the stage's number, its layers, and
    unit numbers."""

    stage: int
    span: Slice
    head_units: Units
    mlp_units: Units
    vocab_units: Units


def holdings(plan: Plan, index: int) -> tuple[Holding, ...]:
    """What member `index` owns, in the order of the stages; nothing where it owns nothing."""
    return _by_stage(
        plan,
        lambda stage: [
            tuple(unit for unit, owner in enumerate(owners) if owner == index)
            for owners in owners_of(stage)
        ],
    )


def standby_holdings(plan: Plan, index: int) -> tuple[Holding, ...]:
    """What member `index` keeps a replica of, in the order of the stages."""
    return _by_stage(
        plan,
        lambda stage: [
            tuple(unit for unit, members in enumerate(copies) if index in members)
            for copies in standbys_of(stage)
        ],
    )


def places(plan: Plan, node_id: str) -> tuple[int, ...]:
    """The index of a node among a plan's members, or nothing where it is none of them."""
    return tuple(n for n, member in enumerate(plan.members) if member.node_id == node_id)


def owns_nothing(plan: Plan, node_id: str) -> bool:
    """Whether a plan gives a node nothing to own."""
    return not any(holdings(plan, place) for place in places(plan, node_id))


def keeps_nothing(plan: Plan, node_id: str) -> bool:
    """Whether a plan gives a node nothing to keep a replica of."""
    return not any(standby_holdings(plan, place) for place in places(plan, node_id))


def _by_stage(plan: Plan, units: Callable[[Stage], Sequence[Units]]) -> tuple[Holding, ...]:
    """The stages of which `units` names any, by kind."""
    found = []
    for number, stage in enumerate(plan.stages):
        heads, mlp, vocab = units(stage)
        if heads or mlp or vocab:
            held = Holding(
                stage=number,
                span=Slice(stage.start, stage.end),
                head_units=heads,
                mlp_units=mlp,
                vocab_units=vocab,
            )
            found.append(held)
    return tuple(found)


def stage_members(plan: Plan, stage: int) -> tuple[int, ...]:
    """Members that own anything of a stage, ascending: all of them need its hidden states."""
    return tuple(sorted({owner for owners in owners_of(plan.stages[stage]) for owner in owners}))


def sender_of_hidden(plan: Plan, stage: int, receiver: int) -> int:
    """Who of the previous stage has its hidden states for `receiver`, a member of `stage` >= 1.

    A member of both has them itself. All have the same bits, so they share the work for the others:
    the j-th of these hears the (j mod n)-th of n.
    """
    senders = stage_members(plan, stage - 1)
    if receiver in senders:
        return receiver
    hearing = [member for member in stage_members(plan, stage) if member not in senders]
    return senders[hearing.index(receiver) % len(senders)]


def validate(plan: Plan) -> None:
    """Raise `RemoteProtocolError` naming the first invariant that a plan from the wire breaks."""
    model, size = plan.model, len(plan.members)
    if model.num_attention_heads % model.num_key_value_heads:
        raise RemoteProtocolError(
            f"a plan's model has {model.num_attention_heads} attention heads, which "
            f"{model.num_key_value_heads} KV heads do not divide"
        )
    if len({member.node_id for member in plan.members}) != size:
        raise RemoteProtocolError("a plan names one node id twice")
    if not (0 <= plan.leader < size and _distinct_below(plan.voters, size)):
        raise RemoteProtocolError("a plan's leader or voters are not its members")
    if not plan.voters:
        raise RemoteProtocolError("a plan has no voters, so it could never be in force")
    if len(set(plan.old_voters)) != len(plan.old_voters):
        raise RemoteProtocolError("a plan names one old voter twice")
    reached = 0
    for number, stage in enumerate(plan.stages):
        if stage.start != reached or stage.end <= stage.start:
            raise RemoteProtocolError(
                f"stage {number} of a plan begins at layer {stage.start} and ends at {stage.end}; "
                f"it must begin at {reached} and not be empty"
            )
        reached = stage.end
        _check_stage(plan, number)
    if reached != model.num_layers:
        raise RemoteProtocolError(f"a plan ends at layer {reached} of {model.num_layers}")


def _check_stage(plan: Plan, number: int) -> None:
    """Check the owners and standbys of one stage."""
    stage = plan.stages[number]
    last = number == len(plan.stages) - 1
    parts = zip(UnitKind, owners_of(stage), standbys_of(stage), strict=True)
    for kind, owners, copies in parts:
        units = unit_count(plan.model, kind) if kind is not UnitKind.VOCAB or last else 0
        where = f"stage {number} of a plan"
        if len(owners) != units or len(copies) not in (0, units):
            raise RemoteProtocolError(
                f"{where} has {len(owners)} owners and {len(copies)} lists of standbys for "
                f"{units} {kind} units"
            )
        if not all(_may_hold(plan, i) for i in (*owners, *(i for c in copies for i in c))):
            raise RemoteProtocolError(f"{where} gives {kind} units to a witness or to nobody")
        if any(len({owner, *c}) <= len(c) for owner, c in zip(owners, copies, strict=False)):
            raise RemoteProtocolError(
                f"{where} names the owner of a {kind} unit as its standby, or one standby twice"
            )
        if not fits_on_the_wire(owners):
            raise RemoteProtocolError(f"{where} scatters {kind} units over too many subtrees")


def owners_of(stage: Stage) -> tuple[Units, Units, Units]:
    """Owners by unit, in the order of `UnitKind`."""
    return stage.head_owners, stage.mlp_owners, stage.vocab_owners


def standbys_of(stage: Stage) -> tuple[Copies, Copies, Copies]:
    """Standbys by unit, in the order of `UnitKind`; each empty where none are named."""
    return stage.head_standbys, stage.mlp_standbys, stage.vocab_standbys


def fits_on_the_wire(owners: Units) -> bool:
    """Whether nobody owns units of one kind in more subtrees than one frame may carry."""
    return all(len(tree.cover(run, len(owners))) <= MAX_PARTS for run in _by_owner(owners))


def _by_owner(owners: Sequence[int]) -> list[list[int]]:
    return [[u for u, o in enumerate(owners) if o == owner] for owner in sorted(set(owners))]


def _may_hold(plan: Plan, index: int) -> bool:
    return 0 <= index < len(plan.members) and not plan.members[index].witness


def _distinct_below(indices: Sequence[int], size: int) -> bool:
    return len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)
