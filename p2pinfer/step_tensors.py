"""Tensors of steps as they lie on the wire, there and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pinfer.errors import StepBroken
from p2pinfer.wire.tensors import Tensor as WireTensor
from p2pinfer.wire.tensors import WireDType

_Numbers = NDArray[Any]
"""float32, or the bits of bfloat16 as int16."""

_BFLOAT16_EXPONENT = np.int16(0x7F80)
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


class FrameTensor:
    """A float32 or bfloat16 tensor that lies in a frame which is sent and received again and again:
    `values` are written and read in place."""

    def __init__(self, tensor: WireTensor) -> None:
        self._numbers = _numbers(tensor)
        dtype = torch.bfloat16 if tensor.dtype is WireDType.BFLOAT16 else torch.float32
        self.values = torch.from_numpy(self._numbers).view(dtype).view(tensor.shape)

    def is_finite(self) -> bool:
        """As the function of that name, of what is in it now."""
        return _are_finite(self._numbers)


def check_tensor(node_id: str, tensor: WireTensor, fits: bool, what: str) -> None:
    """Raise `StepBroken` for what a member has sent that cannot be computed with."""
    if not fits:
        raise StepBroken(node_id, f"{what} of the wrong size")
    if not is_finite(tensor):
        raise not_finite(node_id, what)


def not_finite(node_id: str, what: str) -> StepBroken:
    """To be raised where a member has computed what is no number."""
    return StepBroken(node_id, f"{what} not finite", broken=True)


def is_finite(tensor: WireTensor) -> bool:
    """Whether a float32 or bfloat16 wire tensor has no infinity and no NaN (of float32 the sum of
    squares keeps either, as it would a number beyond 1e18, which no model that works has)."""
    return _are_finite(_numbers(tensor))


def _numbers(tensor: WireTensor) -> _Numbers:
    """The float32 of a tensor, or the bits of its bfloat16."""
    bits = tensor.dtype is WireDType.BFLOAT16
    return np.frombuffer(tensor.data, np.int16 if bits else np.float32)


def _are_finite(numbers: _Numbers) -> bool:
    if numbers.dtype == np.int16:
        return not ((numbers & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    return math.isfinite(np.dot(numbers, numbers))
