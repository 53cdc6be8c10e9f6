"""How much is taken of the memory that members offer, by what they own and keep for others.

Who keeps weights warm has them in no memory of its own, but needs it when it takes an owner's units
over. So of what it keeps the weights count once: those of the owner who gives it the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from math import inf

from p2pinfer.core.shares import room_of
from p2pinfer.types import Member

Size = Fraction | int
"""Bytes; of a fair part of something a fraction."""


def kept_bytes(member: Member, by_owner: Mapping[int, Size]) -> Size:
    """Bytes that the weights which a member keeps count for; `by_owner` are those of each owner."""
    weights = by_owner.values()
    return max(weights, default=0) if member.keeps_warm else sum(weights)


class Room:
    """The memory of members by their index, while units are given to them.

    Of a unit `size` are the bytes of its weights with the least KV, `kv` those of this alone.
    """

    def __init__(self, members: Mapping[int, Member]) -> None:
        self._members = members
        self._taken = dict.fromkeys(members, 0)
        """All but the weights that are kept for others."""
        self._kv = dict.fromkeys(members, 0)
        """The least KV alone."""
        self._kept: dict[int, Counter[int]] = {i: Counter() for i in members}
        """Weights that are kept, by their owner."""

    def own(self, member: int, size: int, kv: int) -> None:
        """A member owns a unit more."""
        self._taken[member] += size
        self._kv[member] += kv

    def keep(self, member: int, owner: int, size: int, kv: int) -> None:
        """A member keeps a unit more for its owner."""
        self._taken[member] += kv
        self._kv[member] += kv
        self._kept[member][owner] += size - kv

    def has(self, member: int, owner: int, size: Size, kv: Size) -> bool:
        """Whether a member could keep so much more for an owner."""
        offer, kept = self._members[member], self._kept[member]
        weights = kept_bytes(offer, {**kept, owner: kept[owner] + size - kv})
        return self._taken[member] + kv + weights <= room_of(offer) and (
            not kv or self._kv[member] + kv <= (offer.kv_bytes or inf)
        )
