"""Llama (Touvron et al., 2023) by layers and units: what one node computes of one stage.

The residual is float32, whole and bit-identical on every node of a stage. A half layer takes it
normed and yields one partial per unit; the caller adds the partials of all nodes along the fixed
tree. Norms, biases that are added after a sum, and the embedding are the `Trunk`, which every node
of a stage has; the rest is by unit. Names are those of `transformers`' checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.planner import Holding
from p2pinfer.core.units import Slice, group_size, unit_bounds
from p2pinfer.model.attention import Rows, attend
from p2pinfer.model.config import LlamaConfig
from p2pinfer.model.linear import Linear, pack
from p2pinfer.model.rope import Rope, rotate
from p2pinfer.types import DType, ModelSpec, UnitKind

WIDTH_MULTIPLE = 64
"""Slices of the MLP are padded to this width by zero weights, so that elementwise operations never
end in a vector's tail, whose bits differ."""

PARALLEL_ELEMENTS = 32768
"""torch splits elementwise work above this size over threads, at places that make new tails."""

TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}


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


@dataclass(frozen=True)
class Batch:
    """The rows of one step: what they attend to, and their rotary angles."""

    rows: Rows
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class LayerTrunk:
    """Norms of one layer's halves, [hidden] float32, and the biases of `o_proj` and `down_proj`.

    A bias is added once, after the sum over all units.
    """

    attention_norm: Tensor
    attention_bias: Tensor | None
    mlp_norm: Tensor
    mlp_bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """What every node of a stage has whole, whichever units it owns.

    `final_norm` is there in the last stage, `embedding` (a mapped table) in the first.
    """

    span: Slice
    dtype: torch.dtype
    eps: float
    rope: Rope
    layers: tuple[LayerTrunk, ...]
    final_norm: Tensor | None
    embedding: Tensor | None

    def normed(self, x: Tensor, norm: Tensor) -> Tensor:
        """`x` [rows, hidden] float32 by root mean square and `norm`, in the model's dtype."""
        return functional.rms_norm(x, (x.shape[1],), norm, self.eps).to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class AttentionHalf:
    """Head units of one layer: q/k/v as one product, attention, `o_proj` per unit."""

    model: ModelSpec
    units: tuple[int, ...]
    qkv: Linear
    out: tuple[Linear, ...]

    def partials(
        self,
        h: Tensor,
        batch: Batch,
        store_of: Callable[[int], Tensor],
        owned: AbstractSet[int],
    ) -> dict[int, Tensor]:
        """[rows, hidden] float32 per unit that is `owned`, of `h` [rows, hidden], the normed input.

        `store_of(request)` is the KV of this layer, [units, 2, capacity, head_dim]: that of all
        units is written.
        """
        dtype = TORCH_DTYPES[self.model.dtype]
        q, k, v = self._project(h, batch.cos, batch.sin)
        mixed = attend(q, k, v, batch.rows, store_of).to(dtype)
        each = zip(self.units, mixed.unbind(), self.out, strict=True)
        return {unit: out(rows_of).float() for unit, rows_of, out in each if unit in owned}

    def keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, each [rows, units, head_dim] in the KV's number format, of `h` [rows, hidden]:
        the very bits that `partials` writes, since it is the same product."""
        _, k, v = self._project(h, cos, sin)
        return k, v

    def _project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q [rows, units, group, head_dim], K and V, in the KV's number format."""
        kind = TORCH_DTYPES[self.model.kv_dtype]
        rows, units, dim = h.shape[0], len(self.units), self.model.head_dim
        group = group_size(self.model)
        qkv = self.qkv(h)
        values_at = units * (group + 1) * dim
        turned = qkv[:, :values_at].view(rows, units * (group + 1), dim)
        turned = rotate(turned, cos, sin).to(kind)
        q = turned[:, : units * group].view(rows, units, group, dim)
        k = turned[:, units * group :]
        v = qkv[:, values_at:].view(rows, units, dim).to(kind)
        return q, k, v

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.qkv.nbytes + sum(o.nbytes for o in self.out)


@dataclass(frozen=True, kw_only=True)
class MlpHalf:
    """MLP units of one layer: gate and up as one product, `down_proj` per unit.

    `widths` are the units' padded widths.
    """

    units: tuple[int, ...]
    widths: tuple[int, ...]
    gate_up: Linear
    down: tuple[Linear, ...]

    def partials(self, h: Tensor, owned: AbstractSet[int]) -> dict[int, Tensor]:
        """[rows, hidden] float32 per unit that is `owned`, of `h` [rows, hidden], the normed
        input."""
        active = _silu_mul(self.gate_up(h))
        sums: dict[int, Tensor] = {}
        start = 0
        for unit, width, down in zip(self.units, self.widths, self.down, strict=True):
            if unit in owned:
                sums[unit] = down(active[:, start : start + width].contiguous()).float()
            start += width
        return sums

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.gate_up.nbytes + sum(d.nbytes for d in self.down)


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


