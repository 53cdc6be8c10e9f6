"""Attention of one step's slots over the KV cache, tile by tile, with bits that depend on a
position's own keys only.

A tile is what a slot asks of one block of 64 positions. Its keys run to the end of that block with
the tail masked, whatever else is in the batch; the query heads of a KV head are rows of one query,
padded to a multiple of 4 (`scaled_dot_product_attention(enable_gqa=True)` is neither as fast nor
independent of the batch). Decode is a tile of one position: prefill and decode are one formulation.

torch's kernel chooses its blocks by the number of threads, and the bits with them, so that it is
always called with one. Where there is much to do the head units are shared out to threads of ours,
each of which calls it with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.model.kernels import library
from p2pinfer.model.kv_cache import KvCache, Layers
from p2pinfer.model.stopwatch import ATTENTION

ROW_MULTIPLE = 4
"""Of query rows. With one or two torch's kernel gives other bits; with these it gives a row the
same in any number of them, and takes a fifth less time than with eight (decision 5)."""

KEPT_MASK = 1 << 20
"""Masks of tiles with more query rows times keys are not kept: those of a long prompt would take
gigabytes. A whole block's in groups of four have so many with 4,096 keys, one position's never."""

SHARED = 1 << 17
"""Of units times query rows times keys: with fewer, to wake another thread takes about as long as
it saves (a core does a hundred thousand in a millisecond)."""


class _Threads:
    """Who helps the caller of attention; chosen once."""

    count = 1
    others: ThreadPoolExecutor | None = None


def use_threads(count: int) -> None:
    """Let attention be computed by `count` threads from now on, the caller's among them."""
    if _Threads.others is not None:
        _Threads.others.shutdown()
    _Threads.count = count
    _Threads.others = ThreadPoolExecutor(count - 1, "attention", _alone) if count > 1 else None


def _alone() -> None:
    """Threads and gradients are settings of the calling thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


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
            if length * group * keys <= KEPT_MASK:
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
    first = start % BLOCK_POSITIONS
    seen = _block_mask(group, dtype, device)[first * group : first * group + rows]
    mask[0, 0, :rows, keys - BLOCK_POSITIONS :] = seen
    return mask


@lru_cache(maxsize=16)
def _block_mask(group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each query row of a block sees of the keys of the block: [64 * group, 64]."""
    shape = BLOCK_POSITIONS, BLOCK_POSITIONS
    hidden = torch.full(shape, float("-inf"), dtype=dtype, device=device).triu(1)
    return hidden.repeat_interleave(group, dim=0)


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


class _Tile(NamedTuple):
    """Some units' part of a tile by the memory of one cache: where its queries are put together,
    [1, units, padded query rows, head_dim] with zeros beyond them; the same by position and head;
    where its keys and values lie, by layer [1, units, keys, head_dim]; where its results come out,
    as many as query rows; those of interest of them, and where they go, [1, units, query rows,
    head_dim], unless they come out there."""

    tile: Tile
    query: Tensor
    by_head: Tensor
    past: Layers
    out: Tensor
    taken: tuple[Tensor, Tensor] | None


class _Share(NamedTuple):
    """What one thread computes: some units of all tiles."""

    units: slice
    tiles: list[_Tile]


