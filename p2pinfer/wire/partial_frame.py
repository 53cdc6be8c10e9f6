"""A PARTIAL whose memory is kept: written in place, and stamped anew for each step.

While a reply is decoded, the partials of a half layer are alike but for step, number, layer and
tensor. So are those that others send: what is due next on a link is known up to its tensor, and
comparing one run of bytes says whether it came, as TCP's header prediction does (Jacobson, 1990).
What differs in any way is for `codec.decode`.
"""

from __future__ import annotations

from struct import Struct

from p2pinfer.types import Fence
from p2pinfer.wire import codec, data_frames
from p2pinfer.wire.messages import Partial
from p2pinfer.wire.tensors import ITEM_BYTES, Tensor, WireDType

_STAMP = Struct("<qqBBH")
"""step, link_seq, sender, stage, layer: of these the third and fourth never change."""

_STAMP_AT = codec.HEADER.size + Struct("<qq").size
assert data_frames.HEADER.format.startswith("<qq" + _STAMP.format[1:]), "these are its fields"


class PartialFrame:
    """The frame of a partial of `parts`, each [rows, hidden], that `sender` sends in one half of
    the layers of a stage.

    `tensor` is [parts, rows, hidden] and lies in `memory`, which is the whole frame. Raises
    `LocalProtocolError` for what `codec.encode` would not send.
    """

    def __init__(
        self,
        fence: Fence,
        place: tuple[int, int, int],
        parts: tuple[int, ...],
        dtype: WireDType,
        shape: tuple[int, int],
    ) -> None:
        """`place`: sender, stage, half. `shape`: rows, hidden."""
        sender, stage, half = place
        whole = (len(parts), *shape)
        nbytes = whole[0] * whole[1] * whole[2] * ITEM_BYTES[dtype]
        start = codec.HEADER.size + data_frames.partial_head_bytes(len(parts))
        self.memory = memoryview(bytearray(start + nbytes))
        self.tensor = Tensor(dtype, whole, self.memory[start:])
        self.half = half
        self._sender, self._stage = sender, stage
        empty = Partial(
            fence=fence,
            step=0,
            link_seq=0,
            sender=sender,
            stage=stage,
            layer=0,
            half=half,
            parts=parts,
            tensor=self.tensor,
        )
        self._head = bytearray(b"".join(codec.pieces(empty)[:-1]))

    def stamp(self, step: int, link_seq: int, layer: int) -> None:
        """The frame to be sent, or due, is that of this layer in this step."""
        _STAMP.pack_into(self._head, _STAMP_AT, step, link_seq, self._sender, self._stage, layer)

    def sealed(self) -> memoryview:
        """The whole frame, with the head as it was stamped; good until the next stamp or tensor."""
        self.memory[: len(self._head)] = self._head
        return self.memory

    def arrived(self) -> bool:
        """Whether what was received into `memory` begins as it was stamped."""
        return self.memory[: len(self._head)] == self._head