class VocabHead:
    """Slices of `lm_head`, by vocab unit."""

    def __init__(self, heads: Mapping[int, Linear]) -> None:
        self._heads = heads

    def logits(self, h: Tensor, owned: AbstractSet[int]) -> dict[int, Tensor]:
        """[rows, unit width] float32 per unit that is `owned`, of `h` [rows, hidden], the normed
        output of the last layer."""
        return {unit: head(h).float() for unit, head in self._heads.items() if unit in owned}

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return sum(h.nbytes for h in self._heads.values())


@dataclass(frozen=True)
class StageModel:
    """The weights of some units of a stage, ready to compute; None where no unit is of the kind.

    One attention and one MLP half for each layer of the span.
    """

    attention: tuple[AttentionHalf, ...] | None
    mlp: tuple[MlpHalf, ...] | None
    vocab: VocabHead | None

    @property
    def nbytes(self) -> int:
        """Bytes of weights held, as they are read by one pass over all of them."""
        layers = sum(h.nbytes for h in self.attention or ()) + sum(h.nbytes for h in self.mlp or ())
        return layers + (self.vocab.nbytes if self.vocab else 0)


class Stacked(NamedTuple):
    """Rows `[start, end)` of a weight and its bias, to be padded to `height`; `name` is both's."""

    name: str
    start: int
    end: int
    height: int


class Read(NamedTuple):
    """Rows `[start, end)` of a tensor by its name; the columns that are wanted may be fewer."""

    name: str
    start: int
    end: int


