"""One node's part of a step, without the network: what to send comes out, what others sent goes in.

`StageRunner.run` is a generator, so that the same code is driven by ZeroMQ in the worker and in
lockstep in one process by tests. It yields what other nodes must help with (`NeedHidden`,
`NeedSum`) or get (`GiveHidden`) and returns the logits of the sampling rows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.holdings import Holding
from p2pinfer.core.units import group_size
from p2pinfer.model.attention import Run, make_rows
from p2pinfer.model.input_store import InputStore
from p2pinfer.model.linear import padded_rows
from p2pinfer.model.llama import TORCH_DTYPES, Batch, Trunk
from p2pinfer.model.part import Part, units_of
from p2pinfer.model.rope import Rope
from p2pinfer.types import ModelSpec
from p2pinfer.wire.messages import Slot

ATTENTION, MLP = 0, 1
"""The two halves of a layer, as they are numbered on the wire."""


@dataclass(frozen=True)
class NeedHidden:
    """Send me the hidden states [rows, hidden] float32 that leave the previous stage."""


@dataclass(frozen=True)
class NeedSum:
    """My unit partials of a half layer, each [rows, hidden] float32; send me the sum of all."""

    layer: int
    half: int
    partials: dict[int, Tensor]


@dataclass(frozen=True)
class GiveHidden:
    """The hidden states [rows, hidden] float32 that leave my stage; the answer is ignored."""

    hidden: Tensor


Exchange = NeedHidden | NeedSum | GiveHidden
StepRun = Generator[Exchange, Tensor | None, list[Tensor]]


class StageRunner:
    """Computes steps for the units that one node owns, and keeps the KV of all that it holds.

    `parts` are all that the node holds. Those of which it owns any unit compute, and their weights
    are ready; what else they compute is dropped. The others are only kept up to date: requests open
    in them too. `owned` are units of one stage, and `trunk` is of that stage: None where nothing is
    owned. `inputs`, of that stage's span, is written along, where it is given.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        owned: Holding,
        trunk: Trunk | None,
        model: ModelSpec,
        device: torch.device,
        *,
        inputs: InputStore | None = None,
    ) -> None:
        assert inputs is None or inputs.span == owned.span, "inputs are of what is computed"
        self._inputs = inputs
        self._owned = owned
        self._trunk = trunk
        self._heads = frozenset(owned.head_units)
        self._mlp_units = frozenset(owned.mlp_units)
        self._vocab_units = frozenset(owned.vocab_units)
        self._hidden = model.hidden_size
        self._group = group_size(model)
        self._kv_dtype = TORCH_DTYPES[model.kv_dtype]
        self._device = device
        self._is_last = owned.span.end == model.num_layers
        assert (trunk is None) == (owned.stage is None), "the trunk is of what is owned"
        self.rearrange(parts)

    def rearrange(self, parts: Sequence[Part]) -> None:
        """From the next step on the same units lie in these parts."""
        self._parts = tuple(parts)
        owned = self._owned
        heads, mlp = self._heads, self._mlp_units
        ready = [
            (part, part.stage)
            for part in parts
            if part.stage is not None and part.held.span == owned.span
        ]
        here = {unit for part, _ in ready for unit in part.units}
        assert units_of(owned) <= here, "what is owned is ready"
        self._attention = [
            (part.cache, stage.attention)
            for part, stage in ready
            if stage.attention and heads.intersection(part.held.head_units)
        ]
        self._mlp = [
            stage.mlp
            for part, stage in ready
            if stage.mlp and mlp.intersection(part.held.mlp_units)
        ]
        self._vocab = [stage.vocab for _, stage in ready if stage.vocab]

    def run(self, slots: Sequence[Slot]) -> StepRun:
        """Compute `slots`. Returns, per owned vocab unit, logits [sampling slots, unit width].

        The list is empty for a node that owns no vocab unit, or when no slot samples. A node that
        owns nothing at all yields nothing.
        """
        runs = self._open(slots)
        trunk = self._trunk
        if trunk is None:
            return []
        rows = sum(len(slot.tokens) for slot in slots)
        batch = self._batch(trunk.rope, runs, rows)
        x = torch.zeros((padded_rows(rows), self._hidden), dtype=torch.float32, device=self._device)
        if trunk.embedding is not None:
            x[:rows] = self._embed(trunk.embedding, slots)
        else:
            hidden = yield NeedHidden()
            assert hidden is not None
            x[:rows] = hidden
        for index, layer in enumerate(trunk.layers):
            number = trunk.span.start + index
            h = trunk.normed(x, layer.attention_norm)
            if self._inputs is not None:
                self._inputs.write(index, runs, h)
            partials = self._attend(index, h, batch)
            total = yield self._need(number, ATTENTION, partials, rows)
            x = self._add(x, rows, total, layer.attention_bias)
            partials = self._multiply(index, trunk.normed(x, layer.mlp_norm))
            total = yield self._need(number, MLP, partials, rows)
            x = self._add(x, rows, total, layer.mlp_bias)
        for cache, _ in self._attention:
            for run in runs:
                cache.wrote(run.request_id, run.end)
        if self._inputs is not None:
            self._inputs.wrote(runs)
        if not self._is_last:
            yield GiveHidden(x[:rows])
            return []
        return self._logits(trunk, x, slots)

    def forget(self, request_ids: Sequence[int]) -> None:
        """Free the KV of requests that ended."""
        for part in self._parts:
            for request_id in request_ids:
                part.cache.drop(request_id)
        if self._inputs is not None:
            for request_id in request_ids:
                self._inputs.drop(request_id)

    def recompute(
        self, request_id: int, units: AbstractSet[int], start: int, end: int
    ) -> Iterator[None]:
        """Write K and V of positions `[start, end)` of owned head units, made of kept inputs.

        Yields after each product. Raises `LookupError` where the inputs are not here.
        """
        assert self._trunk is not None and units <= self._heads, "who owns heads has a trunk"
        if self._inputs is None:
            raise LookupError("this node keeps no inputs")
        rows = end - start
        filler = padded_rows(rows) - rows
        cos, sin = self._trunk.rope.rows([(start, end), *([(0, filler)] if filler else [])])
        for cache, halves in self._attention:
            places = [i for i, unit in enumerate(halves[0].units) if unit in units]
            for index, half in enumerate(halves if places else ()):
                h = self._inputs.rows(request_id, index, start, end)
                if filler:
                    h = functional.pad(h, (0, 0, 0, filler))
                k, v = half.keys_values(h, cos, sin)
                store = cache.of_layer(index)(request_id)
                for place in places:
                    store[place, 0, start:end] = k[:rows, place]
                    store[place, 1, start:end] = v[:rows, place]
                yield
            if places:
                cache.wrote(request_id, end)

    def _open(self, slots: Sequence[Slot]) -> list[Run]:
        runs: list[Run] = []
        row = 0
        for slot in slots:
            if slot.capacity:
                for part in self._parts:
                    part.cache.open(slot.request_id, slot.capacity)
                if self._inputs is not None:
                    self._inputs.open(slot.request_id, slot.capacity)
            end = slot.start + len(slot.tokens)
            runs.append(Run(slot.request_id, row, slot.start, end))
            row += len(slot.tokens)
        return runs

    def _batch(self, rope: Rope, runs: list[Run], rows: int) -> Batch:
        spans = [(run.start, run.end) for run in runs]
        filler = padded_rows(rows) - rows
        if filler:
            spans.append((0, filler))
        cos, sin = rope.rows(spans)
        rows_of_step = make_rows(runs, self._group, self._kv_dtype, self._device)
        return Batch(rows_of_step, cos, sin)

    def _embed(self, embedding: Tensor, slots: Sequence[Slot]) -> Tensor:
        """Rows of the mapped table: the table itself is never loaded."""
        ids = torch.tensor([token for slot in slots for token in slot.tokens], dtype=torch.int64)
        return embedding[ids].to(self._device, torch.float32)

    def _attend(self, index: int, h: Tensor, batch: Batch) -> dict[int, Tensor]:
        """Partials of the owned head units in one layer of the span."""
        partials: dict[int, Tensor] = {}
        for cache, halves in self._attention:
            partials |= halves[index].partials(h, batch, cache.of_layer(index), self._heads)
        return partials

    def _multiply(self, index: int, h: Tensor) -> dict[int, Tensor]:
        """Partials of the owned MLP units in one layer of the span."""
        partials: dict[int, Tensor] = {}
        for halves in self._mlp:
            partials |= halves[index].partials(h, self._mlp_units)
        return partials

    @staticmethod
    def _need(layer: int, half: int, partials: dict[int, Tensor], rows: int) -> NeedSum:
        return NeedSum(layer, half, {unit: p[:rows] for unit, p in partials.items()})

    @staticmethod
    def _add(x: Tensor, rows: int, total: Tensor | None, bias: Tensor | None) -> Tensor:
        """Add a half layer's sum in place; a row-parallel bias is added once, after it."""
        assert total is not None
        x[:rows] += total.to(x.device)
        if bias is not None:
            x[:rows] += bias
        return x

    def _logits(self, trunk: Trunk, x: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
        last_rows: list[int] = []
        row = -1
        for slot in slots:
            row += len(slot.tokens)
            if slot.sample:
                last_rows.append(row)
        if not self._vocab_units or not last_rows:
            return []
        count = len(last_rows)
        picked = functional.pad(x[last_rows], (0, 0, 0, padded_rows(count) - count))
        assert trunk.final_norm is not None
        h = trunk.normed(picked, trunk.final_norm)
        logits: dict[int, Tensor] = {}
        for vocab in self._vocab:
            logits |= vocab.logits(h, self._vocab_units)
        return [logits[unit][:count] for unit in self._owned.vocab_units]
