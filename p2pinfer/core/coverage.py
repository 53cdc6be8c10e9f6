"""How much KV of each request lies on a node, head unit by head unit.

A unit's KV comes into being in three ways: this node's steps compute it, the unit's owner sends
what it computed (delta KV), or this node makes it of inputs that it kept (`core/inputs`). Either
way only a beginning counts, without a hole: `coverage` positions. What a new plan may build on is
the least coverage over the owners of all units, and what they can make of inputs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from p2pinfer.core.units import Slice
from p2pinfer.limits import MAX_NODES


class KvUnit(NamedTuple):
    """The keys and values of one head unit in the layers of `span`."""

    span: Slice
    unit: int


class Run(NamedTuple):
    """Head units of one span that have the same leading positions of a request."""

    span: Slice
    units: tuple[int, ...]
    positions: int


class Coverage:
    """Leading positions by request and unit.

    `computed` are the units whose KV this node's own steps write, `fed` those whose owner sends
    it. Nothing is known of any other.
    """

    def __init__(self) -> None:
        self.computed: frozenset[KvUnit] = frozenset()
        self.fed: frozenset[KvUnit] = frozenset()
        self._positions: dict[int, dict[KvUnit, int]] = {}

    def hold(self, computed: AbstractSet[KvUnit], fed: AbstractSet[KvUnit]) -> None:
        """From now on these units' KV is kept; that of others is gone.

        A unit that is promoted from `fed` to `computed`, or the other way round, keeps what it has.
        """
        assert not computed & fed, "an owner needs no replica of its own"
        self.computed, self.fed = frozenset(computed), frozenset(fed)
        for of in self._positions.values():
            for unit in of.keys() - (self.computed | self.fed):
                del of[unit]

    def lose(self, units: Iterable[KvUnit]) -> None:
        """What was written of these units is gone, of every request."""
        gone = set(units)
        for of in self._positions.values():
            for unit in of.keys() & gone:
                del of[unit]

    def of(self, request_id: int, unit: KvUnit) -> int:
        """Leading positions of a request that a unit has here."""
        return self._positions.get(request_id, {}).get(unit, 0)

    def least(self, request_id: int) -> int:
        """Leading positions of a request that all computed units have; 0 where there is none."""
        return min((self.of(request_id, unit) for unit in self.computed), default=0)

    def most(self, request_id: int) -> int:
        """Leading positions of a request that any unit has."""
        return max(self._positions.get(request_id, {}).values(), default=0)

    def runs(self, request_id: int) -> Iterator[Run]:
        """What of a request is here: units with the same coverage together, in order.

        At most `MAX_NODES` runs: where there would be more, units that differ the least are said to
        have what all of them have.
        """
        of = {unit: n for unit, n in self._positions.get(request_id, {}).items() if n}
        spans = {unit.span for unit in of}
        told = _levels(of.values(), MAX_NODES // max(1, len(spans)))
        by_run: defaultdict[tuple[Slice, int], list[int]] = defaultdict(list)
        for unit, positions in sorted(of.items()):
            by_run[unit.span, told[positions]].append(unit.unit)
        for (span, positions), units in by_run.items():
            yield Run(span, tuple(units), positions)

    def cut(self, request_id: int, positions: int) -> None:
        """KV of a request from `positions` on is void."""
        of = self._positions.get(request_id, {})
        for unit, covered in of.items():
            of[unit] = min(covered, positions)

    def finish(self, request_id: int, start: int, end: int) -> None:
        """A step has written `[start, end)` of every computed unit; a unit with a hole before it
        does not count."""
        of = self._positions.setdefault(request_id, {})
        for unit in self.computed:
            if of.get(unit, 0) >= start:
                of[unit] = end

    def join(self, request_id: int, unit: KvUnit, start: int, end: int) -> None:
        """The owner's `[start, end)` of a fed unit is written; it joins what is there."""
        of = self._positions.setdefault(request_id, {})
        assert unit in self.fed and start <= of.get(unit, 0), "checked before it was written"
        of[unit] = max(of.get(unit, 0), end)

    def recomputed(self, request_id: int, unit: KvUnit, start: int, end: int) -> None:
        """`[start, end)` of a computed unit is made of kept inputs; it joins what is there."""
        of = self._positions.setdefault(request_id, {})
        assert unit in self.computed and start <= of.get(unit, 0), "made from the first that lacks"
        of[unit] = max(of.get(unit, 0), end)

    def forget(self, request_id: int) -> None:
        """Nothing is known of a request any more."""
        self._positions.pop(request_id, None)


def _levels(numbers: Iterable[int], most: int) -> dict[int, int]:
    """What to tell each number as: itself or, where there are more than `most`, a lower one."""
    known = sorted(set(numbers))
    told = list(known)
    while len(told) > most:
        del told[min(range(1, len(told)), key=lambda i: told[i] - told[i - 1])]
    return {number: told[bisect_right(told, number) - 1] for number in known}
