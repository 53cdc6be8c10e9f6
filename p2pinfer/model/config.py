"""A model folder's `config.json`, as Llama and its lookalikes write it, checked field by field.

Names are those of `config.json`; a field that is left out takes the value that `transformers` gives
it. What would need other arithmetic (another activation, a sliding window, an unknown rope type, a
quantised checkpoint) is refused by name. Neither torch nor numpy is imported here.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from msgspec import Struct

from p2pinfer.config import expand_path
from p2pinfer.demo import MODEL_DIR
from p2pinfer.errors import ModelError, UsageError
from p2pinfer.limits import (
    MAX_HEAD_DIM,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_UNITS,
    MAX_VOCAB,
    MAX_WIDTH,
)
from p2pinfer.model.safetensors_file import stored_dtype
from p2pinfer.types import DType, ModelSpec

MAX_CONFIG_BYTES = 1 << 20
MAX_EOS_IDS = 64
MAX_NUMBER = 1e30
"""Beyond any number that a configuration can mean; JSON knows no bound."""

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": None, "sliding_window": None, "biases": True},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096, "biases": False},
}
"""What may be loaded, with what `transformers` takes for a field that `config.json` leaves out
(`biases`: whether the architecture knows `attention_bias` and `mlp_bias` at all)."""

ROPE_TYPES = ("default", "linear", "llama3")


class RopeScaling(Struct, frozen=True, kw_only=True):
    """How rotary frequencies are stretched: `linear` uses the factor alone, `llama3` all fields."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class LlamaConfig(Struct, frozen=True, kw_only=True):
    """What `config.json` says of a model. `dtype` is the format to multiply in, by default."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    dtype: DType = DType.FLOAT32
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads


def resolve_model(text: str) -> Path:
    """The folder that `--model` means: `demo` is the bundled one, anything else is a path.

    Raises `ModelError` where there is no such folder.
    """
    if text == "demo":
        return MODEL_DIR
    try:
        folder = expand_path(text)
        if folder.is_dir():
            os.listdir(folder)
            return folder
        exists = folder.exists()
    except UsageError as error:
        raise ModelError(f"--model {error}") from error
    except OSError as error:
        raise ModelError(
            f"{text} cannot be read: {error.strerror}; give a folder that this user may read"
        ) from error
    if exists:
        raise ModelError(f"{folder} is a file; give the model's folder, which holds {CONFIG_FILE}")
    raise ModelError(
        f"{folder}: no such model folder; give a folder with {CONFIG_FILE} and *.safetensors, "
        "or `demo` for the bundled model"
    )


def model_name(folder: Path) -> str:
    """What people call the model in `folder`: the folder's name, or `demo`."""
    return "demo" if folder == MODEL_DIR else folder.resolve().name


