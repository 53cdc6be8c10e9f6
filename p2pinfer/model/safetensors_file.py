"""One safetensors file's header: which tensors lie where, checked before anything is mapped.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). It is parsed here, and not by its library, so
that every defect has its own message and nothing but the standard library is imported.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from p2pinfer.errors import ModelError
from p2pinfer.types import DType

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_DIMENSIONS = 8

SINGLE_FILE = "model.safetensors"

ITEM_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
"""Element types that the format names, with their width."""

FLOAT_TYPES: dict[str, DType] = {
    "F32": DType.FLOAT32,
    "BF16": DType.BFLOAT16,
    "F16": DType.FLOAT16,
}
"""Element types that weights may have."""

AGAIN = "download or copy the file again"


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes `[begin, end)` of `file`, in C order, little-endian."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name.

    Raises `ModelError` naming the file, and the tensor where it is one, when the file cannot be
    read, is truncated, or its header is too long, no JSON, or describes overlapping, misplaced or
    unknown tensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ModelError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
            if len(first) == 8 and length > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}: "
                    f"it is no safetensors file; {AGAIN}"
                )
            if 8 + length > size:
                raise ModelError(f"{path} is truncated inside its header ({size} bytes); {AGAIN}")
            data = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} has a header that is not JSON ({error}); {AGAIN}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a header that is no JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_places(path, tensors, size)
    return tensors


def stored_dtype(folder: Path) -> DType:
    """The format of the weights on disk: that of the largest share of their bytes.

    Raises `ModelError` where there are no weights in a known format.
    """
    shares: dict[DType, int] = {}
    paths = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else []
    for path in paths or sorted(folder.glob("*.safetensors")):
        for info in read_header(path).values():
            if info.dtype in FLOAT_TYPES:
                dtype = FLOAT_TYPES[info.dtype]
                shares[dtype] = shares.get(dtype, 0) + info.end - info.begin
    if not shares:
        raise ModelError(f"{folder} holds no *.safetensors file with {', '.join(DType)} weights")
    return max(shares, key=lambda dtype: shares[dtype])


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One entry of the header, with its offsets made absolute."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: the header's entry of {name} is malformed; {AGAIN}") from None
    if any(type(n) is not int or n < 0 for n in whole) or len(shape) > MAX_DIMENSIONS:
        raise ModelError(f"{path}: {name} has an impossible shape or place: {entry}; {AGAIN}")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ModelError(f"{path}: {name} has the unknown element type {dtype!r}")
    nbytes = prod(shape) * ITEM_BITS[dtype] // 8
    if end - begin != nbytes:
        raise ModelError(
            f"{path}: {name} is {dtype} {list(shape)}, which takes {nbytes} bytes, but lies in "
            f"bytes {begin} to {end}; {AGAIN}"
        )
    return TensorInfo(path, dtype, tuple(shape), start + begin, start + end)


def _check_places(path: Path, tensors: dict[str, TensorInfo], size: int) -> None:
    """No tensor may reach beyond the file or into another."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    last, reached = "", 0
    for name, info in ordered:
        if info.end > size:
            raise ModelError(
                f"{path} is truncated: {name} ends at byte {info.end}, but the file has {size}; "
                f"{AGAIN}"
            )
        if info.begin < reached and info.end > info.begin:
            raise ModelError(f"{path}: {name} overlaps {last}; {AGAIN}")
        if info.end > reached:
            last, reached = name, info.end
