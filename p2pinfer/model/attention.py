"""Attention of one step's slots over the KV cache, tile by tile, with bits that depend on a
position's own keys only.

A tile is what a slot asks of one block of 64 positions. Its keys run to the end of that block with
the tail masked, whatever else is in the batch; the query heads of a KV head are rows of one query,
padded to a multiple of 8 (`scaled_dot_product_attention(enable_gqa=True)` is neither as fast nor
independent of the batch). Decode is a tile of one position: prefill and decode are one formulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.model.stopwatch import ATTENTION

ROW_MULTIPLE = 8

KEPT_MASK_KEYS = 4096
"""Masks of tiles with more keys are not kept: those of a long prompt would take gigabytes."""


class Tile(NamedTuple):
    """Rows `[row, row + length)` of a step: positions of `request_id` inside one block.

    `mask` is [1, 1, padded query rows, keys], 0 where a key may be seen and -inf where not; None
    where it is so large that each layer makes it anew, rather than the step keeping it.
    """

    request_id: int
    row: int
    length: int
    start: int
    keys: int
    mask: Tensor | None


class Run(NamedTuple):
    """Rows `[row, row + end - start)` of a step hold positions `[start, end)` of a request."""

    request_id: int
    row: int
    start: int
    end: int


class Rows(NamedTuple):
    """What a step's rows attend to: where their keys are written, and in which tiles they read."""

    runs: list[Run]
    tiles: list[Tile]


def make_rows(runs: list[Run], group: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """Cut every run at block boundaries; `group` is the number of query heads per KV head."""
    tiles: list[Tile] = []
    for run in runs:
        start = run.start
        while start < run.end:
            block = start // BLOCK_POSITIONS
            keys = (block + 1) * BLOCK_POSITIONS
            stop = min(run.end, keys)
            length, row = stop - start, run.row + start - run.start
            mask = None
            if keys <= KEPT_MASK_KEYS:
                mask = _tile_mask(start, length, group, dtype, device)
            tiles.append(Tile(run.request_id, row, length, start, keys, mask))
            start = stop
    return Rows(runs, tiles)


def _tile_mask(
    start: int, length: int, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    keys = (start // BLOCK_POSITIONS + 1) * BLOCK_POSITIONS
    rows = length * group
    padded = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
    mask = torch.zeros((1, 1, padded, keys), dtype=dtype, device=device)
    positions = torch.arange(start, start + length, device=device).repeat_interleave(group)
    tail = torch.arange(keys - BLOCK_POSITIONS, keys, device=device)
    hidden = tail[None, :] > positions[:, None]
    mask[0, 0, :rows, keys - BLOCK_POSITIONS :].masked_fill_(hidden, float("-inf"))
    return mask


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """torch's CPU attention chooses its kernel by the number of threads, and the bits with it."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@ATTENTION
def attend(
    q: Tensor, k: Tensor, v: Tensor, rows_of_step: Rows, store_of: Callable[[int], Tensor]
) -> Tensor:
    """Write the new keys and values by position, then attend.

    `q` [rows, units, group, head_dim], `k` and `v` [rows, units, head_dim], all in the cache's
    dtype. `store_of(request)` is [units, 2, capacity, head_dim]: the cache of one layer. Returns
    [units, rows, group * head_dim]; rows outside every tile are zero.
    """
    rows, units, group, head_dim = q.shape
    for run in rows_of_step.runs:
        store = store_of(run.request_id)
        last = run.row + run.end - run.start
        store[:, 0, run.start : run.end] = k[run.row : last].transpose(0, 1)
        store[:, 1, run.start : run.end] = v[run.row : last].transpose(0, 1)
    out = torch.zeros((units, rows, group * head_dim), dtype=q.dtype, device=q.device)
    with _one_thread(q.device):
        for tile in rows_of_step.tiles:
            store = store_of(tile.request_id)
            query_rows = tile.length * group
            mask = tile.mask
            if mask is None:
                mask = _tile_mask(tile.start, tile.length, group, q.dtype, q.device)
            query = torch.zeros((1, units, mask.shape[2], head_dim), dtype=q.dtype, device=q.device)
            mine = q[tile.row : tile.row + tile.length]
            query[0, :, :query_rows] = mine.transpose(0, 1).reshape(units, query_rows, head_dim)
            mixed = functional.scaled_dot_product_attention(
                query,
                store[None, :, 0, : tile.keys],
                store[None, :, 1, : tile.keys],
                attn_mask=mask,
            )
            out[:, tile.row : tile.row + tile.length] = mixed[0, :, :query_rows].reshape(
                units, tile.length, group * head_dim
            )
    return out
