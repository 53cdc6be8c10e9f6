"""A part: units of one stage that are loaded together, with the KV of its head units.

What a node holds is a list of parts: the units that it owned when it first held any, and one more
for each owner whose units it keeps ready. The units of a part share the column-parallel products,
so they are computed together or not at all. A part whose units are promoted stays as it is: to
compute with it is a matter of the runner that is given it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import torch

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.holdings import Holding
from p2pinfer.core.units import Slice
from p2pinfer.model.kv_cache import KvCache, KvShape
from p2pinfer.model.llama import TORCH_DTYPES, StageModel
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.types import ModelSpec, UnitKind


class Unit(NamedTuple):
    """A unit of any kind, in the layers of `span` (of a vocab unit: those of the last stage)."""

    span: Slice
    kind: UnitKind
    number: int


def units_of(held: Holding) -> frozenset[Unit]:
    """The units that a holding names."""
    by_kind = zip(UnitKind, (held.head_units, held.mlp_units, held.vocab_units), strict=True)
    return frozenset(
        Unit(held.span, kind, number) for kind, numbers in by_kind for number in numbers
    )


def holding_of(units: Iterable[Unit], stage: int) -> Holding:
    """Units of one span, at least one, as a holding of the stage of that number."""
    ordered = sorted(units)
    heads, mlp, vocab = (
        tuple(unit.number for unit in ordered if unit.kind is kind) for kind in UnitKind
    )
    return Holding(
        stage=stage, span=ordered[0].span, head_units=heads, mlp_units=mlp, vocab_units=vocab
    )


class Part:
    """Units, their KV, and their weights once they are loaded."""

    def __init__(self, held: Holding, cache: KvCache) -> None:
        self.held = held
        self.units = units_of(held)
        self.cache = cache
        self.kv_units = {KvUnit(held.span, u): place for place, u in enumerate(held.head_units)}
        """The head units, with their places in the cache."""
        self.stage: StageModel | None = None
        """None: the weights are not in this process's memory."""
        self.warm = False
        """Their bytes were brought into the page cache, from where loading them is fast."""
        self.loaded_bytes = 0
        """Bytes of weights that are here already."""
        self.error = ""
        """Why loading or warming failed."""
        self._pieces: Generator[int, None, StageModel] | None = None
        self._pages: Iterator[int] | None = None

    def load_piece(self, loader: Callable[[], StageLoader]) -> int | None:
        """Load some more. Returns the bytes of the product that is ready with that, 0 where none
        is yet, or None when all is loaded.

        `loader` is called at the beginning; whoever calls may stop between two pieces, and another
        thread go on. Raises what reading the model's files raises: then nothing is loaded.
        """
        if self.stage is not None:
            return None
        try:
            if self._pieces is None:
                self.error = ""
                self._pieces = loader().pieces(self.held)
            nbytes = next(self._pieces)
        except StopIteration as done:
            self.stage, self._pieces = done.value, None
            self.warm = False  # nobody reads the files from now on
            return None
        except BaseException as error:  # whatever it is, half-loaded weights are of no use
            self.error = str(error).partition("\n")[0] or type(error).__name__
            self.unload()
            raise
        self.loaded_bytes += nbytes
        return nbytes

    def warm_piece(self, pages: Callable[[Holding], Iterator[int]]) -> int | None:
        """Bring some more of the weights' bytes into the page cache. Returns how many, or None when
        all were read; then the next call begins anew.

        `pages` is called at the beginning, and reads. Raises what reading the model's files raises:
        then the part is not warm.
        """
        try:
            if self._pages is None:
                self._pages = pages(self.held)
            return next(self._pages)
        except StopIteration:
            self.warm, self.error, self._pages = True, "", None
            return None
        except BaseException as error:  # whatever it is, `status` is to say why nothing is warm
            self.error = str(error).partition("\n")[0] or type(error).__name__
            self.warm, self._pages = False, None
            raise

    def unload(self) -> None:
        """Free the weights; KV stays."""
        self.stage, self._pieces, self.loaded_bytes = None, None, 0


def empty_cache(held: Holding, model: ModelSpec, device: torch.device) -> KvCache:
    """A cache for the head units of a holding."""
    layers = held.span.end - held.span.start
    dtype = TORCH_DTYPES[model.kv_dtype]
    return KvCache(KvShape(len(held.head_units), layers, model.head_dim, dtype, device))
