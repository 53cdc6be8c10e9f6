"""`config.json` in all its spellings, and what is refused with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from p2pinfer.demo import MODEL_DIR
from p2pinfer.errors import ModelError
from p2pinfer.model.config import load_config, model_name, model_spec, resolve_model, tensor_shapes
from p2pinfer.model.shapes import SHAPES
from p2pinfer.types import DType
from tests.random_models import LINEAR_ROPE, LLAMA3_ROPE, random_config, save_tensors


def write(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """Write `config.json`; a change to `...` takes the field out."""
    fields = {name: value for name, value in (config | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_every_field_of_a_real_configuration_is_read(tmp_path: Path) -> None:
    """Llama 3.2 1B's `config.json` gives its published values."""
    config = load_config(write(tmp_path, SHAPES["llama-3.2-1b"]))
    assert (config.hidden_size, config.intermediate_size) == (2048, 8192)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 64)
    assert (config.num_hidden_layers, config.vocab_size) == (16, 128256)
    assert config.tie_word_embeddings
    assert config.dtype is DType.BFLOAT16
    assert config.rope_theta == 500000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type == "llama3"
    assert config.rope_scaling.factor == 32.0
    assert config.rope_scaling.original_max_position_embeddings == 8192
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001,))
    assert config.group_size == 4


@pytest.mark.parametrize("rope", [None, LINEAR_ROPE, LLAMA3_ROPE])
def test_both_rope_spellings_mean_the_same(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    """`rope_scaling` with `rope_theta` and `rope_parameters` give one configuration."""
    old = load_config(write(tmp_path, random_config(rope=rope, rope_theta=77.0)))
    new = random_config(rope=rope, rope_theta=77.0, new_rope_spelling=True)
    assert load_config(write(tmp_path, new)) == old
    assert old.rope_theta == 77.0
    assert (old.rope_scaling is None) == (rope is None)


def test_the_old_key_type_names_a_rope_type(tmp_path: Path) -> None:
    """`{"type": "linear"}` is understood like `{"rope_type": "linear"}`."""
    raw = random_config() | {"rope_scaling": {"type": "linear", "factor": 3}}
    scaling = load_config(write(tmp_path, raw)).rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.factor) == ("linear", 3.0)


def test_left_out_fields_take_the_values_of_transformers(tmp_path: Path) -> None:
    """KV heads default to the query heads, head_dim to hidden_size over heads, and so on."""
    left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "hidden_act")
    config = load_config(write(tmp_path, random_config(), **dict.fromkeys(left_out, ...)))
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10_000.0)


def test_mistral_without_a_sliding_window_is_a_llama(tmp_path: Path) -> None:
    """Mistral is accepted where its window is null, with 8 KV heads by default."""
    raw = random_config() | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    config = load_config(write(tmp_path, raw, num_key_value_heads=..., num_attention_heads=16))
    assert config.num_key_value_heads == 8


@pytest.mark.parametrize("window", [4096, ...])
def test_mistral_with_a_sliding_window_is_refused(tmp_path: Path, window: Any) -> None:
    """A window, written or by default, is refused by name."""
    raw = random_config() | {"architectures": ["MistralForCausalLM"]}
    with pytest.raises(ModelError, match=r"config\.json: sliding_window .* must be null"):
        load_config(write(tmp_path, raw, sliding_window=window))


def test_end_of_text_ids_come_from_the_generation_configuration(tmp_path: Path) -> None:
    """`generation_config.json` wins over `config.json`, and a list keeps its order."""
    write(tmp_path, random_config(), eos_token_id=[7, 3, 7])
    assert load_config(tmp_path).eos_token_ids == (7, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert load_config(tmp_path).eos_token_ids == (5, 9)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 2}')
    assert load_config(tmp_path).eos_token_ids == (7, 3)


