"""A partial that is written in place is the frame that `encode` makes of it, at every stamp."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import LocalProtocolError
from p2pinfer.limits import MAX_LAYERS, MAX_NODES, MAX_STAGES
from p2pinfer.types import Fence
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import Partial
from p2pinfer.wire.partial_frame import PartialFrame
from p2pinfer.wire.tensors import WireDType

NUMBERS = st.integers(0, 2**63 - 1)


PLACES = st.tuples(st.integers(0, MAX_NODES - 1), st.integers(0, MAX_STAGES - 1), st.integers(0, 1))
PARTS = st.lists(st.integers(0, 63), min_size=1, max_size=9, unique=True).map(tuple)
DTYPES = st.sampled_from([WireDType.FLOAT32, WireDType.BFLOAT16])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9))
STAMPS = st.tuples(NUMBERS, NUMBERS, st.integers(0, MAX_LAYERS - 1))


@given(
    of=st.tuples(st.builds(Fence, NUMBERS, NUMBERS), PLACES, PARTS, DTYPES, SHAPES),
    stamps=st.lists(STAMPS, min_size=1, max_size=3),
    data=st.data(),
)
def test_a_frame_is_what_encode_makes_of_it(
    of: tuple[Fence, tuple[int, int, int], tuple[int, ...], WireDType, tuple[int, int]],
    stamps: list[tuple[int, int, int]],
    data: st.DataObject,
) -> None:
    """Whatever was in it before; and one that came is known by every byte before its tensor."""
    frame = PartialFrame(*of)
    fence, (sender, stage, half), parts, _, _ = of
    for step, number, layer in stamps:
        values = data.draw(st.binary(min_size=frame.tensor.nbytes, max_size=frame.tensor.nbytes))
        frame.tensor.data[:] = values  # type: ignore[index] # a view of a bytearray
        frame.stamp(step, number, layer)
        expected = encode(
            Partial(
                fence=fence,
                step=step,
                link_seq=number,
                sender=sender,
                stage=stage,
                layer=layer,
                half=half,
                parts=parts,
                tensor=frame.tensor,
            )
        )
        assert frame.sealed() == expected
        assert frame.arrived()
        at = data.draw(st.integers(0, len(expected) - frame.tensor.nbytes - 1))
        frame.memory[at] ^= 1 << data.draw(st.integers(0, 7))
        assert not frame.arrived()


def test_what_encode_refuses_is_no_frame() -> None:
    """It is a defect of this program, and is told before anything is computed for it."""
    with pytest.raises(LocalProtocolError, match="twice"):
        PartialFrame(Fence(1, 1), (0, 0, 0), (1, 1), WireDType.FLOAT32, (1, 8))
    with pytest.raises(LocalProtocolError, match="half"):
        PartialFrame(Fence(1, 1), (0, 0, 2), (1,), WireDType.FLOAT32, (1, 8))
