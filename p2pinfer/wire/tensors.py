"""A tensor as it lies on the wire: an element type, a shape and bytes (little-endian, C order)."""

from __future__ import annotations

from enum import IntEnum
from math import prod

from msgspec import Struct

from p2pinfer.errors import LocalProtocolError


class WireDType(IntEnum):
    """Element types and their numbers on the wire (append-only)."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT32 = 4


ITEM_BYTES: dict[WireDType, int] = {
    WireDType.FLOAT32: 4,
    WireDType.BFLOAT16: 2,
    WireDType.FLOAT16: 2,
    WireDType.INT32: 4,
}


class Tensor(Struct, frozen=True):
    """Element type, shape and the bytes themselves: a view into the frame, never a copy.

    Raises `LocalProtocolError` when the bytes are not as many as type and shape say, or are a view
    of something else than single bytes (`memoryview.cast("B")` makes one).
    """

    dtype: WireDType
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        view = memoryview(self.data)
        if view.format != "B" or view.ndim != 1:
            raise LocalProtocolError(
                "the bytes of a tensor must be a one-dimensional view of bytes"
            )
        if len(view) != self.nbytes:
            raise LocalProtocolError(
                f"a tensor {self.dtype.name} {self.shape} has {self.nbytes} bytes, not {len(view)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that type and shape call for."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]
