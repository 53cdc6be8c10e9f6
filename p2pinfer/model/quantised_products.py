"""Products of units by quantised weights: see `unit_products` for what they are to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import Tensor

from p2pinfer.core.units import BlockFormat
from p2pinfer.model.product_graph import ROWS, Graph, Session, Value, threads
from p2pinfer.model.quantise import QuantisedWeight, quantise, stacked
from p2pinfer.model.quantised_copies import QuantisedCopies
from p2pinfer.model.rope import Angles
from p2pinfer.model.unit_products import (
    Columns,
    Heads,
    Norm,
    Projection,
    Rows,
    TensorSource,
    UnitProducts,
    Units,
    slice_of,
)

MAX_AT_ONCE = 2
"""Graphs made at the same time: reading for more would take longer than making them, and each takes
the memory of a half layer."""


class QuantisedLinear:
    """One product: `x` [rows, in] to [rows, out], float32."""

    def __init__(self, weight: QuantisedWeight) -> None:
        graph = Graph()
        graph.product("x", weight, "y")
        self.nbytes = weight.nbytes
        self._session = Session(graph, {"x": _rows_of(weight.inputs)}, {"y": _rows_of(weight.rows)})

    def __call__(self, x: Tensor, /) -> Tensor:
        return self._session.run(x.shape[0], x)[0]


class QuantisedProjection:
    """See `Packer.projection`: norm, product and rotary embedding in one graph."""

    def __init__(self, weight: QuantisedWeight, heads: Heads, norm: Norm) -> None:
        units, group, dim = heads
        widths = {"q": units * group * dim, "k": units * dim, "v": units * dim}
        graph = Graph()
        qkv = graph.product(graph.norm("x", norm, "normed"), weight, "qkv")
        graph.split(qkv, [widths["q"] + widths["k"], widths["v"]], ["qk", "v"])
        turned = graph.turned("qk", units * (group + 1), ("cos", "sin"), "turned")
        graph.split(turned, [widths["q"], widths["k"]], ["q", "k"])
        angles = Value((ROWS, dim // 2))
        self.nbytes = weight.nbytes
        self._heads = heads
        self._session = Session(
            graph,
            {
                "x": Value((1, ROWS, weight.inputs)),
                "cos": angles,
                "sin": angles,
            },
            {name: Value((1, ROWS, width)) for name, width in widths.items()},
            self._by_unit,
        )

    def __call__(self, x: Tensor, angles: Angles, /) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._session.run(x.shape[0], x, angles.cos, angles.sin)
        return q, k, v

    def _by_unit(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Queries, keys and values, which come as [rows, units * heads of each * dim]."""
        units, _, dim = self._heads
        q, k, v = (each.view(-1, units, each.shape[1] // units // dim, dim) for each in outputs)
        return q.transpose(0, 1), k[:, :, 0].transpose(0, 1), v[:, :, 0].transpose(0, 1)


class QuantisedProducts:
    """A graph with one output per unit, and one for each sum of them.

    `graph` has the units' products already, by the names that `_name` gives them, and `shapes`
    are theirs.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Value],
        units: Units,
        shapes: Sequence[Value],
        weights: Iterable[QuantisedWeight],
    ) -> None:
        self.nbytes = sum(weight.nbytes for weight in weights)
        self._units = units.numbers
        outputs = dict(zip(units.numbers, shapes, strict=True))
        for left, right, result in units.additions:
            graph.node("Add", [_name(left), _name(right)], [_name(result)])
            outputs[result] = outputs[left]
        added = {node for left, right, _ in units.additions for node in (left, right)}
        self._tops = [node for node in outputs if node not in added]
        self._places = {node: place for place, node in enumerate(outputs)}
        named = {_name(node): value for node, value in outputs.items()}
        self._session = Session(graph, inputs, named)

    def __call__(self, x: Tensor, rows: int, wanted: AbstractSet[int], /) -> dict[int, Tensor]:
        outputs = self._session.run(rows, x)
        apart = [unit for unit in self._units if unit in wanted]
        nodes = apart if len(apart) < len(self._units) else self._tops
        return {node: outputs[self._places[node]] for node in nodes}


class QuantisedPacker:
    """Weights quantised by block, from slices in the number format that they are stored in, or from
    `copies` of what was made of them before."""

    norms_within = True

    def __init__(
        self, weights: TensorSource, form: BlockFormat, copies: QuantisedCopies | None = None
    ) -> None:
        self._weights = weights
        self._form = form
        self._copies = copies
        self.at_once = min(threads(), MAX_AT_ONCE)

    def piece(self, read: Rows) -> QuantisedWeight:
        """See `Packer.piece`."""
        return self.alone(read)

    def stack(self, pieces: list[QuantisedWeight], bias: Tensor | None) -> QuantisedWeight:
        """See `Packer.stack`."""
        whole = stacked(pieces, bias)
        pieces.clear()
        return whole

    def alone(self, read: Rows | Columns) -> QuantisedWeight:
        """See `Packer.alone`."""
        if self._copies is None:
            return quantise(slice_of(self._weights, read), self._form)
        known = self._copies.read(read, self._form)
        if known is None:
            known = quantise(slice_of(self._weights, read), self._form)
            self._copies.keep(read, known)
        return known

    def projection(self, weight: QuantisedWeight, heads: Heads, norm: Norm) -> Projection:
        """See `Packer.projection`."""
        return QuantisedProjection(weight, heads, norm)

    def separate(self, units: Units, weights: Sequence[QuantisedWeight]) -> UnitProducts:
        """See `Packer.separate`."""
        graph, count = Graph(), len(weights)
        parts = graph.split("x", [1] * count, [f"x{place}" for place in range(count)], axis=0)
        for unit, part, weight in zip(units.numbers, parts, weights, strict=True):
            graph.product(part, weight, _name(unit))
        inputs = {"x": Value((count, ROWS, weights[0].inputs))}
        shapes = [Value((1, ROWS, weight.rows)) for weight in weights]
        return QuantisedProducts(graph, inputs, units, shapes, weights)

    def fanned(self, units: Units, weights: Sequence[QuantisedWeight], norm: Norm) -> UnitProducts:
        """See `Packer.fanned`."""
        graph = Graph()
        normed = graph.norm("x", norm, "normed")
        for unit, weight in zip(units.numbers, weights, strict=True):
            graph.product(normed, weight, _name(unit))
        inputs = {"x": _rows_of(weights[0].inputs)}
        shapes = [_rows_of(weight.rows) for weight in weights]
        return QuantisedProducts(graph, inputs, units, shapes, weights)

    def gated(
        self,
        units: Units,
        gate_up: QuantisedWeight,
        down: Sequence[QuantisedWeight],
        widths: Sequence[int],
        norm: Norm,
    ) -> UnitProducts:
        """See `Packer.gated`."""
        graph, total = Graph(), sum(widths)
        both = graph.product(graph.norm("x", norm, "normed"), gate_up, "gate_up")
        gate, up = graph.split(both, [total, total], ["gate", "up"])
        active = graph.silu_mul(gate, up, "active")
        parts = graph.split(active, widths, [f"active{place}" for place in range(len(down))])
        for unit, part, weight in zip(units.numbers, parts, down, strict=True):
            graph.product(part, weight, _name(unit))
        inputs = {"x": _rows_of(gate_up.inputs)}
        shapes = [_rows_of(weight.rows) for weight in down]
        return QuantisedProducts(graph, inputs, units, shapes, (gate_up, *down))


def _name(node: int) -> str:
    """Of a unit's product, or of a sum of them, in a graph."""
    return f"y{node}"


def _rows_of(width: int) -> Value:
    return Value((ROWS, width))
