"""Who holds what: a plan made anew from members, model and layout.

Making a plan is deterministic and does not depend on the order of arrival. A layout is a list of
groups of members, one per stage: `heads` is one group of all, `layers` groups of one, `SxH` S
groups of H. Layers are shared out to the groups and units to the members of a group by weight
(largest remainder), then moved one by one to where there is memory for them. `core/units.py` says
what the units are, `core/replan.py` how a plan follows another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction

from p2pinfer.core.holdings import (
    Holding,
    holdings,
    sender_of_hidden,
    stage_members,
    validate,
)
from p2pinfer.core.shares import (
    MIN_KV_POSITIONS,
    Counts,
    Shares,
    apportion,
    held_bytes,
    largest_remainder,
    last_used,
    least_positions,
    moved,
    relieve,
    room_of,
    stage_loads,
)
from p2pinfer.errors import ClusterError, LocalProtocolError
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Member, ModelSpec, Plan, Stage

__all__ = [
    "MIN_KV_POSITIONS",
    "Holding",
    "PlacementError",
    "crew_size",
    "holdings",
    "make_plan",
    "may_own",
    "normal_layout",
    "ordered_members",
    "sender_of_hidden",
    "stage_members",
    "validate",
]


class PlacementError(ClusterError):
    """The members cannot hold the model; the message says what lacks.

    The code is `not_ready` (retryable: another member may come) or `invalid_request` (the layout).
    """


def normal_layout(layout: str) -> str:
    """The layout that `auto` stands for, or the layout itself."""
    return "heads" if layout == "auto" else layout


def crew_size(layout: str) -> int:
    """The most members that share one stage of a normal layout while none is lost."""
    if layout == "heads":
        return MAX_NODES
    return int(layout.partition("x")[2] or 1)


def may_own(member: Member) -> bool:
    """Whether a member may own units at all: no witness, and not of weight 0."""
    return member.weight > 0 and not member.witness


def ordered_members(members: Sequence[Member]) -> tuple[Member, ...]:
    """Members in the order of a plan: by name, then by node id."""
    return tuple(sorted(members, key=lambda m: (m.name, m.node_id)))


def make_plan(
    *,
    members: Sequence[Member],
    model: ModelSpec,
    layout: str,
    fence: Fence,
    cluster_id: str,
    leader_id: str,
    able: AbstractSet[str] | None = None,
) -> Plan:
    """The plan by which `members` hold `model`; witnesses and members of weight 0 own nothing.

    Where `able` is given, only the node ids in it may own anything. `layout` is `auto` (as
    `heads`), `heads`, `layers` or `SxH` (S stages of H members; the S x H of greatest weight hold
    the model, further ones nothing). All members are voters. Raises `PlacementError`, and
    `LocalProtocolError` when the leader is not a member.
    """
    ordered = ordered_members(members)
    ids = [member.node_id for member in ordered]
    if leader_id not in ids or len(ids) > MAX_NODES:
        raise LocalProtocolError(
            f"a plan has at most {MAX_NODES} members, not {len(ids)}, and the leader {leader_id} "
            f"is one of them"
        )
    layout = normal_layout(layout)
    owners = [
        i for i, m in enumerate(ordered) if may_own(m) and (able is None or m.node_id in able)
    ]
    groups, least = _groups(ordered, owners, layout, model)
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
    members: Sequence[Member], able: Sequence[int], layout: str, model: ModelSpec
) -> tuple[list[tuple[int, ...]], int]:
    """The members (by index) of each stage to be, and the least number of layers of a stage."""
    if not able:
        raise PlacementError(
            "not_ready",
            "no member can hold a part of the model: all are witnesses, have weight 0, or cannot "
            "hold units now; start a node with a model and a positive weight",
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


class _Placement:
    """Shares out layers to groups and units to their members, and minds everybody's memory."""

    def __init__(
        self, model: ModelSpec, members: Sequence[Member], groups: list[tuple[int, ...]]
    ) -> None:
        self._model = model
        self._members = members
        self._groups = groups
        self._weights = [[Fraction(members[i].weight) for i in group] for group in groups]
        self._rooms = [[room_of(members[i]) for i in group] for group in groups]
        self._known: dict[tuple[int, int, bool], Shares] = {}

    def layers(self, least: int) -> Counts:
        """Layers of each group: by weight, at least `least`, then to where there is memory."""
        counts = largest_remainder(self._model.num_layers, [sum(w) for w in self._weights])
        while min(counts) < least:
            counts = moved(counts, counts.index(max(counts)), counts.index(min(counts)))
        lacking = self._lacking(counts)
        while worst := max(lacking):
            source = lacking.index(worst)
            options = [
                moved(counts, source, target)
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
        last = last_used(layers)
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
        last = last_used(layers)
        return [
            self._shares(g, depth, g == last).lacking if depth else 0
            for g, depth in enumerate(layers)
        ]

    def _shares(self, group: int, depth: int, last: bool) -> Shares:
        key = (group, depth, last)
        if key not in self._known:
            loads = stage_loads(self._model, depth, last)
            weights, rooms = self._weights[group], self._rooms[group]
            counts: list[Counts] = []
            for load in loads:
                held = held_bytes(counts, loads, len(weights))
                counts.append(apportion(load.units, weights, held))
            self._known[key] = relieve(counts, loads, weights, rooms)
        return self._known[key]

    def _too_small(self, lacking: int) -> PlacementError:
        able = [self._members[i] for group in self._groups for i in group]
        whole = stage_loads(self._model, self._model.num_layers, True)
        need = sum((load.units - 1) * load.unit_bytes + load.last_bytes for load in whole)
        offers = ", ".join(
            f"{m.name} {m.memory_bytes}" if m.memory_bytes else f"{m.name} unlimited" for m in able
        )
        return PlacementError(
            "not_ready",
            f"{self._model.name} does not fit: {lacking} bytes of memory lack. Its weights and the "
            f"KV of one request of {least_positions(self._model)} positions need {need} bytes, in "
            f"whole units; offered are: {offers}. Add a node or let the nodes use more memory",
            retryable=True,
        )