class StageLoader:
    """Reads units and trunk of a stage from the checkpoint, slice by slice, and packs them.

    Temporary memory is one product's weight at most.
    """

    def __init__(
        self,
        weights: TensorSource,
        config: LlamaConfig,
        model: ModelSpec,
        device: torch.device,
    ) -> None:
        self._weights = weights
        self._config = config
        self._model = model
        self._device = device
        self._dtype = TORCH_DTYPES[model.dtype]

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
        span = range(holding.span.start, holding.span.end)
        attention, mlp, vocab = None, None, None
        if holding.head_units:
            halves = []
            for layer in span:
                halves.append((yield from self._attention(layer, holding.head_units)))
            attention = tuple(halves)
        if holding.mlp_units:
            others = []
            for layer in span:
                others.append((yield from self._mlp(layer, holding.mlp_units)))
            mlp = tuple(others)
        if holding.vocab_units:
            vocab = yield from self._vocab(holding.vocab_units)
        return StageModel(attention, mlp, vocab)

    def trunk(self, span: Slice) -> Trunk:
        """Load what every node of a stage has, whichever units it owns."""
        config = self._config
        last = span.end == self._model.num_layers
        return Trunk(
            span=span,
            dtype=self._dtype,
            eps=config.rms_norm_eps,
            rope=Rope(config, self._device),
            layers=tuple(self._layer_trunk(layer) for layer in range(span.start, span.end)),
            final_norm=self._whole("model.norm.weight") if last else None,
            embedding=self._weights.mapped("model.embed_tokens.weight") if not span.start else None,
        )

    def _layer_trunk(self, layer: int) -> LayerTrunk:
        prefix, config = f"model.layers.{layer}.", self._config
        attention, mlp = f"{prefix}self_attn.o_proj.bias", f"{prefix}mlp.down_proj.bias"
        return LayerTrunk(
            attention_norm=self._whole(f"{prefix}input_layernorm.weight"),
            attention_bias=self._whole(attention) if config.attention_bias else None,
            mlp_norm=self._whole(f"{prefix}post_attention_layernorm.weight"),
            mlp_bias=self._whole(mlp) if config.mlp_bias else None,
        )

    def _whole(self, name: str) -> Tensor:
        return self._weights.whole(name).to(self._device, torch.float32)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)

    def _attention(self, layer: int, units: Sequence[int]) -> Generator[int, None, AttentionHalf]:
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        rows = self._qkv_rows(layer, units)
        qkv = yield from self._stacked(rows, self._config.attention_bias)
        width = group_size(self._model) * self._model.head_dim
        out: list[Linear] = []
        for u in units:
            out.append(self._columns(name, u * width, (u + 1) * width, width))
            yield out[-1].nbytes
        return AttentionHalf(model=self._model, units=tuple(units), qkv=qkv, out=tuple(out))

    def _qkv_rows(self, layer: int, units: Sequence[int]) -> list[Stacked]:
        base = f"model.layers.{layer}.self_attn."
        dim, group = self._model.head_dim, group_size(self._model)
        heights = (("q_proj", group * dim), ("k_proj", dim), ("v_proj", dim))
        return [
            Stacked(f"{base}{name}", unit * height, (unit + 1) * height, height)
            for name, height in heights
            for unit in units
        ]

    def _stacked(self, pieces: Sequence[Stacked], biased: bool) -> Generator[int, None, Linear]:
        """One column-parallel product of `(weight, first row, end row, padded height)` stacked."""
        read = self._weights.rows
        slices: list[Tensor] = []
        for name, start, end, height in pieces:
            slices.append(_taller(read(f"{name}.weight", start, end), height))
            # Reading may take long where a disk is asked.
            yield 0
        bias = None
        if biased:
            bias = torch.cat([_taller(read(f"{n}.bias", a, b), high) for n, a, b, high in pieces])
            bias = bias.to(self._device, self._dtype)
        weight = torch.cat(slices)
        slices.clear()
        product = pack(self._place(weight), bias)
        yield product.nbytes
        return product

    def _columns(self, name: str, start: int, end: int, width: int) -> Linear:
        """One unit's row-parallel product: columns `[start, end)`, with zeros up to `width`."""
        return pack(self._place(_wider(self._weights.cols(name, start, end), width)))

    def _mlp(self, layer: int, units: Sequence[int]) -> Generator[int, None, MlpHalf]:
        rows = self._gate_up_rows(layer, units)
        gate_up = yield from self._stacked(rows, self._config.mlp_bias)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        down: list[Linear] = []
        for _, start, end, width in rows[: len(units)]:
            down.append(self._columns(name, start, end, width))
            yield down[-1].nbytes
        widths = tuple(each.height for each in rows[: len(units)])
        return MlpHalf(units=tuple(units), widths=widths, gate_up=gate_up, down=tuple(down))

    def _gate_up_rows(self, layer: int, units: Sequence[int]) -> list[Stacked]:
        """Those of `gate_proj` by unit, then those of `up_proj`."""
        bounds = [unit_bounds(self._model, UnitKind.MLP, u) for u in units]
        return [
            Stacked(
                f"model.layers.{layer}.mlp.{name}",
                a,
                b,
                -(-(b - a) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE,
            )
            for name in ("gate_proj", "up_proj")
            for a, b in bounds
        ]

    def _vocab(self, units: Sequence[int]) -> Generator[int, None, VocabHead]:
        heads: dict[int, Linear] = {}
        for unit, read in zip(units, self._vocab_reads(units), strict=True):
            heads[unit] = pack(self._place(self._weights.rows(*read)))
            yield heads[unit].nbytes
        return VocabHead(heads)

    def _vocab_reads(self, units: Sequence[int]) -> list[Read]:
        tied = self._config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return [Read(name, *unit_bounds(self._model, UnitKind.VOCAB, unit)) for unit in units]

    def reads(self, holding: Holding) -> Iterator[Read]:
        """What `pieces` asks its source for, in another order. Columns lie on nearly all pages of a
        matrix, so it is all of its rows."""
        config, hidden = self._config, self._model.hidden_size
        heads, mlp = holding.head_units, holding.mlp_units
        for layer in range(holding.span.start, holding.span.end):
            base = f"model.layers.{layer}."
            halves = (
                (heads, self._qkv_rows(layer, heads), config.attention_bias, "self_attn.o_proj"),
                (mlp, self._gate_up_rows(layer, mlp), config.mlp_bias, "mlp.down_proj"),
            )
            for units, rows, biased, columns in halves:
                for name, start, end, _ in rows:
                    yield Read(f"{name}.weight", start, end)
                    if biased:
                        yield Read(f"{name}.bias", start, end)
                if units:
                    yield Read(f"{base}{columns}.weight", 0, hidden)
        yield from self._vocab_reads(holding.vocab_units)


def _taller(tensor: Tensor, height: int) -> Tensor:
    if tensor.shape[0] == height:
        return tensor
    filled = tensor.new_zeros((height, *tensor.shape[1:]))
    filled[: tensor.shape[0]] = tensor
    return filled


def _wider(tensor: Tensor, width: int) -> Tensor:
    if tensor.shape[1] == width:
        return tensor
    return functional.pad(tensor, (0, width - tensor.shape[1]))
