"""Moves by stages: who is to own a unit is first its standby, and takes over once it is ready.

A plan made for new members, or without those that are to rest, is a goal. Where a unit's owner goes
on computing and the one that is to own it is not ready, the owner stays for now, and the other is
named as a standby of the unit: it loads the weights and gets the KV while replies go on. When it is
ready the leader proposes again, and it is promoted; the owner before stays a standby. Replicas are
given up only by a later plan, once those that take their place are complete. Until then these are
named first: if the owner dies, nobody takes over who has yet to get ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from math import inf
from typing import NamedTuple

import msgspec

from p2pinfer.core.holdings import Copies, Units, fits_on_the_wire, owners_of, standbys_of
from p2pinfer.core.room import Room
from p2pinfer.core.shares import least_kv_bytes, stage_loads
from p2pinfer.types import Plan, Stage, UnitKind


class Standing(NamedTuple):
    """How far the members are that live and can compute; sets of node ids.

    `here` may go on owning what they own; of these `resting` own nothing as soon as others are
    ready, and keep what they have ready meanwhile. `ready` are those that have all that the
    previous plan makes them keep for others.
    """

    here: AbstractSet[str]
    resting: AbstractSet[str]
    ready: AbstractSet[str]


class Staged(NamedTuple):
    """The next plan towards a goal. `moving`: it is not there yet."""

    plan: Plan
    moving: bool


def staged(previous: Plan, goal: Plan, standing: Standing, positions: int = 0) -> Staged:
    """The plan to propose on the way from `previous` to `goal`; who keeps a unit on the way has
    room for a request of so many `positions`.

    It is the goal itself where a stage has other layers than before, or where memory, or what one
    frame may carry, does not allow to go there by stages.
    """
    if not _same_spans(previous, goal):
        return Staged(goal, moving=False)
    way = _Way(previous, goal, standing, positions)
    stages = way.stages()
    if stages and all(fits_on_the_wire(owners) for each in stages for owners in owners_of(each)):
        return Staged(msgspec.structs.replace(goal, stages=stages), moving=way.moving)
    return Staged(goal, moving=False)


class Progress(NamedTuple):
    """Why a plan is worth an epoch; empty: it is not. `trims`: it only gives replicas up; `frees`:
    somebody that leaves has nothing left by that."""

    why: str = ""
    trims: bool = False
    frees: bool = False


def progress(before: Plan, after: Plan, leaving: AbstractSet[str] = frozenset()) -> Progress:
    """Whether by the plan `after` members that were standbys take over, or replicas are given up,
    with none that are new. `leaving` are node ids."""
    if not _same_spans(before, after):
        return Progress()
    old = [owner for stage in before.stages for owners in owners_of(stage) for owner in owners]
    new = [owner for stage in after.stages for owners in owners_of(stage) for owner in owners]
    lives = [[(m.node_id, m.boot_id) for m in plan.members] for plan in (before, after)]
    heirs = {i for o, i in zip(old, new, strict=True) if lives[0][o] != lives[1][i]}
    if heirs:
        names = ", ".join(after.members[i].name for i in sorted(heirs))
        return Progress(f"{names} ready to take over")
    had, has = _holders(before), _holders(after)
    fewer = had != has and all(a >= b for a, b in zip(had, has, strict=True))
    if not fewer:
        return Progress()
    freed = frozenset[str]().union(*had) - frozenset[str]().union(*has)
    return Progress("replicas are complete", trims=True, frees=not freed.isdisjoint(leaving))


class Steps:
    """What the leader has found out of its next step towards a goal: making a plan takes time, so
    it is made again only when what it goes by has changed. Times in seconds."""

    def __init__(self) -> None:
        self.deadline = inf
        """When to look again."""
        self._key: object = None
        self._found = Progress()

    def look(
        self,
        key: object,
        find: Callable[[], Progress],
        *,
        earliest: float,
        trims_from: float,
        now: float,
    ) -> str:
        """Why to propose now, by `find`; nothing before `earliest`: those that are ready at about
        the same time take over together. Nothing is only given up before `trims_from`, but for who
        leaves: each of these plans costs a pause, and that member goes by the last of them."""
        self.deadline = earliest if now < earliest else inf
        if now < earliest:
            return ""
        if key != self._key:
            self._key, self._found = key, find()
        if self._found.trims and not self._found.frees and now < trims_from:
            self.deadline = trims_from
            return ""
        return self._found.why


def _same_spans(one: Plan, other: Plan) -> bool:
    spans = [[(stage.start, stage.end) for stage in plan.stages] for plan in (one, other)]
    return spans[0] == spans[1]


def _holders(plan: Plan) -> list[frozenset[str]]:
    """By unit the node ids of those that have it: its owner and its standbys."""
    return [
        frozenset(plan.members[i].node_id for i in (owner, *(copies[unit] if copies else ())))
        for stage in plan.stages
        for owners, copies in zip(owners_of(stage), standbys_of(stage), strict=True)
        for unit, owner in enumerate(owners)
    ]


class _Unit(NamedTuple):
    """One unit on its way: who owns it next, and who keeps it, the most important ones first."""

    owner: int
    names: tuple[Units, Units, Units]
    """Who is to own it and does not yet; the standbys of the goal; those that have it, and keep it
    until all of these have it too. The first ones are the first to get what memory there is."""
    have: frozenset[int]
    """Who could take it over at once: these are named first."""


_Place = tuple[int, int, int]
"""Stage, kind and number of a unit."""


class _Way:
    """From one plan to a goal of the same stages; members are indices into the goal's."""

    def __init__(self, previous: Plan, goal: Plan, standing: Standing, positions: int) -> None:
        self._needs = _Needs(goal, positions)
        self.moving = False
        """A later plan is to change something, once others are ready."""
        self._previous = previous
        self._goal = goal
        lives = {(m.node_id, m.boot_id): i for i, m in enumerate(goal.members)}
        self._now = [
            lives.get((m.node_id, m.boot_id)) if m.node_id in standing.here else None
            for m in previous.members
        ]
        ids = [member.node_id for member in goal.members]
        self._ready = {i for i, node_id in enumerate(ids) if node_id in standing.ready}
        self._rests = {i for i, node_id in enumerate(ids) if node_id in standing.resting}
        self._unready = self._waiting()

    def _waiting(self) -> set[int]:
        """Members that cannot take over all that they are to: so they take over nothing yet."""
        found = set()
        for number in range(len(self._goal.stages)):
            for kind in range(3):
                for unit, new in enumerate(owners_of(self._goal.stages[number])[kind]):
                    old, kept = self._holders(number, kind, unit)
                    if old not in (None, new) and not (new in kept and new in self._ready):
                        found.add(new)
        return found

    def _holders(self, number: int, kind: int, unit: int) -> tuple[int | None, Units]:
        """Who goes on with a unit, and who kept it, of those that are still here: its owner or,
        where that is lost, a standby that is ready, better one that does not rest; where none is
        known to be, the one that was named first."""
        stage = self._previous.stages[number]
        copies = standbys_of(stage)[kind]
        kept = [i for m in (copies[unit] if copies else ()) if (i := self._now[m]) is not None]
        old = self._now[owners_of(stage)[kind][unit]]
        if old is None:
            ready = sorted((i for i in kept if i in self._ready), key=self._rests.__contains__)
            old = next(iter((*ready, *kept)), None)
        return old, tuple(kept)

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the plan to propose; none where there is no memory to go by stages."""
        units = [
            [
                [self._unit(number, kind, unit) for unit in range(len(owners))]
                for kind, owners in enumerate(owners_of(stage))
            ]
            for number, stage in enumerate(self._goal.stages)
        ]
        copies = self._named(units)
        return tuple(
            self._stage(number, kinds, copies[number])
            for number, kinds in enumerate(units if copies else ())
        )

    def _stage(
        self, number: int, kinds: Sequence[Sequence[_Unit]], copies: Sequence[Copies]
    ) -> Stage:
        goal = self._goal.stages[number]
        self.moving |= any(
            each.owner != new or not self._rests.issuperset({*have} - {new, *each.names[1]})
            for kind, units in enumerate(kinds)
            for each, new, have in zip(
                units, owners_of(goal)[kind], copies[kind] or ((),) * len(units), strict=True
            )
        )
        return msgspec.structs.replace(
            goal,
            head_owners=tuple(unit.owner for unit in kinds[0]),
            mlp_owners=tuple(unit.owner for unit in kinds[1]),
            vocab_owners=tuple(unit.owner for unit in kinds[2]),
            head_standbys=copies[0],
            mlp_standbys=copies[1],
            vocab_standbys=copies[2],
        )

    def _unit(self, number: int, kind: int, unit: int) -> _Unit:
        stage = self._goal.stages[number]
        new, named = owners_of(stage)[kind][unit], standbys_of(stage)[kind]
        old, kept = self._holders(number, kind, unit)
        owner = new if old is None or new not in self._unready else old
        wanted = tuple(i for i in (named[unit] if named else ()) if i != owner)
        before = tuple(i for i in (old, *kept) if i is not None)
        have = frozenset(i for i in before if i == old or i in self._ready)
        # Who gives a unit away keeps it until a later plan: what it still owns of the part that the
        # unit is in need not be loaded anew while replies wait.
        complete = old == new and have.issuperset(wanted)
        spare = tuple(i for i in before if not complete or i in self._rests)
        return _Unit(owner, ((new,) if owner != new else (), wanted, spare), have)

    def _named(self, units: Sequence[Sequence[Sequence[_Unit]]]) -> list[list[Copies]]:
        """Standbys by stage, kind and unit, as far as there is memory; empty: not even for the
        heirs."""
        room, needs = Room(dict(enumerate(self._goal.members))), self._needs
        for place, each in _every(units):
            room.own(each.owner, *needs.of(place))
        names: dict[_Place, list[int]] = {place: [] for place, _ in _every(units)}
        for rank in range(3):
            for place, each in _every(units):
                for member in each.names[rank]:
                    if member == each.owner or member in names[place]:
                        continue
                    if room.has(member, each.owner, *needs.of(place)):
                        room.keep(member, each.owner, *needs.of(place))
                        names[place].append(member)
                    elif not rank:
                        return []
        for place, each in _every(units):
            names[place].sort(key=lambda i, have=each.have: i not in have)  # type: ignore[misc]
        return [
            [
                _copies([names[number, kind, unit] for unit in range(len(of_kind))])
                for kind, of_kind in enumerate(kinds)
            ]
            for number, kinds in enumerate(units)
        ]


def _every(units: Sequence[Sequence[Sequence[_Unit]]]) -> Iterator[tuple[_Place, _Unit]]:
    for number, kinds in enumerate(units):
        for kind, of_kind in enumerate(kinds):
            for unit, each in enumerate(of_kind):
                yield (number, kind, unit), each


def _copies(names: Sequence[Sequence[int]]) -> Copies:
    return tuple(map(tuple, names)) if any(names) else ()


class _Needs:
    """What the units of a plan take of the memory of who has them."""

    def __init__(self, plan: Plan, positions: int) -> None:
        model, last = plan.model, len(plan.stages) - 1
        depths = [stage.end - stage.start for stage in plan.stages]
        self._loads = [stage_loads(model, d, n == last, positions) for n, d in enumerate(depths)]
        self._kv = [least_kv_bytes(model, depth, positions) for depth in depths]

    def of(self, place: _Place) -> tuple[int, int]:
        """Bytes of a unit's weights with the least KV, and of this alone."""
        number, kind, unit = place
        load = self._loads[number][kind]
        return load.bytes_of(unit), self._kv[number] if load.kind is UnitKind.HEAD else 0