class StepAttention:
    """Attention of one step's rows over one cache, in which all of its requests are open.

    What does not change from layer to layer is made once, and together: between products, which
    leave no cache as it was, a view takes torch many times as long. Results are in `dtype`.
    """

    def __init__(self, cache: KvCache, rows: int, of_step: Rows, group: int, dtype: torch.dtype):
        shape = cache.shape
        units, head_dim, self._device = shape.units, shape.head_dim, shape.device
        self._group, self._kv_dtype = group, shape.dtype
        self._mix = _mix_of(shape.dtype, shape.device)
        self._written = []
        for run in of_step.runs:
            last = run.row + run.end - run.start
            new = cache.layers(run.request_id, run.start, run.end)
            self._written.append((run.row, last, *new))
        self._out = torch.zeros((units, rows, group * head_dim), dtype=dtype, device=self._device)
        self._whole = len(of_step.tiles) == 1
        """One tile, and so one run, has all rows."""
        into = self._out.view(1, units, rows * group, head_dim)
        tiles = []
        for tile in of_step.tiles:
            count = tile.length * group
            padded = -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
            query = torch.zeros(
                (1, units, padded, head_dim), dtype=shape.dtype, device=self._device
            )
            by_head = query[0, :, :count].view(units, tile.length, group, head_dim)
            keys, values = cache.layers(tile.request_id, 0, tile.keys)
            past = Layers(tuple(each[None] for each in keys), tuple(each[None] for each in values))
            first = tile.row * group
            place = into[:, :, first : first + count]
            if self._mix is _by_torch or (padded == count and dtype is shape.dtype):
                tiles.append(_Tile(tile, query, by_head, past, place, None))
            else:
                out = torch.empty_like(query)
                tiles.append(_Tile(tile, query, by_head, past, out, (place, out[:, :, :count])))
        work = sum(each.query.shape[1] * each.query.shape[2] * each.tile.keys for each in tiles)
        threads = _Threads.count if work >= SHARED and self._device.type == "cpu" else 1
        self._shares = _shared(tiles, units, min(threads, units))

    @ATTENTION
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the new keys and values of a layer (0 is the cache's first) by position, then
        attend.

        `q` [units, rows, group, head_dim], `k` and `v` [units, rows, head_dim], of the rows of all
        runs; they are rounded to the cache's number format. Returns [units, rows, group *
        head_dim], good until the next call, with as many rows as were asked for: those outside
        every tile are zero.
        """
        for row, last, keys, values in self._written:
            keys[layer].copy_(k if self._whole else k[:, row:last])
            values[layer].copy_(v if self._whole else v[:, row:last])
        mine, *others = self._shares
        helpers = [_submit(self._attend, layer, q, share) for share in others]
        with _one_thread(self._device):
            self._attend(layer, q, mine)
        for helper in helpers:
            helper.result()
        return self._out

    def _attend(self, layer: int, q: Tensor, share: _Share) -> None:
        if len(self._shares) > 1:
            q = q[share.units]
        for tile, query, by_head, past, out, taken in share.tiles:
            by_head.copy_(q if self._whole else q[:, tile.row : tile.row + tile.length])
            mask = tile.mask if tile.mask is not None else self._mask(tile)
            self._mix(query, past.keys[layer], past.values[layer], mask, out)
            if taken is not None:
                place, results = taken
                place.copy_(results)

    def _mask(self, tile: Tile) -> Tensor:
        return _tile_mask(tile.start, tile.length, self._group, self._kv_dtype, self._device)


Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Of queries [1, units, query rows, head_dim], keys and values [1, units, keys, head_dim] and a
mask [1, 1, query rows, keys], into memory [1, units, query rows, head_dim]. torch's also takes
memory for fewer rows, and in another number format."""


def _mix_of(dtype: torch.dtype, device: torch.device) -> Mix:
    """Scaled dot product attention by the fastest kernel whose bits do not depend on other rows: in
    float32 ZenDNN's do."""
    if dtype is torch.bfloat16 and library(dtype, device) == "zendnn":
        return _by_zendnn
    return _by_torch


def _by_zendnn(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, out: Tensor) -> None:
    torch.ops.zentorch.zentorch_sdpa.out(query, keys, values, attn_mask=mask, out=out)


def _by_torch(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, out: Tensor) -> None:
    mixed, rows = functional.scaled_dot_product_attention(query, keys, values, mask), out.shape[2]
    out.copy_(mixed if mixed.shape[2] == rows else mixed[:, :, :rows])


def _submit(attend: Callable[[int, Tensor, _Share], None], *given: Any) -> Future[None]:
    assert _Threads.others is not None, "there are shares for them"
    return _Threads.others.submit(attend, *given)


def _shared(tiles: Sequence[_Tile], units: int, count: int) -> list[_Share]:
    """Cut the units of tiles into as many shares."""
    if count == 1:
        return [_Share(slice(0, units), list(tiles))]
    bounds = [units * place // count for place in range(count + 1)]
    cuts = [slice(start, end) for start, end in pairwise(bounds)]
    return [_Share(cut, [_of_units(tile, cut) for tile in tiles]) for cut in cuts]


def _of_units(whole: _Tile, cut: slice) -> _Tile:
    past = Layers(*(tuple(layer[:, cut] for layer in each) for each in whole.past))
    taken = whole.taken and (whole.taken[0][:, cut], whole.taken[1][:, cut])
    query, by_head = whole.query[:, cut], whole.by_head[cut]
    return _Tile(whole.tile, query, by_head, past, whole.out[:, cut], taken)
