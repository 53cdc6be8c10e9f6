"""The plan that follows another, with the least movement.

What stays where it was keeps its KV cache and its loaded weights. So owners that live on keep what
they own; a lost owner's units go to their standbys, which have the KV, and only where there are
none to whoever has the least for its weight. Only newcomers make others give something away, and
then as little as makes the shares right. Where that cannot be (a stage has lost everybody and all
standbys, or the memory does not reach), the plan is made anew.

A member that owns units of several stages, since it was a standby for one that has lost everybody,
belongs to one of them and is a guest in the others: there newcomers take its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from p2pinfer.core.holdings import Units, owners_of, stage_members, standbys_of
from p2pinfer.core.movement import StageMove
from p2pinfer.core.planner import (
    PlacementError,
    crew_size,
    make_plan,
    may_own,
    normal_layout,
    ordered_members,
)
from p2pinfer.core.shares import Load, stage_loads
from p2pinfer.core.standbys import name_standbys
from p2pinfer.errors import LocalProtocolError
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Member, ModelSpec, Plan, Stage


def next_plan(
    *,
    previous: Plan | None,
    members: Sequence[Member],
    able: AbstractSet[str],
    model: ModelSpec,
    layout: str,
    fence: Fence,
    cluster_id: str,
    leader_id: str,
    voters: Sequence[str],
    old_voters: Sequence[str] = (),
    quorum: str = "majority",
    layout_auto: bool = False,
    use_nodes: str = "all",
    replicas: int = 0,
    rebalance: bool = True,
    ready: AbstractSet[str] = frozenset(),
    positions: int = 0,
) -> Plan:
    """The plan of `fence` by which those of `members` whose node ids are in `able` hold `model`.

    All `members` are listed, whether they own anything or not; a member that is there in another
    boot than in the `previous` plan has lost what it held. `voters` and `old_voters` are node ids,
    the former of members. `replicas` standbys are named for each unit, as far as there are members
    and memory. Without `rebalance` members that own nothing get units only of those that are lost.
    Standbys have room for a request of so many `positions`; those in `ready` (node ids) come first.
    Raises `PlacementError` when the model does not fit, and `LocalProtocolError` when leader or
    voters are not members.
    """
    ordered = ordered_members(members)
    index = {member.node_id: i for i, member in enumerate(ordered)}
    _check_named(index, leader_id, voters)
    layout = normal_layout(layout)
    if previous is not None and not _same(previous.model, model):
        previous = None

    def anew() -> tuple[Stage, ...]:
        return make_plan(
            members=ordered,
            model=model,
            layout=layout,
            fence=fence,
            cluster_id=cluster_id,
            leader_id=leader_id,
            able=able,
        ).stages

    stages: tuple[Stage, ...] | None = None
    if previous is not None and previous.layout == layout:
        owners = {i: m for i, m in enumerate(ordered) if may_own(m) and m.node_id in able}
        follower = _Follower(previous, ordered, owners, ready)
        stages = follower.stages(rebalance)
        if stages is not None and layout == "layers" and rebalance:
            stages = _with_more_stages(stages, owners, anew)
    plan = Plan(
        fence=fence,
        cluster_id=cluster_id,
        leader=index[leader_id],
        members=ordered,
        voters=tuple(sorted(index[node_id] for node_id in voters)),
        old_voters=tuple(sorted(old_voters)),
        quorum=quorum,
        model=model,
        stages=anew() if stages is None else stages,
        layout=layout,
        layout_auto=layout_auto,
        use_nodes=use_nodes,
    )
    return name_standbys(plan, able=able, replicas=replicas, previous=previous, positions=positions)


def _check_named(index: Mapping[str, int], leader_id: str, voters: Sequence[str]) -> None:
    if not index.keys() >= {leader_id, *voters} or len(index) > MAX_NODES:
        raise LocalProtocolError(
            f"leader {leader_id} and voters {sorted(voters)} of a plan are among its members, of "
            f"which there are at most {MAX_NODES}"
        )


def _same(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether units of one are units of the other: nodes may call a model by different names."""
    return msgspec.structs.replace(one, name="") == msgspec.structs.replace(other, name="")


def _with_more_stages(
    stages: tuple[Stage, ...],
    members: Mapping[int, Member],
    anew: Callable[[], tuple[Stage, ...]],
) -> tuple[Stage, ...]:
    """In layout `layers` a newcomer can only get a stage of its own, in a plan made anew.

    That is not worth it where it would only take the place of members of as much weight.
    """
    before = _owners(stages)
    if not members.keys() - before:
        return stages
    try:
        fresh = anew()
    except PlacementError:
        return stages
    after = _owners(fresh)
    gained = sum(members[i].weight for i in after - before)
    return fresh if gained > sum(members[i].weight for i in before - after) else stages


def _owners(stages: Iterable[Stage]) -> set[int]:
    return {owner for stage in stages for owners in owners_of(stage) for owner in owners}


