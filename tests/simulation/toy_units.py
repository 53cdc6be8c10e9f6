"""The weights and the KV of the units that a toy node owns, or keeps for others.

What `p2pinfer/unit_holder.py` does with parts and tensors: units that stay wanted keep what they
have, the KV of all others is freed. Weights take time to read, those of standbys in the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.holdings import Holding, holdings, standby_holdings
from p2pinfer.core.inputs import input_spans
from p2pinfer.core.replication import computed_units, fed_units
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology
from p2pinfer.core.units import Slice
from p2pinfer.types import Plan, UnitKind
from p2pinfer.wire.tensors import Tensor
from tests.simulation import toy_model as toy
from tests.simulation.world import check


class Row(NamedTuple):
    """One position of a step."""

    request_id: int
    position: int
    token: int
    before: int
    """The tag of the log up to this token, without it."""
    name: int
    """With it."""


class Kept(NamedTuple):
    """KV of one position in one layer: the tag of the log it was written for, and its value."""

    name: int
    value: int


NOTHING = Kept(0, 0)

Weights = tuple[UnitKind, Slice, int]
"""A unit's weights, by kind, layers and number."""


class ToyCache:
    """KV by head unit, request, layer and position; written in place, what is behind it stays."""

    def __init__(self) -> None:
        self._layers: dict[KvUnit, dict[int, list[list[Kept]]]] = {}

    def hold(self, units: Iterable[KvUnit]) -> None:
        """Keep the KV of these, empty where it was not kept before; free that of all others."""
        self._layers = {unit: self._layers.get(unit, {}) for unit in units}

    def open(self, request_id: int) -> None:
        """Make room for a request in all units."""
        for unit, requests in self._layers.items():
            if request_id not in requests:
                requests[request_id] = [[] for _ in range(*unit.span)]

    def forget(self, request_ids: Iterable[int]) -> None:
        """Free what these requests hold."""
        for requests in self._layers.values():
            for request_id in request_ids:
                requests.pop(request_id, None)

    def rows(self, unit: KvUnit, request_id: int, layer: int) -> list[Kept]:
        """All that is kept of a unit in one layer, by position."""
        layers = self._layers.get(unit, {}).get(request_id)
        return layers[layer - unit.span.start] if layers else []

    def past(self, unit: KvUnit, layer: int, row: Row) -> int:
        """What a unit attended up to the position before `row`."""
        if row.position == 0:
            return 0
        rows = self.rows(unit, row.request_id, layer)
        check(
            len(rows) >= row.position,
            f"KV of request {row.request_id} is read at {row.position - 1}: {len(rows)} are there",
        )
        kept = rows[row.position - 1]
        check(
            kept.name == row.before,
            f"KV of request {row.request_id} at {row.position - 1} was written for another log",
        )
        return kept.value

    def write(self, unit: KvUnit, layer: int, row: Row, value: int) -> None:
        """Write what a unit attended up to a position."""
        rows = self.rows(unit, row.request_id, layer)
        _put(rows, row.position, Kept(row.name, value))

    def read_kv(self, unit: KvUnit, request_id: int, start: int, end: int) -> Tensor:
        """[layers, 2, rows]: the values as K, the tags as V."""
        numbers: list[int] = []
        for layer in range(*unit.span):
            kept = self.rows(unit, request_id, layer)[start:end]
            check(len(kept) == end - start, "KV is sent that is not there")
            numbers += (each.value for each in kept)
            numbers += (each.name for each in kept)
        return toy.to_tensor(numbers, (unit.span.end - unit.span.start, 2, end - start))

    def write_kv(self, unit: KvUnit, request_id: int, start: int, tensor: Tensor) -> bool:
        """Write what `read_kv` read elsewhere; False: there is no room for that request."""
        layers = self._layers.get(unit, {}).get(request_id)
        if layers is None:
            return False
        numbers, count = toy.from_tensor(tensor), tensor.shape[2]
        for place, rows in enumerate(layers):
            first = 2 * place * count
            values = numbers[first : first + count]
            names = numbers[first + count : first + 2 * count]
            for offset, (value, name) in enumerate(zip(values, names, strict=True)):
                _put(rows, start + offset, Kept(name, value))
        return True


