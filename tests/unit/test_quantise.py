"""Weights by block: what the integers stand for is near what was quantised."""

from __future__ import annotations

import pytest
import torch

from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model.quantise import (
    PORTION_WEIGHTS,
    RANGES,
    SYMMETRIC_ZERO,
    dequantise,
    quantise,
    stacked,
)

SHAPES = ((16, 64), (5, 48), (33, 200), (7, 128), (3, 65))


@pytest.mark.parametrize("quant", QUANT_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_further_off_than_half_a_scale(
    quant: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Rounding is to the nearest integer, in every block, the last one too. At the ends of int4's
    range, where the zero point is rounded as well, and some may be cut off, it may be more."""
    torch.manual_seed(shape[1])
    weight = torch.randn(shape).to(dtype)
    weight[0, 0] = 100.0
    form = QUANT_FORMATS[quant]
    quantised = quantise(weight, form)
    off = (dequantise(quantised) - weight.float()).abs()
    scales = quantised.scales.repeat_interleave(form.block, dim=1)[:, : shape[1]]
    beyond = 1.01 + 15 * (1 / min(RANGES) - 1)
    assert (off <= (beyond if form.zero_points else 0.501) * scales).all()
    assert (off > 1.01 * scales).sum() <= off.numel() / 16, "few are cut off"
    assert (off[1:] < 1).all(), "an outlier spoils its own block only"


def test_int4_takes_the_range_with_the_smaller_error() -> None:
    """One weight of many at the end of the range is cut off, many there are not."""
    weight = torch.linspace(-1, 1, 256).repeat(2, 1)
    weight[:, 0], weight[:, -1] = -1.3, 1.3
    weight[1, 1:60], weight[1, -60:] = -1.3, 1.3
    scales = quantise(weight, QUANT_FORMATS["int4"]).scales
    best = 0.84  # the steps of a smaller part would be finer, but the ends further off
    assert best in RANGES
    assert torch.allclose(scales, torch.tensor([[best * 2.6 / 15], [2.6 / 15]]))


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_zeros_stay_zeros(quant: str) -> None:
    """A block of zeros has the scale 0, and a zero beside other weights is exact."""
    weight = torch.zeros(2, 128)
    weight[1, ::2] = torch.randn(64)
    quantised = quantise(weight, QUANT_FORMATS[quant])
    exact = dequantise(quantised)
    assert not quantised.scales[0].any()
    assert not exact[0].any()
    assert not exact[1, 1::2].any()


def test_large_weights_are_quantised_in_portions_and_alike() -> None:
    """What is quantised together does not matter."""
    weight = torch.randn(2 * PORTION_WEIGHTS // 2048 + 3, 2048)
    for form in QUANT_FORMATS.values():
        whole = quantise(weight, form)
        halves = stacked([quantise(weight[:100], form), quantise(weight[100:], form)], None)
        assert torch.equal(whole.values, halves.values)
        assert torch.equal(whole.scales, halves.scales)
        assert (whole.zeros is None) == (halves.zeros is None) == (not form.zero_points)
        assert whole.rows == weight.shape[0]


def test_the_layout_is_the_product_librarys() -> None:
    """The earlier of two weights, and of two blocks' zero points, is the lower half of a byte."""
    weight = torch.zeros(1, 512)
    weight[0, :256:2], weight[0, 1] = 15.0, 3.0
    weight[0, 256::2], weight[0, 257] = -15.0, -3.0
    quantised = quantise(weight, QUANT_FORMATS["int4"])
    assert quantised.zeros is not None
    assert quantised.scales.tolist() == [[1.0, 1.0]]
    assert quantised.zeros.tolist() == [[15 << 4]]
    assert quantised.values[0, :, 0].tolist() == [15 | 3 << 4, 0 | 12 << 4]
    assert quantise(weight, QUANT_FORMATS["int8"]).values[0, 0, 3] == SYMMETRIC_ZERO


def test_what_is_not_finite_stays_so() -> None:
    """A damaged weight is not turned into a plausible one."""
    weight = torch.ones(1, 64)
    weight[0, 5] = float("nan")
    for form in QUANT_FORMATS.values():
        assert not torch.isfinite(dequantise(quantise(weight, form))).all()
