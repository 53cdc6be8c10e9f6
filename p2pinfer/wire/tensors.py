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

    Raises `LocalProtocolError` when the bytes are not as many as type and shape say.
    """

    dtype: WireDType
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if memoryview(self.data).nbytes != self.nbytes:
            raise LocalProtocolError(
                f"a tensor {self.dtype.name} {self.shape} has {self.nbytes} bytes, "
                f"not {memoryview(self.data).nbytes}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that type and shape call for."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]
