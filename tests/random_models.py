"""Small random Llama checkpoints for tests: any heads, biases, rope spelling, number of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from p2pinfer.model.checkpoint import INDEX_FILE
from p2pinfer.model.config import CONFIG_FILE, load_config, tensor_shapes
from p2pinfer.model.safetensors_file import SINGLE_FILE
from p2pinfer.model.shapes import write_byte_tokenizer

BOS, EOS = 0, 1

LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE: Mapping[str, Any] = {"rope_type": "linear", "factor": 2.0}


def random_config(
    *,
    hidden_size: int = 64,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int | None = 16,
    intermediate_size: int = 192,
    vocab_size: int = 320,
    num_hidden_layers: int = 2,
    tie: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope: Mapping[str, Any] | None = None,
    rope_theta: float = 10_000.0,
    new_rope_spelling: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A `config.json`; `new_rope_spelling` writes `rope_parameters` as transformers 5 does.

    `transformers` itself wants `hidden_size` to be a multiple of `num_attention_heads`.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tie,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    if new_rope_spelling:
        rope = rope or {"rope_type": "default"}
        config["rope_parameters"] = {**rope, "rope_theta": rope_theta}
        config["dtype"] = dtype
    else:
        config["rope_theta"] = rope_theta
        config["rope_scaling"] = None if rope is None else dict(rope)
        config["torch_dtype"] = dtype
    return config


def write_random_model(
    folder: Path, *, seed: int = 0, files: int = 1, dtype: str = "float32", **shape: Any
) -> Path:
    """Write a whole model folder; `shape` are arguments of `random_config`.

    Weights are scaled by their fan-in and each layer outweighs the embedding, so that greedy
    replies wander. With room for 256 bytes and two special tokens there is a byte-level tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = random_config(dtype=dtype, **shape)
    (folder / CONFIG_FILE).write_text(json.dumps(raw), encoding="utf-8")
    config = load_config(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random_tensor(name, size, generator).to(getattr(torch, dtype))
        for name, size in tensor_shapes(config).items()
    }
    save_tensors(folder, tensors, files)
    if config.vocab_size >= 258:
        write_byte_tokenizer(folder, config.vocab_size, bos_id=BOS, eos_id=EOS)
    return folder


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    """Write `tensors` as one safetensors file, or dealt out over several with an index."""
    if files == 1:
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(size, generator=generator)
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * values
    if name.endswith(".bias"):
        return 0.2 * values
    if name == "model.embed_tokens.weight":
        return 0.3 * values
    return values * (2.0 / size[1] ** 0.5)


class TensorTable:
    """Tensors by name, as a source of weights."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """A copy of rows `[start, end)`."""
        return self._tensors[name][start:end].clone()

    def cols(self, name: str, start: int, end: int) -> torch.Tensor:
        """A copy of columns `[start, end)`."""
        return self._tensors[name][:, start:end].clone()

    def whole(self, name: str) -> torch.Tensor:
        """A copy of all of it."""
        return self._tensors[name].clone()

    mapped = whole
