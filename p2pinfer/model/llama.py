"""Llama (Touvron et al., 2023) by layers and units: what one node computes of one stage.

The residual is float32, whole and bit-identical on every node of a stage. A half layer takes it
normed, with rows of filler where products want more, and yields one partial per unit, or what it
has added of them; the caller adds those of all nodes along the fixed tree. Norms, biases that are
added after a sum, and the embedding are the `Trunk`, which every node of a stage has; the rest is
by unit.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.core.units import Slice
from p2pinfer.model.norms import RmsNorm
from p2pinfer.model.rope import Angles, Rope
from p2pinfer.model.unit_products import Projection, UnitProducts
from p2pinfer.types import DType, ModelSpec

TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}


def compute_dtype(model: ModelSpec) -> torch.dtype:
    """In what products take their inputs: quantised ones quantise them themselves, of float32."""
    return TORCH_DTYPES[model.dtype] if model.quant == "none" else torch.float32


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

    `final_norm` is there in the last stage, `embedding` (a mapped table) in the first. With
    `norms_within` products norm what they are given themselves.
    """

    span: Slice
    dtype: torch.dtype
    norms_within: bool
    rms_norm: RmsNorm
    eps: float
    rope: Rope
    layers: tuple[LayerTrunk, ...]
    final_norm: Tensor | None
    embedding: Tensor | None

    def memory(self, x: Tensor) -> Tensor:
        """Where to put what products take of the residual `x` [rows, hidden] float32: `x` itself,
        where they norm it, and otherwise memory of its own, in the model's dtype."""
        return x if self.norms_within else torch.zeros_like(x, dtype=self.dtype)

    def prepare(self, x: Tensor, norm: Tensor, memory: Tensor) -> None:
        """Put rows of the residual [rows, hidden], normed by root mean square and `norm`, into
        `memory`, or leave them where they are."""
        if not self.norms_within:
            memory.copy_(self.rms_norm(x, norm, self.eps))


@dataclass(frozen=True, kw_only=True)
class AttentionHalf:
    """Head units of one layer: q/k/v as one product, attention, `o_proj` per unit."""

    units: tuple[int, ...]
    qkv: Projection
    out: UnitProducts

    def partials(
        self,
        h: Tensor,
        angles: Angles,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        owned: AbstractSet[int],
    ) -> dict[int, Tensor]:
        """[rows, hidden] float32 per unit that is `owned`, or sums of them by tree node, of `h`
        [rows, hidden], the prepared input. `attend` is `StepAttention.attend` of this layer: it
        writes the KV of all units."""
        return self.out(attend(*self.qkv(h, angles)), angles.rows, owned)

    def keys_values(self, h: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """K and V, each [units, rows, head_dim], of `h` [rows, hidden]: in the KV's number format
        the very bits that `partials` writes, since it is the same product."""
        _, k, v = self.qkv(h, angles)
        return k, v

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.qkv.nbytes + self.out.nbytes


@dataclass(frozen=True)
class MlpHalf:
    """MLP units of one layer: `gate_proj` and `up_proj` as one product, `down_proj` per unit."""

    products: UnitProducts

    def partials(self, h: Tensor, rows: int, owned: AbstractSet[int]) -> dict[int, Tensor]:
        """[rows, hidden] float32 per unit that is `owned`, or sums of them by tree node, of `h`
        [rows, hidden], the prepared input."""
        return self.products(h, rows, owned)

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.products.nbytes


@dataclass(frozen=True)
class VocabHead:
    """Slices of `lm_head`, by vocab unit."""

    products: UnitProducts

    def logits(self, h: Tensor, rows: int, owned: AbstractSet[int]) -> dict[int, Tensor]:
        """[rows, unit width] float32 per unit that is `owned`, of `h` [rows, hidden], the
        prepared output of the last layer."""
        return self.products(h, rows, owned)

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.products.nbytes


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
