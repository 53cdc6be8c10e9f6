"""Bringing weights into the page cache: what loading would read, read and dropped.

Loading copies slices of mapped files, so it asks the disk only for pages that are not in memory.
Whoever has read them before loads at the speed of memory, and holds none of its own meanwhile:
the system takes such pages back whenever it needs room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from p2pinfer.core.holdings import Holding
from p2pinfer.errors import ModelError
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import LlamaConfig
from p2pinfer.model.safetensors_file import AGAIN
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.model.weights import Weights
from p2pinfer.types import ModelSpec

PORTION_BYTES = 1 << 20
"""Read at a time: large enough for a disk to stream, small enough to stop soon."""


class Extent(NamedTuple):
    """Bytes `[begin, end)` of a file."""

    file: Path
    begin: int
    end: int


class PageReader:
    """Reads the bytes of weights, and drops them, for parts of one model.

    `folder` and `config` are the model's.
    """

    def __init__(self, folder: Path, config: LlamaConfig, model: ModelSpec) -> None:
        self._folder = folder
        self._config = config
        self._model = model
        self._known: dict[Holding, tuple[Extent, ...]] = {}

    def read(self, held: Holding) -> Iterator[int]:
        """Read what loading a holding would read: yields the bytes of each portion.

        Raises `ModelError` where a file is gone, damaged, or has become shorter.
        """
        if held not in self._known:
            self._known[held] = joined(self._extents(held))
        for extent in self._known[held]:
            yield from _read(extent)

    def _extents(self, held: Holding) -> Iterator[Extent]:
        checkpoint = Checkpoint.open(self._folder, self._config)
        loader = StageLoader(Weights(checkpoint), self._config, self._model, torch.device("cpu"))
        for name, start, end in loader.reads(held):
            info = checkpoint.tensors[name]
            row = (info.end - info.begin) // info.shape[0]
            yield Extent(info.file, info.begin + start * row, info.begin + end * row)


def joined(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same bytes as runs that neither touch nor overlap, in the files' order."""
    runs: list[Extent] = []
    for each in sorted(extents):
        last = runs[-1] if runs else None
        if last is not None and last.file == each.file and last.end >= each.begin:
            runs[-1] = last._replace(end=max(last.end, each.end))
        else:
            runs.append(each)
    return tuple(runs)


def _read(extent: Extent) -> Iterator[int]:
    file, begin, end = extent
    portion = memoryview(bytearray(PORTION_BYTES))
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(begin)
            while begin < end:
                count = opened.readinto(portion[: min(PORTION_BYTES, end - begin)])
                if not count:
                    raise ModelError(f"{file} has become shorter than {end} bytes; {AGAIN}")
                begin += count
                yield count
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
