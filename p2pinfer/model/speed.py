"""How fast this machine multiplies weights with a token, and how fast it reads memory.

Both are measured on more memory than caches hold, in well under a second, and beside whatever else
the machine does: each matrix, and each piece of memory, is read several times, and the median of
its times counts. So a program that takes the processor away now and then hardly shows; one that
takes the memory's bandwidth does, and so do strangers on the same host. Least times would promise
replies a tenth to a third more than they get.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import psutil
import torch

from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model.linear import pack

WEIGHTS_BYTES = 128 << 20
"""Of the matrices that are multiplied: several times what caches hold."""

ROWS, COLUMNS = 2048, 2048
"""Of one matrix: a slice of a layer, as a node has it."""

PRODUCT_S = 0.25
PASSES = 5
"""Fewest times that each matrix is read, however long that takes."""

READ_BYTES = 1 << 30
"""Of memory that all processors read, each a part of its own."""

READ_S = 1.5
QUICK_READ_BYTES = 256 << 20
QUICK_READ_S = 0.15
PIECE_BYTES = 8 << 20
MEMORY_SHARE = 8
"""No more than this part of the memory that is free is taken, for either."""

BUSY_SHARE = 0.7
"""Whose threads got less of the time than this shared their processors with other programs."""


Product = Callable[[torch.Tensor], torch.Tensor]


class ProductRate(NamedTuple):
    """GB (1e9 bytes) of weights per second that one token's products read; whether other programs
    took much of the processors meanwhile."""

    gb_s: float
    busy: bool


def product_rate(
    dtype: torch.dtype, device: torch.device, *, quant: str = "none", threads: int | None = None
) -> ProductRate:
    """Measure the products that serve, at one row, with the `threads` that they have (by
    default torch's)."""
    threads = threads or torch.get_num_threads()
    size = min(WEIGHTS_BYTES, psutil.virtual_memory().available // MEMORY_SHARE)
    weight = torch.ones(ROWS, COLUMNS, dtype=dtype, device=device)
    make, nbytes = _maker(weight, quant)
    products = [make() for _ in range(max(1, size // nbytes))]
    x = torch.ones(1, COLUMNS, dtype=dtype if quant == "none" else torch.float32, device=device)
    times: list[list[float]] = [[] for _ in products]
    began, worked, passes = time.perf_counter(), time.process_time(), 0
    while passes < PASSES or time.perf_counter() - began < PRODUCT_S:
        for of_product, product in zip(times, products, strict=True):
            of_product.append(_seconds(product, x))
        passes += 1
    share = (time.process_time() - worked) / (time.perf_counter() - began)
    busy = device.type == "cpu" and share < BUSY_SHARE * threads
    return ProductRate(nbytes * len(products) / sum(map(median, times)) / 1e9, busy)


def _maker(weight: torch.Tensor, quant: str) -> tuple[Callable[[], Product], int]:
    """What makes a product of a weight quantised so, and the bytes that it reads."""
    if quant == "none":
        return partial(pack, weight), weight.nbytes
    # Only who quantises pays for the import.
    from p2pinfer.model.quantise import quantise
    from p2pinfer.model.quantised_products import QuantisedLinear

    form = QUANT_FORMATS[quant]
    quantised = quantise(weight, form)
    return partial(QuantisedLinear, quantised), form.read_bytes(*weight.shape)


def _seconds(product: Product, x: torch.Tensor) -> float:
    began = time.perf_counter()
    product(x)
    _finish(x.device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(cpus: Sequence[int], seconds: float = READ_S, size: int = READ_BYTES) -> float:
    """GB/s that `cpus`, each reading its own part of `size` bytes, read together: what weights can
    be streamed at, and so the limit of decoding one token at a time."""
    size = min(size, psutil.virtual_memory().available // MEMORY_SHARE)
    items = max(1, size // len(cpus) // 4)
    memory = torch.ones(len(cpus), items)
    rates = [0.0] * len(cpus)
    start = threading.Barrier(len(cpus))

    def read(number: int) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {cpus[number]})  # of this thread alone
        torch.set_num_threads(1)
        pieces = torch.split(memory[number], PIECE_BYTES // 4)
        start.wait()
        rates[number] = _median_rate(pieces, seconds)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(len(cpus))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(rates)


def device_bandwidth(device: torch.device) -> float:
    """GB/s that an accelerator reads its own memory at."""
    free, _ = torch.cuda.mem_get_info(device)
    memory = torch.ones(max(1, min(READ_BYTES, free // MEMORY_SHARE) // 4), device=device)
    return _median_rate((memory,), QUICK_READ_S)


def _median_rate(pieces: Sequence[torch.Tensor], seconds: float) -> float:
    """GB/s of the median reading; torch's vectorised maximum does nothing but read."""
    rates: list[float] = []
    began = time.perf_counter()
    while not rates or time.perf_counter() - began < seconds:
        for piece in pieces:
            at = time.perf_counter()
            piece.amax()
            _finish(piece.device)
            rates.append(piece.nbytes / (time.perf_counter() - at) / 1e9)
    return median(rates)
