"""A model folder's weights files as one checked table of tensors, and the folder's content hash.

`model.safetensors` is taken where it exists, else the files of `model.safetensors.index.json`, as
`transformers` does. Only headers are read here; `weights.py` maps the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
from msgspec import Struct

from p2pinfer.errors import ModelError
from p2pinfer.model.config import (
    CONFIG_FILE,
    GENERATION_FILE,
    LlamaConfig,
    read_json,
    tensor_shapes,
)
from p2pinfer.model.safetensors_file import FLOAT_TYPES, SINGLE_FILE, TensorInfo, read_header
from p2pinfer.types import DType

__all__ = ["Checkpoint", "TensorInfo", "content_id", "default_cache_dir"]

INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_FILES = 4096

FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".gguf")
"""Weights as other programs keep them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

PIECE_BYTES = 4 << 20
"""Bytes hashed at a time: large enough to keep SHA-256 busy, small enough to stay in cache."""

CACHED_FROM_BYTES = 1 << 20
"""Smaller files are hashed every time: as fast as looking them up."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Checkpoint(Struct, frozen=True, kw_only=True):
    """The tensors of a model by name, each found whole and of the right shape."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path, config: LlamaConfig) -> Checkpoint:
        """Read the headers and compare them with what `config` calls for.

        Raises `ModelError` naming the file and the tensor: missing, damaged or truncated files,
        missing tensors, wrong shapes or element types, and tensors that the model would not use
        (a bias that `config.json` denies, say) and that would so be lost silently.
        """
        tensors = _read_tensors(folder)
        expected = tensor_shapes(config)
        for name, shape in expected.items():
            _check_tensor(folder, name, tensors.get(name), shape)
        for name, info in tensors.items():
            if name not in expected and not _harmless(name):
                raise ModelError(
                    f"{info.file}: {name} has no place in the model that {CONFIG_FILE} describes; "
                    f"correct {CONFIG_FILE} or take the checkpoint that belongs to it"
                )
        return cls(folder=folder, tensors={name: tensors[name] for name in expected})

    @property
    def nbytes(self) -> int:
        """Bytes of all the model's tensors on disk."""
        return sum(info.end - info.begin for info in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Numbers in all the model's tensors."""
        return sum(
            (info.end - info.begin) // _ITEM_BYTES[info.dtype] for info in self.tensors.values()
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them, in ascending order."""
        return tuple(sorted({info.file for info in self.tensors.values()}))


_ITEM_BYTES = {name: 4 if dtype is DType.FLOAT32 else 2 for name, dtype in FLOAT_TYPES.items()}


def content_id(
    folder: Path, cache_dir: Path | None = None, progress: Progress | None = None
) -> str:
    """SHA-256 (hexadecimal) over the model: every file's name, size and content.

    Counted are the configuration, the tokenizer's files and the weights. The hash of a large file
    is kept under `cache_dir` (default: the user's cache folder) by device, inode, size and
    modification time; a cache that is damaged or cannot be written is ignored.
    """
    cache_dir = cache_dir or default_cache_dir()
    names = [CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES]
    present = {folder / name for name in names if (folder / name).is_file()}
    paths = sorted(present | set(_weights_files(folder)), key=lambda path: path.name)
    total = sum(_stat(path).st_size for path in paths)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    whole = hashlib.sha256(b"p2pinfer model 1\n")
    for path in paths:
        size, digest = _file_digest(path, cache_dir, count)
        whole.update(f"{path.name}\0{size}\0{digest}\n".encode())
    return whole.hexdigest()


def default_cache_dir() -> Path:
    """Where hashes of large files are remembered."""
    return platformdirs.user_cache_path("p2pinfer") / "digests"


def _weights_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        named = {folder / name for name in _read_index(folder).values()}
        return [folder / INDEX_FILE, *sorted(named)]
    raise ModelError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{_advice(folder)}")


def _advice(folder: Path) -> str:
    """What to do about weights that are not where they should be."""
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_symlink():
            return f": {name} is a link to nowhere; copy the file itself"
    others = sorted(path.name for path in folder.glob("*") if path.suffix in FOREIGN_SUFFIXES)
    if others:
        return f" (it has {others[0]}: convert it to safetensors)"
    return "; download the weights"


def _read_index(folder: Path) -> dict[str, str]:
    """File name by tensor name; every file is checked to be there."""
    path = folder / INDEX_FILE
    table: Any = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{path}: weight_map must be an object that names a file for each tensor")
    names = set(table.values()) if all(isinstance(v, str) for v in table.values()) else {""}
    if len(names) > MAX_FILES:
        raise ModelError(f"{path} names {len(names)} files, more than {MAX_FILES}")
    for name in sorted(names):
        if name in ("", ".", "..") or Path(name).name != name:
            raise ModelError(f"{path}: weight_map names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, but {INDEX_FILE} names it; download it")
    return table


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    paths = _weights_files(folder)[1:]
    headers = {path.name: read_header(path) for path in paths}
    tensors: dict[str, TensorInfo] = {}
    for name, file in _read_index(folder).items():
        if name not in headers[file]:
            raise ModelError(f"{folder / file} does not hold {name}, but {INDEX_FILE} says so")
        tensors[name] = headers[file][name]
    return tensors


def _check_tensor(folder: Path, name: str, info: TensorInfo | None, shape: tuple[int, ...]) -> None:
    if info is None:
        hint = f"download the weights again, or correct {CONFIG_FILE} if it is another model's"
        if name == "lm_head.weight":
            hint = f"if the embeddings are tied, set tie_word_embeddings in {CONFIG_FILE}"
        raise ModelError(f"{folder}: the checkpoint has no tensor {name}; {hint}")
    if info.shape != shape:
        raise ModelError(
            f"{info.file}: {name} has the shape {list(info.shape)}, but {CONFIG_FILE} calls for "
            f"{list(shape)}; take both from the same model"
        )
    if info.dtype not in FLOAT_TYPES:
        raise ModelError(
            f"{info.file}: {name} is {info.dtype}; weights must be one of {', '.join(FLOAT_TYPES)}"
        )


def _harmless(name: str) -> bool:
    """Tensors that old checkpoints hold and every loader ignores."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _file_digest(path: Path, cache_dir: Path, count: Callable[[int], None]) -> tuple[int, str]:
    """(size, SHA-256) of one file, from the cache where it has not changed."""
    stat = _stat(path)
    key = {
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
    }
    entry = cache_dir / f"{stat.st_dev:x}-{stat.st_ino:x}.json"
    large = stat.st_size >= CACHED_FROM_BYTES
    if large and (known := _read_entry(entry, key)):
        count(stat.st_size)
        return stat.st_size, known
    digest = hashlib.sha256()
    size = 0
    buffer = bytearray(PIECE_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                digest.update(view[:got])
                size += got
                count(got)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    # A file that was written to meanwhile must not be remembered under its old key.
    if large and size == stat.st_size and _stat(path).st_mtime_ns == stat.st_mtime_ns:
        _write_entry(entry, key | {"sha256": digest.hexdigest()})
    return size, digest.hexdigest()


def _read_entry(path: Path, key: dict[str, int]) -> str:
    """The digest kept under `key`; empty where there is none that can be trusted."""
    try:
        entry = json.loads(path.read_bytes())
        digest = entry.pop("sha256")
        if entry == key and len(bytes.fromhex(digest)) == 32:
            return str(digest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return ""


def _write_entry(path: Path, entry: dict[str, Any]) -> None:
    """Keep an entry, atomically: readers see the old one, the new one or none."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(entry, file)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
