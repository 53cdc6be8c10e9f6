"""Matrix products whose bits do not depend on how many rows run together, on slicing or on threads.

The one seam between the model's code and product libraries: `pack` turns a weight into a callable.
On CPUs it is oneDNN's prepacked linear, by the operators that `torch.compile`'s own CPU backend
uses; they are private to torch, so this module alone knows them, and falls back to
`torch.nn.functional.linear` where they are missing. Rows are padded to `MIN_ROWS`: with fewer,
oneDNN takes another kernel with other bits (and in bfloat16 half the speed).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.model.stopwatch import PRODUCTS

MIN_ROWS = 4
"""Fewest rows that a product runs with; fewer are padded by zeros."""


class Linear(Protocol):
    """`x` [rows, in] to [rows, out], in the weight's dtype; its time counts as `PRODUCTS`."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one call reads."""
        ...


def padded_rows(rows: int, quant: str = "none") -> int:
    """How many rows a batch of `rows` is computed with, by weights that are quantised so (whose
    graphs fill up what they need by themselves)."""
    return max(rows, MIN_ROWS) if quant == "none" else rows


def _pad(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, MIN_ROWS - x.shape[0]))


class PrepackedLinear:
    """oneDNN's linear with the weight in oneDNN's own blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.nbytes = weight.nbytes
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MIN_ROWS)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    @PRODUCTS
    def __call__(self, x: Tensor, /) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            return self._product(_pad(x), self._weight, self._bias, "none", [], "")[:rows]  # type: ignore[no-any-return]
        return self._product(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]


class PlainLinear:
    """`torch.nn.functional.linear`: on accelerators, and where oneDNN lacks the number format."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.nbytes = weight.nbytes
        self._weight = weight.contiguous()
        self._bias = bias

    @PRODUCTS
    def __call__(self, x: Tensor, /) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            return functional.linear(_pad(x), self._weight, self._bias)[:rows]
        return functional.linear(x, self._weight, self._bias)


def _prepacks(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Make `weight` [out, in] (and `bias` [out]) ready to multiply; the weight may be freed after.

    The best kernel for the weight's device and dtype is chosen here and nowhere else.
    """
    if _prepacks(weight):
        return PrepackedLinear(weight, bias)
    return PlainLinear(weight, bias)