class ToyInputs:
    """The residuals that the KV of a span is made of, by request, layer and position."""

    def __init__(self, span: Slice) -> None:
        self.span = span
        self._layers: dict[int, list[list[Kept]]] = {}

    def forget(self, request_ids: Iterable[int]) -> None:
        """Free what these requests hold."""
        for request_id in request_ids:
            self._layers.pop(request_id, None)

    def write(self, layer: int, row: Row, x: int) -> None:
        """Write the residual of a position before the attention of a layer."""
        layers = self._layers.setdefault(row.request_id, [[] for _ in range(*self.span)])
        _put(layers[layer - self.span.start], row.position, Kept(row.name, x))

    def rows(self, request_id: int, layer: int) -> list[Kept]:
        """All that is kept of a layer, by position."""
        layers = self._layers.get(request_id)
        return layers[layer - self.span.start] if layers else []


def _put(rows: list[Kept], position: int, kept: Kept) -> None:
    """Write in place; a hole before it holds nothing that could be read."""
    rows += [NOTHING] * (position + 1 - len(rows))
    rows[position] = kept


class ToyUnits:
    """Which weights are ready here, which are wanted, and the KV of all of them."""

    def __init__(self, logs: TokenLogs) -> None:
        self.cache = ToyCache()
        self.inputs: dict[Slice, ToyInputs] = {}
        self._logs = logs
        self._ready: set[Weights] = set()
        self._own: frozenset[Weights] = frozenset()
        self._kept: tuple[frozenset[Weights], ...] = ()
        """By owner: the weights that are kept as a standby, to be loaded one after the other."""

    def hold(self, mine: Topology) -> None:
        """From now on this plan's units are wanted, and all others are freed."""
        plan, me = mine.plan, mine.me
        self._own = frozenset(_weights(mine.holdings))
        self._kept = tuple(_kept_for(plan, me))
        self._ready &= self._own.union(*self._kept)
        computed, fed = computed_units(plan, me), fed_units(plan, me)
        self._logs.coverage.hold(computed=computed.keys(), fed=fed.keys())
        self.cache.hold((*computed, *fed))
        spans = input_spans(plan, me)
        self._logs.inputs.hold(spans)
        self.inputs = {span: self.inputs.get(span) or ToyInputs(span) for span in spans}

    def forget(self, request_ids: Iterable[int]) -> None:
        """Free what these requests hold."""
        self.cache.forget(request_ids)
        for inputs in self.inputs.values():
            inputs.forget(request_ids)

    def recompute(
        self, request_id: int, units: AbstractSet[KvUnit], start: int, end: int
    ) -> Iterator[None]:
        """Write KV of these positions, made of inputs."""
        self.cache.open(request_id)
        for unit in sorted(units):
            for layer in range(*unit.span):
                kept = self.inputs[unit.span].rows(request_id, layer)
                check(len(kept) >= end, f"inputs of request {request_id} are not there")
                for position in range(start, end):
                    name, x = kept[position]
                    before = kept[position - 1].name if position else toy.ROOT_TAG
                    row = Row(request_id, position, 0, before, name)
                    past = self.cache.past(unit, layer, row)
                    self.cache.write(unit, layer, row, toy.attend(layer, unit.unit, past, x))
            yield

    @property
    def complete(self) -> bool:
        """Whether the weights of all units that are owned are ready."""
        return self._own <= self._ready

    def load(self) -> None:
        """The weights of all units that are owned have been read."""
        self._ready |= self._own

    @property
    def kept(self) -> int:
        """For how many owners weights are kept."""
        return len(self._kept)

    @property
    def lacking(self) -> int:
        """For how many owners the weights kept for them have yet to be read."""
        return sum(not each <= self._ready for each in self._kept)

    def load_next(self) -> None:
        """The weights kept for one more owner have been read."""
        self._ready |= next(each for each in self._kept if not each <= self._ready)


def _weights(by_stage: Iterable[Holding]) -> list[Weights]:
    return [
        (kind, held.span, unit)
        for held in by_stage
        for kind, units in zip(
            UnitKind, (held.head_units, held.mlp_units, held.vocab_units), strict=True
        )
        for unit in units
    ]


def _kept_for(plan: Plan, me: int) -> list[frozenset[Weights]]:
    """What `me` is a standby of, owner by owner."""
    kept = set(_weights(standby_holdings(plan, me)))
    by_owner = (
        frozenset(_weights(holdings(plan, owner))) & kept for owner in range(len(plan.members))
    )
    return [each for each in by_owner if each]
