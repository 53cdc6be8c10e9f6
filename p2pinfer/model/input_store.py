"""The inputs of the K and V projections of every request on this node, written by position.

One tensor per request, [layers, capacity, hidden], in the number format in which the products take
them. It is virtual memory that is paged in as positions are written, as that of the KV cache. What
is kept is a beginning without a hole: steps that begin beyond it leave nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.core.units import Slice
from p2pinfer.model.attention import Run
from p2pinfer.model.kv_cache import unwritten_zeros


class InputStore:
    """Inputs in all layers of `span`, each [positions, `hidden`] in `dtype`."""

    def __init__(self, span: Slice, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.span = span
        self._hidden = hidden
        self._dtype = dtype
        self._device = device
        self._store: dict[int, Tensor] = {}
        self._written: dict[int, int] = {}
        """Where the last position ends that was ever written."""

    def open(self, request_id: int, capacity: int) -> None:
        """Reserve `capacity` positions; an open request keeps what it has."""
        if request_id not in self._store:
            shape = (self.span.end - self.span.start, capacity, self._hidden)
            self._store[request_id] = unwritten_zeros(shape, self._dtype, self._device)
            self._written[request_id] = 0

    def drop(self, request_id: int) -> None:
        """Free a request's inputs; unknown requests are ignored."""
        self._store.pop(request_id, None)
        self._written.pop(request_id, None)

    def write(self, layer: int, runs: Sequence[Run], h: Tensor) -> None:
        """Put the rows of `h` [rows, hidden] at their positions, in one layer of the span (0 is
        its first)."""
        for run in runs:
            if self._joins(run):
                rows = h[run.row : run.row + run.end - run.start]
                self._store[run.request_id][layer, run.start : run.end] = rows

    def wrote(self, runs: Sequence[Run]) -> None:
        """These rows were written in every layer."""
        for run in runs:
            if self._joins(run):
                self._written[run.request_id] = max(self._written[run.request_id], run.end)

    def _joins(self, run: Run) -> bool:
        return run.start <= self._written.get(run.request_id, -1)

    def rows(self, request_id: int, layer: int, start: int, end: int) -> Tensor:
        """A copy of positions `[start, end)` of a layer: [end - start, hidden].

        Raises `LookupError` where they were never written.
        """
        if end > self._written.get(request_id, 0):
            raise LookupError(f"inputs of positions {start} to {end} of a request are not here")
        return self._store[request_id][layer, start:end].clone()

    @property
    def used_bytes(self) -> int:
        """Bytes of the positions written, in whole blocks."""
        layers, item = self.span.end - self.span.start, self._dtype.itemsize
        blocks = sum(-(-n // BLOCK_POSITIONS) for n in self._written.values())
        return layers * blocks * BLOCK_POSITIONS * self._hidden * item
