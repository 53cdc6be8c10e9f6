"""Units: their number, bounds and bytes are a function of the model alone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from p2pinfer.core.units import (
    QUANT_FORMATS,
    group_size,
    input_bytes_per_position,
    kv_bytes_per_position,
    unit_bounds,
    unit_count,
    unit_read_bytes,
    unit_weight_bytes,
)
from p2pinfer.types import DType, ModelSpec, UnitKind


def model(**changes: object) -> ModelSpec:
    """Llama-3.2-1B's shape, but for `changes`."""
    fields: dict[str, object] = {
        "name": "llama",
        "model_id": "",
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_positions": 131072,
        "dtype": DType.BFLOAT16,
        "kv_dtype": DType.BFLOAT16,
    }
    return ModelSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_head_unit_is_one_kv_head() -> None:
    """There are as many head units as KV heads, each with its group of query heads."""
    assert unit_count(model(), UnitKind.HEAD) == 8
    assert unit_bounds(model(), UnitKind.HEAD, 3) == (3, 4)
    assert group_size(model()) == 4


@pytest.mark.parametrize(
    ("size", "width", "units"),
    [
        (8192, 1024, 8),
        (14336, 1024, 14),
        (5632, 768, 8),
        (7168, 896, 8),
        (1000, 128, 8),
        (1024, 128, 8),
        (897, 128, 8),
        (896, 128, 7),
        (200, 128, 2),
        (128, 128, 1),
        (100, 100, 1),
        (1, 1, 1),
    ],
)
def test_mlp_units_are_the_widest_that_still_give_eight(size: int, width: int, units: int) -> None:
    """MLP units are a multiple of 128 wide, at most 1,024, and at least eight where that can be."""
    spec = model(intermediate_size=size)
    assert unit_count(spec, UnitKind.MLP) == units
    assert unit_bounds(spec, UnitKind.MLP, 0) == (0, width)
    assert unit_bounds(spec, UnitKind.MLP, units - 1).end == size


@pytest.mark.parametrize(
    ("size", "width", "units"),
    [(128256, 4032, 32), (32000, 1024, 32), (2048, 64, 32), (2000, 64, 32), (65, 64, 2), (7, 7, 1)],
)
def test_vocab_units_are_about_thirty_two(size: int, width: int, units: int) -> None:
    """Vocab units are a multiple of 64 wide and about 32, fewer for a small vocabulary."""
    spec = model(vocab_size=size)
    assert unit_count(spec, UnitKind.VOCAB) == units
    assert unit_bounds(spec, UnitKind.VOCAB, 0) == (0, width)
    assert unit_bounds(spec, UnitKind.VOCAB, units - 1).end == size


@pytest.mark.parametrize("kind", list(UnitKind))
def test_units_follow_each_other_without_gap(kind: UnitKind) -> None:
    """Each unit begins where the one before ends, and none is empty."""
    spec = model(intermediate_size=5000, vocab_size=50257)
    bounds = [unit_bounds(spec, kind, unit) for unit in range(unit_count(spec, kind))]
    assert bounds[0].start == 0
    assert all(start < end for start, end in bounds)
    assert all(before.end == after.start for before, after in pairwise(bounds))


@pytest.mark.parametrize("unit", [-1, 8])
def test_a_unit_that_is_not_there_is_refused(unit: int) -> None:
    """A unit number out of range is a `ValueError` that names it."""
    with pytest.raises(ValueError, match=f"head unit {unit}"):
        unit_bounds(model(), UnitKind.HEAD, unit)


def test_all_units_together_weigh_what_the_model_does() -> None:
    """The bytes of all units of all layers are those of the matrices of Llama-3.2-1B."""
    spec = model()

    def total(kind: UnitKind) -> int:
        return sum(unit_weight_bytes(spec, kind, u) for u in range(unit_count(spec, kind)))

    assert total(UnitKind.HEAD) == 2 * 2048 * (2048 + 512 + 512 + 2048)
    assert total(UnitKind.MLP) == 2 * 3 * 2048 * 8192
    assert total(UnitKind.VOCAB) == 2 * 128256 * 2048


def test_bytes_follow_the_number_format() -> None:
    """float32 weights take twice the bytes of bfloat16, and a KV position goes by `kv_dtype`."""
    spec = model(dtype=DType.FLOAT32)
    assert unit_weight_bytes(spec, UnitKind.MLP, 0) == 2 * unit_weight_bytes(
        model(), UnitKind.MLP, 0
    )
    assert kv_bytes_per_position(spec, 3) == 2 * 64 * 3 * 2
    assert kv_bytes_per_position(model(kv_dtype=DType.FLOAT32), 3) == 2 * 64 * 3 * 4


@pytest.mark.parametrize(("quant", "read", "held"), [("int8", 130, 134), ("int4", 66.25, 70.25)])
def test_quantised_weights_count_with_their_scales(quant: str, read: float, held: float) -> None:
    """Per block of 256 the values, a scale and, of int4, a zero point; held are three words in
    all. Both in bytes per 128 weights. The one zero point of a row of `o_proj` takes a byte."""
    quantised = model(quant=quant)
    head = 2 * (4 + 1) * 64 * 2048
    for kind, weights in (
        (UnitKind.HEAD, head),
        (UnitKind.MLP, 3 * 1024 * 2048),
        (UnitKind.VOCAB, 4032 * 2048),
    ):
        more = 2048 / 2 if (quant, kind) == ("int4", UnitKind.HEAD) else 0
        assert unit_read_bytes(quantised, kind, 0) == weights * read / 128 + more
        assert unit_weight_bytes(quantised, kind, 0) == weights * held / 128 + more
    assert unit_read_bytes(model(), UnitKind.MLP, 0) == unit_weight_bytes(model(), UnitKind.MLP, 0)


def test_a_block_that_is_not_full_counts_whole() -> None:
    """So do the inputs that are kept for quantised products, in float32."""
    form = QUANT_FORMATS["int4"]
    assert form.read_bytes(3, 257) == form.read_bytes(3, 512) == 3 * 265
    assert input_bytes_per_position(model(quant="int4"), 2) == 2 * 2048 * 4
    assert input_bytes_per_position(model(), 2) == 2 * 2048 * 2
