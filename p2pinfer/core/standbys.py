"""Who keeps a replica of each unit: its weights ready, and its KV up to date.

The first standby of a unit takes it over when its owner dies. So an owner's units are spread over
the others just as the shares would be fair without it. Standbys are chosen in the owner's numeric
class first, since only there the bits stay the same, and where there is memory for the weights and
the least KV of all that a member owns and keeps. Whoever has a unit's KV already, as its standby or
its owner before, is kept unless it would be given too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction
from math import inf

import msgspec

from p2pinfer.core.holdings import Copies, Units, owners_of, stage_members, standbys_of
from p2pinfer.core.planner import may_own
from p2pinfer.core.shares import (
    Load,
    largest_remainder,
    least_kv_bytes,
    preferred,
    room_of,
    stage_loads,
)
from p2pinfer.types import Member, Plan, UnitKind


def name_standbys(
    plan: Plan, *, able: AbstractSet[str], replicas: int, previous: Plan | None = None
) -> Plan:
    """The plan with up to `replicas` standbys for each unit, in place of those that it names.

    They are members of the unit's stage, in a plan of one stage all that may own units; only node
    ids in `able`, as all owners are. `previous` is the plan before, of the same model: its owners
    and standbys that still live have KV.
    """
    stages = []
    for number, stage in enumerate(plan.stages):
        alone = len(plan.stages) == 1
        among = range(len(plan.members)) if alone else stage_members(plan, number)
        members = {
            i: member
            for i in among
            if (member := plan.members[i]).node_id in able and may_own(member)
        }
        last = number == len(plan.stages) - 1
        depth = stage.end - stage.start
        kv = least_kv_bytes(plan.model, depth)
        naming = _Naming(stage_loads(plan.model, depth, last), members, kv)
        owners = [each for each in owners_of(stage) if each]
        naming.own(owners)
        warm = _warm(plan, number, previous)
        named = [naming.name(kind, each, warm[kind], replicas) for kind, each in enumerate(owners)]
        stages.append(
            msgspec.structs.replace(
                stage,
                head_standbys=named[0],
                mlp_standbys=named[1],
                vocab_standbys=named[2] if last else (),
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


class _Naming:
    """The standbys of one stage, being named. Members are indices into the plan's members."""

    def __init__(self, loads: Sequence[Load], members: Mapping[int, Member], kv: int) -> None:
        self._loads = loads
        self._members = members
        self._kv = [kv if load.kind is UnitKind.HEAD else 0 for load in loads]
        """By kind: the least KV of a unit."""
        self._weights = {i: Fraction(member.weight) for i, member in members.items()}
        self._held = dict.fromkeys(members, 0)
        """Bytes of what each owns and is named for, the least KV of it included."""
        self._kv_held = dict.fromkeys(members, 0)
        """That KV alone."""

    def own(self, owners: Sequence[Units]) -> None:
        """Note what is owned: it comes first in everybody's memory."""
        assert self._members.keys() >= {i for each in owners for i in each}, "owners are able"
        for kind, each in enumerate(owners):
            for unit, owner in enumerate(each):
                self._hold(kind, unit, owner)

    def _hold(self, kind: int, unit: int, member: int) -> None:
        self._held[member] += self._loads[kind].bytes_of(unit)
        self._kv_held[member] += self._kv[kind]

    def name(self, kind: int, owners: Units, warm: Copies, replicas: int) -> Copies:
        """Standbys by unit of one kind; empty where there are none at all."""
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
            self._hold(kind, unit, i)

        for unit in units:
            fit = self._fit(kind, owner, unit, named[unit])
            has = [i for i in warm[unit] if i in fit and (missing[i] > 0 or not first)]
            if has:
                choose(unit, has[0])
        before: int | None = None
        for unit in units:
            fit = self._fit(kind, owner, unit, named[unit]) if unit not in chosen else []
            if fit:
                loads = {i: (given[i] + 1) / self._weights[i] for i in fit}
                before = preferred(fit, missing, loads, {before}, times)
                choose(unit, before)

    def _missing(
        self, owner: int, given: Mapping[int, int], named: Mapping[int, int], count: int
    ) -> dict[int, int]:
        """How many of an owner's `count` units each should take for the shares to stay fair.

        The odd ones go to those that are named least so far, then in a circle from the owner on.
        """
        mine = self._members[owner].numeric_class
        others = [i for i in sorted(self._members) if i != owner]
        pool = [i for i in others if self._members[i].numeric_class == mine] or others
        missing = dict.fromkeys(others, 0)
        if pool:
            shares = largest_remainder(
                sum(given[i] for i in pool) + count,
                [self._weights[i] for i in pool],
                [(-given[i], named[i], i < owner, i) for i in pool],
            )
            missing |= {i: share - given[i] for i, share in zip(pool, shares, strict=True)}
        return missing

    def _fit(self, kind: int, owner: int, unit: int, named: Sequence[int]) -> list[int]:
        """Who may be the unit's next standby: of the owner's class, if there is anybody."""
        size, kv = self._loads[kind].bytes_of(unit), self._kv[kind]
        fit = [
            i
            for i, member in self._members.items()
            if i not in (owner, *named)
            and self._held[i] + size <= room_of(member)
            and (not kv or self._kv_held[i] + kv <= (member.kv_bytes or inf))
        ]
        mine = self._members[owner].numeric_class
        return [i for i in fit if self._members[i].numeric_class == mine] or fit
