"""Products of several units at once, and how weights become them: in floating point.

`Packer` is the seam between loading and product libraries. It reads slices of weights from a
source, in the form in which it multiplies them, and makes of them what the halves of a layer call.
This module has the packer of unquantised weights; `quantised_products` that of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.model.linear import Linear, pack

PARALLEL_ELEMENTS = 32768
"""torch splits elementwise work above this size over threads, at places that make new tails."""


class TensorSource(Protocol):
    """Where weights come from, slice by slice; names are those of the checkpoint."""

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """A copy of rows `[start, end)`."""
        ...

    def cols(self, name: str, start: int, end: int) -> Tensor:
        """A copy of columns `[start, end)`."""
        ...

    def whole(self, name: str) -> Tensor:
        """A copy of all of it."""
        ...

    def mapped(self, name: str) -> Tensor:
        """A read-only view that takes no private memory."""
        ...


class Rows(NamedTuple):
    """Rows `[start, end)` of a matrix (of a vocab unit, of a projection), with zeros up to
    `height`."""

    name: str
    start: int
    end: int
    height: int


class Columns(NamedTuple):
    """Columns `[start, end)` of a matrix, with zeros up to `width`."""

    name: str
    start: int
    end: int
    width: int


class UnitProducts(Protocol):
    """One product per unit, [rows, out] float32, of those units whose places are `wanted`."""

    def __call__(self, x: Tensor, wanted: Iterable[int], /) -> Mapping[int, Tensor]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one call for all units reads."""
        ...


class Weight(Protocol):
    """A weight by itself that products are made of."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is part of a product."""
        ...


Piece = TypeVar("Piece")
Whole = TypeVar("Whole", bound=Weight)


class Packer(Protocol[Piece, Whole]):
    """Reads weights and makes products of them: for one library, device and number format."""

    def piece(self, read: Rows) -> Piece:
        """Rows that are to be stacked with others."""
        ...

    def stack(self, pieces: list[Piece], bias: Tensor | None) -> Whole:
        """One weight of pieces one above the other, with a bias [out]. Takes them out of the list,
        so that they need not lie in memory twice."""
        ...

    def alone(self, read: Rows | Columns) -> Whole:
        """One unit's own weight."""
        ...

    def linear(self, weight: Whole) -> Linear:
        """One product for all units together."""
        ...

    def separate(self, weights: Sequence[Whole]) -> UnitProducts:
        """A product for each unit with an input of its own: `x` is [units, rows, in]."""
        ...

    def fanned(self, weights: Sequence[Whole]) -> UnitProducts:
        """A product for each unit with one input for all: `x` is [rows, in]."""
        ...

    def gated(self, gate_up: Whole, down: Sequence[Whole], widths: Sequence[int]) -> UnitProducts:
        """down(silu(gate(x)) * up(x)) for each unit: `x` is [rows, in].

        `gate_up` has the rows of `gate_proj` of all units and then those of `up_proj`, of each
        unit as many as `widths` says.
        """
        ...


class Separate:
    """See `Packer.separate`."""

    def __init__(self, weights: Sequence[Linear]) -> None:
        self._weights = tuple(weights)
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: Tensor, wanted: Iterable[int], /) -> dict[int, Tensor]:
        rows_of = x.unbind()
        return {place: self._weights[place](rows_of[place]).float() for place in wanted}


class Fanned:
    """See `Packer.fanned`."""

    def __init__(self, weights: Sequence[Linear]) -> None:
        self._weights = tuple(weights)
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: Tensor, wanted: Iterable[int], /) -> dict[int, Tensor]:
        return {place: self._weights[place](x).float() for place in wanted}


class Gated:
    """See `Packer.gated`."""

    def __init__(self, gate_up: Linear, down: Sequence[Linear], widths: Sequence[int]) -> None:
        self._gate_up = gate_up
        self._down = tuple(down)
        self._bounds = [(sum(widths[:i]), sum(widths[: i + 1])) for i in range(len(widths))]
        self.nbytes = gate_up.nbytes + sum(weight.nbytes for weight in down)

    def __call__(self, x: Tensor, wanted: Iterable[int], /) -> dict[int, Tensor]:
        active = _silu_mul(self._gate_up(x))
        sums: dict[int, Tensor] = {}
        for place in wanted:
            start, end = self._bounds[place]
            sums[place] = self._down[place](active[:, start:end].contiguous()).float()
        return sums


def _silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `gate_up` [rows, 2 * width]; in pieces too small to be split by torch."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    if gate_up.device.type != "cpu" or torch.get_num_threads() == 1:
        return functional.silu(gate) * up
    piece = max(1, (PARALLEL_ELEMENTS - 1) // width)
    return torch.cat(
        [functional.silu(gate[i : i + piece]) * up[i : i + piece] for i in range(0, rows, piece)]
    )


class FloatPacker:
    """Weights in `dtype` on `device`, multiplied as `model.linear` does."""

    def __init__(self, weights: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self._weights = weights
        self._device = device
        self._dtype = dtype

    def piece(self, read: Rows) -> Tensor:
        """See `Packer.piece`."""
        return slice_of(self._weights, read)

    def stack(self, pieces: list[Tensor], bias: Tensor | None) -> Linear:
        """See `Packer.stack`."""
        placed = None if bias is None else bias.to(self._device, self._dtype)
        weight = torch.cat(pieces)
        pieces.clear()
        return pack(self._place(weight), placed)

    def alone(self, read: Rows | Columns) -> Linear:
        """See `Packer.alone`."""
        return pack(self._place(slice_of(self._weights, read)))

    def linear(self, weight: Linear) -> Linear:
        """See `Packer.linear`."""
        return weight

    def separate(self, weights: Sequence[Linear]) -> UnitProducts:
        """See `Packer.separate`."""
        return Separate(weights)

    def fanned(self, weights: Sequence[Linear]) -> UnitProducts:
        """See `Packer.fanned`."""
        return Fanned(weights)

    def gated(self, gate_up: Linear, down: Sequence[Linear], widths: Sequence[int]) -> UnitProducts:
        """See `Packer.gated`."""
        return Gated(gate_up, down, widths)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)


def slice_of(weights: TensorSource, read: Rows | Columns) -> Tensor:
    """A slice as it is multiplied, in the checkpoint's number format."""
    name, start, end, size = read
    if isinstance(read, Columns):
        columns = weights.cols(name, start, end)
        short = size - columns.shape[1]
        return functional.pad(columns, (0, short)) if short else columns
    rows = weights.rows(name, start, end)
    short = size - rows.shape[0]
    return functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, short]) if short else rows
