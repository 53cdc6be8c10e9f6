"""One node's part of a step, without the network: what to send comes out, what others sent goes in.

`StageRunner.run` is a generator, so that the same code is driven by ZeroMQ in the worker and in
lockstep in one process by tests. It yields what other nodes must help with (`NeedHidden`,
`NeedSum`) or get (`GiveHidden`) and returns the logits of the sampling rows.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.planner import Holding
from p2pinfer.core.units import group_size
from p2pinfer.model.attention import Run, make_rows
from p2pinfer.model.config import LlamaConfig
from p2pinfer.model.kv_cache import KvCache, KvShape
from p2pinfer.model.linear import padded_rows
from p2pinfer.model.llama import TORCH_DTYPES, Batch, StageModel
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
    """Computes steps for the units that one node owns, and keeps their KV.

    `cache` is one of the same shape, of a runner before with the same layers and head units.
    """

    def __init__(
        self,
        stage: StageModel,
        holding: Holding,
        config: LlamaConfig,
        model: ModelSpec,
        device: torch.device,
        *,
        cache: KvCache | None = None,
    ) -> None:
        self._stage = stage
        self._span = holding.span
        self._eps = config.rms_norm_eps
        self._hidden = model.hidden_size
        self._group = group_size(model)
        self._kv_dtype = TORCH_DTYPES[model.kv_dtype]
        self._device = device
        self._rope = Rope(config, device)
        self._is_last = self._span.end == model.num_layers
        layers = self._span.end - self._span.start
        units = len(holding.head_units)
        shape = KvShape(units, layers, model.head_dim, self._kv_dtype, device)
        assert cache is None or cache.shape == shape, "KV of other units"
        self.cache = cache or KvCache(shape)

    def run(self, slots: Sequence[Slot]) -> StepRun:
        """Compute `slots`. Returns, per owned vocab unit, logits [sampling slots, unit width].

        The list is empty for a node that owns no vocab unit, or when no slot samples. KV counts
        as covered only when the whole step is done: an unfinished one may run again.
        """
        rows = sum(len(slot.tokens) for slot in slots)
        runs = self._open(slots)
        batch = self._batch(runs, rows)
        x = torch.zeros((padded_rows(rows), self._hidden), dtype=torch.float32, device=self._device)
        if self._stage.embedding is not None:
            x[:rows] = self._embed(slots)
        else:
            hidden = yield NeedHidden()
            assert hidden is not None
            x[:rows] = hidden
        for index, (attention, mlp) in enumerate(self._stage.layers):
            layer = self._span.start + index
            partials = attention.partials(x, self._eps, batch, self.cache.of_layer(index))
            x = self._add(
                x, rows, (yield self._need(layer, ATTENTION, partials, rows)), attention.bias
            )
            partials = mlp.partials(x, self._eps)
            x = self._add(x, rows, (yield self._need(layer, MLP, partials, rows)), mlp.bias)
        for run in runs:
            self.cache.finish(run.request_id, run.end)
        if not self._is_last:
            yield GiveHidden(x[:rows])
            return []
        return self._logits(x, slots)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held, as they are read by one pass over all of them."""
        return self._stage.nbytes

    def forget(self, request_ids: Sequence[int]) -> None:
        """Free the KV of requests that ended."""
        for request_id in request_ids:
            self.cache.drop(request_id)

    def _open(self, slots: Sequence[Slot]) -> list[Run]:
        runs: list[Run] = []
        row = 0
        for slot in slots:
            if slot.capacity:
                self.cache.open(slot.request_id, slot.capacity)
            end = slot.start + len(slot.tokens)
            runs.append(Run(slot.request_id, row, slot.start, end))
            row += len(slot.tokens)
        return runs

    def _batch(self, runs: list[Run], rows: int) -> Batch:
        spans = [(run.start, run.end) for run in runs]
        filler = padded_rows(rows) - rows
        if filler:
            spans.append((0, filler))
        cos, sin = self._rope.rows(spans)
        rows_of_step = make_rows(runs, self._group, self._kv_dtype, self._device)
        return Batch(rows_of_step, cos, sin)

    def _embed(self, slots: Sequence[Slot]) -> Tensor:
        """Rows of the mapped table: the table itself is never loaded."""
        assert self._stage.embedding is not None
        ids = torch.tensor([token for slot in slots for token in slot.tokens], dtype=torch.int64)
        return self._stage.embedding[ids].to(self._device, torch.float32)

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

    def _logits(self, x: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
        last_rows: list[int] = []
        row = -1
        for slot in slots:
            row += len(slot.tokens)
            if slot.sample:
                last_rows.append(row)
        if self._stage.vocab is None or not last_rows:
            return []
        count = len(last_rows)
        picked = functional.pad(x[last_rows], (0, 0, 0, padded_rows(count) - count))
        return [logits[:count] for logits in self._stage.vocab.logits(picked, self._eps)]
