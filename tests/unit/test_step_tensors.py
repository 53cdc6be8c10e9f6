"""Tensors of steps as they lie on the wire, there and back."""

from __future__ import annotations

import pytest
import torch

from p2pinfer.step_tensors import from_wire, is_finite, to_wire
from p2pinfer.wire.tensors import WireDType

BITS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
"""Every bfloat16 there is."""


def test_every_bfloat16_comes_back_with_its_bits() -> None:
    """Two bytes each, of any strides, and the copy can be written to."""
    values = BITS.view(torch.bfloat16).reshape(1, 256, 256)
    for sent in (values, values.transpose(1, 2)):
        wire = to_wire(sent)
        assert (wire.dtype, wire.nbytes) == (WireDType.BFLOAT16, 2 << 16)
        back = from_wire(wire)
        assert torch.equal(back.view(torch.int16), sent.contiguous().view(torch.int16))
        back += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_seen(value: float, dtype: torch.dtype) -> None:
    """One value in a thousand is enough; large ones are fine."""
    values = torch.full((2, 500), 1e15, dtype=dtype)
    assert is_finite(to_wire(values))
    values[1, 3] = value
    assert not is_finite(to_wire(values))


def test_all_finite_numbers_are_finite() -> None:
    """Of all bfloat16, those with the largest exponent are not."""
    values = BITS.view(torch.bfloat16)
    assert is_finite(to_wire(values[values.isfinite()]))
    assert not any(is_finite(to_wire(each[None])) for each in values[~values.isfinite()][::17])
