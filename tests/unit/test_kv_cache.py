"""The KV store: by unit, by position, free until written."""

from __future__ import annotations

import psutil
import torch

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.model.kv_cache import KvCache, KvShape

SHAPE = KvShape(units=3, layers=2, head_dim=16, dtype=torch.bfloat16, device=torch.device("cpu"))


def test_a_units_part_is_one_contiguous_object() -> None:
    """Whoever receives or hands over a unit's KV gets one piece of memory."""
    cache = KvCache(SHAPE)
    cache.open(7, 100)
    layer = cache.of_layer(1)(7)
    assert layer.shape == (3, 2, 2 * BLOCK_POSITIONS, 16)
    store = layer._base
    assert store is not None
    assert all(unit.is_contiguous() for unit in layer.unbind())


def test_room_costs_nothing_before_it_is_written() -> None:
    """Reserving gigabytes takes no memory: the operating system pages it in when written."""
    wide = KvShape(units=8, layers=16, head_dim=64, dtype=torch.bfloat16, device=SHAPE.device)
    before = psutil.Process().memory_info().rss
    cache = KvCache(wide)
    cache.open(1, 131_072)
    assert wide.nbytes(131_072) == 8 * 16 * 2 * 131_072 * 64 * 2
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert cache.used_bytes == 0


def test_used_bytes_follow_finished_steps() -> None:
    """Coverage counts what finished steps have written, in whole blocks; dropping frees it."""
    cache = KvCache(SHAPE)
    cache.open(1, 200)
    cache.open(1, 9999)
    assert cache.capacity(1) == 4 * BLOCK_POSITIONS
    cache.finish(1, 65)
    assert cache.covered(1) == 65
    assert cache.used_bytes == SHAPE.nbytes(128)
    cache.drop(1)
    cache.drop(1)
    assert 1 not in cache
    assert len(cache) == 0
    assert cache.used_bytes == 0
    assert cache.covered(1) == 0


def test_cutting_keeps_what_is_before() -> None:
    """A log that is cut leaves the KV of its first positions; with none of use, all is freed."""
    cache = KvCache(SHAPE)
    cache.open(1, 200)
    cache.finish(1, 150)
    cache.cut(1, 160)
    assert cache.covered(1) == 150
    cache.cut(1, 70)
    assert cache.covered(1) == 70
    assert cache.used_bytes == SHAPE.nbytes(70)
    cache.cut(2, 5)
    assert 2 not in cache
    cache.cut(1, 0)
    assert 1 not in cache
