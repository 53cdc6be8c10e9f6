"""Who keeps a replica of each unit: its weights ready, and its KV up to date.

The first standby of a unit takes it over when its owner dies. So an owner's units are spread over
the others just as the shares would be fair without it. Standbys are chosen in the owner's numeric
class first, since only there the bits stay the same, and where there is memory for the weights and
the least KV of all that a member owns and keeps. Whoever has a unit's KV already, as its standby or
its owner before, is kept unless it would be given too much.

Where a model is cut into stages, members of the owner's own stage are chosen first, since they
compute together anyway; then others, those that own nothing before all, and no more of them than
share a stage: where a stage has one owner, one member keeps all of its units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction

import msgspec

from p2pinfer.core.holdings import Copies, Units, owners_of, standbys_of
from p2pinfer.core.planner import crew_size, may_own
from p2pinfer.core.room import Room
from p2pinfer.core.shares import Load, largest_remainder, least_kv_bytes, preferred, stage_loads
from p2pinfer.types import Member, Plan, UnitKind


def name_standbys(
    plan: Plan,
    *,
    able: AbstractSet[str],
    replicas: int,
    previous: Plan | None = None,
    positions: int = 0,
) -> Plan:
    """The plan with up to `replicas` standbys for each unit, in place of those that it names.

    Only members that may own units and whose node ids are in `able` are named, as all owners are.
    `previous` is the plan before, of the same model: its owners and standbys that still live have
    KV. Who keeps a unit has room for as many `positions` of KV: a request that is under way must
    not lose its place to replicas.
    """
    members = {
        i: member
        for i, member in enumerate(plan.members)
        if member.node_id in able and may_own(member)
    }
    namings = []
    load = _Load(members)
    for number, stage in enumerate(plan.stages):
        depth = stage.end - stage.start
        loads = stage_loads(plan.model, depth, number == len(plan.stages) - 1, positions)
        owners = [each for each in owners_of(stage) if each]
        kv = least_kv_bytes(plan.model, depth, positions)
        namings.append(_Naming(loads, owners, load, kv=kv, crew=crew_size(plan.layout)))
    stages = []
    for number, (stage, naming) in enumerate(zip(plan.stages, namings, strict=True)):
        named = naming.name(_warm(plan, number, previous), replicas)
        stages.append(
            msgspec.structs.replace(
                stage,
                head_standbys=named[0],
                mlp_standbys=named[1],
                vocab_standbys=named[2] if len(named) > 2 else (),
            )
        )
    return msgspec.structs.replace(plan, stages=tuple(stages))


def _warm(plan: Plan, number: int, previous: Plan | None) -> list[Copies]:
    """By kind and unit: who has its KV by the previous plan, the owner before first."""
    stage = plan.stages[number]
    nobody: list[Copies] = [((),) * len(owners) for owners in owners_of(stage)]
    if previous is None:
        return nobody
    now = {(m.node_id, m.boot_id): i for i, m in enumerate(plan.members)}
    index = [now.get((m.node_id, m.boot_id)) for m in previous.members]
    before = next(
        (s for s in previous.stages if (s.start, s.end) == (stage.start, stage.end)), None
    )
    if before is None:
        return nobody

    def there(members: Units) -> Units:
        return tuple(i for member in members if (i := index[member]) is not None)

    return [
        tuple(
            there((owner, *(copies[unit] if copies else ()))) for unit, owner in enumerate(owners)
        )
        for owners, copies in zip(owners_of(before), standbys_of(before), strict=True)
    ]


class _Load:
    """What each of some members owns and is named for, over all stages of a plan."""

    def __init__(self, members: Mapping[int, Member]) -> None:
        self.members = members
        self.weights = {i: Fraction(member.weight) for i, member in members.items()}
        self.groups: Counter[int] = Counter()
        """Stages of which each owns anything, and owners of a stage that it is named for."""
        self.idle = set(members)
        """Those that own nothing."""
        self.room = Room(members)


class _Naming:
    """The standbys of one stage, being named. Members are indices into the plan's members.

    `owners` are by kind and unit, and are counted in `load`. `kv` is the least KV of a head unit,
    `crew` how many members share a stage at most.
    """

    def __init__(
        self, loads: Sequence[Load], owners: Sequence[Units], load: _Load, *, kv: int, crew: int
    ) -> None:
        self._loads = loads
        self._owners = owners
        self._load = load
        self._members = load.members
        self._kv = [kv if each.kind is UnitKind.HEAD else 0 for each in loads]
        """By kind."""
        self._crew = crew
        self._mates = {i for each in owners for i in each}
        """The stage's owners. Where all may share one, whoever owns nothing is one of them."""
        assert self._members.keys() >= self._mates, "owners are able"
        self._tiers: dict[int, list[list[int]]] = {}
        for kind, each in enumerate(owners):
            for unit, owner in enumerate(each):
                load.room.own(owner, loads[kind].bytes_of(unit), self._kv[kind])
        load.groups.update(self._mates)
        load.idle -= self._mates
        if crew >= len(self._members):
            self._mates = set(self._members)

    def name(self, warm: Sequence[Copies], replicas: int) -> list[Copies]:
        """Standbys by kind and unit; empty where there are none at all."""
        owning = sorted({i for each in self._owners for i in each})
        self._tiers = {owner: self._ordered(owner, warm) for owner in owning}
        named = [
            self._name_kind(kind, each, warm[kind], replicas)
            for kind, each in enumerate(self._owners)
        ]
        self._load.groups.update(
            i
            for owner in owning
            for i in {
                i
                for owners, copies in zip(self._owners, named, strict=True)
                for each, standbys in zip(owners, copies, strict=False)
                if each == owner
                for i in standbys
            }
        )
        return named

    def _ordered(self, owner: int, warm: Sequence[Copies]) -> list[list[int]]:
        """Who may keep an owner's units, the best first: those of a group share them fairly.

        Members of the owner's numeric class come first; among such those of its stage, then as many
        others as may share a stage, and so on.
        """
        mine = self._members[owner].numeric_class
        groups = []
        for same in (True, False):
            others = [
                i
                for i in sorted(self._members)
                if i != owner and (self._members[i].numeric_class == mine) is same
            ]
            guests = self._guests(owner, [i for i in others if i not in self._mates], warm)
            groups.append([i for i in others if i in self._mates])
            groups += [guests[n : n + self._crew] for n in range(0, len(guests), self._crew)]
        return [group for group in groups if group]

    def _guests(self, owner: int, others: list[int], warm: Sequence[Copies]) -> list[int]:
        """Members that do not belong to the stage, the best standby for an owner first.

        Those come first that have room, then those that own nothing, then those that own and keep
        the least for their weight; of equal ones those that have KV already, and then in a circle
        from the owner on.
        """
        units = [
            (kind, unit)
            for kind, each in enumerate(self._owners)
            for unit, i in enumerate(each)
            if i == owner
        ]
        size = Fraction(sum(self._loads[kind].bytes_of(unit) for kind, unit in units), self._crew)
        kv = Fraction(sum(self._kv[kind] for kind, _ in units), self._crew)
        has = {i for kind, unit in units for i in warm[kind][unit]}
        load = self._load

        def rank(i: int) -> tuple[bool, bool, Fraction, bool, bool, int]:
            full = not load.room.has(i, owner, size, kv)
            groups = (load.groups[i] + 1) / load.weights[i]
            return full, i not in load.idle, groups, i not in has, i < owner, i

        return sorted(others, key=rank)

    def _name_kind(self, kind: int, owners: Units, warm: Copies, replicas: int) -> Copies:
        named: list[list[int]] = [[] for _ in owners]
        counts = {i: owners.count(i) for i in self._members}
        for owner in sorted(set(owners)):
            units = [unit for unit, i in enumerate(owners) if i == owner]
            given = dict(counts)
            for rank in range(replicas):
                self._name_next(kind, owner, units, named, given, warm=warm, first=not rank)
        return tuple(map(tuple, named)) if any(named) else ()

    def _name_next(
        self,
        kind: int,
        owner: int,
        units: Sequence[int],
        named: list[list[int]],
        given: dict[int, int],
        *,
        warm: Copies,
        first: bool,
    ) -> None:
        """Name one more standby for each of an owner's units.

        `given` counts what each would own if the owner were gone and the standbys named so far
        took its units.
        """
        times = Counter(i for each in named for i in each)
        missing = self._missing(owner, given, times, len(units))
        chosen: dict[int, int] = {}

        def choose(unit: int, i: int) -> None:
            chosen[unit] = i
            named[unit].append(i)
            given[i] += 1
            missing[i] -= 1
            times[i] += 1
            self._load.room.keep(i, owner, self._loads[kind].bytes_of(unit), self._kv[kind])

        for unit in units:
            fit = self._fit(kind, owner, unit, named[unit])
            has = [i for i in warm[unit] if i in fit and (missing[i] > 0 or not first)]
            if has:
                choose(unit, has[0])
        before: int | None = None
        for unit in units:
            fit = self._fit(kind, owner, unit, named[unit]) if unit not in chosen else []
            if fit:
                loads = {i: (given[i] + 1) / self._load.weights[i] for i in fit}
                before = preferred(fit, missing, loads, {before}, times)
                choose(unit, before)

    def _missing(
        self, owner: int, given: Mapping[int, int], named: Mapping[int, int], count: int
    ) -> dict[int, int]:
        """How many of an owner's `count` units each should take for the shares to stay fair, in
        each group of those that may.

        The odd ones go to those that are named least so far, then in a circle from the owner on.
        """
        missing: dict[int, int] = {}
        for group in self._tiers[owner]:
            shares = largest_remainder(
                sum(given[i] for i in group) + count,
                [self._load.weights[i] for i in group],
                [(-given[i], named.get(i, 0), i < owner, i) for i in group],
            )
            missing |= {i: share - given[i] for i, share in zip(group, shares, strict=True)}
        return missing

    def _fit(self, kind: int, owner: int, unit: int, named: Sequence[int]) -> list[int]:
        """Who may be the unit's next standby, of the first group in which there is anybody."""
        size, kv, room = self._loads[kind].bytes_of(unit), self._kv[kind], self._load.room
        for group in self._tiers[owner]:
            fit = [i for i in group if i not in named and room.has(i, owner, size, kv)]
            if fit:
                return fit
        return []
