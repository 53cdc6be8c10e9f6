"""Keys and values of every request on this node, stored by unit and written by position.

One tensor per request, unit-major: [units, layers, 2, capacity, head_dim]. A unit's part of it is
one contiguous object, so it can be received, promoted or handed over whole. Storage is contiguous
virtual memory that the operating system pages in as positions are written, as in vAttention
(Prabhu et al., 2024): a request's capacity costs nothing before it is used, and attention reads
the cache in place. Limits are accounted for in blocks by `core/blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2pinfer.core.blocks import BLOCK_POSITIONS


@dataclass(frozen=True)
class KvShape:
    """What one request's KV looks like on this node."""

    units: int
    layers: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def nbytes(self, positions: int) -> int:
        """Bytes of `positions` positions, in whole blocks."""
        blocks = -(-positions // BLOCK_POSITIONS)
        item = self.dtype.itemsize
        return self.units * self.layers * 2 * blocks * BLOCK_POSITIONS * self.head_dim * item


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory until written: attention reads to the end of a block, and what is
    masked there must be finite."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    if dtype.itemsize == 2:
        return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(dtype)
    return torch.from_numpy(np.zeros(shape, dtype=np.float32)).view(dtype)


class KvCache:
    """KV of all requests for the units and layers that this node owns.

    `covered(request)` is how many leading positions have been written.
    """

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self._store: dict[int, Tensor] = {}
        self._covered: dict[int, int] = {}

    def open(self, request_id: int, capacity: int) -> None:
        """Reserve `capacity` positions; an open request keeps what it has."""
        if request_id in self._store:
            return
        s = self.shape
        positions = -(-capacity // BLOCK_POSITIONS) * BLOCK_POSITIONS
        shape = (s.units, s.layers, 2, positions, s.head_dim)
        self._store[request_id] = _zeros(shape, s.dtype, s.device)
        self._covered[request_id] = 0

    def drop(self, request_id: int) -> None:
        """Free a request's KV; unknown requests are ignored."""
        self._store.pop(request_id, None)
        self._covered.pop(request_id, None)

    def cut(self, request_id: int, positions: int) -> None:
        """Only the first `positions` of a request's KV are of use: with none, it is freed."""
        if positions == 0:
            self.drop(request_id)
        elif request_id in self._covered:
            self._covered[request_id] = min(self._covered[request_id], positions)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._store

    def __len__(self) -> int:
        return len(self._store)

    def of_layer(self, layer: int) -> Callable[[int], Tensor]:
        """A function that gives a request's KV of one layer of the span (0 is its first):
        [units, 2, capacity, head_dim]."""
        return lambda request_id: self._store[request_id][:, layer]

    def capacity(self, request_id: int) -> int:
        """Positions reserved."""
        return self._store[request_id].shape[3]

    def covered(self, request_id: int) -> int:
        """Leading positions that finished steps have written."""
        return self._covered.get(request_id, 0)

    def finish(self, request_id: int, end: int) -> None:
        """A step that wrote up to position `end` is complete in every layer."""
        self._covered[request_id] = end

    @property
    def used_bytes(self) -> int:
        """Bytes of the positions written, in whole blocks."""
        return sum(self.shape.nbytes(n) for n in self._covered.values())
