"""The units of one stage on their way from one plan to the next.

Members are indices into the new plan's members. Kinds are in the order of `UnitKind`, by their
place in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction

from p2pinfer.core import tree
from p2pinfer.core.holdings import Units, fits_on_the_wire
from p2pinfer.core.shares import Load, largest_remainder, preferred, relieve, room_of
from p2pinfer.types import Member

Owner = int | None
"""A member, or None where the unit has lost its owner."""


class StageMove:
    """Who owns which unit of a stage, being changed; `members` are those that may own any.

    The stage is to be shared by its `crew`, those of them that belong to it; where there are none,
    by all. `elsewhere` is what members own in other stages, in bytes.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        members: Mapping[int, Member],
        owners: Sequence[Sequence[Owner]],
        *,
        crew: Sequence[int],
        elsewhere: Mapping[int, int],
    ) -> None:
        self._loads = loads
        self._order = sorted(members)
        self._crew = sorted(crew) or self._order
        self._weights = {i: Fraction(members[i].weight) for i in self._order}
        self._rooms = {i: room_of(members[i]) - elsewhere.get(i, 0) for i in self._order}
        self._owners = [list(each) for each in owners]
        self._counts = [{i: each.count(i) for i in self._order} for each in self._owners]
        self._warm: list[list[set[int]]] = [[set() for _ in each] for each in owners]
        """Standbys by kind and unit."""
        self._held = dict.fromkeys(self._order, 0)
        for load, each in zip(loads, self._owners, strict=True):
            for unit, owner in enumerate(each):
                if owner is not None:
                    self._held[owner] += load.bytes_of(unit)

    @property
    def owners(self) -> list[Units]:
        """Owners by kind and unit; all lost units must have been placed."""
        return [tuple(i for i in each if i is not None) for each in self._owners]

    @property
    def held(self) -> Mapping[int, int]:
        """Bytes of what each owns of the stage, the least KV included."""
        return self._held

    @property
    def has_owners(self) -> bool:
        """Whether anybody owns anything yet."""
        return any(any(counts.values()) for counts in self._counts)

    @property
    def has_guests(self) -> bool:
        """Whether anybody owns anything who does not belong to the stage."""
        return any(counts[i] for counts in self._counts for i in self._order if i not in self._crew)

    def holds(self) -> bool:
        """Whether everybody has memory for what it owns, and few enough subtrees to send."""
        return all(self._held[i] <= self._rooms[i] for i in self._order) and all(
            fits_on_the_wire(each) for each in self.owners
        )

    def promote(
        self, kind: int, standbys: Sequence[Sequence[Owner]], ready: AbstractSet[int] = frozenset()
    ) -> None:
        """Give lost units to their standbys; None among these is one that is gone itself.

        Those that are known to be `ready` come first. The one named first was chosen so that the
        shares stay even; if it is gone, the standby with the greatest claim takes its place.
        """
        missing = self._missing(kind)
        for unit, named in enumerate(standbys):
            self._warm[kind][unit].update(i for i in named if i is not None)
            there = [i for i in named if i is not None and self._room(kind, unit, i)]
            there = [i for i in there if i in ready] or there
            if self._owners[kind][unit] is None and there:
                chosen = there[0] if there[0] == named[0] else self._best(kind, missing, there)
                self._give(kind, unit, chosen)
                missing[chosen] -= 1

    def restore(self, kind: int, owners: Sequence[Owner]) -> None:
        """Give lost units to those that owned them in another boot, and will load them again."""
        for unit, owner in enumerate(owners):
            if self._owners[kind][unit] is None and owner is not None:
                self._give(kind, unit, owner)

    def spread(self, kind: int) -> None:
        """Give what is still lost to whoever misses most of its share, where there is room."""
        missing = self._missing(kind)
        owners = self._owners[kind]
        for unit, owner in enumerate(owners):
            if owner is None:
                near = {owners[u] for u in (unit - 1, unit + 1) if 0 <= u < len(owners)}
                roomy = [i for i in self._order if self._room(kind, unit, i)]
                chosen = self._best(kind, missing, roomy or self._order, near)
                self._give(kind, unit, chosen)
                missing[chosen] -= 1

    def fair_shares(self) -> list[dict[int, int]] | None:
        """Units of each kind by weight and memory; None where there is too little memory.

        Odd units are for those that have them.
        """
        counts = [tuple(self._targets(kind).values()) for kind in range(len(self._loads))]
        # The last unit may be with anybody here, so it counts as a whole one.
        loads = [load._replace(last_bytes=load.unit_bytes) for load in self._loads]
        rooms = [self._rooms[i] for i in self._order]
        shares = relieve(counts, loads, [self._weights[i] for i in self._order], rooms)
        if shares.lacking:
            return None
        return [dict(zip(self._order, each, strict=True)) for each in shares.counts]

    def bring_to(self, shares: Sequence[Mapping[int, int]]) -> None:
        """Move the fewest units that make the shares so, in as few runs as may be."""
        for kind, wanted in enumerate(shares):
            counts = self._counts[kind]
            for receiver in self._order:
                while (need := wanted[receiver] - counts[receiver]) > 0:
                    excess = {i: counts[i] - wanted[i] for i in self._order}
                    donor = max(self._order, key=lambda i: (excess[i], -i))
                    for unit in self._choice(kind, donor, receiver, min(need, excess[donor])):
                        self._give(kind, unit, receiver)

    def _choice(self, kind: int, donor: int, receiver: int, count: int) -> list[int]:
        """Which of a donor's units to give: first those that the receiver is a standby of."""
        own = [unit for unit, owner in enumerate(self._owners[kind]) if owner == donor]
        warm = [unit for unit in own if receiver in self._warm[kind][unit]]
        if len(warm) >= count:
            return self._window(kind, warm, receiver, count)
        rest = [unit for unit in own if unit not in warm]
        return warm + self._window(kind, rest, receiver, count - len(warm))

    def _window(self, kind: int, own: Sequence[int], receiver: int, count: int) -> list[int]:
        """Which of a donor's units to give so that both are left with the fewest subtrees.

        They are neighbours in its list: at its beginning, its end, or where a run of it does.
        """
        owners = self._owners[kind]
        size = len(owners)
        there = [unit for unit, owner in enumerate(owners) if owner == receiver]
        starts = [
            i
            for i in range(len(own) - count + 1)
            if i in (0, len(own) - count)
            or own[i - 1] + 1 != own[i]
            or own[i + count - 1] + 1 != own[i + count]
        ]

        def parts(start: int) -> int:
            end = start + count
            kept, given = [*own[:start], *own[end:]], sorted([*there, *own[start:end]])
            return _parts(kept, size) + _parts(given, size)

        start = min(starts, key=parts)
        return list(own[start : start + count])

    def _targets(self, kind: int) -> dict[int, int]:
        """Units by weight alone; ties go to those that have more of them, then to the emptiest."""
        counts = self._counts[kind]
        shares = largest_remainder(
            self._loads[kind].units,
            [self._weights[i] for i in self._crew],
            [(-counts[i], self._held[i]) for i in self._crew],
        )
        return dict.fromkeys(self._order, 0) | dict(zip(self._crew, shares, strict=True))

    def _missing(self, kind: int) -> dict[int, int]:
        targets = self._targets(kind)
        return {i: targets[i] - self._counts[kind][i] for i in self._order}

    def _best(
        self,
        kind: int,
        missing: Mapping[int, int],
        among: Sequence[int],
        near: frozenset[Owner] | set[Owner] = frozenset(),
    ) -> int:
        loads = {i: (self._counts[kind][i] + 1) / self._weights[i] for i in among}
        return preferred(among, missing, loads, near, self._held)

    def _room(self, kind: int, unit: int, index: int) -> bool:
        return self._held[index] + self._loads[kind].bytes_of(unit) <= self._rooms[index]

    def _give(self, kind: int, unit: int, index: int) -> None:
        size = self._loads[kind].bytes_of(unit)
        before = self._owners[kind][unit]
        if before is not None:
            self._counts[kind][before] -= 1
            self._held[before] -= size
        self._owners[kind][unit] = index
        self._counts[kind][index] += 1
        self._held[index] += size


def _parts(units: Sequence[int], size: int) -> int:
    """How many subtrees cover ascending `units` of `size`."""
    total, start = 0, 0
    for i, unit in enumerate(units):
        if i + 1 == len(units) or units[i + 1] != unit + 1:
            total += tree.count_of_run(units[start], unit + 1, size)
            start = i + 1
    return total
