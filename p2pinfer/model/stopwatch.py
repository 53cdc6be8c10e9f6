"""Where a worker's computing time goes: products and attention, each under a watch of its own.

A worker computes in one thread, so one watch of each kind is enough for a process. On an
accelerator calls return before they are done: there only launching them is measured.
"""

from __future__ import annotations

import time
from contextlib import ContextDecorator
from types import TracebackType
from typing import Self


class Stopwatch(ContextDecorator):
    """Adds up the seconds spent under it, as a context manager or a decorator; not nested."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> Self:
        """It runs."""
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """It stands, whatever was raised."""
        self.seconds += time.perf_counter() - self._began


PRODUCTS = Stopwatch()
"""Products with weights."""

ATTENTION = Stopwatch()
"""Attention over the KV cache, writing the new rows included."""
