"""Matrix products whose bits do not depend on how many rows run together, on slicing or on threads.

The one seam between the model's code and product libraries: `pack` turns a weight into a callable.
On CPUs it is ZenDNN's linear, on processors that it is made for, or oneDNN's, both with weights in
layouts of their own. oneDNN's is called by the operators that `torch.compile`'s own CPU backend
uses, which are private to torch; where `kernels` finds neither, it is
`torch.nn.functional.linear`. Rows are padded to `MIN_ROWS`: with fewer,
both libraries take other kernels with other bits (and oneDNN's takes twice as long in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.model.kernels import library
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

    @property
    def like(self) -> Tensor:
        """A tensor [0, out] with the form of what comes out."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether `into` makes what comes out where it is to be."""
        ...

    def into(self, out: Tensor, x: Tensor, /) -> None:
        """Put what comes out of `x`, with `MIN_ROWS` rows or more, into `out` [rows, out]."""
        ...


def padded_rows(rows: int, quant: str = "none") -> int:
    """How many rows a batch of `rows` is computed with, by weights that are quantised so (whose
    graphs fill up what they need by themselves)."""
    return max(rows, MIN_ROWS) if quant == "none" else rows


def _pad(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, MIN_ROWS - x.shape[0]))


class ZendnnLinear:
    """ZenDNN's linear with the weight in its blocked layout."""

    in_place = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.nbytes, self.like = weight.nbytes, weight.new_empty((0, len(weight)))
        self._bias = bias
        self._weight = torch.ops.zentorch.zentorch_weight_prepack_for_linear(weight.contiguous())
        self._product = torch.ops.zentorch.zentorch_linear_unary.default
        self._product_into = torch.ops.zentorch.zentorch_linear_unary.out

    @PRODUCTS
    def __call__(self, x: Tensor, /) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            padded = _pad(x)
            return self._product(padded, self._weight, self._bias, is_weight_prepacked=True)[:rows]  # type: ignore[no-any-return]
        return self._product(x, self._weight, self._bias, is_weight_prepacked=True)  # type: ignore[no-any-return]

    @PRODUCTS
    def into(self, out: Tensor, x: Tensor, /) -> None:
        """See `Linear.into`."""
        self._product_into(x, self._weight, self._bias, is_weight_prepacked=True, out=out)


class OnednnLinear:
    """oneDNN's linear with the weight in oneDNN's own blocked layout."""

    in_place = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.nbytes, self.like = weight.nbytes, weight.new_empty((0, len(weight)))
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MIN_ROWS)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    @PRODUCTS
    def __call__(self, x: Tensor, /) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            return self._product(_pad(x), self._weight, self._bias, "none", [], "")[:rows]  # type: ignore[no-any-return]
        return self._product(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]

    def into(self, out: Tensor, x: Tensor, /) -> None:
        """See `Linear.into`."""
        out.copy_(self(x))


class PlainLinear:
    """`torch.nn.functional.linear`: on accelerators, and where oneDNN lacks the number format."""

    in_place = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.nbytes, self.like = weight.nbytes, weight.new_empty((0, len(weight)))
        self._weight = weight.contiguous()
        self._bias = bias

    @PRODUCTS
    def __call__(self, x: Tensor, /) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            return functional.linear(_pad(x), self._weight, self._bias)[:rows]
        return functional.linear(x, self._weight, self._bias)

    def into(self, out: Tensor, x: Tensor, /) -> None:
        """See `Linear.into`."""
        out.copy_(self(x))


_LINEARS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "zendnn": ZendnnLinear,
    "onednn": OnednnLinear,
    "torch": PlainLinear,
}


def pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Make `weight` [out, in] (and `bias` [out]) ready to multiply; the weight may be freed after.

    The best kernel for the weight's device and dtype is chosen here and nowhere else.
    """
    return _LINEARS[library(weight.dtype, weight.device)](weight, bias)


class SideBySide:
    """Products that each have an input of their own, put into one `memory` [products, rows, out]:
    as they are made, where the library does that (of `MIN_ROWS` or more)."""

    def __init__(self, products: Sequence[Linear], rows: int) -> None:
        like = products[0].like
        self.memory = like.new_empty((len(products), rows, like.shape[1]))
        self._places = self.memory.unbind()
        self._products = products
        self._in_place = rows >= MIN_ROWS and all(each.in_place for each in products)

    def multiply(self, inputs: Iterable[Tensor]) -> None:
        """Compute the products of `inputs`, [rows, in] each."""
        if self._in_place:
            for product, place, x in zip(self._products, self._places, inputs, strict=True):
                product.into(place, x)
        else:
            each = [product(x) for product, x in zip(self._products, inputs, strict=True)]
            torch.stack(each, out=self.memory)
