"""Products of several units at once, and how weights become them: in floating point.

`Packer` is the seam between loading and product libraries. It reads slices of weights from a
source, in the form in which it multiplies them, and makes of them what the halves of a layer call.
This module has the packer of unquantised weights; `quantised_products` that of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.model.linear import (
    MIN_ROWS,
    Diagonal,
    Inputs,
    Linear,
    SideBySide,
    join,
    pack,
    padded_rows,
)
from p2pinfer.model.rope import Angles, Turning, rotate

PARALLEL_ELEMENTS = 32768
"""torch splits elementwise work above this size over threads, at places that make new tails."""

FEW_ROWS = 16
"""So few are handled for all units at once; of more the memory that this takes costs more."""

KEPT_ROWS = 4
"""Memory for what so few become within a half layer is kept, and the views of it: of a layer about
a fiftieth of what its weights of 16 bits take."""


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


class Norm(NamedTuple):
    """Division by the root mean square, plus `eps`, and a `weight` [in] float32 (Zhang and
    Sennrich, 2019)."""

    weight: Tensor
    eps: float


class Heads(NamedTuple):
    """The form of what comes out of `q_proj`, `k_proj` and `v_proj`: head units, query heads of
    each, and the width of a head."""

    units: int
    group: int
    head_dim: int


class Projection(Protocol):
    """Queries, keys and values of a layer's head units."""

    def __call__(self, x: Tensor, angles: Angles, /) -> tuple[Tensor, Tensor, Tensor]:
        """Of `x` [rows, in], turned by `angles`: queries [units, rows, group, head_dim] and keys
        [units, rows, head_dim]; and values [units, rows, head_dim]. Good until the next call. Of
        `x` there may be more rows than angles: filler, as `linear.padded_rows` has it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one call reads."""
        ...


class Units(NamedTuple):
    """The numbers of units, and which of their products may be added up where they are made: left,
    right and result of each addition, by tree node (`core/tree`)."""

    numbers: tuple[int, ...]
    additions: tuple[tuple[int, int, int], ...] = ()


class UnitProducts(Protocol):
    """One product per unit, [rows, out] float32, of those of its units that are `wanted`; or, by
    the tree's other nodes, sums of them in their place. Good until the next call. Of `x` there may
    be rows of filler beyond `rows`, as `linear.padded_rows` has it."""

    def __call__(self, x: Tensor, rows: int, wanted: AbstractSet[int], /) -> dict[int, Tensor]: ...

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
    """Reads weights and makes products of them: for one library, device and number format.

    With `norms_within` products norm what they are given; otherwise they are given it normed. So
    many products as `at_once` may be made at the same time, in threads of their own.
    """

    norms_within: bool
    at_once: int

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

    def projection(self, weight: Whole, heads: Heads, norm: Norm) -> Projection:
        """`weight` has the rows of `q_proj` of all units, then of `k_proj` and of `v_proj`."""
        ...

    def separate(self, units: Units, weights: Sequence[Whole]) -> UnitProducts:
        """A product for each unit with an input of its own: `x` is [units, rows, in]."""
        ...

    def fanned(self, units: Units, weights: Sequence[Whole], norm: Norm) -> UnitProducts:
        """A product for each unit with one input for all: `x` is [rows, in]."""
        ...

    def gated(
        self, units: Units, gate_up: Whole, down: Sequence[Whole], widths: Sequence[int], norm: Norm
    ) -> UnitProducts:
        """down(silu(gate(x)) * up(x)) for each unit: `x` is [rows, in].

        `gate_up` has the rows of `gate_proj` of all units and then those of `up_proj`, of each
        unit as many as `widths` says.
        """
        ...


class Turned:
    """See `Packer.projection`."""

    def __init__(self, qkv: Linear, heads: Heads) -> None:
        self._qkv = qkv
        self._heads = heads
        self._kept: _KeptHeads | None = None
        self.nbytes = qkv.nbytes

    def __call__(self, x: Tensor, angles: Angles, /) -> tuple[Tensor, Tensor, Tensor]:
        rows, kept = (angles.rows, len(x)), self._kept
        if rows[0] <= KEPT_ROWS and rows[1] >= MIN_ROWS:
            if kept is None or kept.rows != rows:
                kept = self._kept = _KeptHeads(self._qkv, self._heads, rows)
            return kept.of(x, angles)
        qkv, (units, group, dim) = self._qkv(x), self._heads
        turned = rotate(qkv[: rows[0], : units * (group + 1) * dim].view(rows[0], -1, dim), angles)
        return _by_unit(turned, qkv, self._heads)


