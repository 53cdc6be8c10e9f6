"""Models of real shapes with random weights, for measurements and tests; and a look into a folder.

`SHAPES` holds the published `config.json` of each model. `make_model` writes a whole model folder
of that shape: nothing about speed, memory or messages depends on what the weights say.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pinfer.core.units import unit_count
from p2pinfer.errors import ModelError, UsageError
from p2pinfer.model.checkpoint import INDEX_FILE, Checkpoint, Progress, content_id
from p2pinfer.model.config import (
    CONFIG_FILE,
    GENERATION_FILE,
    load_config,
    model_name,
    model_spec,
    tensor_shapes,
)
from p2pinfer.model.safetensors_file import FLOAT_TYPES, SINGLE_FILE
from p2pinfer.model.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from p2pinfer.model.tokenizer import FAST_FILE, Tokenizer, byte_alphabet
from p2pinfer.types import DType, UnitKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHARD_BYTES = 2_000_000_000
POOL_ELEMENTS = (1 << 24) + 17
"""Numbers drawn once and used for all weights; no multiple of any row length."""

MARKER_FILE = "made_by_p2pinfer.json"
RECIPE = 1
"""Raised whenever the same arguments would give other files."""

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

_LLAMA_3: dict[str, Any] = _LLAMA | {
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def _llama_3_scaling(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA
    | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 16,
        "hidden_size": 256,
        "initializer_range": 0.1,
        "intermediate_size": 1024,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 4,
        "num_key_value_heads": 8,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "vocab_size": 1024,
    },
    "llama-3.2-1b": _LLAMA_3
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": _llama_3_scaling(32.0),
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": _LLAMA_3
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": _llama_3_scaling(32.0),
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_scaling": _llama_3_scaling(8.0),
    },
    "tinyllama-1.1b": _LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "vocab_size": 32000,
    },
}
"""The real `config.json` of each shape; `tiny` is our own, for tests (its larger
`initializer_range` keeps greedy replies from repeating one token)."""


def make_model(
    shape: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: DType | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model of `shape` with random weights and a byte-level tokenizer into `folder`.

    Weights are normal with the shape's `initializer_range` (0.02), norms are 1; `dtype` None is the
    shape's own. The folder appears whole or not at all. One that already holds exactly this model
    is left as it is. `progress` is called with (bytes written, bytes in all).

    Raises `UsageError` for an unknown shape or a folder that is not empty, or cannot be written.
    """
    if shape not in SHAPES:
        raise UsageError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    config = dict(SHAPES[shape])
    if dtype is not None:
        config["torch_dtype"] = str(dtype)
    made = {"shape": shape, "seed": seed, "dtype": config["torch_dtype"], "recipe": RECIPE}
    if folder.exists() and not _is_empty(folder):
        if _holds(folder, made):
            return folder
        raise UsageError(
            f"{folder} is not empty and does not hold the model {shape} of seed {seed} in "
            f"{config['torch_dtype']}; give another folder or empty this one"
        )
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        _write_json(partial / CONFIG_FILE, config)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(partial / GENERATION_FILE, ids)
        write_byte_tokenizer(
            partial, config["vocab_size"], bos_id=ids["bos_token_id"], eos_id=ids["eos_token_id"]
        )
        _write_weights(partial, config["initializer_range"], seed, progress)
        _write_json(partial / MARKER_FILE, made)
        partial.rename(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_byte_tokenizer(folder: Path, vocab_size: int, *, bos_id: int, eos_id: int) -> None:
    """Write a `tokenizer.json` of `vocab_size` tokens that encodes any text byte by byte.

    The two special tokens keep their ids and the bytes take the lowest others. All further ids,
    which only a model can draw, decode to a printable word that names them: ` t300`.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors

    free = (i for i in range(vocab_size) if i not in (bos_id, eos_id))
    vocab = {character: next(free) for character in byte_alphabet()}
    space = byte_alphabet()[ord(" ")]
    vocab |= {f"{space}t{i}": i for i in free} | {BEGIN: bos_id, END: eos_id}
    library = Library(models.BPE(vocab=vocab, merges=[]))
    library.add_special_tokens([BEGIN, END])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, bos_id)]
    )
    library.save(str(folder / FAST_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / TOKENIZER_CONFIG_FILE, settings)


def inspect_model(
    folder: Path, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """What `p2pinfer model inspect` shows of a folder, checked as a node would; `progress` follows
    the hashing. Raises `ModelError` as `load_config`, `Checkpoint.open` and `Tokenizer.load` do."""
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder, config)
    tokenizer = Tokenizer.load(folder, config)
    model_id = content_id(folder, cache_dir, progress)
    spec = model_spec(config, name=model_name(folder), model_id=model_id)
    return {
        "name": spec.name,
        "model_id": model_id,
        "architecture": config.architecture,
        "parameters": checkpoint.num_parameters,
        "bytes": checkpoint.nbytes,
        "files": len(checkpoint.files),
        "dtype": str(config.dtype),
        "stored_as": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_type": config.rope_scaling.rope_type if config.rope_scaling else "default",
        "tie_word_embeddings": config.tie_word_embeddings,
        "units": {str(kind): unit_count(spec, kind) for kind in UnitKind},
        "tokenizer": {"kind": tokenizer.kind, "size": tokenizer.size},
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(config.eos_token_ids),
    }


def _is_empty(folder: Path) -> bool:
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder")
    return next(folder.iterdir(), None) is None


def _holds(folder: Path, made: dict[str, Any]) -> bool:
    """Whether `make_model` finished this very model here and its files are still whole."""
    try:
        if json.loads((folder / MARKER_FILE).read_bytes()) != made:
            return False
        config = load_config(folder)
        Checkpoint.open(folder, config)
        Tokenizer.load(folder, config)
    except (OSError, ValueError, ModelError):
        return False
    return True


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- weights --------------------------------------------------------------------------------------


def _write_weights(folder: Path, scale: float, seed: int, progress: Progress | None) -> None:
    """The safetensors files of the configuration that already lies in `folder`."""
    config = load_config(folder)
    code = next(name for name, dtype in FLOAT_TYPES.items() if dtype is config.dtype)
    item = 4 if config.dtype is DType.FLOAT32 else 2
    shapes = tensor_shapes(config)
    shards = _split_shards(shapes, item)
    elements = sum(map(prod, shapes.values()))
    total = item * elements
    noise = _Noise(seed, scale, config.dtype, min(elements, POOL_ELEMENTS))
    weight_map: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = SINGLE_FILE if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}, code, item))
            for name in names:
                for piece in noise.pieces(name, prod(shapes[name])):
                    out.write(piece.data)
                    done += piece.nbytes
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _split_shards(shapes: dict[str, tuple[int, ...]], item: int) -> list[list[str]]:
    """Tensor names file by file, each file at most `SHARD_BYTES` unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        nbytes = item * prod(shape)
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes
    return shards


def _header(shapes: dict[str, tuple[int, ...]], code: str, item: int) -> bytes:
    """A safetensors header, padded so that the tensors' bytes begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + item * prod(shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Noise:
    """Random weights in the bytes of `dtype`, at the speed of writing them.

    One pool of normal numbers is drawn and converted once; a tensor is made of stretches of it from
    random places. Repetition across tensors does no harm to what random weights are good for.
    """

    def __init__(self, seed: int, scale: float, dtype: DType, pool_elements: int) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        pool = self._random.standard_normal(pool_elements, dtype=np.float32)
        pool *= np.float32(scale)
        self._pool = _as_stored(pool, dtype)
        self._ones = _as_stored(np.ones(1 << 16, dtype=np.float32), dtype)

    def pieces(self, name: str, count: int) -> Iterator[NDArray[Any]]:
        """`count` elements of the tensor `name`, in stretches; the weights of norms are 1."""
        while count > 0:
            if name.endswith("norm.weight"):
                piece = self._ones[:count]
            else:
                start = int(self._random.integers(len(self._pool) // 2))
                piece = self._pool[start : start + count]
            yield piece
            count -= len(piece)


def _as_stored(values: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """float32 `values` rounded to `dtype`; bfloat16, which numpy lacks, as its 16 bits."""
    import numpy as np

    if dtype is DType.FLOAT32:
        return values.astype("<f4")
    if dtype is DType.FLOAT16:
        return values.astype("<f2")
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to nearest, ties to even
