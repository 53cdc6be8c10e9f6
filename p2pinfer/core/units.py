"""Units: the smallest pieces of a model that can be placed, and how large each is.

Where a unit begins and ends is a function of the model alone, never of the plan: a node that takes
over a unit computes the same products, so the same bits. Widths are multiples of what the product
kernels need to be independent of slicing; nothing has to divide evenly, the last unit is shorter.
"""

from __future__ import annotations

from typing import NamedTuple

from p2pinfer.types import DType, ModelSpec, UnitKind

MLP_WIDTH_MULTIPLE = 128
MLP_WIDTH_MAX = 1024
MLP_UNITS_WANTED = 8
"""Enough MLP units for eight nodes to share a small model."""

VOCAB_WIDTH_MULTIPLE = 64
VOCAB_UNITS_WANTED = 32

MLP_PADDED_MULTIPLE = 64
"""Slices of the MLP are padded to this width by zero weights, so that elementwise operations never
end in a vector's tail, whose bits differ."""

ITEM_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2}


SCALE_BYTES = 4


class BlockFormat(NamedTuple):
    """How quantised weights are kept: `bits` each, and a scale per `block` of a row."""

    bits: int
    block: int
    zero_points: bool

    def read_bytes(self, rows: int, inputs: int) -> int:
        """Bytes that a product with a matrix [rows, inputs] must read: the values, and per block a
        scale and, where there are any, a zero point of `bits` bits."""
        of_block = self.block * self.bits + 8 * SCALE_BYTES + self.bits * self.zero_points
        return rows * _ceil_div(_ceil_div(inputs, self.block) * of_block, 8)

    def held_bytes(self, rows: int, inputs: int) -> int:
        """Bytes that such a matrix takes in memory: onnxruntime keeps, beside its own layout, the
        scales as they were given, and per block the sum that takes the zero point into account."""
        blocks = _ceil_div(inputs, self.block)
        return self.read_bytes(rows, inputs) + rows * blocks * 2 * SCALE_BYTES


QUANT_FORMATS = {
    "int8": BlockFormat(bits=8, block=256, zero_points=False),
    "int4": BlockFormat(bits=4, block=256, zero_points=True),
}
"""By the names of `ModelSpec.quant`, but for `none`."""


class Slice(NamedTuple):
    """Indices `[start, end)`."""

    start: int
    end: int


def group_size(model: ModelSpec) -> int:
    """Query heads per KV head (grouped-query attention, Ainslie et al., 2023)."""
    return model.num_attention_heads // model.num_key_value_heads


def unit_count(model: ModelSpec, kind: UnitKind) -> int:
    """How many units of `kind` a layer (for `VOCAB`: the model) has; at least 1."""
    return _ceil_div(_size(model, kind), _width(model, kind))


def unit_bounds(model: ModelSpec, kind: UnitKind, unit: int) -> Slice:
    """KV heads, rows of `gate_proj` and `up_proj`, or vocabulary ids that `unit` is made of.

    Raises `ValueError` when the model has no such unit.
    """
    if not 0 <= unit < unit_count(model, kind):
        raise ValueError(f"{model.name} has no {kind} unit {unit}")
    width = _width(model, kind)
    return Slice(unit * width, min((unit + 1) * width, _size(model, kind)))


def unit_weight_bytes(model: ModelSpec, kind: UnitKind, unit: int) -> int:
    """Bytes that a unit's weights take in memory, per layer (for `VOCAB`: once)."""
    return sum(_held_bytes(model, *matrix) for matrix in unit_matrices(model, kind, unit))


def unit_read_bytes(model: ModelSpec, kind: UnitKind, unit: int) -> int:
    """Bytes of a unit's weights that decoding a token must read, per layer (for `VOCAB`: once)."""
    form = QUANT_FORMATS.get(model.quant)
    if form is None:
        return unit_weight_bytes(model, kind, unit)
    return sum(form.read_bytes(*matrix) for matrix in unit_matrices(model, kind, unit))


def unit_matrices(model: ModelSpec, kind: UnitKind, unit: int) -> tuple[tuple[int, int], ...]:
    """Rows and inputs of a unit's matrices.

    A head unit is its rows of `q_proj`, `k_proj` and `v_proj` and its columns of `o_proj`; an MLP
    unit its rows of `gate_proj` and `up_proj` and its columns of `down_proj`; a vocab unit its rows
    of `lm_head`. Biases and norms, a thousandth of that, are left out.
    """
    start, end = unit_bounds(model, kind, unit)
    hidden, group, wide = model.hidden_size, group_size(model), end - start
    return {
        UnitKind.HEAD: (
            ((group + 2) * model.head_dim, hidden),
            (hidden, group * model.head_dim),
        ),
        UnitKind.MLP: ((2 * wide, hidden), (hidden, wide)),
        UnitKind.VOCAB: ((wide, hidden),),
    }[kind]


def _held_bytes(model: ModelSpec, rows: int, inputs: int) -> int:
    form = QUANT_FORMATS.get(model.quant)
    return form.held_bytes(rows, inputs) if form else rows * inputs * ITEM_BYTES[model.dtype]


def kv_bytes_per_position(model: ModelSpec, span_layers: int) -> int:
    """Bytes of K and V of one head unit for one position of a request, over `span_layers`."""
    return 2 * model.head_dim * span_layers * ITEM_BYTES[model.kv_dtype]


def input_bytes_per_position(model: ModelSpec, span_layers: int) -> int:
    """Bytes of the inputs of the K and V projections for one position of a request, over
    `span_layers`: the same whichever units a node owns. Quantised products take float32."""
    dtype = model.dtype if model.quant == "none" else DType.FLOAT32
    return model.hidden_size * span_layers * ITEM_BYTES[dtype]


def _size(model: ModelSpec, kind: UnitKind) -> int:
    sizes = {
        UnitKind.HEAD: model.num_key_value_heads,
        UnitKind.MLP: model.intermediate_size,
        UnitKind.VOCAB: model.vocab_size,
    }
    return sizes[kind]


def _width(model: ModelSpec, kind: UnitKind) -> int:
    if kind is UnitKind.HEAD:
        return 1
    if kind is UnitKind.MLP:
        for width in range(MLP_WIDTH_MAX, MLP_WIDTH_MULTIPLE, -MLP_WIDTH_MULTIPLE):
            if _ceil_div(model.intermediate_size, width) >= MLP_UNITS_WANTED:
                return width
        return MLP_WIDTH_MULTIPLE
    wanted = _ceil_div(model.vocab_size, VOCAB_UNITS_WANTED)
    return _ceil_div(wanted, VOCAB_WIDTH_MULTIPLE) * VOCAB_WIDTH_MULTIPLE


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
