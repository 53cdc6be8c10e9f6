"""Slices of a checkpoint as CPU tensors: just the rows or columns that a node's units need.

Files are memory-mapped read-only and shared, so whatever is only read stays in the page cache and
is no private memory of ours (RssFile, not RssAnon). One mapping serves copies and views alike;
measured against safetensors' `get_slice` followed by a copy, and against `pread`, it is as fast:
the page faults of the copy's own memory are the cost of all three. (`get_slice` alone returns a
view that keeps a private mapping of the whole file alive.)
"""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

from p2pinfer.errors import ModelError
from p2pinfer.model.checkpoint import Checkpoint

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class Weights:
    """The tensors of `checkpoint` by name, in the dtype they are stored in, on the CPU.

    `bytes_taken` counts the bytes of all copies handed out by `rows`, `cols` and `whole`. Unknown
    names raise `KeyError`; files that cannot be mapped, `ModelError`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_taken = 0
        self._files: dict[Path, Tensor] = {}

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """A copy of rows `[start, end)` (of a bias: elements), contiguous."""
        return self._copy(self._bounded(name, 0, start, end)[start:end])

    def cols(self, name: str, start: int, end: int) -> Tensor:
        """A copy of columns `[start, end)` of a matrix, contiguous."""
        return self._copy(self._bounded(name, 1, start, end)[:, start:end])

    def whole(self, name: str) -> Tensor:
        """A copy of the whole tensor."""
        return self._copy(self.mapped(name))

    def mapped(self, name: str) -> Tensor:
        """A view on the mapping, of no private memory. To write to it is to crash: never do."""
        info = self.checkpoint.tensors[name]
        data = self._file(info.file)[info.begin : info.end]
        dtype = DTYPES[info.dtype]
        if info.begin % dtype.itemsize:  # old writers did not align; such a tensor must be copied
            data = self._copy(data)
        return data.view(dtype).view(info.shape)

    def _bounded(self, name: str, axis: int, start: int, end: int) -> Tensor:
        tensor = self.mapped(name)
        size = tensor.shape[axis]
        if not 0 <= start <= end <= size:
            raise IndexError(f"{name} has no slice [{start}, {end}) along axis {axis} of {size}")
        return tensor

    def _copy(self, view: Tensor) -> Tensor:
        self.bytes_taken += view.nbytes
        return view.clone(memory_format=torch.contiguous_format)

    def _file(self, path: Path) -> Tensor:
        """All bytes of a file as a uint8 tensor on its mapping."""
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be mapped: {error}") from error
            with warnings.catch_warnings():
                # torch has no read-only tensors and warns of that; `mapped` says the same.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                self._files[path] = torch.frombuffer(mapping, dtype=torch.uint8)
        return self._files[path]