def _by_unit(turned: Tensor, qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views by unit, as `Projection` has them, of queries and keys that are turned, [rows, heads,
    head_dim], and of the values in `qkv` [rows or more, width]."""
    (units, group, dim), rows = heads, len(turned)
    q, k = torch.split(turned, [units * group, units], 1)
    v = qkv[:rows, -units * dim :].view(rows, units, dim)
    return q.view(rows, units, group, dim).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


class _KeptHeads:
    """Queries, keys and values of a few rows in memory that is kept, and the views of it.

    `rows` are those of interest, and all that the product has.
    """

    def __init__(self, qkv: Linear, heads: Heads, rows: tuple[int, int]) -> None:
        self.rows = rows
        self._product = qkv
        units, group, dim = heads
        self._qkv = qkv.like.new_empty((rows[1], qkv.like.shape[1]))
        turning = units * (group + 1)
        self._heads = self._qkv[: rows[0], : turning * dim].view(rows[0], turning, dim)
        self._turning = Turning(self._heads)
        self._results = _by_unit(self._turning.turned, self._qkv, heads)

    def of(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Of `x` [rows, in], until it is called again."""
        self._product.into(self._qkv, x)
        self._turning.turn(angles)
        return self._results


class UnitLinears:
    """A product for each unit with an input of its own, added up where all are wanted.

    That is done for few rows only, of which each call of torch takes longer than what it does: all
    results lie in one tensor then, and a level of the tree is one addition as long as it pairs all
    neighbours there.
    """

    def __init__(self, units: Units, weights: Sequence[Linear]) -> None:
        self._weights = dict(zip(units.numbers, weights, strict=True))
        self._nodes, self._additions = units.numbers, units.additions
        self._whole_levels = 0
        while pairs := len(self._nodes) // 2:
            level = self._additions[:pairs]
            neighbours = list(zip(self._nodes[0::2], self._nodes[1::2], strict=False))
            if len(self._nodes) % 2 or [pair[:2] for pair in level] != neighbours:
                break
            self._whole_levels += 1
            self._nodes = tuple(result for _, _, result in level)
            self._additions = self._additions[pairs:]
        self._joined = join(weights)
        self._sums: _KeptSums | None = None
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: Inputs, rows: int, wanted: AbstractSet[int], /) -> dict[int, Tensor]:
        """`x` is [rows or more, in] for each unit."""
        if rows <= FEW_ROWS and self._weights.keys() <= wanted:
            return self._added(x, rows)
        each = zip(self._weights.items(), x, strict=True)
        return {unit: weight(own)[:rows].float() for (unit, weight), own in each if unit in wanted}

    def _added(self, x: Inputs, rows: int) -> dict[int, Tensor]:
        sums = self._sums
        given = rows, x.shape[1] if isinstance(x, Tensor) else len(x[0])
        if sums is None or sums.rows != given:
            weights = tuple(self._weights.values())
            one = rows == 1 and self._joined
            products = Diagonal(self._joined) if one else SideBySide(weights, given)
            sums = _KeptSums(products, given, self._whole_levels)
            if rows <= KEPT_ROWS:
                self._sums = sums
        by_node = dict(zip(self._nodes, sums.of(x), strict=True))
        for left, right, result in self._additions:
            by_node[result] = by_node.pop(left) + by_node.pop(right)
        return by_node


