"""Models as plans name them, for tests that need a shape and no weights."""

from __future__ import annotations

from p2pinfer.types import DType, ModelSpec

NO_MODEL = ModelSpec(
    name="none",
    model_id="",
    num_layers=1,
    hidden_size=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
    intermediate_size=1,
    vocab_size=1,
    max_positions=1,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
)
"""For plans of which only members and votes count."""

TWO_LAYERS = ModelSpec(
    name="toy",
    model_id="ab" * 32,
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=4,
    intermediate_size=256,
    vocab_size=128,
    max_positions=96,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
)
"""Four head units, so that each of a few nodes holds some."""

SIX_LAYERS = ModelSpec(
    name="m",
    model_id="0" * 64,
    num_layers=6,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=1024,
    vocab_size=640,
    max_positions=512,
    dtype=DType.BFLOAT16,
    kv_dtype=DType.BFLOAT16,
)
"""Two query heads to a KV head, in bfloat16, with layers enough for every layout."""

LLAMA_1B = ModelSpec(
    name="llama",
    model_id="",
    num_layers=16,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128256,
    max_positions=131072,
    dtype=DType.BFLOAT16,
    kv_dtype=DType.BFLOAT16,
)
"""The shape of Llama-3.2-1B, but that its two tables are not tied."""