def load_config(folder: Path) -> LlamaConfig:
    """Read and check `config.json` (and `generation_config.json` for the end-of-text ids).

    Raises `ModelError` naming file, field and value.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no {CONFIG_FILE}: it is not a model's folder; give the one with "
            f"{CONFIG_FILE} and *.safetensors"
        )
    fields = _Fields(path, read_json(path))
    architecture = _architecture(fields)
    defaults = ARCHITECTURES[architecture]
    _refuse_other_arithmetic(fields, defaults)
    heads = fields.whole("num_attention_heads", high=MAX_UNITS)
    hidden = fields.whole("hidden_size", high=MAX_WIDTH)
    vocab = fields.whole("vocab_size", high=MAX_VOCAB)
    theta, scaling = _rope(fields)
    return LlamaConfig(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size", high=MAX_WIDTH),
        num_hidden_layers=fields.whole("num_hidden_layers", high=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(fields, heads, defaults["num_key_value_heads"] or heads),
        head_dim=_head_dim(fields, hidden, heads),
        vocab_size=vocab,
        max_position_embeddings=fields.whole("max_position_embeddings", high=1 << 40),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False) and defaults["biases"],
        mlp_bias=fields.flag("mlp_bias", False) and defaults["biases"],
        dtype=_dtype(fields, folder),
        eos_token_ids=_eos_ids(fields, folder, vocab),
        bos_token_id=_bos_id(fields, vocab),
    )


def model_spec(
    config: LlamaConfig,
    *,
    name: str,
    model_id: str,
    dtype: DType | None = None,
    quant: str = "none",
    wire_dtype: str = "float32",
) -> ModelSpec:
    """What the cluster agrees on of this model; `dtype` None means the configuration's own.

    KV is float32 beside float32 weights and bfloat16 beside all others: float16 too, whose range a
    real Llama's keys can leave, and quantised ones.
    """
    dtype = dtype or config.dtype
    exact = dtype is DType.FLOAT32 and quant == "none"
    return ModelSpec(
        name=name[:256],
        model_id=model_id,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=min(config.max_position_embeddings, MAX_POSITIONS),
        dtype=dtype,
        kv_dtype=DType.FLOAT32 if exact else DType.BFLOAT16,
        quant=quant,
        wire_dtype=wire_dtype,
        tied=config.tie_word_embeddings,
        eos_token_ids=config.eos_token_ids,
    )


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model must hold, with its shape, in file order."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    attention = {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden)}
    attention["o"] = (hidden, q_rows)
    mlp = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for part, products, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, shape in products.items():
                shapes[f"{prefix}{part}.{name}_proj.weight"] = shape
                if bias:
                    shapes[f"{prefix}{part}.{name}_proj.bias"] = shape[:1]
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises `ModelError` where there is none or it is over `limit`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise ModelError(f"{path} is longer than {limit} bytes: it is no file of this kind")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not JSON ({error}); download or write the file again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds {type(value).__name__}, not a JSON object; "
            "download or write the file again"
        )
    return value


class _Fields:
    """A JSON object of a named file, read field by field; null counts as left out."""

    def __init__(self, path: Path, raw: dict[str, Any], inside: str = "") -> None:
        self.path = path
        self.raw = raw
        self.inside = inside

    def get(self, name: str) -> Any:
        return self.raw.get(name)

    def wrong(self, name: str, must: str) -> ModelError:
        label = f"{self.inside}.{name}" if self.inside else name
        found = repr(self.raw[name]) if name in self.raw else "missing"
        return ModelError(f"{self.path}: {label} is {found}, but it must be {must}")

    def whole(self, name: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value) if abs(value) < MAX_NUMBER else math.inf
            if 0 < number < math.inf:
                return number
        raise self.wrong(name, "a positive number")

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def within(self, name: str) -> _Fields | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object or null")
        return _Fields(self.path, value, name)


def _architecture(fields: _Fields) -> str:
    named = fields.get("architectures")
    if named is None and fields.get("model_type") in ("llama", "mistral"):
        named = [f"{str(fields.get('model_type')).capitalize()}ForCausalLM"]
    if isinstance(named, list) and len(named) == 1 and named[0] in ARCHITECTURES:
        return str(named[0])
    raise fields.wrong("architectures", f"one of {', '.join(ARCHITECTURES)}: no other is computed")


def _refuse_other_arithmetic(fields: _Fields, defaults: dict[str, Any]) -> None:
    if (fields.get("hidden_act") or "silu") != "silu":
        raise fields.wrong("hidden_act", '"silu": no other activation is computed')
    if fields.raw.get("sliding_window", defaults["sliding_window"]) is not None:
        raise fields.wrong("sliding_window", "null: sliding-window attention is not computed")
    if fields.get("quantization_config") is not None:
        raise fields.wrong(
            "quantization_config",
            "absent: take the model's unquantised checkpoint",
        )


def _kv_heads(fields: _Fields, heads: int, default: int) -> int:
    kv_heads = fields.whole("num_key_value_heads", default, high=MAX_UNITS)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    return kv_heads


def _head_dim(fields: _Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.wrong(
            "hidden_size",
            f"a multiple of num_attention_heads ({heads}) where head_dim is not given",
        )
    head_dim = fields.whole("head_dim", hidden // heads, high=MAX_HEAD_DIM)
    if head_dim % 2:
        raise fields.wrong("head_dim", f"even, for rotary embedding (here {head_dim})")
    return head_dim


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and scaling in either spelling; `rope_parameters` (transformers 5) wins."""
    theta = fields.number("rope_theta", 10_000.0)
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.within(name)
    if rope is None:
        return theta, None
    theta = rope.number("rope_theta", theta)
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(key) or "default"
    if kind not in ROPE_TYPES:
        raise rope.wrong(key, f"one of {', '.join(ROPE_TYPES)}: no other rope type is computed")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise rope.wrong("partial_rotary_factor", "1: partial rotation is not computed")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(rope_type=kind, factor=rope.number("factor"))
    scaling = RopeScaling(
        rope_type=kind,
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.whole(
            "original_max_position_embeddings", high=MAX_POSITIONS
        ),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.wrong("high_freq_factor", f"above low_freq_factor ({scaling.low_freq_factor})")
    return theta, scaling


def _dtype(fields: _Fields, folder: Path) -> DType:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return stored_dtype(folder)
    try:
        return DType(str(value).removeprefix("torch."))
    except ValueError:
        raise fields.wrong(name, f"one of {', '.join(DType)}") from None


def _eos_ids(fields: _Fields, folder: Path, vocab: int) -> tuple[int, ...]:
    """End-of-text ids; `generation_config.json` knows them better where it exists."""
    path = folder / GENERATION_FILE
    if path.is_file():
        generation = _Fields(path, read_json(path))
        if generation.get("eos_token_id") is not None:
            fields = generation
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab for i in ids)
    if not good or len(ids) > MAX_EOS_IDS:
        raise fields.wrong("eos_token_id", f"ids from 0 to {vocab - 1} (one, or a list of them)")
    return tuple(dict.fromkeys(ids))


def _bos_id(fields: _Fields, vocab: int) -> int | None:
    if fields.get("bos_token_id") is None:
        return None
    return fields.whole("bos_token_id", low=0, high=vocab - 1)
