"""Llama (Touvron et al., 2023) by layers and units: what one node computes of one stage.

The residual `x` is float32, whole and bit-identical on every node of a stage. A half layer yields
one partial per owned unit; the caller adds the partials of all nodes along the fixed tree. Names
are those of `transformers`' checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.planner import Holding
from p2pinfer.core.units import group_size, unit_bounds
from p2pinfer.model.attention import Rows, attend
from p2pinfer.model.config import LlamaConfig
from p2pinfer.model.linear import Linear, pack
from p2pinfer.model.rope import rotate
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


@dataclass(frozen=True, kw_only=True)
class AttentionHalf:
    """Head units of one layer: norm, q/k/v as one product, attention, `o_proj` per unit.

    `bias` is that of `o_proj`; the caller adds it once, after the sum over all units.
    """

    model: ModelSpec
    units: tuple[int, ...]
    norm: Tensor
    qkv: Linear | None
    out: tuple[Linear, ...]
    bias: Tensor | None

    def partials(
        self, x: Tensor, eps: float, batch: Batch, store_of: Callable[[int], Tensor]
    ) -> dict[int, Tensor]:
        """[rows, hidden] float32 per owned unit, of `x` [rows, hidden] float32.

        `store_of(request)` is the KV of this layer, [units, 2, capacity, head_dim].
        """
        if self.qkv is None:
            return {}
        dtype, kind = TORCH_DTYPES[self.model.dtype], TORCH_DTYPES[self.model.kv_dtype]
        h = functional.rms_norm(x, (x.shape[1],), self.norm, eps).to(dtype)
        rows, units, dim = x.shape[0], len(self.units), self.model.head_dim
        group = group_size(self.model)
        qkv = self.qkv(h)
        values_at = units * (group + 1) * dim
        turned = qkv[:, :values_at].view(rows, units * (group + 1), dim)
        turned = rotate(turned, batch.cos, batch.sin).to(kind)
        q = turned[:, : units * group].view(rows, units, group, dim)
        k = turned[:, units * group :]
        v = qkv[:, values_at:].view(rows, units, dim).to(kind)
        mixed = attend(q, k, v, batch.rows, store_of).to(dtype)
        each = zip(self.units, mixed.unbind(), self.out, strict=True)
        return {unit: out(rows_of_unit).float() for unit, rows_of_unit, out in each}

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return (self.qkv.nbytes if self.qkv else 0) + sum(o.nbytes for o in self.out)


@dataclass(frozen=True, kw_only=True)
class MlpHalf:
    """MLP units of one layer: norm, gate and up as one product, `down_proj` per unit.

    `widths` are the units' padded widths; `bias` is that of `down_proj`, added by the caller.
    """

    dtype: torch.dtype
    units: tuple[int, ...]
    widths: tuple[int, ...]
    norm: Tensor
    gate_up: Linear | None
    down: tuple[Linear, ...]
    bias: Tensor | None

    def partials(self, x: Tensor, eps: float) -> dict[int, Tensor]:
        """[rows, hidden] float32 per owned unit, of `x` [rows, hidden] float32."""
        if self.gate_up is None:
            return {}
        h = functional.rms_norm(x, (x.shape[1],), self.norm, eps).to(self.dtype)
        active = _silu_mul(self.gate_up(h))
        sums: dict[int, Tensor] = {}
        start = 0
        for unit, width, down in zip(self.units, self.widths, self.down, strict=True):
            sums[unit] = down(active[:, start : start + width].contiguous()).float()
            start += width
        return sums

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return (self.gate_up.nbytes if self.gate_up else 0) + sum(d.nbytes for d in self.down)


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
    """The final norm and the owned slices of `lm_head`."""

    def __init__(
        self, dtype: torch.dtype, units: Sequence[int], norm: Tensor, heads: Sequence[Linear]
    ) -> None:
        self._dtype = dtype
        self.units = tuple(units)
        self._norm = norm
        self._heads = tuple(heads)

    def logits(self, x: Tensor, eps: float) -> list[Tensor]:
        """[rows, unit width] float32 per owned unit, of `x` [rows, hidden] float32."""
        h = functional.rms_norm(x, (x.shape[1],), self._norm, eps).to(self._dtype)
        return [head(h).float() for head in self._heads]

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return sum(h.nbytes for h in self._heads)


@dataclass(frozen=True)
class StageModel:
    """What a node holds of its stage, ready to compute."""

    layers: list[tuple[AttentionHalf, MlpHalf]]
    vocab: VocabHead | None
    embedding: Tensor | None
    nbytes: int


class StageLoader:
    """Reads a node's units from the checkpoint, slice by slice, and packs them.

    `progress(bytes)` is called after each piece. Temporary memory is one product's weight at most.
    """

    def __init__(
        self,
        weights: TensorSource,
        config: LlamaConfig,
        model: ModelSpec,
        device: torch.device,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        self._weights = weights
        self._config = config
        self._model = model
        self._device = device
        self._dtype = TORCH_DTYPES[model.dtype]
        self._progress = progress

    def load(self, holding: Holding) -> StageModel:
        """Load everything that `holding` names."""
        span = holding.span
        layers = [
            (self._attention(layer, holding.head_units), self._mlp(layer, holding.mlp_units))
            for layer in range(span.start, span.end)
        ]
        vocab = self._vocab(holding.vocab_units) if holding.vocab_units else None
        embedding = self._weights.mapped("model.embed_tokens.weight") if span.start == 0 else None
        nbytes = sum(a.nbytes + m.nbytes for a, m in layers) + (vocab.nbytes if vocab else 0)
        return StageModel(layers, vocab, embedding, nbytes)

    def _place(self, tensor: Tensor) -> Tensor:
        self._progress(tensor.nbytes)
        return tensor.to(self._device, self._dtype)

    def _norm(self, name: str) -> Tensor:
        return self._weights.whole(name).to(self._device, torch.float32)

    def _bias(self, name: str, wanted: bool) -> Tensor | None:
        """A row-parallel product's bias, added once, after the sum, on every node."""
        return self._norm(name) if wanted else None

    def _attention(self, layer: int, units: Sequence[int]) -> AttentionHalf:
        prefix = f"model.layers.{layer}."
        base = prefix + "self_attn."
        dim, group = self._model.head_dim, group_size(self._model)
        norm = self._norm(prefix + "input_layernorm.weight")
        bias = self._bias(base + "o_proj.bias", self._config.attention_bias)
        if not units:
            return AttentionHalf(
                model=self._model, units=(), norm=norm, qkv=None, out=(), bias=bias
            )
        heights = (("q_proj", group * dim), ("k_proj", dim), ("v_proj", dim))
        rows = [
            (f"{base}{name}", unit * height, (unit + 1) * height, height)
            for name, height in heights
            for unit in units
        ]
        qkv = self._stacked(rows, self._config.attention_bias)
        width = group * dim
        columns = [
            self._weights.cols(base + "o_proj.weight", u * width, (u + 1) * width) for u in units
        ]
        out = [pack(self._place(column)) for column in columns]
        return AttentionHalf(
            model=self._model, units=tuple(units), norm=norm, qkv=qkv, out=tuple(out), bias=bias
        )

    def _stacked(self, pieces: Sequence[tuple[str, int, int, int]], biased: bool) -> Linear:
        """One column-parallel product of `(weight, first row, end row, padded height)` stacked."""
        read = self._weights.rows
        weight = torch.cat([_taller(read(f"{n}.weight", a, b), high) for n, a, b, high in pieces])
        bias = None
        if biased:
            bias = torch.cat([_taller(read(f"{n}.bias", a, b), high) for n, a, b, high in pieces])
            bias = bias.to(self._device, self._dtype)
        return pack(self._place(weight), bias)

    def _mlp(self, layer: int, units: Sequence[int]) -> MlpHalf:
        prefix = f"model.layers.{layer}."
        base = prefix + "mlp."
        norm = self._norm(prefix + "post_attention_layernorm.weight")
        biased = self._config.mlp_bias
        bias = self._bias(base + "down_proj.bias", biased)
        if not units:
            return MlpHalf(
                dtype=self._dtype,
                units=(),
                widths=(),
                norm=norm,
                gate_up=None,
                down=(),
                bias=bias,
            )
        bounds = [unit_bounds(self._model, UnitKind.MLP, u) for u in units]
        widths = [-(-(b - a) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for a, b in bounds]
        pieces = [
            (f"{base}{name}", a, b, width)
            for name in ("gate_proj", "up_proj")
            for (a, b), width in zip(bounds, widths, strict=True)
        ]
        gate_up = self._stacked(pieces, biased)
        down = [
            pack(self._place(_wider(self._weights.cols(base + "down_proj.weight", a, b), width)))
            for (a, b), width in zip(bounds, widths, strict=True)
        ]
        return MlpHalf(
            dtype=self._dtype,
            units=tuple(units),
            widths=tuple(widths),
            norm=norm,
            gate_up=gate_up,
            down=tuple(down),
            bias=bias,
        )

    def _vocab(self, units: Sequence[int]) -> VocabHead:
        tied = self._config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        bounds = [unit_bounds(self._model, UnitKind.VOCAB, u) for u in units]
        heads = [pack(self._place(self._weights.rows(name, a, b))) for a, b in bounds]
        return VocabHead(self._dtype, units, self._norm("model.norm.weight"), heads)


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
