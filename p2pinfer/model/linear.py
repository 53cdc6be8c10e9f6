"""Matrix products whose bits do not depend on how many rows run together, on slicing or on threads.

The one seam between the model's code and product libraries: `pack` turns a weight into a callable.
On CPUs it is ZenDNN's linear, on processors that it is made for, or oneDNN's, both with weights in
layouts of their own. oneDNN's is called by the operators that `torch.compile`'s own CPU backend
uses, which are private to torch; where `kernels` finds neither, it is
`torch.nn.functional.linear`. Rows are padded to `MIN_ROWS`: with fewer,
both libraries take other kernels with other bits (and oneDNN's takes twice as long in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.model.kernels import library
from p2pinfer.model.stopwatch import PRODUCTS

MIN_ROWS = 4
"""Fewest rows that a product runs with; fewer are padded by zeros."""

MAX_JOINED_BYTES = 32 << 20
"""Of weights that are one product for one row. Reading more takes fifty times as long as the calls
that this saves, and to find out whether such weights can be joined takes twice their memory."""


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
        """Put what comes out of `x`, with `MIN_ROWS` rows or more, into `out` [rows, out]. (Of
        fewer a row may have other bits.)"""
        ...


def padded_rows(rows: int, quant: str = "none") -> int:
    """How many rows a batch of `rows` is computed with, by weights that are quantised so (whose
    graphs fill up what they need by themselves)."""
    return max(rows, MIN_ROWS) if quant == "none" else rows


def _pad(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, MIN_ROWS - x.shape[0]))


class ZendnnLinear:
    """ZenDNN's linear, of a weight `packed` in its blocked layout [out, in]."""

    in_place = True

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        self.nbytes, self.like = packed.nbytes, packed.new_empty((0, len(packed)))
        self.packed = packed
        self.shape = (packed.shape[0], packed.shape[1])
        self.bias = bias
        self._product = torch.ops.zentorch.zentorch_linear_unary.default
        self._product_into = torch.ops.zentorch.zentorch_linear_unary.out

    @PRODUCTS
    def __call__(self, x: Tensor, /) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            padded = _pad(x)
            return self._product(padded, self.packed, self.bias, is_weight_prepacked=True)[:rows]  # type: ignore[no-any-return]
        return self._product(x, self.packed, self.bias, is_weight_prepacked=True)  # type: ignore[no-any-return]

    @PRODUCTS
    def into(self, out: Tensor, x: Tensor, /) -> None:
        """See `Linear.into`."""
        self._product_into(x, self.packed, self.bias, is_weight_prepacked=True, out=out)


def _packed(weight: Tensor) -> Tensor:
    """A weight [out, in] in ZenDNN's blocked layout."""
    packed: Tensor = torch.ops.zentorch.zentorch_weight_prepack_for_linear(weight.contiguous())
    return packed


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
    "zendnn": lambda weight, bias: ZendnnLinear(_packed(weight), bias),
    "onednn": OnednnLinear,
    "torch": PlainLinear,
}


def pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Make `weight` [out, in] (and `bias` [out]) ready to multiply; the weight may be freed after.

    The best kernel for the weight's device and dtype is chosen here and nowhere else.
    """
    return _LINEARS[library(weight.dtype, weight.device)](weight, bias)


class Joined(NamedTuple):
    """So `many` products of equal shapes as one, which has the columns of all."""

    product: Linear
    many: int


def join(products: Sequence[Linear]) -> tuple[Joined, ...]:
    """Lay weights of equal shapes together, of up to `MIN_ROWS` products that follow one another;
    each product goes on with its part of that memory. Empty where packed weights are not of that
    kind, or there is only one."""
    linears = [each for each in products if isinstance(each, ZendnnLinear) and each.bias is None]
    if len(linears) < max(2, len(products)) or len({each.shape for each in linears}) > 1:
        return ()
    # As equal as can be: one row by itself would have other bits.
    count, groups = len(linears), -(-len(linears) // MIN_ROWS)
    cuts = pairwise(count * place // groups for place in range(groups + 1))
    parts = [linears[start:end] for start, end in cuts]
    if not all(_can_join(len(part), part[0].shape, part[0].like.dtype) for part in parts):
        return ()
    return tuple(Joined(_joined(part), len(part)) for part in parts)


def _joined(linears: Sequence[ZendnnLinear]) -> ZendnnLinear:
    whole = torch.cat([each.packed for each in linears])
    for linear, part in zip(linears, torch.split(whole, linears[0].shape[0]), strict=True):
        linear.packed = part
    return ZendnnLinear(whole, None)


@lru_cache(maxsize=64)
def _can_join(count: int, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether ZenDNN's layout of `count` weights one above the other is that of each in turn, and
    a row for each of them has the bits that it has alone."""
    height, width = shape
    if count * height * width * dtype.itemsize > MAX_JOINED_BYTES:
        return False
    drawn = torch.Generator().manual_seed(0)
    weights = torch.randn((count * height, width), generator=drawn, dtype=dtype)
    x = torch.randn((count, width), generator=drawn, dtype=dtype)
    together = ZendnnLinear(_packed(weights), None)
    found = torch.empty((count, count * height), dtype=dtype)
    together.into(found, x)
    for place, weight in enumerate(torch.split(weights, height)):
        own, columns = _packed(weight), slice(place * height, (place + 1) * height)
        alone = ZendnnLinear(own, None)(x[place : place + 1])
        same = torch.equal(own, together.packed[columns])
        if not (same and torch.equal(alone[0], found[place, columns])):
            return False
    return True


