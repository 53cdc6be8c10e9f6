"""Makes KV that is lost of the inputs that are kept: the rung `recompute`.

A head unit that came to this node lacks the KV of positions that were computed elsewhere. The
inputs of its K and V projections are the same on all nodes of a stage, so where they were kept only
these products are run again, and no layer has to wait for the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Protocol

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.orders import Recompute
from p2pinfer.core.token_log import TokenLogs

CHUNK_ROWS = 256
"""Positions that one product takes: enough to make use of the weights once they are read, and no
more than take a fraction of the time in which a worker must report."""


class KvMaker(Protocol):
    """Who has the weights and the inputs."""

    def recompute(
        self, request_id: int, units: AbstractSet[KvUnit], start: int, end: int
    ) -> Iterator[None]:
        """Write KV of positions `[start, end)` of owned units of one span, in small portions."""


def recompute(maker: KvMaker, logs: TokenLogs, orders: Iterable[Recompute]) -> Iterator[None]:
    """Make the KV that owned units lack before the positions of `orders`; what is done counts.

    Yields after each portion, so that whoever runs it may report, or break it off. Raises
    `LookupError` where the inputs are not here.
    """
    coverage = logs.coverage
    for order in orders:
        request_id, end = order.request_id, order.position
        lacking = {unit for unit in coverage.computed if coverage.of(request_id, unit) < end}
        for span in sorted({unit.span for unit in lacking}):
            if logs.inputs.of(request_id, span) < end:
                raise LookupError(
                    f"the inputs of {end} positions of a request were to be here, and are not"
                )
            those = {unit for unit in lacking if unit.span == span}
            start = min(coverage.of(request_id, unit) for unit in those)
            while start < end:
                stop = min(start + CHUNK_ROWS, end)
                yield from maker.recompute(request_id, those, start, stop)
                for unit in those:
                    coverage.recomputed(request_id, unit, start, stop)
                start = stop
