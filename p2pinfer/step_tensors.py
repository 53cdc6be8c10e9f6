"""Tensors of steps as they lie on the wire, there and back."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pinfer.wire.tensors import Tensor as WireTensor
from p2pinfer.wire.tensors import WireDType

_BFLOAT16_EXPONENT = np.uint16(0x7F80)
"""All of these bits are set in an infinity and in a NaN, and in nothing else."""


def to_wire(values: Tensor | NDArray[np.float32] | NDArray[np.int32]) -> WireTensor:
    """A float32, bfloat16 or int32 tensor or array as it lies on the wire (no copy, if it is
    contiguous)."""
    if isinstance(values, Tensor):
        if not values.is_cpu:
            values = values.cpu()
        if values.dtype == torch.bfloat16:  # numpy does not know it: its bits go as they are
            bits = np.ascontiguousarray(values.view(torch.int16).numpy())
            return WireTensor(WireDType.BFLOAT16, tuple(bits.shape), bits.data.cast("B"))
        values = values.numpy()
    array = np.ascontiguousarray(values)
    kind = WireDType.INT32 if array.dtype == np.int32 else WireDType.FLOAT32
    return WireTensor(kind, tuple(array.shape), array.data.cast("B"))


def from_wire(tensor: WireTensor) -> Tensor:
    """A writable copy of a float32 or bfloat16 wire tensor."""
    if tensor.dtype is WireDType.BFLOAT16:
        half = torch.empty(tensor.shape, dtype=torch.bfloat16)
        bits = np.frombuffer(tensor.data, dtype=np.int16).reshape(tensor.shape)
        np.copyto(half.view(torch.int16).numpy(), bits)
        return half
    values = np.frombuffer(tensor.data, dtype=np.float32).reshape(tensor.shape)
    return torch.from_numpy(values.copy())


def is_finite(tensor: WireTensor) -> bool:
    """Whether a float32 or bfloat16 wire tensor has no infinity and no NaN (of float32 the sum of
    squares keeps either, as it would a number beyond 1e18, which no model that works has)."""
    if tensor.dtype is WireDType.BFLOAT16:
        exponents = np.frombuffer(tensor.data, np.uint16) & _BFLOAT16_EXPONENT
        return not (exponents == _BFLOAT16_EXPONENT).any()
    values = np.frombuffer(tensor.data, np.float32)
    return math.isfinite(np.dot(values, values))