Inputs = Tensor | Sequence[Tensor]
"""[rows, in] of each product."""


class SideBySide:
    """Products that each have an input of their own, one after the other: into one memory as they
    are made, where the library does that (of `MIN_ROWS` or more).

    `rows` are those of interest, and all that the inputs have.
    """

    def __init__(self, products: Sequence[Linear], rows: tuple[int, int]) -> None:
        like = products[0].like
        self._memory = like.new_empty((len(products), rows[1], like.shape[1]))
        self._places = self._memory.unbind()
        self.results: tuple[Tensor, ...] = (self._memory[:, : rows[0]],)
        """What comes out, of products that follow one another: [products, rows, out]."""
        self._products = products
        self._in_place = rows[1] >= MIN_ROWS and all(each.in_place for each in products)
        self._seen: Inputs = ()
        self._inputs: Sequence[Tensor] = ()

    def multiply(self, inputs: Inputs) -> None:
        """Compute the products of `inputs`."""
        if inputs is not self._seen:
            self._seen = inputs
            self._inputs = inputs.unbind() if isinstance(inputs, Tensor) else inputs
        if self._in_place:
            for product, place, x in zip(self._products, self._places, self._inputs, strict=True):
                product.into(place, x)
        else:
            each = [product(x) for product, x in zip(self._products, self._inputs, strict=True)]
            torch.stack(each, out=self._memory)


class _FirstRows:
    """The first rows of inputs, `counts` of them together. What was cut last is known: the layers
    of a step attend into one memory."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = list(counts)
        self._last: tuple[Inputs, Sequence[Tensor]] = (), ()

    @classmethod
    @lru_cache(maxsize=64)
    def shared(cls, counts: tuple[int, ...]) -> _FirstRows:
        """The one of these counts that all layers have."""
        return cls(counts)

    def of(self, inputs: Tensor) -> Sequence[Tensor]:
        """Of `inputs` [products, rows, in], views [count, in]."""
        seen, rows = self._last
        if inputs is not seen:
            rows = torch.split(inputs.select(1, 0), self._counts)
            self._last = inputs, rows
        return rows


class Diagonal:
    """Products of one row each: row n of what a joined product is given is for the nth of its
    products, and what it has in the columns of others is dropped.

    Such rows take the place of filler: fewer calls compute no more. `join` has seen that each has
    the bits that it has alone, also of two and three products.
    """

    def __init__(self, joined: Sequence[Joined]) -> None:
        self._products = [product for product, _ in joined]
        self._first_rows = _FirstRows.shared(tuple(count for _, count in joined))
        widths = [product.like.shape[1] for product in self._products]
        self._places = [
            product.like.new_empty((count, width))
            for (product, count), width in zip(joined, widths, strict=True)
        ]
        by_product = (
            place.view(count, count, -1).diagonal(0, 0, 1)
            for place, (_, count) in zip(self._places, joined, strict=True)
        )
        self.results = tuple(each.T[:, None] for each in by_product)
        """See `SideBySide`."""
        self._seen: Inputs = ()
        self._inputs: Sequence[Tensor] = ()

    def multiply(self, inputs: Inputs) -> None:
        """Compute the products of the first rows of `inputs` [products, rows, in]."""
        if inputs is not self._seen:
            assert isinstance(inputs, Tensor), "products of equal shapes have their inputs in one"
            self._seen, self._inputs = inputs, self._first_rows.of(inputs)
        for product, place, x in zip(self._products, self._places, self._inputs, strict=True):
            product.into(place, x)
