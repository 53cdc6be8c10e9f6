"""The KV store: by unit, by position, free until written."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.model.kv_cache import KvCache, KvShape
from p2pinfer.wire.tensors import Tensor as WireTensor
from p2pinfer.wire.tensors import WireDType

SHAPE = KvShape(units=3, layers=2, head_dim=16, dtype=torch.bfloat16, device=torch.device("cpu"))
ROW_BYTES = 2 * 2 * 16 * 2
"""Of one position of one unit."""


def filled(shape: KvShape, positions: int) -> KvCache:
    """A cache with one request, 7, whose `positions` are random."""
    cache = KvCache(shape)
    cache.open(7, 200)
    for kind in cache.layers(7, 0, positions):
        for layer in kind:
            layer.copy_(torch.randn(layer.shape))
    cache.wrote(7, positions)
    return cache


def test_a_units_part_is_one_contiguous_object() -> None:
    """Whoever receives or hands over a unit's KV gets one piece of memory."""
    cache = KvCache(SHAPE)
    cache.open(7, 100)
    keys, values = cache.layers(7, 0, 2 * BLOCK_POSITIONS)
    assert keys[1].shape == values[1].shape == (3, 2 * BLOCK_POSITIONS, 16)
    first = keys[0].data_ptr()
    places = [[each.data_ptr() - first for each in kind] for kind in (keys, values)]
    one = keys[0][0].nbytes
    assert places == [[0, 2 * one], [one, 3 * one]]
    assert keys[0].stride(0) == 4 * 2 * BLOCK_POSITIONS * 16


def test_room_costs_nothing_before_it_is_written() -> None:
    """Reserving gigabytes takes no memory: the operating system pages it in when written."""
    wide = KvShape(units=8, layers=16, head_dim=64, dtype=torch.bfloat16, device=SHAPE.device)
    before = psutil.Process().memory_info().rss
    cache = KvCache(wide)
    cache.open(1, 131_072)
    assert wide.unit_bytes(131_072) == 16 * 2 * 131_072 * 64 * 2
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert cache.unit_used_bytes == 0


def test_used_bytes_are_those_that_were_ever_written() -> None:
    """In whole blocks, up to the last position; what is written again takes nothing more, and
    dropping frees it."""
    cache = KvCache(SHAPE)
    cache.open(1, 200)
    cache.open(1, 9999)
    assert cache.capacities == {1: 4 * BLOCK_POSITIONS}
    cache.wrote(1, 65)
    cache.wrote(1, 3)
    assert cache.unit_used_bytes == SHAPE.unit_bytes(128) == 128 * ROW_BYTES
    cache.drop(1)
    cache.drop(1)
    assert 1 not in cache
    assert (len(cache), cache.unit_used_bytes) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_go_from_cache_to_cache_bit_by_bit(dtype: torch.dtype) -> None:
    """What is read of one unit and written to another's place is the same, and nothing else is
    touched."""
    shape = replace(SHAPE, dtype=dtype)
    cache, other = filled(shape, 100), KvCache(replace(shape, units=1))
    other.open(7, 150)
    rows = cache.read(2, 7, 30, 97)
    assert (rows.shape, rows.nbytes) == ((2, 2, 67, 16), 67 * ROW_BYTES * dtype.itemsize // 2)
    assert other.write(0, 7, 30, rows)
    for its, mine in zip(other.layers(7, 0, 150), cache.layers(7, 0, 150), strict=True):
        for layer in range(2):
            assert torch.equal(its[layer][0, 30:97], mine[layer][2, 30:97])
            assert not its[layer][0, :30].any()
            assert not its[layer][0, 97:].any()
    assert other.unit_used_bytes == shape.unit_bytes(97)
    assert other.read(0, 7, 30, 97) == rows


def test_what_was_read_does_not_change_any_more() -> None:
    """It may wait in a socket while the next step writes."""
    cache = filled(replace(SHAPE, layers=1, units=1), BLOCK_POSITIONS)
    before = bytes(cache.read(0, 7, 0, BLOCK_POSITIONS).data)
    rows = cache.read(0, 7, 0, BLOCK_POSITIONS)
    cache.layers(7, 0, BLOCK_POSITIONS).keys[0].zero_()
    assert bytes(rows.data) == before


def test_rows_without_a_place_are_not_written() -> None:
    """Those of a request that is not open, or that end beyond its capacity."""
    cache = KvCache(SHAPE)
    rows = WireTensor(WireDType.BFLOAT16, (2, 2, 3, 16), bytes(3 * ROW_BYTES))
    assert not cache.write(0, 1, 0, rows)
    cache.open(1, BLOCK_POSITIONS)
    assert cache.write(0, 1, BLOCK_POSITIONS - 3, rows)
    assert not cache.write(0, 1, BLOCK_POSITIONS - 2, rows)


def test_a_unit_is_taken_over_with_all_its_requests() -> None:
    """Its positions, at another place in another cache."""
    cache, other = filled(SHAPE, 70), KvCache(replace(SHAPE, units=2))
    for request_id, capacity in cache.capacities.items():
        other.open(request_id, capacity)
    other.copy(0, cache, 2)
    assert other.read(0, 7, 0, 70) == cache.read(2, 7, 0, 70)
    assert other.unit_used_bytes == cache.unit_used_bytes
    assert not other.layers(7, 0, 70).keys[0][1].any()
