"""Quantised weights on the disk: made once, and mapped by every later start.

Each matrix of a unit is a safetensors file of its own, so that a node keeps its own units and no
others. The folder's name is the checkpoint's hash, the quantisation and the format's version:
whatever else lies beside it is of another model and is removed. A file is written beside its place
and moved there, and carries a checksum: one that is damaged is made again. A disk that is full
costs the next start its time, and nothing else.
"""

from __future__ import annotations

import mmap
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from p2pinfer.core.units import BlockFormat
from p2pinfer.errors import ModelError
from p2pinfer.model.quantise import QuantisedWeight
from p2pinfer.model.safetensors_file import TensorInfo, read_header
from p2pinfer.model.unit_products import Columns, Rows
from p2pinfer.types import ModelSpec

FORMAT_VERSION = 4
"""To be raised by whoever changes what `model/quantise` makes of a weight, or how it lies here."""

SUFFIX = ".safetensors"
UNFINISHED = ".unfinished"

MIN_FREE_BYTES = 1 << 30
"""Left on the disk for others: without so much nothing is written."""

DTYPES = {"U8": torch.uint8, "F32": torch.float32, "I64": torch.int64}


class QuantisedCopies:
    """Copies under `root` of one model's quantised weights, by slice of the checkpoint."""

    def __init__(self, root: Path, model: ModelSpec) -> None:
        self._folder = root / f"{model.model_id}-{model.quant}-{FORMAT_VERSION}"

    def read(self, slice_: Rows | Columns, form: BlockFormat) -> QuantisedWeight | None:
        """The copy of a slice, on a mapping of its file; None if there is none that is whole."""
        path = self._path(slice_)
        if not path.is_file():
            return None
        try:
            header = read_header(path)
            data = _mapped(path)
            return _weight(header, data, form)
        except (ModelError, OSError, ValueError, KeyError):
            return None

    def keep(self, slice_: Rows | Columns, weight: QuantisedWeight) -> None:
        """Write the copy of a slice, if there is room on the disk."""
        parts = {"values": weight.values, "scales": weight.scales}
        if weight.zeros is not None:
            parts["zeros"] = weight.zeros
        check = torch.tensor([weight.inputs, _checksum(parts, weight.inputs)])
        path = self._path(slice_)
        unfinished = path.with_suffix(UNFINISHED)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < weight.nbytes + MIN_FREE_BYTES:
                return
            unfinished.write_bytes(save({**parts, "check": check}))
            os.replace(unfinished, path)

    def _path(self, slice_: Rows | Columns) -> Path:
        axis = "columns" if isinstance(slice_, Columns) else "rows"
        name, start, end, size = slice_
        return self._folder / f"{name}.{axis}-{start}-{end}-{size}{SUFFIX}"


def copies_folder(folder: str, model: ModelSpec | None) -> Path | None:
    """Where quantised weights are kept, None: nowhere; those of other models are removed."""
    if not folder:
        return None
    remove_others(Path(folder), model)
    return Path(folder)


def remove_others(root: Path, model: ModelSpec | None) -> None:
    """Remove copies of all models but this, and what was left unfinished of its own."""
    kept = f"{model.model_id}-{model.quant}-{FORMAT_VERSION}" if model else ""
    with suppress(OSError):
        for folder in root.iterdir():
            if folder.name != kept:
                shutil.rmtree(folder, ignore_errors=True)
        for file in (root / kept).glob(f"*{UNFINISHED}"):
            file.unlink()


def _mapped(path: Path) -> Tensor:
    """All bytes of a file as a uint8 tensor on its mapping."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns of that; nobody writes to these.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _weight(header: Mapping[str, TensorInfo], data: Tensor, form: BlockFormat) -> QuantisedWeight:
    """What a file holds. Raises `ValueError` or `KeyError` where it is not what was written."""
    parts: dict[str, Tensor] = {}
    for name in ("check", "values", "scales", *(("zeros",) if form.zero_points else ())):
        info = header[name]
        part = data[info.begin : info.end].view(DTYPES[info.dtype])
        parts[name] = part.view(info.shape)
    inputs, checksum = parts.pop("check").tolist()
    blocks = -(-inputs // form.block)
    rows = parts["values"].shape[0]
    shapes = {
        "values": (rows, blocks, form.block * form.bits // 8),
        "scales": (rows, blocks),
        "zeros": (rows, -(-blocks * form.bits // 8)),
    }
    if any(part.shape != shapes[name] for name, part in parts.items()):
        raise ValueError("a copy of another shape")
    if checksum != _checksum(parts, inputs):
        raise ValueError("a damaged copy")
    return QuantisedWeight(
        form=form,
        inputs=inputs,
        values=parts["values"],
        scales=parts["scales"],
        zeros=parts.get("zeros"),
    )


def _checksum(parts: Mapping[str, Tensor], inputs: int) -> int:
    """CRC-32 of the tensors' bytes, in the order of their names, behind the number of inputs."""
    value = zlib.crc32(str(inputs).encode())
    for name in sorted(parts):
        value = zlib.crc32(parts[name].numpy().data.cast("B"), value)
    return value
