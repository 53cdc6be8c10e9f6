"""Reads units and trunk of a stage from the checkpoint, slice by slice.

What the slices are multiplied with, and so in which form they are held, is the packer's choice.
Names are those of `transformers`' checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pinfer.core.holdings import Holding
from p2pinfer.core.tree import plan_additions
from p2pinfer.core.units import (
    MLP_PADDED_MULTIPLE,
    QUANT_FORMATS,
    Slice,
    group_size,
    unit_bounds,
    unit_count,
)
from p2pinfer.model.aside import Aside
from p2pinfer.model.config import LlamaConfig
from p2pinfer.model.kernels import library
from p2pinfer.model.llama import (
    TORCH_DTYPES,
    AttentionHalf,
    LayerTrunk,
    MlpHalf,
    StageModel,
    Trunk,
    VocabHead,
    compute_dtype,
)
from p2pinfer.model.norms import rms_norm_of
from p2pinfer.model.rope import Rope
from p2pinfer.model.unit_products import (
    Columns,
    FloatPacker,
    Heads,
    Norm,
    Packer,
    Rows,
    TensorSource,
    Units,
    slice_of,
)
from p2pinfer.types import ModelSpec, UnitKind

ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
"""Of a layer; what is added to its name in the checkpoint."""
FINAL_NORM = "model.norm.weight"


class Read(NamedTuple):
    """Rows `[start, end)` of a tensor by its name; the columns that are wanted may be fewer."""

    name: str
    start: int
    end: int


class StageLoader:
    """Reads units and trunk of a stage from the checkpoint, slice by slice, and packs them.

    Temporary memory is the largest product's weight, or those that units of a half layer have by
    themselves; of quantised weights those of half a layer for each graph that is made. `packer`
    multiplies them, by default the one that `packer_of` chooses.
    """

    def __init__(
        self,
        weights: TensorSource,
        config: LlamaConfig,
        model: ModelSpec,
        device: torch.device,
        packer: Packer[Any, Any] | None = None,
    ) -> None:
        self._weights = weights
        self._config = config
        self._model = model
        self._device = device
        self._dtype = compute_dtype(model)
        self._packer = packer or packer_of(weights, model, device)

    def load(self, holding: Holding) -> StageModel:
        """Load everything that `holding` names."""
        pieces = self.pieces(holding)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                loaded: StageModel = done.value
                return loaded

    def pieces(self, holding: Holding) -> Generator[int, None, StageModel]:
        """The same, bit by bit: yields the bytes of each product, and 0 now and then between.
        Whoever runs it may pause for as long as it likes, and go on in another thread."""
        span, aside = (
            range(holding.span.start, holding.span.end),
            Aside(self._packer.at_once),
        )
        attention: list[Callable[[], AttentionHalf]] = []
        mlp: list[Callable[[], MlpHalf]] = []
        vocab: list[Callable[[], VocabHead]] = []
        for layer in span if holding.head_units else ():
            attention.append((yield from self._attention(layer, holding.head_units, aside)))
        for layer in span if holding.mlp_units else ():
            mlp.append((yield from self._mlp(layer, holding.mlp_units, aside)))
        if holding.vocab_units:
            vocab.append((yield from self._vocab(holding.vocab_units, aside)))
        yield from aside.finish()
        return StageModel(
            tuple(made() for made in attention) or None,
            tuple(made() for made in mlp) or None,
            vocab[0]() if vocab else None,
        )

    def trunk(self, span: Slice) -> Trunk:
        """Load what every node of a stage has, whichever units it owns."""
        config = self._config
        last, within = span.end == self._model.num_layers, self._packer.norms_within
        return Trunk(
            span=span,
            dtype=self._dtype,
            norms_within=within,
            rms_norm=rms_norm_of("torch" if within else library(self._dtype, self._device)),
            eps=config.rms_norm_eps,
            rope=Rope(config, self._device),
            layers=tuple(self._layer_trunk(layer) for layer in range(span.start, span.end)),
            final_norm=self._whole(FINAL_NORM) if last else None,
            embedding=self._weights.mapped("model.embed_tokens.weight") if not span.start else None,
        )

    def _layer_trunk(self, layer: int) -> LayerTrunk:
        prefix, config = f"model.layers.{layer}.", self._config
        attention, mlp = f"{prefix}self_attn.o_proj.bias", f"{prefix}mlp.down_proj.bias"
        return LayerTrunk(
            attention_norm=self._whole(prefix + ATTENTION_NORM),
            attention_bias=self._whole(attention) if config.attention_bias else None,
            mlp_norm=self._whole(prefix + MLP_NORM),
            mlp_bias=self._whole(mlp) if config.mlp_bias else None,
        )

    def _whole(self, name: str) -> Tensor:
        return self._weights.whole(name).to(self._device, torch.float32)

    def _norm(self, name: str) -> Norm:
        return Norm(self._whole(name), self._config.rms_norm_eps)

    def _attention(
        self, layer: int, units: Sequence[int], aside: Aside
    ) -> Generator[int, None, Callable[[], AttentionHalf]]:
        """Reads what the half is made of. What comes of it gives the half, once it is made."""
        qkv = yield from self._stacked(self._qkv_rows(layer, units), self._config.attention_bias)
        own = []
        for read in self._out_columns(layer, units):
            own.append(self._packer.alone(read))
            yield own[-1].nbytes
        packer, norm = self._packer, self._norm(f"model.layers.{layer}.{ATTENTION_NORM}")
        heads = Heads(len(units), group_size(self._model), self._model.head_dim)
        turned = yield from aside.start(lambda: packer.projection(qkv, heads, norm))
        summed = self._summed(UnitKind.HEAD, units)
        out = yield from aside.start(lambda: packer.separate(summed, own))
        return lambda: AttentionHalf(units=tuple(units), qkv=turned.result(), out=out.result())

    def _qkv_rows(self, layer: int, units: Sequence[int]) -> list[Rows]:
        base = f"model.layers.{layer}.self_attn."
        dim, group = self._model.head_dim, group_size(self._model)
        heights = (("q_proj", group * dim), ("k_proj", dim), ("v_proj", dim))
        return [
            Rows(f"{base}{name}.weight", unit * height, (unit + 1) * height, height)
            for name, height in heights
            for unit in units
        ]

    def _out_columns(self, layer: int, units: Sequence[int]) -> list[Columns]:
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        width = group_size(self._model) * self._model.head_dim
        return [Columns(name, u * width, (u + 1) * width, width) for u in units]

    def _stacked(self, reads: Sequence[Rows], biased: bool) -> Generator[int, None, Any]:
        """One column-parallel weight of the rows that are read, one above the other."""
        pieces = []
        for read in reads:
            pieces.append(self._packer.piece(read))
            # Reading may take long where a disk is asked.
            yield 0
        bias = None
        if biased:
            bias = torch.cat([slice_of(self._weights, _bias(read)) for read in reads])
        weight = self._packer.stack(pieces, bias)
        yield weight.nbytes
        return weight

    def _mlp(
        self, layer: int, units: Sequence[int], aside: Aside
    ) -> Generator[int, None, Callable[[], MlpHalf]]:
        rows = self._gate_up_rows(layer, units)
        gate_up = yield from self._stacked(rows, self._config.mlp_bias)
        down = []
        for read in self._down_columns(layer, units):
            down.append(self._packer.alone(read))
            yield down[-1].nbytes
        widths = [each.height for each in rows[: len(units)]]
        norm = self._norm(f"model.layers.{layer}.{MLP_NORM}")
        packer, summed = self._packer, self._summed(UnitKind.MLP, units)
        products = yield from aside.start(lambda: packer.gated(summed, gate_up, down, widths, norm))
        return lambda: MlpHalf(products.result())

    def _gate_up_rows(self, layer: int, units: Sequence[int]) -> list[Rows]:
        """Those of `gate_proj` by unit, then those of `up_proj`."""
        bounds = [unit_bounds(self._model, UnitKind.MLP, u) for u in units]
        return [
            Rows(
                f"model.layers.{layer}.mlp.{name}.weight",
                a,
                b,
                -(-(b - a) // MLP_PADDED_MULTIPLE) * MLP_PADDED_MULTIPLE,
            )
            for name in ("gate_proj", "up_proj")
            for a, b in bounds
        ]

    def _down_columns(self, layer: int, units: Sequence[int]) -> list[Columns]:
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        rows = self._gate_up_rows(layer, units)[: len(units)]
        return [Columns(name, *read[1:]) for read in rows]

    def _vocab(
        self, units: Sequence[int], aside: Aside
    ) -> Generator[int, None, Callable[[], VocabHead]]:
        heads = []
        for read in self._vocab_rows(units):
            heads.append(self._packer.alone(read))
            yield heads[-1].nbytes
        norm = self._norm(FINAL_NORM)
        apart = Units(tuple(units))
        products = yield from aside.start(lambda: self._packer.fanned(apart, heads, norm))
        return lambda: VocabHead(products.result())

    def _summed(self, kind: UnitKind, units: Sequence[int]) -> Units:
        """Units whose partials are added as far as they go; each is rounded before, where sums are
        in another format than products, and is not added there."""
        if self._model.wire_dtype != "float32":
            return Units(tuple(units))
        additions = plan_additions(units, unit_count(self._model, kind))
        return Units(tuple(units), tuple(additions))

    def _vocab_rows(self, units: Sequence[int]) -> list[Rows]:
        tied = self._config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        bounds = [unit_bounds(self._model, UnitKind.VOCAB, unit) for unit in units]
        return [Rows(name, a, b, b - a) for a, b in bounds]

    def _slices(self, holding: Holding) -> Iterator[Rows | Columns]:
        """All weights of a holding, as the packer reads them."""
        heads, mlp = holding.head_units, holding.mlp_units
        for layer in range(holding.span.start, holding.span.end):
            yield from self._qkv_rows(layer, heads)
            yield from self._out_columns(layer, heads)
            yield from self._gate_up_rows(layer, mlp)
            yield from self._down_columns(layer, mlp)
        yield from self._vocab_rows(holding.vocab_units)

    def reads(self, holding: Holding) -> Iterator[Read]:
        """What `pieces` asks its source for, in another order. Columns lie on nearly all pages of a
        matrix, so it is all of its rows."""
        whole = set()
        for read in self._slices(holding):
            if isinstance(read, Rows):
                yield Read(*read[:3])
                if self._biased(read.name):
                    yield Read(*_bias(read)[:3])
            elif read.name not in whole:
                whole.add(read.name)
                yield Read(read.name, 0, self._model.hidden_size)

    def _biased(self, name: str) -> bool:
        if ".mlp." in name:
            return self._config.mlp_bias
        return ".self_attn." in name and self._config.attention_bias

    def prepare(self, holding: Holding) -> Iterator[int]:
        """Read all weights of a holding as the packer holds them, and drop them: yields the bytes
        of each slice. Of quantised weights there are copies on the disk then, in the page cache."""
        for read in self._slices(holding):
            yield self._packer.alone(read).nbytes


def _bias(read: Rows) -> Rows:
    """The bias of these rows."""
    return read._replace(name=f"{read.name.removesuffix('.weight')}.bias")


def packer_of(
    weights: TensorSource, model: ModelSpec, device: torch.device, copies: Path | None = None
) -> Packer[Any, Any]:
    """The one place where it is chosen what multiplies. Quantised weights are kept in the folder
    `copies`, and read from there, where one is given."""
    if model.quant == "none":
        return FloatPacker(weights, device, TORCH_DTYPES[model.dtype])
    # Only who quantises pays for the import.
    from p2pinfer.model.quantised_copies import QuantisedCopies
    from p2pinfer.model.quantised_products import QuantisedPacker

    known = QuantisedCopies(copies, model) if copies else None
    return QuantisedPacker(weights, QUANT_FORMATS[model.quant], known)
