"""One node's part of a step, without the network: what to send comes out, what others sent goes in.

`StageRunner.run` is a generator, so that the same code is driven by ZeroMQ in the worker and in
lockstep in one process by tests. It yields what other nodes must help with (`NeedHidden`,
`NeedSum`) or get (`GiveHidden`) and returns the logits of the sampling rows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.holdings import Holding
from p2pinfer.core.units import Slice, group_size, unit_count
from p2pinfer.model.attention import Rows, Run, StepAttention, make_rows
from p2pinfer.model.input_store import InputStore
from p2pinfer.model.linear import padded_rows
from p2pinfer.model.llama import TORCH_DTYPES, Trunk
from p2pinfer.model.part import Part, units_of
from p2pinfer.model.reduction import whole_sum
from p2pinfer.model.rope import Angles
from p2pinfer.types import DType, ModelSpec, UnitKind
from p2pinfer.wire.messages import Slot

ATTENTION, MLP = 0, 1
"""The two halves of a layer, as they are numbered on the wire."""


@dataclass(frozen=True)
class NeedHidden:
    """Send me the hidden states [rows, hidden] float32 with which a stage begins."""

    stage: int


@dataclass(frozen=True)
class NeedSum:
    """My partials of a half layer of a stage, by unit or, where some are added already, by tree
    node, each [rows, hidden] in the `wire_dtype` of the model, good until that half is computed
    again; send me the sum of all."""

    stage: int
    layer: int
    half: int
    partials: dict[int, Tensor]


@dataclass(frozen=True)
class GiveHidden:
    """The hidden states [rows, hidden] float32 that leave a stage; the answer is ignored."""

    stage: int
    hidden: Tensor


Exchange = NeedHidden | NeedSum | GiveHidden
StepRun = Generator[Exchange, Tensor | None, Tensor | None]

NO_INPUTS: Mapping[Slice, InputStore] = MappingProxyType({})


class _Owned:
    """What one node owns of one stage, ready to compute: see `StageRunner`."""

    def __init__(
        self,
        parts: Sequence[Part],
        held: Holding,
        trunk: Trunk,
        inputs: InputStore | None,
        quant: str,
    ) -> None:
        assert trunk.span == held.span, "the trunk is of what is owned"
        assert inputs is None or inputs.span == held.span, "inputs are of what is computed"
        self.stage = held.stage
        self.trunk = trunk
        self._quant = quant
        self.inputs = inputs
        self.vocab_units = held.vocab_units
        self._heads = frozenset(held.head_units)
        self._mlp_units = frozenset(held.mlp_units)
        heads, mlp = self._heads, self._mlp_units
        ready = [
            (part, part.stage)
            for part in parts
            if part.stage is not None and part.held.span == held.span
        ]
        here = {unit for part, _ in ready for unit in part.units}
        assert units_of(held) <= here, "what is owned is ready"
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

    def attention(self, rows: int, of_step: Rows, group: int) -> list[StepAttention]:
        """What a step's rows attend to, by part."""
        dtype = self.trunk.dtype
        return [StepAttention(cache, rows, of_step, group, dtype) for cache, _ in self._attention]

    def attend(
        self, index: int, h: Tensor, angles: Angles, attention: Sequence[StepAttention]
    ) -> dict[int, Tensor]:
        """Partials of the owned head units in one layer of the span."""
        partials: dict[int, Tensor] = {}
        for of_part, (_, halves) in zip(attention, self._attention, strict=True):
            attend = partial(of_part.attend, index)
            partials |= halves[index].partials(h, angles, attend, self._heads)
        return partials

    def multiply(self, index: int, h: Tensor, rows: int) -> dict[int, Tensor]:
        """Partials of the owned MLP units in one layer of the span."""
        partials: dict[int, Tensor] = {}
        for halves in self._mlp:
            partials |= halves[index].partials(h, rows, self._mlp_units)
        return partials

    def logits(self, h: Tensor, rows: int) -> dict[int, Tensor]:
        """Logits by owned vocab unit, of prepared hidden states."""
        logits: dict[int, Tensor] = {}
        for vocab in self._vocab:
            logits |= vocab.logits(h, rows, frozenset(self.vocab_units))
        return logits

    def wrote(self, runs: Sequence[Run]) -> None:
        """All layers have their K and V of these rows, and their inputs where they are kept."""
        for cache, _ in self._attention:
            for run in runs:
                cache.wrote(run.request_id, run.end)
        if self.inputs is not None:
            self.inputs.wrote(runs)

    def recompute(
        self, request_id: int, units: AbstractSet[int], start: int, end: int
    ) -> Iterator[None]:
        """See `StageRunner.recompute`; `units` are head units of this stage."""
        assert units <= self._heads, "what is computed is owned"
        if self.inputs is None:
            raise LookupError("this node keeps no inputs")
        rows = end - start
        filler = padded_rows(rows, self._quant) - rows
        angles = self.trunk.rope.rows([(start, end)])
        for cache, halves in self._attention:
            places = [i for i, unit in enumerate(halves[0].units) if unit in units]
            stored = cache.layers(request_id, start, end)
            for index, half in enumerate(halves if places else ()):
                h = self.inputs.rows(request_id, index, start, end)
                if filler:
                    h = functional.pad(h, (0, 0, 0, filler))
                k, v = half.keys_values(h, angles)
                for place in places:
                    stored.keys[index][place] = k[place]
                    stored.values[index][place] = v[place]
                yield
            if places:
                cache.wrote(request_id, end)


