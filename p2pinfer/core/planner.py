"""Who holds what: a plan made from members, model and layout, and what a plan means.

Making a plan is deterministic and does not depend on the order of arrival. A layout is a list of
groups of members, one per stage: `heads` is one group of all, `layers` groups of one, `SxH` S
groups of H. Layers are shared out to the groups and units to the members of a group by weight
(largest remainder), then moved one by one to where there is memory for them. `core/units.py` says
what the units are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple

from msgspec import Struct

from p2pinfer.core import tree
from p2pinfer.core.units import Slice, kv_bytes_per_position, unit_count, unit_weight_bytes
from p2pinfer.errors import ClusterError, LocalProtocolError, RemoteProtocolError
from p2pinfer.limits import MAX_NODES, MAX_PARTS
from p2pinfer.types import Fence, Member, ModelSpec, Plan, Stage, UnitKind

MIN_KV_POSITIONS = 2048
"""A plan leaves room for the KV of one request of this length (or of the model's, if shorter)."""

Counts = tuple[int, ...]
"""How many units, or layers, each member or group gets, in their order."""


class PlacementError(ClusterError):
    """The members cannot hold the model; the message says what lacks.

    The code is `not_ready` (retryable: another member may come) or `invalid_request` (the layout).
    """


class Holding(Struct, frozen=True, kw_only=True):
    """What one member owns: its stage (None: nothing at all), its layers and its unit numbers."""

    stage: int | None
    span: Slice
    head_units: tuple[int, ...]
    mlp_units: tuple[int, ...]
    vocab_units: tuple[int, ...]


# --- making a plan --------------------------------------------------------------------------------


def make_plan(
    *,
    members: Sequence[Member],
    model: ModelSpec,
    layout: str,
    fence: Fence,
    cluster_id: str,
    leader_id: str,
) -> Plan:
    """The plan by which `members` hold `model`; witnesses and members of weight 0 own nothing.

    `layout` is `auto` (as `heads`), `heads`, `layers` or `SxH` (S stages of H members; the S x H
    of greatest weight hold the model, further ones nothing). All members are voters. Raises
    `PlacementError`, and `LocalProtocolError` when the leader is not a member.
    """
    ordered = tuple(sorted(members, key=lambda m: (m.name, m.node_id)))
    ids = [member.node_id for member in ordered]
    if leader_id not in ids or len(ids) > MAX_NODES:
        raise LocalProtocolError(
            f"a plan has at most {MAX_NODES} members, not {len(ids)}, and the leader {leader_id} "
            f"is one of them"
        )
    layout = "heads" if layout == "auto" else layout
    groups, least = _groups(ordered, layout, model)
    placement = _Placement(model, ordered, groups)
    return Plan(
        fence=fence,
        cluster_id=cluster_id,
        leader=ids.index(leader_id),
        members=ordered,
        voters=tuple(range(len(ordered))),
        model=model,
        stages=tuple(placement.stages(placement.layers(least))),
        layout=layout,
    )


def _groups(
    members: Sequence[Member], layout: str, model: ModelSpec
) -> tuple[list[tuple[int, ...]], int]:
    """The members (by index) of each stage to be, and the least number of layers of a stage."""
    able = [i for i, m in enumerate(members) if m.weight > 0 and not m.witness]
    if not able:
        raise PlacementError(
            "not_ready",
            "no member can hold a part of the model: all are witnesses or have weight 0; "
            "start a node with a model and a positive weight",
            retryable=True,
        )
    if layout == "heads":
        return [tuple(able)], 0
    if layout == "layers":
        return [(i,) for i in able], 0
    match = re.fullmatch(r"([1-9][0-9]?)x([1-9][0-9]?)", layout)
    if match is None:
        raise PlacementError(
            "invalid_request",
            f"unknown layout {layout!r}; use auto, heads, layers, or stages x nodes such as 2x2",
        )
    stages, height = int(match[1]), int(match[2])
    if stages > model.num_layers:
        raise PlacementError(
            "invalid_request",
            f"layout {layout} has {stages} stages, but {model.name} has {model.num_layers} layers",
        )
    if len(able) < stages * height:
        raise PlacementError(
            "not_ready",
            f"layout {layout} needs {stages * height} nodes that hold units; {len(able)} are here",
            retryable=True,
        )
    heaviest = sorted(able, key=lambda i: -members[i].weight)[: stages * height]
    chosen = sorted(heaviest)
    return [tuple(chosen[s * height : (s + 1) * height]) for s in range(stages)], 1


class _Load(NamedTuple):
    """The units of one kind in a stage: how many, the bytes of one, and those of the last one."""

    kind: UnitKind
    units: int
    unit_bytes: int
    last_bytes: int


class _Shares(NamedTuple):
    """Units per member for each kind of a stage, and the bytes of memory that lack for it."""

    counts: list[Counts]
    lacking: int


class _Placement:
    """Shares out layers to groups and units to their members, and minds everybody's memory."""

    def __init__(
        self, model: ModelSpec, members: Sequence[Member], groups: list[tuple[int, ...]]
    ) -> None:
        self._model = model
        self._members = members
        self._groups = groups
        self._weights = [[Fraction(members[i].weight) for i in group] for group in groups]
        self._rooms = [[members[i].memory_bytes or inf for i in group] for group in groups]
        self._positions = min(MIN_KV_POSITIONS, model.max_positions)
        self._known: dict[tuple[int, int, bool], _Shares] = {}

    def layers(self, least: int) -> Counts:
        """Layers of each group: by weight, at least `least`, then to where there is memory."""
        counts = _largest_remainder(self._model.num_layers, [sum(w) for w in self._weights])
        while min(counts) < least:
            counts = _moved(counts, counts.index(max(counts)), counts.index(min(counts)))
        lacking = self._lacking(counts)
        while worst := max(lacking):
            source = lacking.index(worst)
            options = [
                _moved(counts, source, target)
                for target in range(len(counts))
                if target != source and counts[source] > least
            ]
            best = min(options, key=lambda option: sum(self._lacking(option)), default=counts)
            if sum(self._lacking(best)) >= sum(lacking):
                raise self._too_small(sum(lacking))
            counts, lacking = best, self._lacking(best)
        return counts

    def stages(self, layers: Counts) -> Iterator[Stage]:
        """The stages of groups that got layers."""
        start = 0
        last = _last_used(layers)
        for g, depth in enumerate(layers):
            if depth:
                shares = self._shares(g, depth, g == last).counts
                owners = [
                    tuple(i for i, c in zip(self._groups[g], counts, strict=True) for _ in range(c))
                    for counts in shares
                ]
                yield Stage(
                    start=start,
                    end=start + depth,
                    head_owners=owners[0],
                    mlp_owners=owners[1],
                    vocab_owners=owners[2] if g == last else (),
                )
                start += depth

    def _lacking(self, layers: Counts) -> list[int]:
        last = _last_used(layers)
        return [
            self._shares(g, depth, g == last).lacking if depth else 0
            for g, depth in enumerate(layers)
        ]

    def _shares(self, group: int, depth: int, last: bool) -> _Shares:
        key = (group, depth, last)
        if key not in self._known:
            loads = self._loads(depth, last)
            weights, rooms = self._weights[group], self._rooms[group]
            counts: list[Counts] = []
            for load in loads:
                held = _held(counts, loads, len(weights))
                counts.append(_apportion(load.units, weights, held))
            self._known[key] = _relieve(counts, loads, weights, rooms)
        return self._known[key]

    def _loads(self, depth: int, last: bool) -> list[_Load]:
        """What a stage of `depth` layers weighs, its least KV included; vocabulary in the last."""
        model = self._model
        kv = kv_bytes_per_position(model, depth) * self._positions
        loads = []
        for kind, times, more in (
            (UnitKind.HEAD, depth, kv),
            (UnitKind.MLP, depth, 0),
            *(((UnitKind.VOCAB, 1, 0),) if last else ()),
        ):
            units = unit_count(model, kind)
            first, end = (unit_weight_bytes(model, kind, unit) for unit in (0, units - 1))
            loads.append(_Load(kind, units, times * first + more, times * end + more))
        return loads

    def _too_small(self, lacking: int) -> PlacementError:
        able = [self._members[i] for group in self._groups for i in group]
        whole = self._loads(self._model.num_layers, True)
        need = sum((load.units - 1) * load.unit_bytes + load.last_bytes for load in whole)
        offers = ", ".join(
            f"{m.name} {m.memory_bytes}" if m.memory_bytes else f"{m.name} unlimited" for m in able
        )
        return PlacementError(
            "not_ready",
            f"{self._model.name} does not fit: {lacking} bytes of memory lack. Its weights and the "
            f"KV of one request of {self._positions} positions need {need} bytes, in whole units; "
            f"offered are: {offers}. Add a node or let the nodes use more memory",
            retryable=True,
        )


def _largest_remainder(total: int, weights: Sequence[Fraction | int]) -> Counts:
    """`total` items by weight (Hamilton's method); ties go to the heavier, then to the first."""
    whole = sum(weights)
    quotas = [total * Fraction(weight) / whole for weight in weights]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - quotas[i], -weights[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def _apportion(units: int, weights: Sequence[Fraction], held: Sequence[int]) -> Counts:
    """Units of one kind by weight; which of equal members get the odd units costs no balance.

    So they go where the runs of units are covered by the fewest subtrees (each is a tensor to
    send), among such to the members that hold the fewest bytes so far, then to the first.
    """
    fair = _largest_remainder(units, weights)
    floors = {w: min(c for c, v in zip(fair, weights, strict=True) if v == w) for w in weights}
    classes = sorted(floors)
    odd = [
        sum(c - floors[w] for c, v in zip(fair, weights, strict=True) if v == w) for w in classes
    ]

    @cache
    def best(i: int, start: int, odd: Counts) -> tuple[float, int, Counts]:
        """(subtrees, bytes held, counts) of members i and up, whose runs begin at unit `start`."""
        if i == len(weights):
            return (inf if any(odd) else 0, 0, ())
        mine = classes.index(weights[i])
        options = []
        for more in (1, 0) if odd[mine] else (0,):
            count = floors[weights[i]] + more
            left = tuple(n - more if c == mine else n for c, n in enumerate(odd))
            parts, weight, rest = best(i + 1, start + count, left)
            parts += tree.count_of_run(start, start + count, units)
            options.append((parts, weight + more * held[i], (count, *rest)))
        return min(options, key=lambda option: option[:2])

    return best(0, 0, tuple(odd))[2]


def _held(counts: Sequence[Counts], loads: Sequence[_Load], members: int) -> list[int]:
    """Bytes that each member of a stage holds; the last unit of a kind may be smaller."""
    held = [0] * members
    for each, load in zip(counts, loads, strict=False):
        for i, count in enumerate(each):
            held[i] += count * load.unit_bytes
        held[_last_used(each)] -= load.unit_bytes - load.last_bytes
    return held


def _relieve(
    counts: list[Counts],
    loads: Sequence[_Load],
    weights: Sequence[Fraction],
    rooms: Sequence[float],
) -> _Shares:
    """Move units, one by one, from the fullest member to where less memory lacks for them.

    Each move lessens the sum of what lacks, so it ends; where it ends too early, no member has
    room for one more unit of those that the fullest one holds. Of the possible moves the one is
    taken that fills nobody beyond its memory, then the one that slows the stage least for each
    byte that lacks no more.
    """
    size = len(weights)

    def lacking(option: Sequence[Counts]) -> list[int]:
        held = _held(option, loads, size)
        return [max(0, int(h - r)) if r != inf else 0 for h, r in zip(held, rooms, strict=True)]

    def slowness(option: Sequence[Counts]) -> Fraction:
        """Every half layer waits for its slowest member: bytes read, over weight."""
        return sum(
            (
                max(load.unit_bytes * c / w for c, w in zip(each, weights, strict=True))
                for each, load in zip(option, loads, strict=True)
            ),
            Fraction(),
        )

    lacks = lacking(counts)
    while worst := max(lacks):
        source = lacks.index(worst)
        moves: list[tuple[bool, Fraction, int, list[Counts]]] = []
        for k, target in product(range(len(counts)), range(size)):
            if target != source and counts[k][source]:
                option = [*counts]
                option[k] = _moved(counts[k], source, target)
                after = lacking(option)
                if gain := max(0, sum(lacks) - sum(after)):
                    cost = (slowness(option) - slowness(counts)) / gain
                    moves.append((after[target] > 0, cost, -gain, option))
        if not moves:
            break
        counts = min(moves, key=lambda move: move[:3])[3]
        lacks = lacking(counts)
    return _Shares(counts, sum(lacks))


def _moved(counts: Counts, source: int, target: int) -> Counts:
    return tuple(c - (i == source) + (i == target) for i, c in enumerate(counts))


def _last_used(counts: Counts) -> int:
    return max(i for i, count in enumerate(counts) if count)


# --- reading a plan -------------------------------------------------------------------------------


def holding(plan: Plan, index: int) -> Holding:
    """What member `index` owns."""
    for number, stage in enumerate(plan.stages):
        heads, mlp, vocab = (
            tuple(unit for unit, owner in enumerate(owners) if owner == index)
            for owners in _owners(stage)
        )
        if heads or mlp or vocab:
            return Holding(
                stage=number,
                span=Slice(stage.start, stage.end),
                head_units=heads,
                mlp_units=mlp,
                vocab_units=vocab,
            )
    return Holding(stage=None, span=Slice(0, 0), head_units=(), mlp_units=(), vocab_units=())


def stage_members(plan: Plan, stage: int) -> tuple[int, ...]:
    """Members that own anything of a stage, ascending: all of them need its hidden states."""
    return tuple(sorted({owner for owners in _owners(plan.stages[stage]) for owner in owners}))


def sender_of_hidden(plan: Plan, stage: int, receiver: int) -> int:
    """Who of the previous stage sends its hidden states to `receiver`, a member of `stage` >= 1.

    All have the same bits, so they share the work: the j-th receiver hears the (j mod n)-th of n.
    """
    senders = stage_members(plan, stage - 1)
    return senders[stage_members(plan, stage).index(receiver) % len(senders)]


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
    reached, placed = 0, set[int]()
    for number, stage in enumerate(plan.stages):
        if stage.start != reached or stage.end <= stage.start:
            raise RemoteProtocolError(
                f"stage {number} of a plan begins at layer {stage.start} and ends at {stage.end}; "
                f"it must begin at {reached} and not be empty"
            )
        reached = stage.end
        owners = _check_stage(plan, number)
        if owners & placed:
            raise RemoteProtocolError(f"members {sorted(owners & placed)} are in two stages")
        placed |= owners
    if reached != model.num_layers:
        raise RemoteProtocolError(f"a plan ends at layer {reached} of {model.num_layers}")


def _check_stage(plan: Plan, number: int) -> set[int]:
    """Check the owners and standbys of one stage; returns its owners."""
    stage = plan.stages[number]
    last = number == len(plan.stages) - 1
    standbys = (stage.head_standbys, stage.mlp_standbys, stage.vocab_standbys)
    for kind, owners, copies in zip(UnitKind, _owners(stage), standbys, strict=True):
        units = unit_count(plan.model, kind) if kind is not UnitKind.VOCAB or last else 0
        where = f"stage {number} of a plan"
        if len(owners) != units or len(copies) not in (0, units):
            raise RemoteProtocolError(
                f"{where} has {len(owners)} owners and {len(copies)} lists of standbys for "
                f"{units} {kind} units"
            )
        if not all(_may_hold(plan, i) for i in (*owners, *(i for c in copies for i in c))):
            raise RemoteProtocolError(f"{where} gives {kind} units to a witness or to nobody")
        if any(len(tree.cover(run, units)) > MAX_PARTS for run in _by_owner(owners)):
            raise RemoteProtocolError(f"{where} scatters {kind} units over too many subtrees")
    return {owner for owners in _owners(stage) for owner in owners}


def _owners(stage: Stage) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Owners by unit, in the order of `UnitKind`."""
    return stage.head_owners, stage.mlp_owners, stage.vocab_owners


def _by_owner(owners: Sequence[int]) -> list[list[int]]:
    return [[u for u, o in enumerate(owners) if o == owner] for owner in sorted(set(owners))]


def _may_hold(plan: Plan, index: int) -> bool:
    return 0 <= index < len(plan.members) and not plan.members[index].witness


def _distinct_below(indices: Sequence[int], size: int) -> bool:
    return len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)
