"""How far the inputs of the K and V projections are kept on a node, by request and span.

A node that owns anything of a stage has the normed hidden states of every layer of it, whichever
units it owns, and the same bits as all others there. Kept, they bring back the KV of any head unit
of the stage by its two products alone, without the layers before.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from p2pinfer.core.holdings import holdings
from p2pinfer.core.units import Slice
from p2pinfer.types import Plan


def input_spans(plan: Plan, member: int) -> frozenset[Slice]:
    """The spans whose inputs a member keeps: those of which it owns anything, if it keeps any."""
    if not plan.members[member].keeps_inputs:
        return frozenset()
    return frozenset(held.span for held in holdings(plan, member))


class Inputs:
    """Leading positions by request and span; only a beginning counts, without a hole."""

    def __init__(self) -> None:
        self.spans: frozenset[Slice] = frozenset()
        """Those whose inputs this node's own steps write."""
        self._positions: dict[int, dict[Slice, int]] = {}

    def hold(self, spans: AbstractSet[Slice]) -> None:
        """From now on the inputs of these spans are kept; those of others are gone."""
        self.spans = frozenset(spans)
        for of in self._positions.values():
            for span in of.keys() - self.spans:
                del of[span]

    def lose(self) -> None:
        """All that was written is gone, of every request."""
        self._positions.clear()

    def of(self, request_id: int, span: Slice) -> int:
        """Leading positions of a request whose inputs are here in all layers of a span."""
        return self._positions.get(request_id, {}).get(span, 0)

    def cut(self, request_id: int, positions: int) -> None:
        """Inputs of a request from `positions` on are void."""
        of = self._positions.get(request_id, {})
        for span, kept in of.items():
            of[span] = min(kept, positions)

    def finish(self, request_id: int, start: int, end: int) -> None:
        """A step has written `[start, end)` of every span; one with a hole before it does not
        count."""
        of = self._positions.setdefault(request_id, {})
        for span in self.spans:
            if of.get(span, 0) >= start:
                of[span] = end

    def forget(self, request_id: int) -> None:
        """Nothing is known of a request any more."""
        self._positions.pop(request_id, None)
