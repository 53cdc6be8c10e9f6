"""The block pool: worst cases are reserved whole, or not at all."""

from __future__ import annotations

import pytest

from p2pinfer.core.blocks import BLOCK_POSITIONS, BlockPool, blocks_for


def test_positions_are_rounded_up_to_blocks() -> None:
    """A block has 64 positions, and a part of one counts as one."""
    assert BLOCK_POSITIONS == 64
    assert [blocks_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_a_reservation_holds_until_it_is_freed() -> None:
    """What does not fit reserves nothing; freed blocks can be reserved again."""
    pool = BlockPool(3)
    assert pool.reserve(1, 128)
    assert not pool.reserve(2, 65)
    assert (pool.used, pool.limit) == (2, 3)
    assert pool.reserve(3, 64)
    assert pool.used == 3
    pool.free(1)
    assert pool.used == 1
    assert pool.reserve(2, 65)


def test_freeing_what_is_not_reserved_is_harmless() -> None:
    """A request may be freed twice."""
    pool = BlockPool(1)
    pool.free(7)
    assert pool.used == 0


def test_reserving_twice_is_a_defect() -> None:
    """A second reservation of a request is a `ValueError`."""
    pool = BlockPool(2)
    pool.reserve(0xAB, 1)
    with pytest.raises(ValueError, match="0xab"):
        pool.reserve(0xAB, 1)


def test_an_empty_pool_tells_what_could_ever_fit() -> None:
    """`fits` looks at the limit, not at what is reserved now."""
    pool = BlockPool(2)
    pool.reserve(1, 128)
    assert pool.fits(128)
    assert not pool.fits(129)


def test_a_pool_without_blocks_is_refused() -> None:
    """Nothing could ever be served with less than one block."""
    with pytest.raises(ValueError, match="at least 1 block"):
        BlockPool(0)
