"""How many units of a stage each of its members gets: by weight, then to where there is memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple

from p2pinfer.core import tree
from p2pinfer.core.units import kv_bytes_per_position, unit_count, unit_weight_bytes
from p2pinfer.types import Member, ModelSpec, UnitKind

MIN_KV_POSITIONS = 2048
"""A plan leaves room for the KV of one request of this length (or of the model's, if shorter)."""

Counts = tuple[int, ...]
"""How many units, or layers, each member or group gets, in their order."""


class Load(NamedTuple):
    """The units of one kind in a stage: how many, the bytes of one, and those of the last one."""

    kind: UnitKind
    units: int
    unit_bytes: int
    last_bytes: int

    def bytes_of(self, unit: int) -> int:
        """Bytes of one unit by its number."""
        return self.last_bytes if unit == self.units - 1 else self.unit_bytes


class Shares(NamedTuple):
    """Units per member for each kind of a stage, and the bytes of memory that lack for it."""

    counts: list[Counts]
    lacking: int


def stage_loads(model: ModelSpec, depth: int, last: bool, positions: int = 0) -> list[Load]:
    """What a stage of `depth` layers weighs, its least KV included; vocabulary in the last."""
    kv = least_kv_bytes(model, depth, positions)
    loads = []
    for kind, times, more in (
        (UnitKind.HEAD, depth, kv),
        (UnitKind.MLP, depth, 0),
        *(((UnitKind.VOCAB, 1, 0),) if last else ()),
    ):
        units = unit_count(model, kind)
        first, end = (unit_weight_bytes(model, kind, unit) for unit in (0, units - 1))
        loads.append(Load(kind, units, times * first + more, times * end + more))
    return loads


def least_positions(model: ModelSpec) -> int:
    """Positions of KV that a plan must have room for."""
    return min(MIN_KV_POSITIONS, model.max_positions)


def least_kv_bytes(model: ModelSpec, depth: int, positions: int = 0) -> int:
    """Bytes of KV that whoever has a head unit of `depth` layers must have room for; `positions`
    are those of a request that is under way."""
    return kv_bytes_per_position(model, depth) * max(positions, least_positions(model))


def room_of(member: Member) -> float:
    """Bytes that a member offers for weights and KV; infinite where it says nothing."""
    return member.memory_bytes or inf


def largest_remainder(
    total: int, weights: Sequence[Fraction | int], ties: Sequence[tuple[int, ...]] = ()
) -> Counts:
    """`total` items by weight (Hamilton's method).

    Ties go to the least of `ties`, where these are given, then to the heavier, then to the first.
    """
    whole = sum(weights)
    quotas = [total * Fraction(weight) / whole for weight in weights]
    counts = [int(quota) for quota in quotas]
    ranks = ties or [()] * len(counts)
    order = sorted(
        range(len(counts)), key=lambda i: (counts[i] - quotas[i], ranks[i], -weights[i], i)
    )
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def apportion(units: int, weights: Sequence[Fraction], held: Sequence[int]) -> Counts:
    """Units of one kind by weight; which of equal members get the odd units costs no balance.

    So they go where the runs of units are covered by the fewest subtrees (each is a tensor to
    send), among such to the members that hold the fewest bytes so far, then to the first.
    """
    fair = largest_remainder(units, weights)
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


def held_bytes(counts: Sequence[Counts], loads: Sequence[Load], members: int) -> list[int]:
    """Bytes that each member of a stage holds; the last unit of a kind may be smaller."""
    held = [0] * members
    for each, load in zip(counts, loads, strict=False):
        for i, count in enumerate(each):
            held[i] += count * load.unit_bytes
        held[last_used(each)] -= load.unit_bytes - load.last_bytes
    return held


def relieve(
    counts: list[Counts],
    loads: Sequence[Load],
    weights: Sequence[Fraction],
    rooms: Sequence[float],
) -> Shares:
    """Move units, one by one, from the fullest member to where less memory lacks for them.

    Each move lessens the sum of what lacks, so it ends; where it ends too early, no member has
    room for one more unit of those that the fullest one holds. Of the possible moves the one is
    taken that fills nobody beyond its memory, then the one that slows the stage least for each
    byte that lacks no more.
    """
    size = len(weights)

    def lacking(option: Sequence[Counts]) -> list[int]:
        held = held_bytes(option, loads, size)
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
                option[k] = moved(counts[k], source, target)
                after = lacking(option)
                if gain := max(0, sum(lacks) - sum(after)):
                    cost = (slowness(option) - slowness(counts)) / gain
                    moves.append((after[target] > 0, cost, -gain, option))
        if not moves:
            break
        counts = min(moves, key=lambda move: move[:3])[3]
        lacks = lacking(counts)
    return Shares(counts, sum(lacks))


def preferred(
    among: Sequence[int],
    missing: Mapping[int, int],
    loads: Mapping[int, Fraction],
    near: AbstractSet[int | None],
    held: Mapping[int, int],
) -> int:
    """Who of some members should get one more unit.

    First those that miss any of their share, among such the ones that have a neighbour of the unit,
    then who misses most; if nobody misses any, who would have the least `loads` by weight. Then who
    has the least of what is `held`, then the first.
    """

    def rank(i: int) -> tuple[bool, Fraction | int, bool, int, int, int]:
        full = missing[i] <= 0
        return (full, loads[i] if full else 0, i not in near, -missing[i], held[i], i)

    return min(among, key=rank)


def moved(counts: Counts, source: int, target: int) -> Counts:
    """The same with one item less for `source` and one more for `target`."""
    return tuple(c - (i == source) + (i == target) for i, c in enumerate(counts))


def last_used(counts: Counts) -> int:
    """The last that has anything: it holds the last unit, since units are given in runs."""
    return max(i for i, count in enumerate(counts) if count)
