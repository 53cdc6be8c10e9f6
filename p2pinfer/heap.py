"""A worker's memory: what stays is left alone by collections, what is free is given back."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def settle() -> None:
    """What is here now stays: let collections leave it alone, and give back what is free.

    Otherwise one of them walks all of torch now and then, in the middle of a step that other nodes
    wait for.
    """
    gc.collect()
    gc.freeze()
    give_back()


def give_back() -> None:
    """Return pages to the system that nobody uses any more, where the C library can do that.

    Weights are read, copied and packed in pieces of megabytes. What is freed between those that
    stay would be kept for allocations to come, which are never as large: up to a quarter of the
    weights' own size.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
