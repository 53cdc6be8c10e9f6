"""Weights by block: small integers with a scale, and for int4 a zero point, per block of a row.

int8 is symmetric: 127 is the largest magnitude of the block. int4 is asymmetric: 0 and 15 are its
least and greatest value, or zero where that lies outside; or a part of both, where that leaves a
smaller squared error: few weights lie beyond, and all others are nearer. The layout is that of
onnxruntime's `MatMulNBits`. Outliers of a few input features spoil the blocks in which they lie and
no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.units import BlockFormat

SYMMETRIC_ZERO = 128
"""What stands for zero in unsigned bytes."""

RANGES = (1.0, 0.92, 0.84, 0.76)
"""What part of a block's range int4 may stand for; each more to try takes as long again."""

PORTION_WEIGHTS = 1 << 19
"""Weights quantised at a time: what is needed meanwhile stays in a core's cache."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A matrix [rows, inputs].

    `values` is uint8 [rows, blocks, bytes per block], of int4 the earlier of two in the lower half
    of a byte; `scales` float32 [rows, blocks]; `zeros` uint8 [rows, half of the blocks, rounded
    up], packed alike, or None where `SYMMETRIC_ZERO` is zero everywhere. A last block that is not
    full ends in zeros. `bias` is float32 [rows].
    """

    form: BlockFormat
    inputs: int
    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many outputs a product with it has."""
        return self.values.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the product library holds of it (`BlockFormat.held_bytes`)."""
        return self.form.held_bytes(self.rows, self.inputs)


def quantise(weight: Tensor, form: BlockFormat) -> QuantisedWeight:
    """Quantise `weight` [rows, inputs], of any floating-point format, on the CPU."""
    rows, inputs = weight.shape
    portion = max(1, PORTION_WEIGHTS // inputs)
    bounds = [*range(0, rows, portion), rows]
    quantised = [_portion(weight[a:b], form) for a, b in pairwise(bounds)]
    values, scales, zeros = zip(*quantised, strict=True)
    return QuantisedWeight(
        form=form,
        inputs=inputs,
        values=torch.cat(values),
        scales=torch.cat(scales),
        zeros=torch.cat(zeros) if form.zero_points else None,
    )


def stacked(weights: list[QuantisedWeight], bias: Tensor | None) -> QuantisedWeight:
    """One weight of several, one above the other, with a bias [rows]."""
    first = weights[0]
    return QuantisedWeight(
        form=first.form,
        inputs=first.inputs,
        values=torch.cat([each.values for each in weights]),
        scales=torch.cat([each.scales for each in weights]),
        zeros=torch.cat([_zeros(each) for each in weights]) if first.form.zero_points else None,
        bias=None if bias is None else bias.float(),
    )


def dequantise(weight: QuantisedWeight) -> Tensor:
    """What the integers stand for: [rows, inputs] float32."""
    values = weight.values
    if weight.form.bits == 4:
        values = _halves(values)
        zeros = _halves(_zeros(weight))[:, : values.shape[1], None].float()
    else:
        zeros = torch.tensor(float(SYMMETRIC_ZERO))
    exact = (values.float() - zeros) * weight.scales[..., None]
    return exact.flatten(1)[:, : weight.inputs]


def _portion(weight: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    short = -weight.shape[1] % form.block
    blocks = functional.pad(weight.float(), (0, short)).view(weight.shape[0], -1, form.block)
    if not form.zero_points:
        scales = torch.linalg.vector_norm(blocks, float("inf"), dim=-1) / 127
        values = (blocks * _inverse(scales)[..., None]).round_().add_(SYMMETRIC_ZERO)
        return values.to(torch.uint8), scales, scales.new_empty(0)
    values, scales, zeros = _within_best_range(blocks)
    return _in_halves(values.to(torch.uint8)), scales, _in_halves(_even(zeros.to(torch.uint8)))


def _within_best_range(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of 0 to 15, scales and zero points of `blocks` [rows, blocks, block], by that one of
    `RANGES` which leaves a block the smallest squared error."""
    least, most = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)
    values, scales, zeros = _within(blocks, least, most)
    error = _squared_error(blocks, values, scales, zeros)
    for part in RANGES[1:]:
        others = _within(blocks, least * part, most * part)
        other_error = _squared_error(blocks, *others)
        better = other_error < error
        error = torch.where(better, other_error, error)
        values = torch.where(better[..., None], others[0], values)
        scales = torch.where(better, others[1], scales)
        zeros = torch.where(better, others[2], zeros)
    return values, scales, zeros


def _within(blocks: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = (most - least) / 15
    inverse = _inverse(scales)
    zeros = (-least * inverse).round_()
    values = torch.addcmul(zeros[..., None], blocks, inverse[..., None]).round_().clamp_(0, 15)
    return values, scales, zeros


def _squared_error(blocks: Tensor, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Of each block; NaN, and so never smaller, where a weight is not finite."""
    off = torch.addcmul(blocks, values - zeros[..., None], scales[..., None], value=-1)
    return off.square_().sum(-1)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 for blocks of zeros, whose products are then exactly zero."""
    return torch.where(scales != 0, 1 / scales, 0)


def _even(values: Tensor) -> Tensor:
    return functional.pad(values, (0, values.shape[-1] % 2))


def _in_halves(values: Tensor) -> Tensor:
    """Two values of four bits to a byte."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _halves(packed: Tensor) -> Tensor:
    """The reverse of `_in_halves`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _zeros(weight: QuantisedWeight) -> Tensor:
    assert weight.zeros is not None, "the format has zero points"
    return weight.zeros