def test_without_a_dtype_the_checkpoint_decides(tmp_path: Path) -> None:
    """The format that most bytes are stored in is the model's dtype."""
    write(tmp_path, random_config(), torch_dtype=...)
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        load_config(tmp_path)
    save_tensors(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(99, dtype=torch.float16)})
    assert load_config(tmp_path).dtype is DType.FLOAT16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures is .*GPT2LMHeadModel.*LlamaFor"),
        ({"architectures": ..., "model_type": "qwen2"}, "architectures is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*silu"),
        ({"sliding_window": 4096}, "sliding_window is 4096.*null"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* unquantised"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'.*llama3"),
        ({"rope_parameters": {"type": "dynamic"}}, "rope_parameters.type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type is .'linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'.*object or null"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing.*positive"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": -1}}, "rope_scaling.factor is -1"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1}},
            "rope_scaling.high_freq_factor is 1.*above low_freq_factor",
        ),
        (
            {"rope_scaling": {"partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor is 0.5",
        ),
        ({"hidden_size": "64"}, "hidden_size is '64'.*whole number"),
        ({"hidden_size": True}, "hidden_size is True.*whole number"),
        ({"hidden_size": ...}, "hidden_size is missing.*whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0.*from 1"),
        ({"num_hidden_layers": 513}, "num_hidden_layers is 513.*to 512"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3.*divisor .*\(8\)"),
        ({"head_dim": 15}, "head_dim is 15.*even"),
        ({"head_dim": ..., "hidden_size": 60}, "hidden_size is 60.*multiple"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.*positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan.*positive"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*positive"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1.*true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'.*bfloat16"),
        ({"eos_token_id": 320}, "eos_token_id is 320.*0 to 319"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """The error names file, field, value and what the field must be."""
    with pytest.raises(ModelError, match=r"config\.json: " + words):
        load_config(write(tmp_path, random_config(), **changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds list, not a JSON object"),
        (b" " * (1 << 20) + b"{}", "is longer than"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """What is no JSON object is refused with the file's name."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json " + words):
        load_config(tmp_path)


def test_a_missing_folder_or_configuration_is_named(tmp_path: Path) -> None:
    """Each way not to be a model's folder has its own words."""
    with pytest.raises(ModelError, match=r"nowhere: no such model folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_config(tmp_path)


def test_the_word_demo_is_the_bundled_model(tmp_path: Path) -> None:
    """`demo` resolves to the bundled folder, a folder to itself, all else is refused."""
    assert resolve_model("demo") == MODEL_DIR
    assert load_config(resolve_model("demo")).num_key_value_heads == 8
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"nowhere: no such model folder; give .*`demo`"):
        resolve_model(str(tmp_path / "nowhere"))
    file = write(tmp_path, {}) / "config.json"
    with pytest.raises(ModelError, match="is a file; give the model's folder"):
        resolve_model(str(file))
    assert model_name(MODEL_DIR) == "demo"
    assert model_name(tmp_path) == tmp_path.name


@pytest.mark.parametrize(
    ("dtype", "quant", "kv_dtype"),
    [
        (None, "none", DType.FLOAT32),
        (DType.FLOAT32, "none", DType.FLOAT32),
        (DType.BFLOAT16, "none", DType.BFLOAT16),
        (DType.FLOAT16, "none", DType.BFLOAT16),
        (None, "int8", DType.BFLOAT16),
        (DType.FLOAT32, "int4", DType.BFLOAT16),
    ],
)
def test_the_kv_format_follows_the_weights(
    tmp_path: Path, dtype: DType | None, quant: str, kv_dtype: DType
) -> None:
    """KV is float32 beside float32 weights and bfloat16 beside all others, quantised ones too."""
    config = load_config(write(tmp_path, random_config(tie=True)))
    spec = model_spec(config, name="m" * 300, model_id="", dtype=dtype, quant=quant)
    assert spec.kv_dtype is kv_dtype
    assert spec.dtype is (dtype or DType.FLOAT32)
    assert (spec.quant, spec.tied, spec.eos_token_ids) == (quant, True, (1,))
    assert len(spec.name) == 256


def test_the_tensors_of_a_model_are_those_of_transformers(tmp_path: Path) -> None:
    """Names and shapes equal the parameters of `transformers`' Llama with biases."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    raw = random_config(attention_bias=True, mlp_bias=True, num_key_value_heads=2)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(TheirConfig(**raw))
    expected = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    assert tensor_shapes(load_config(write(tmp_path, raw))) == expected


def test_reading_a_configuration_imports_neither_torch_nor_numpy() -> None:
    """Configuration, checkpoint, tokenizer and shapes are light to import."""
    code = (
        "import sys, p2pinfer.model.checkpoint, p2pinfer.model.shapes, p2pinfer.model.tokenizer;"
        "sys.exit(any(n in sys.modules for n in ('torch', 'numpy', 'tokenizers', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
