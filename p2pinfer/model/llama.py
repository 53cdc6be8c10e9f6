"""Llama (Touvron et al., 2023) by layers and units: what one node computes of one stage.

The residual is float32, whole and bit-identical on every node of a stage. A half layer takes it
normed and yields one partial per unit; the caller adds the partials of all nodes along the fixed
tree. Norms, biases that are added after a sum, and the embedding are the `Trunk`, which every node
of a stage has; the rest is by unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.core.units import Slice, group_size
from p2pinfer.model.attention import Rows, attend
from p2pinfer.model.linear import Linear
from p2pinfer.model.rope import Rope, rotate
from p2pinfer.model.unit_products import UnitProducts
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
    out: UnitProducts

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
        q, k, v = self._project(h, batch.cos, batch.sin)
        mixed = attend(q, k, v, batch.rows, store_of).to(compute_dtype(self.model))
        return _by_unit(self.units, self.out, mixed, owned)

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
        return self.qkv.nbytes + self.out.nbytes


@dataclass(frozen=True)
class MlpHalf:
    """MLP units of one layer: `gate_proj` and `up_proj` as one product, `down_proj` per unit."""

    units: tuple[int, ...]
    products: UnitProducts

    def partials(self, h: Tensor, owned: AbstractSet[int]) -> dict[int, Tensor]:
        """[rows, hidden] float32 per unit that is `owned`, of `h` [rows, hidden], the normed
        input."""
        return _by_unit(self.units, self.products, h, owned)

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.products.nbytes


@dataclass(frozen=True)
class VocabHead:
    """Slices of `lm_head`, by vocab unit."""

    units: tuple[int, ...]
    products: UnitProducts

    def logits(self, h: Tensor, owned: AbstractSet[int]) -> dict[int, Tensor]:
        """[rows, unit width] float32 per unit that is `owned`, of `h` [rows, hidden], the normed
        output of the last layer."""
        return _by_unit(self.units, self.products, h, owned)

    @property
    def nbytes(self) -> int:
        """Bytes of weight that one pass reads."""
        return self.products.nbytes


def _by_unit(
    units: Sequence[int], products: UnitProducts, x: Tensor, owned: AbstractSet[int]
) -> dict[int, Tensor]:
    wanted = [place for place, unit in enumerate(units) if unit in owned]
    return {units[place]: result for place, result in products(x, wanted).items()}


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
