"""Keys and values of every request on this node, stored by unit and written by position.

One tensor per request, unit-major: [units, layers, 2, capacity, head_dim]. A unit's part of it is
one contiguous object, so it can be received, promoted or handed over whole. Storage is contiguous
virtual memory that the operating system pages in as positions are written, as in vAttention
(Prabhu et al., 2024): a request's capacity costs nothing before it is used, and attention reads
the cache in place. Limits are accounted for in blocks by `core/blocks.py`; which positions are of
use is for `core/coverage.py` to say.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.wire.tensors import Tensor as WireTensor
from p2pinfer.wire.tensors import WireDType

WIRE_DTYPES = {torch.float32: WireDType.FLOAT32, torch.bfloat16: WireDType.BFLOAT16}


@dataclass(frozen=True)
class KvShape:
    """What one request's KV looks like in one cache."""

    units: int
    layers: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def unit_bytes(self, positions: int) -> int:
        """Bytes of `positions` positions of one unit, in whole blocks."""
        blocks = -(-positions // BLOCK_POSITIONS)
        return self.layers * 2 * blocks * BLOCK_POSITIONS * self.head_dim * self.dtype.itemsize


class Layers(NamedTuple):
    """Keys and values of some positions, by layer, each [units, positions, head_dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def unwritten_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory until written (attention reads to the end of a block, and what is
    masked there must be finite). Raises `MemoryError` where the system gives none."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=private)
    except OSError as error:
        raise MemoryError(f"no memory for {prod(shape) * dtype.itemsize} bytes: {error}") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page would take memory for a request's whole room with the first position.
        with suppress(OSError):  # the kernel has none at all
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KvCache:
    """KV of all requests for some head units, here by their place in the cache, and all layers of
    a span."""

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self._store: dict[int, Tensor] = {}
        self._written: dict[int, int] = {}
        """Where the last position that was ever written ends: what memory is in use."""

    def open(self, request_id: int, capacity: int) -> None:
        """Reserve `capacity` positions; an open request keeps what it has."""
        if request_id in self._store:
            return
        s = self.shape
        positions = -(-capacity // BLOCK_POSITIONS) * BLOCK_POSITIONS
        shape = (s.units, s.layers, 2, positions, s.head_dim)
        self._store[request_id] = unwritten_zeros(shape, s.dtype, s.device)
        self._written[request_id] = 0

    def drop(self, request_id: int) -> None:
        """Free a request's KV; unknown requests are ignored."""
        self._store.pop(request_id, None)
        self._written.pop(request_id, None)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._store

    def __len__(self) -> int:
        return len(self._store)

    @property
    def capacities(self) -> Mapping[int, int]:
        """Positions reserved, by request."""
        return {request_id: store.shape[3] for request_id, store in self._store.items()}

    def layers(self, request_id: int, start: int, end: int) -> Layers:
        """Positions `[start, end)` of an open request, in place."""
        rows = self._store[request_id][:, :, :, start:end]
        return Layers(rows[:, :, 0].unbind(1), rows[:, :, 1].unbind(1))

    def wrote(self, request_id: int, end: int) -> None:
        """Positions up to `end` were written, in every layer."""
        self._written[request_id] = max(self._written[request_id], end)

    def read(self, unit: int, request_id: int, start: int, end: int) -> WireTensor:
        """A copy of positions `[start, end)` of one unit: [layers, 2, rows, head_dim].

        The request is open, and has them.
        """
        assert 0 <= start < end <= self._store[request_id].shape[3]
        rows = self._store[request_id][unit, :, :, start:end]
        values = _words(rows.clone(memory_format=torch.contiguous_format).cpu()).numpy()
        return WireTensor(WIRE_DTYPES[self.shape.dtype], values.shape, values.data.cast("B"))

    def write(self, unit: int, request_id: int, start: int, rows: WireTensor) -> bool:
        """Put `rows` [layers, 2, rows, head_dim] of one unit at the positions from `start` on.

        False where the request is not open, or has not so many positions.
        """
        store, s = self._store.get(request_id), self.shape
        end = start + rows.shape[2]
        if store is None or end > store.shape[3]:
            return False
        assert rows.dtype is WIRE_DTYPES[s.dtype], "KV of another number format"
        assert rows.shape == (s.layers, 2, end - start, s.head_dim), "KV of another model"
        place = _words(store[unit, :, :, start:end])
        values = np.frombuffer(rows.data, np.int16 if s.dtype.itemsize == 2 else np.float32)
        values = values.reshape(rows.shape)
        if place.device.type == "cpu":
            np.copyto(place.numpy(), values)
        else:
            place.copy_(torch.from_numpy(values.copy()))
        self.wrote(request_id, end)
        return True

    def copy(self, unit: int, other: KvCache, its_unit: int) -> None:
        """Take over a unit from another cache, which has no request that is not open here."""
        for request_id, written in other._written.items():
            mine, its = self._store[request_id], other._store[request_id]
            mine[unit, :, :, :written] = its[its_unit, :, :, :written]
            self.wrote(request_id, written)

    @property
    def unit_used_bytes(self) -> int:
        """Bytes of the positions written of each unit, in whole blocks."""
        return sum(self.shape.unit_bytes(n) for n in self._written.values())


def _words(values: Tensor) -> Tensor:
    """16-bit formats as raw words: numpy has no bfloat16."""
    return values.view(torch.int16) if values.dtype.itemsize == 2 else values
