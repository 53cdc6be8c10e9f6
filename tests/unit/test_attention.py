"""Attention's bits: by several threads as by one, and of a position alone as among others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pinfer.model import attention, kernels, zendnn
from p2pinfer.model.attention import SHARED, Run, StepAttention, make_rows
from p2pinfer.model.kv_cache import KvCache, KvShape

CPU = torch.device("cpu")
LIBRARIES = ("onednn",) if zendnn.missing() else ("onednn", "zendnn")
HEAD_DIM = 16
LAYERS = 2


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Later tests get no helpers, and torch's threads are as they were."""
    before = torch.get_num_threads()
    yield
    attention.use_threads(1)
    kernels.use("auto")
    assert torch.get_num_threads() == before


def filled(units: int, dtype: torch.dtype, lengths: list[int], seed: int) -> KvCache:
    """A cache with a request of each length, all of whose keys and values are random."""
    draw = torch.Generator().manual_seed(seed)
    cache = KvCache(KvShape(units, LAYERS, HEAD_DIM, dtype, CPU))
    for request_id, length in enumerate(lengths):
        cache.open(request_id, length)
        for layer in (each for both in cache.layers(request_id, 0, length) for each in both):
            layer.copy_(torch.randn(layer.shape, generator=draw))
    return cache


def attended(cache: KvCache, runs: list[Run], group: int, seed: int) -> list[Tensor]:
    """What each layer's attention gives for random queries."""
    draw = torch.Generator().manual_seed(seed)
    rows, units = sum(run.end - run.start for run in runs), cache.shape.units
    step = StepAttention(
        cache, rows, make_rows(runs, group, cache.shape.dtype, CPU), group, torch.float32
    )
    q = torch.randn((units, rows, group, HEAD_DIM), generator=draw)
    k, v = (torch.randn((units, rows, HEAD_DIM), generator=draw) for _ in range(2))
    with torch.no_grad():
        return [step.attend(layer, q, k, v).clone() for layer in range(LAYERS)]


@settings(deadline=None, max_examples=25)
@given(
    units=st.integers(1, 5),
    group=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lengths=st.lists(st.integers(600, 2500), min_size=1, max_size=3),
    new=st.integers(1, 150),
    threads=st.integers(2, 4),
    library=st.sampled_from(LIBRARIES),
    seed=st.integers(0, 99),
)
def test_the_bits_are_those_of_one_thread(  # noqa: PLR0917
    units: int,
    group: int,
    dtype: torch.dtype,
    lengths: list[int],
    new: int,
    threads: int,
    library: str,
    seed: int,
) -> None:
    """However many units, slots and rows there are to be shared out."""
    kernels.use(library)
    cache, runs, row = filled(units, dtype, lengths, seed), [], 0
    for request_id, length in enumerate(lengths):
        runs.append(Run(request_id, row, length - new, length))
        row += new
    attention.use_threads(1)
    alone = attended(cache, runs, group, seed)
    attention.use_threads(threads)
    for ours, theirs in zip(attended(cache, runs, group, seed), alone, strict=True):
        assert torch.equal(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    length=st.integers(1, 5000),
    new=st.integers(1, 130),
    library=st.sampled_from(LIBRARIES),
    seed=st.integers(0, 99),
)
def test_a_position_by_itself_has_the_bits_that_it_has_among_others(  # noqa: PLR0917
    group: int, head_dim: int, dtype: torch.dtype, length: int, new: int, library: str, seed: int
) -> None:
    """However few rows its tile has then, and however many keys there are."""
    kernels.use(library)
    draw = torch.Generator().manual_seed(seed)
    cache = KvCache(KvShape(2, 1, head_dim, dtype, CPU))
    cache.open(0, length)
    for both in cache.layers(0, 0, length):
        both[0].copy_(torch.randn(both[0].shape, generator=draw))
    first = max(0, length - new)
    q = torch.randn((2, length - first, group, head_dim), generator=draw)
    k, v = (torch.randn((2, length - first, head_dim), generator=draw) for _ in range(2))

    def attend(start: int, end: int) -> Tensor:
        rows = make_rows([Run(0, 0, first + start, first + end)], group, dtype, CPU)
        step = StepAttention(cache, end - start, rows, group, torch.float32)
        own = slice(start, end)
        with torch.no_grad():
            return step.attend(0, q[:, own], k[:, own], v[:, own])

    together = attend(0, length - first)
    for place in sorted({0, (length - first) // 2, length - first - 1}):
        assert torch.equal(attend(place, place + 1)[:, 0], together[:, place])


def test_what_a_helper_raises_is_raised() -> None:
    """A step does not go on with what was not computed."""
    cache, keys = filled(2, torch.float32, [SHARED], 0), SHARED
    attention.use_threads(2)
    of_step = make_rows([Run(0, 0, keys - 1, keys)], 1, torch.float32, CPU)
    step = StepAttention(cache, 1, of_step, 1, torch.float32)
    k = torch.zeros((2, 1, HEAD_DIM))
    queries_of_one_unit = torch.zeros((1, 1, 1, HEAD_DIM))
    with pytest.raises(RuntimeError, match="shape"):
        step.attend(0, queries_of_one_unit, k, k)
