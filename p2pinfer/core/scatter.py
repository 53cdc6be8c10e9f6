"""Which member of a stage adds which rows of a long sum.

With few rows each member sends its sums to all others, and each adds everything: one exchange.
With many rows what is sent counts, not how often: each member adds some rows for all, and sends
them what it has added (reduce-scatter and all-gather: Thakur, Rabenseifner and Gropp, 2005). Of n
members each then sends 2 * (n - 1) / n of a sum instead of n - 1 of them. The additions of a row
are the same ones in the same order, so its bits are, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pinfer.core.units import Slice

SCATTER_MEMBERS = 3
"""Of two each would send as much as before, one exchange later."""

SCATTER_ROWS = 64
"""Fewer rows are not worth the second exchange. Reckoned, not measured: of 64 rows of 2,048 numbers
a sum takes 4 ms on a wire of 1 Gbit/s, several times what an exchange costs."""


def shares(members: Iterable[int], rows: int) -> dict[int, Slice]:
    """The rows of a sum that each of these members adds for all; empty: every member adds all."""
    ordered = sorted(members)
    count = len(ordered)
    if count < SCATTER_MEMBERS or rows < SCATTER_ROWS:
        return {}
    return {
        member: Slice(place * rows // count, (place + 1) * rows // count)
        for place, member in enumerate(ordered)
    }
