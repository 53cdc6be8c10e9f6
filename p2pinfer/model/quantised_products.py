"""Products of units by quantised weights: see `unit_products` for what they are to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from p2pinfer.core.units import BlockFormat
from p2pinfer.model.linear import Linear
from p2pinfer.model.product_graph import Graph, Session
from p2pinfer.model.quantise import QuantisedWeight, quantise, stacked
from p2pinfer.model.quantised_copies import QuantisedCopies
from p2pinfer.model.unit_products import Columns, Rows, TensorSource, UnitProducts, slice_of


class QuantisedLinear:
    """One product: `x` [rows, in] to [rows, out], float32."""

    def __init__(self, weight: QuantisedWeight) -> None:
        graph = Graph()
        graph.product("x", weight, "y")
        self.nbytes = weight.nbytes
        self._session = Session(graph, ["x"], weight.inputs, {"y": weight.rows})

    def __call__(self, x: Tensor, /) -> Tensor:
        return self._session.run(x)[0]


class QuantisedProducts:
    """A graph with one output per unit."""

    def __init__(self, session: Session, weights: Iterable[QuantisedWeight]) -> None:
        self.nbytes = sum(weight.nbytes for weight in weights)
        self._session = session

    def __call__(self, x: Tensor, wanted: Iterable[int], /) -> dict[int, Tensor]:
        outputs = self._session.run(x)
        return {place: outputs[place] for place in wanted}


class QuantisedPacker:
    """Weights quantised by block, from slices in the number format that they are stored in, or from
    `copies` of what was made of them before."""

    def __init__(
        self, weights: TensorSource, form: BlockFormat, copies: QuantisedCopies | None = None
    ) -> None:
        self._weights = weights
        self._form = form
        self._copies = copies

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

    def linear(self, weight: QuantisedWeight) -> Linear:
        """See `Packer.linear`."""
        return QuantisedLinear(weight)

    def separate(self, weights: Sequence[QuantisedWeight]) -> UnitProducts:
        """See `Packer.separate`."""
        graph, outputs = Graph(), {}
        for place, weight in enumerate(weights):
            outputs[graph.product(f"x{place}", weight, f"y{place}")] = weight.rows
        inputs = [f"x{place}" for place in range(len(weights))]
        return QuantisedProducts(Session(graph, inputs, weights[0].inputs, outputs), weights)

    def fanned(self, weights: Sequence[QuantisedWeight]) -> UnitProducts:
        """See `Packer.fanned`."""
        graph, outputs = Graph(), {}
        for place, weight in enumerate(weights):
            outputs[graph.product("x", weight, f"y{place}")] = weight.rows
        return QuantisedProducts(Session(graph, ["x"], weights[0].inputs, outputs), weights)

    def gated(
        self, gate_up: QuantisedWeight, down: Sequence[QuantisedWeight], widths: Sequence[int]
    ) -> UnitProducts:
        """See `Packer.gated`."""
        graph, outputs, total = Graph(), {}, sum(widths)
        both = graph.product("x", gate_up, "gate_up")
        gate, up = graph.split(both, [total, total], ["gate", "up"])
        active = graph.silu_mul(gate, up, "active")
        parts = graph.split(active, widths, [f"active{place}" for place in range(len(down))])
        for place, weight in enumerate(down):
            outputs[graph.product(parts[place], weight, f"y{place}")] = weight.rows
        session = Session(graph, ["x"], gate_up.inputs, outputs)
        return QuantisedProducts(session, (gate_up, *down))