class _KeptSums:
    """The sums of products, level by level, in float32; the memory and the views that they take.

    `rows` are those of interest, and all that inputs have.
    """

    def __init__(self, products: SideBySide | Diagonal, rows: tuple[int, int], levels: int) -> None:
        self.rows = rows
        self._products = products
        first, *others = taken = products.results
        if others or first.dtype is not torch.float32:
            shape = sum(map(len, taken)), *first.shape[1:]
            whole = first.new_empty(shape, dtype=torch.float32)
            self._copied = tuple(
                zip(torch.split(whole, [len(each) for each in taken]), taken, strict=True)
            )
        else:
            whole, self._copied = first, ()
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(levels):
            left, right = whole[0::2], whole[1::2]
            whole = torch.empty_like(left)
            self._levels.append((left, right, whole))
        self._results = whole.unbind()

    def of(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the last level has, [rows, out] each, until it is called again."""
        self._products.multiply(inputs)
        for to, of in self._copied:
            to.copy_(of)
        for left, right, both in self._levels:
            torch.add(left, right, out=both)
        return self._results


class Separate:
    """See `Packer.separate`."""

    def __init__(self, units: Units, weights: Sequence[Linear]) -> None:
        self._linears = UnitLinears(units, weights)
        self.nbytes = self._linears.nbytes

    def __call__(self, x: Tensor, rows: int, wanted: AbstractSet[int], /) -> dict[int, Tensor]:
        return self._linears(x, rows, wanted)


class Fanned:
    """See `Packer.fanned`."""

    def __init__(self, units: Units, weights: Sequence[Linear]) -> None:
        self._weights = dict(zip(units.numbers, weights, strict=True))
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: Tensor, rows: int, wanted: AbstractSet[int], /) -> dict[int, Tensor]:
        own = ((unit, weight) for unit, weight in self._weights.items() if unit in wanted)
        return {unit: weight(x)[:rows].float() for unit, weight in own}


class Gated:
    """See `Packer.gated`."""

    def __init__(
        self, units: Units, gate_up: Linear, down: Sequence[Linear], widths: Sequence[int]
    ) -> None:
        self._gate_up = gate_up
        self._down = UnitLinears(units, down)
        self._widths = list(widths)
        self._even = len(set(widths)) == 1
        self._kept: _KeptGates | None = None
        self.nbytes = gate_up.nbytes + self._down.nbytes

    def __call__(self, x: Tensor, rows: int, wanted: AbstractSet[int], /) -> dict[int, Tensor]:
        padded = len(x)
        keeps = self._even and rows <= KEPT_ROWS and padded >= MIN_ROWS
        if keeps and _whole(rows * sum(self._widths)):
            kept = self._kept
            if kept is None or kept.rows != (rows, padded):
                kept = self._kept = _KeptGates(self._gate_up, len(self._widths), (rows, padded))
            return self._down(kept.of(x), rows, wanted)
        active = _silu_mul(self._gate_up(x)[:rows])
        return self._down(self._by_unit(active), rows, wanted)

    def _by_unit(self, active: Tensor) -> Inputs:
        """Columns of each unit by themselves, [rows, width], with filler as products want it."""
        rows, units = active.shape[0], len(self._widths)
        filler = padded_rows(rows) - rows
        if not self._even or rows > FEW_ROWS:
            whole = functional.pad(active, (0, 0, 0, filler)) if filler else active
            return [own.contiguous() for own in torch.split(whole, self._widths, dim=1)]
        by_unit = active.view(rows, units, -1).transpose(0, 1)
        return functional.pad(by_unit, (0, 0, 0, filler)) if filler else by_unit.contiguous()


class _KeptGates:
    """What an MLP's units multiply last, of a few rows, in memory that is kept, with its views.

    `rows` are those of interest, and all that products have: between them lies filler, zeros. The
    units are equally wide.
    """

    def __init__(self, gate_up: Linear, units: int, rows: tuple[int, int]) -> None:
        self.rows = rows
        self._product = gate_up
        width = gate_up.like.shape[1] // 2 // units
        self._both = gate_up.like.new_empty((rows[1], 2 * units * width))
        by_unit = self._both[: rows[0]].view(rows[0], 2, units, width)
        self._gate, self._up = (each.transpose(0, 1) for each in by_unit.unbind(1))
        self._filled = gate_up.like.new_zeros((units, rows[1], width))
        self._active = self._filled[:, : rows[0]]

    def of(self, x: Tensor) -> Tensor:
        """Of `x` [rows, in], until it is called again: [units, rows, width]."""
        self._product.into(self._both, x)
        torch.mul(functional.silu(self._gate, inplace=True), self._up, out=self._active)
        return self._filled


def _whole(elements: int) -> bool:
    """Whether torch computes so many elements in one piece."""
    return elements < PARALLEL_ELEMENTS or torch.get_num_threads() == 1


def _silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `gate_up` [rows, 2 * width]; in pieces too small to be split by torch."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    if gate_up.device.type != "cpu" or torch.get_num_threads() == 1:
        return functional.silu(gate) * up
    piece = max(1, (PARALLEL_ELEMENTS - 1) // width)
    pieces = [
        functional.silu(gate[i : i + piece]) * up[i : i + piece] for i in range(0, rows, piece)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class FloatPacker:
    """Weights in `dtype` on `device`, multiplied as `model.linear` does."""

    norms_within = False
    at_once = 1

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

    def projection(self, weight: Linear, heads: Heads, norm: Norm) -> Projection:
        """See `Packer.projection`."""
        return Turned(weight, heads)

    def separate(self, units: Units, weights: Sequence[Linear]) -> UnitProducts:
        """See `Packer.separate`."""
        return Separate(units, weights)

    def fanned(self, units: Units, weights: Sequence[Linear], norm: Norm) -> UnitProducts:
        """See `Packer.fanned`."""
        return Fanned(units, weights)

    def gated(
        self,
        units: Units,
        gate_up: Linear,
        down: Sequence[Linear],
        widths: Sequence[int],
        norm: Norm,
    ) -> UnitProducts:
        """See `Packer.gated`."""
        return Gated(units, gate_up, down, widths)

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