class _Follower:
    """Brings the stages of a plan to the members that are there now.

    `members` and `owners` are those of the plan to be, the latter those that may own units, by
    index; `_homes` says to which stage a member belonged before, in whichever boot: that of which
    it owned the most bytes.
    """

    def __init__(
        self,
        previous: Plan,
        members: Sequence[Member],
        owners: Mapping[int, Member],
        ready: AbstractSet[str] = frozenset(),
    ) -> None:
        self._previous = previous
        self._ready = frozenset(i for i, member in owners.items() if member.node_id in ready)
        self._owners = owners
        now = {member.node_id: i for i, member in enumerate(members) if i in owners}
        self._now = [now.get(member.node_id) for member in previous.members]
        """Where a member of before is now; None if it is gone, or may own nothing."""
        self._alive = [
            i if i is not None and members[i].boot_id == member.boot_id else None
            for i, member in zip(self._now, previous.members, strict=True)
        ]
        """The same, None also for one that started again since: what it held is lost."""
        last = len(previous.stages) - 1
        self._loads = [
            stage_loads(previous.model, stage.end - stage.start, number == last)
            for number, stage in enumerate(previous.stages)
        ]
        held = [
            _bytes(loads, owners_of(stage))
            for loads, stage in zip(self._loads, previous.stages, strict=True)
        ]
        self._home_before = {
            before: max(range(last + 1), key=lambda n: held[n][before])
            for before in sorted({i for each in held for i in each})
        }
        self._homes = {
            i: number
            for before, number in self._home_before.items()
            if (i := self._now[before]) is not None
        }
        self._held: list[Mapping[int, int]] = [
            {i: n for before, n in each.items() if (i := self._alive[before]) is not None}
            for each in held
        ]
        """Bytes that each owns by stage: of before, as far as it is there, or of the plan to be."""

    def stages(self, rebalance: bool) -> tuple[Stage, ...] | None:
        """The stages; None where they cannot be kept."""
        crews = self._crews()
        stages = []
        for number, before in enumerate(self._previous.stages):
            owners = self._moved(number, crews[number], rebalance)
            if owners is None:
                return None
            stages.append(
                Stage(
                    start=before.start,
                    end=before.end,
                    head_owners=owners[0],
                    mlp_owners=owners[1],
                    vocab_owners=owners[2] if len(owners) > 2 else (),
                )
            )
        return tuple(stages)

    def _crews(self) -> list[list[int]]:
        """Who is to share each stage: its owners that are left, and others to fill its ranks.

        The heaviest go first, to the stage with the fewest owners.
        """
        crews: list[list[int]] = [[] for _ in self._previous.stages]
        for i, number in self._homes.items():
            crews[number].append(i)
        most = crew_size(self._previous.layout)
        free = [i for i in self._owners if i not in self._homes]
        for i in sorted(free, key=lambda i: (-self._owners[i].weight, i)):
            crew = min(crews, key=len)
            if len(crew) < most:
                crew.append(i)
        return crews

    def _moved(self, number: int, crew: Sequence[int], rebalance: bool) -> list[Units] | None:
        stage, loads = self._previous.stages[number], self._loads[number]
        before = owners_of(stage)[: len(loads)]
        guests = {self._now[i] for i in stage_members(self._previous, number)} | {
            self._alive[i] for each in standbys_of(stage) for copies in each for i in copies
        }
        move = StageMove(
            loads,
            {i: self._owners[i] for i in {*crew, *guests} if i is not None},
            [[self._alive[i] for i in each] for each in before],
            crew=crew,
            elsewhere=self._elsewhere(number),
        )
        for kind, copies in enumerate(standbys_of(stage)[: len(loads)]):
            named = [[self._alive[member] for member in each] for each in copies]
            move.promote(kind, named, self._ready)
        for kind, each in enumerate(before):
            move.restore(kind, [self._now[i] for i in each])
        if not move.has_owners:
            return None
        for kind in range(len(loads)):
            move.spread(kind)
        shares = None
        full = not move.holds()
        if full or rebalance:
            hungry = self._newcomers(number, crew, move.owners)
            shares = move.fair_shares() if full or hungry else None
            wanted = any(each[i] for each in shares or () for i in hungry)
            if shares and (full or wanted or move.has_guests):
                move.bring_to(shares)
        self._held[number] = move.held
        return move.owners if move.holds() else None

    def _elsewhere(self, number: int) -> Counter[int]:
        """Bytes that each owns of the other stages."""
        held = Counter[int]()
        for other, each in enumerate(self._held):
            if other != number:
                held.update(each)
        return held

    def _newcomers(self, number: int, crew: Sequence[int], owners: Sequence[Units]) -> list[int]:
        """Those of a crew that should own more than they do, since they own no share of before.

        A member that was there and owned nothing is none, if the units were just too few: a plan
        for another reason must not move anything. If they were enough, it was unable to own them.
        """
        previous = self._previous
        seen = {i for i in self._alive if i is not None}
        weights = [previous.members[i].weight for i, n in self._home_before.items() if n == number]
        most = max(map(len, owners))
        found = []
        for i in crew:
            if i in seen and i not in self._homes:
                weight = self._owners[i].weight
                if (
                    len(weights) >= crew_size(previous.layout)
                    or most * weight < sum(weights) + weight
                ):
                    continue
            elif i in seen or self._restored(number, i, owners):
                continue
            found.append(i)
        return found

    def _restored(self, number: int, member: int, owners: Sequence[Units]) -> bool:
        """Whether a member that started again owns all that it owned in the boot before."""
        if self._homes.get(member) != number:
            return False
        before = owners_of(self._previous.stages[number])
        return all(
            i == member
            for kind, each in enumerate(owners)
            for i, old in zip(each, before[kind], strict=True)
            if self._now[old] == member
        )


def _bytes(loads: Sequence[Load], owners: Sequence[Units]) -> Counter[int]:
    """Bytes of a stage that each owner has."""
    held = Counter[int]()
    for load, each in zip(loads, owners, strict=False):
        for unit, owner in enumerate(each):
            held[owner] += load.bytes_of(unit)
    return held
