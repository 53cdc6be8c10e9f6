"""How much KV cache the running requests may come to use, counted in blocks as in vLLM.

A request's worst case, prompt and `max_tokens`, is reserved when it is admitted, so that no running
request ever has to give its place back. The storage itself is contiguous virtual memory, which the
operating system pages in as it is written, as in vAttention (Prabhu et al., 2024): no block table
translates addresses, blocks are for the limit only.
"""

from __future__ import annotations

BLOCK_POSITIONS = 64


def blocks_for(positions: int) -> int:
    """Blocks that hold `positions`."""
    return -(-positions // BLOCK_POSITIONS)


class BlockPool:
    """`limit_blocks` blocks and who reserved how many of them."""

    def __init__(self, limit_blocks: int) -> None:
        if limit_blocks < 1:
            raise ValueError(f"a block pool needs at least 1 block, not {limit_blocks}")
        self._limit = limit_blocks
        self._reserved: dict[int, int] = {}

    @property
    def limit(self) -> int:
        """Blocks there are."""
        return self._limit

    @property
    def used(self) -> int:
        """Blocks reserved now."""
        return sum(self._reserved.values())

    def fits(self, positions: int) -> bool:
        """Whether an empty pool could hold that many positions."""
        return blocks_for(positions) <= self._limit

    def reserve(self, request_id: int, positions: int) -> bool:
        """Reserve blocks for a request; False, and nothing reserved, when they are not free now.

        Raises `ValueError` when the request has blocks already.
        """
        if request_id in self._reserved:
            raise ValueError(f"request {request_id:#x} has its blocks already")
        blocks = blocks_for(positions)
        if self.used + blocks > self._limit:
            return False
        self._reserved[request_id] = blocks
        return True

    def free(self, request_id: int) -> None:
        """Give a request's blocks back; a request without blocks is no error."""
        self._reserved.pop(request_id, None)