class _Prepared(NamedTuple):
    """What a step of these runs computes with: memory [rows, hidden] for the residual and for what
    products take of it, and how what is owned of each stage attends."""

    runs: list[Run]
    x: Tensor
    h: Tensor
    angles: Angles
    attention: tuple[list[StepAttention], ...]


class StageRunner:
    """Computes steps for the units that one node owns, and keeps the KV of all that it holds.

    `parts` are all that the node holds. Those of which it owns any unit compute, and their weights
    are ready; what else they compute is dropped. The others are only kept up to date: requests open
    in them too. `owned` are units of some stages, in their order, and `trunks` are of those stages.
    `inputs` of such stages are written along, where they are given.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        owned: Sequence[Holding],
        trunks: Mapping[Slice, Trunk],
        model: ModelSpec,
        device: torch.device,
        *,
        inputs: Mapping[Slice, InputStore] = NO_INPUTS,
    ) -> None:
        self._holdings = tuple(owned)
        self._trunks = trunks
        self._inputs = inputs
        self._hidden = model.hidden_size
        self._group = group_size(model)
        self.units = unit_count(model, UnitKind.HEAD), unit_count(model, UnitKind.MLP)
        """By half, how many units the model has."""
        self._quant = model.quant
        self._kv_dtype = TORCH_DTYPES[model.kv_dtype]
        self._sum_dtype = TORCH_DTYPES[DType(model.wire_dtype)]
        self._device = device
        self._layers = model.num_layers
        self.rearrange(parts)

    def rearrange(self, parts: Sequence[Part]) -> None:
        """From the next step on the same units lie in these parts."""
        self._parts = tuple(parts)
        self._ahead: _Prepared | None = None
        self._owned = tuple(
            _Owned(parts, held, self._trunks[held.span], self._inputs.get(held.span), self._quant)
            for held in self._holdings
        )

    def run(self, slots: Sequence[Slot]) -> StepRun:
        """Compute `slots`. Returns logits [sampling slots, width], unit after owned vocab unit.

        None for a node that owns no vocab unit, or when no slot samples. A node that owns nothing
        at all yields nothing. One that owns units of two stages in a row goes on with
        its own hidden states; it gives them away all the same.
        """
        runs = self._open(slots)
        if not self._owned:
            return None
        rows = sum(len(slot.tokens) for slot in slots)
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.runs != runs:
            ahead = self._prepare(runs, rows)
        _, x, h, angles, attends = ahead
        own, normed = x[:rows], h[:rows]
        reached = 0
        for owned, attention in zip(self._owned, attends, strict=True):
            trunk = owned.trunk
            if trunk.embedding is not None:
                self._embed(trunk.embedding, slots, own)
            elif trunk.span.start != reached:
                hidden = yield NeedHidden(owned.stage)
                assert hidden is not None
                own.copy_(hidden)
            for index, layer in enumerate(trunk.layers):
                number = trunk.span.start + index
                trunk.prepare(own, layer.attention_norm, normed)
                if owned.inputs is not None:
                    owned.inputs.write(index, runs, h)
                partials = owned.attend(index, h, angles, attention)
                total = yield NeedSum(owned.stage, number, ATTENTION, self._sent(partials))
                self._add(own, total, layer.attention_bias)
                trunk.prepare(own, layer.mlp_norm, normed)
                partials = owned.multiply(index, h, rows)
                total = yield NeedSum(owned.stage, number, MLP, self._sent(partials))
                self._add(own, total, layer.mlp_bias)
            owned.wrote(runs)
            reached = trunk.span.end
            if reached == self._layers:
                return self._logits(owned, x, slots)
            yield GiveHidden(owned.stage, own)
        return None

    def foresee(self, slots: Sequence[Slot]) -> None:
        """Prepare the step that follows these slots, if each goes on with one token: while others
        are at this one still, rather than when they are at the next."""
        if not self._owned or not slots or not all(slot.sample for slot in slots):
            return
        ends = (slot.start + len(slot.tokens) for slot in slots)
        runs = [
            Run(slot.request_id, row, end, end + 1)
            for row, (slot, end) in enumerate(zip(slots, ends, strict=True))
        ]
        self._ahead = self._prepare(runs, len(runs))

    def _prepare(self, runs: list[Run], rows: int) -> _Prepared:
        padded = padded_rows(rows, self._quant)
        of_step = make_rows(runs, self._group, self._kv_dtype, self._device)
        x = torch.zeros((padded, self._hidden), dtype=torch.float32, device=self._device)
        return _Prepared(
            runs,
            x,
            self._owned[0].trunk.memory(x),
            self._owned[0].trunk.rope.rows([(run.start, run.end) for run in runs]),
            tuple(owned.attention(padded, of_step, self._group) for owned in self._owned),
        )

    def open(self, request_id: int, positions: int) -> None:
        """Make room for a request; an open one keeps what it has."""
        self._ahead = None
        for part in self._parts:
            part.cache.open(request_id, positions)
        for store in self._inputs.values():
            store.open(request_id, positions)

    def forget(self, request_ids: Sequence[int]) -> None:
        """Free the KV of requests that ended."""
        if request_ids:
            self._ahead = None
        for part in self._parts:
            for request_id in request_ids:
                part.cache.drop(request_id)
        for store in self._inputs.values():
            for request_id in request_ids:
                store.drop(request_id)

    def recompute(
        self, request_id: int, units: AbstractSet[KvUnit], start: int, end: int
    ) -> Iterator[None]:
        """Write K and V of positions `[start, end)` of owned head units, made of kept inputs.

        Yields after each product. Raises `LookupError` where the inputs are not here.
        """
        for owned in self._owned:
            those = {unit.unit for unit in units if unit.span == owned.trunk.span}
            if those:
                yield from owned.recompute(request_id, those, start, end)

    def _open(self, slots: Sequence[Slot]) -> list[Run]:
        runs: list[Run] = []
        row = 0
        for slot in slots:
            if slot.capacity:
                self.open(slot.request_id, slot.capacity)
            end = slot.start + len(slot.tokens)
            runs.append(Run(slot.request_id, row, slot.start, end))
            row += len(slot.tokens)
        return runs

    def _embed(self, embedding: Tensor, slots: Sequence[Slot], x: Tensor) -> None:
        """Put rows of the mapped table into `x`: the table itself is never loaded."""
        ids = [token for slot in slots for token in slot.tokens]
        if len(ids) == 1:
            x.copy_(embedding[ids[0]])
        else:
            x.copy_(embedding[torch.tensor(ids, dtype=torch.int64)])

    def _sent(self, partials: dict[int, Tensor]) -> dict[int, Tensor]:
        """Partials in the format in which they are added up."""
        if self._sum_dtype is torch.float32:
            return partials
        return {unit: p.to(self._sum_dtype) for unit, p in partials.items()}

    @staticmethod
    def _add(x: Tensor, total: Tensor | None, bias: Tensor | None) -> None:
        """Add a half layer's sum in place; a row-parallel bias is added once, after it."""
        assert total is not None
        x += total if x.is_cpu else total.to(x.device)
        if bias is not None:
            x += bias

    def _logits(self, owned: _Owned, x: Tensor, slots: Sequence[Slot]) -> Tensor | None:
        last_rows: list[int] = []
        row = -1
        for slot in slots:
            row += len(slot.tokens)
            if slot.sample:
                last_rows.append(row)
        if not owned.vocab_units or not last_rows:
            return None
        count = len(last_rows)
        picked = functional.pad(x[last_rows], (0, 0, 0, padded_rows(count, self._quant) - count))
        trunk = owned.trunk
        assert trunk.final_norm is not None
        h = trunk.memory(picked)
        trunk.prepare(picked, trunk.final_norm, h)
        logits = owned.logits(h, count)
        return torch.cat([logits[unit] for unit in owned.vocab_units], dim=1)


def run_alone(runner: StageRunner, slots: Sequence[Slot]) -> Tensor:
    """Compute `slots` on a node that owns all units of the model: see `StageRunner.run`."""
    run = runner.run(slots)
    try:
        need = next(run)
        while True:
            assert isinstance(need, NeedSum), "who has all units needs no hidden states"
            need = run.send(whole_sum(need.partials, runner.units[need.half]))
    except StopIteration as done:
        logits: Tensor = done.value
        return logits
