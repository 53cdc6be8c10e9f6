"""What a worker says of itself, and how fast its machine is: measured once, and remembered.

A file per kind of work (number format, quantisation or kernels, device, threads) in the user's
cache folder holds the last measurement. All nodes of a machine share it, so that they get equal
shares; who finds it locked waits for the node that measures, since two at once would measure each
other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
import platformdirs
import torch
from msgspec import Meta

from p2pinfer import __version__
from p2pinfer.core.orders import Speed, WorkerReady
from p2pinfer.core.speed import GB_S_PER_THREAD, weight_of
from p2pinfer.device import kernels_of, offered_memory, threads_of
from p2pinfer.limits import MAX_GB_S
from p2pinfer.model.kernels import library
from p2pinfer.model.llama import TORCH_DTYPES
from p2pinfer.model.numeric_class import Numerics, numerics
from p2pinfer.model.speed import (
    QUICK_READ_BYTES,
    QUICK_READ_S,
    device_bandwidth,
    product_rate,
    read_bandwidth,
)
from p2pinfer.pipe import WorkerConfig
from p2pinfer.types import DType
from p2pinfer.wire.fields import MaybeIdentity

FRESH_S: Final = 7 * 86_400.0
"""After so long a machine is measured anew when a node starts."""

BUSY_FRESH_S: Final = 60.0
"""The same where other programs ran beside: long enough for all nodes that start together."""

RULE: Final = "medians"
"""Of `model/speed`, part of what a measurement is of: others went by least times, a third more."""

BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
CPU_FILE: Final = Path("/proc/cpuinfo")
MAX_RECORD_BYTES: Final = 4096

STARTED_AT: Final = time.time()
CPUS: Final = tuple(
    sorted(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else range(os.cpu_count() or 1)
)
"""Of this machine, before this process is pinned to some of them."""


def introduction(config: WorkerConfig, device: torch.device) -> WorkerReady:
    """The first report of a worker: how it computes, by whose kernels, and how fast."""
    model, speed, computes = config.model, Speed(), Numerics("", rows_matter=False)
    if model:
        speed = machine_speed(config.speed, dtype=model.dtype, quant=model.quant, device=device)
        computes = numerics(model.dtype, device, model.quant)
    return WorkerReady(
        numeric_class=computes.numeric_class,
        rows_matter=computes.rows_matter,
        device=str(device),
        kernels=kernels_of(model, device),
        threads=config.threads,
        memory_bytes=offered_memory(device),
        speed=speed,
    )


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement as it lies on the disk: of what (`key`), when, and what came out."""

    key: str
    machine: MaybeIdentity
    measured_at: float
    busy: bool
    product_gb_s: Annotated[float, Meta(gt=0.0, le=MAX_GB_S)]
    read_gb_s: Annotated[float, Meta(ge=0.0, le=MAX_GB_S)]
    weight: Annotated[float, Meta(gt=0.0, le=1e6)]


def default_folder() -> Path:
    """Where measurements are remembered."""
    return platformdirs.user_cache_path("p2pinfer") / "speed"


def machine_id(device: torch.device) -> str:
    """Whose memory weights are read from: this boot of this machine, or one of its accelerators;
    16 hexadecimal digits, or empty where the system does not tell."""
    try:
        boot = BOOT_ID_FILE.read_text().strip()
    except OSError:
        return ""
    where = "" if device.type == "cpu" else f" {device}"
    return hashlib.sha256(f"{boot}{where}".encode()).hexdigest()[:16]


def machine_speed(
    told: str,
    *,
    dtype: DType,
    quant: str,
    device: torch.device,
    folder: Path | None = None,
) -> Speed:
    """The speed that `--speed` asks for: `auto` as remembered or measured, `measure` measured by
    this start of this node or beside it, `off` unknown, or the GB/s that were told.

    Products run with the present threads. What cannot be remembered is measured each time.
    """
    machine = machine_id(device)
    if told == "off":
        return Speed(machine=machine)
    if told not in ("auto", "measure"):
        rate = float(told)
        return Speed(machine=machine, product_gb_s=rate, weight=rate / GB_S_PER_THREAD)
    how = library(TORCH_DTYPES[dtype], device) if quant == "none" else quant
    kind = f"{threads_of(quant)} {dtype} {how} {device}"
    key = f"{__version__} {RULE} {_cpu_model()} {kind}"
    name = hashlib.sha256(kind.encode())
    path = (folder or default_folder()) / f"{name.hexdigest()[:16]}.json"
    with _locked(path) as file:
        known = _read(file) if file else None
        if known and _is_fresh(known, key, machine, anew=told == "measure"):
            return _speed(known)
        product = product_rate(TORCH_DTYPES[dtype], device, quant=quant, threads=threads_of(quant))
        read = (
            read_bandwidth(CPUS, QUICK_READ_S, QUICK_READ_BYTES)
            if device.type == "cpu"
            else device_bandwidth(device)
        )
        rate = round(min(product.gb_s, MAX_GB_S), 2)
        record = Record(
            key=key,
            machine=machine,
            measured_at=time.time(),
            busy=product.busy,
            product_gb_s=max(rate, 0.01),
            read_gb_s=round(min(read, MAX_GB_S), 2),
            weight=weight_of(max(rate, 0.01), known.weight if known else 0.0),
        )
        if file:
            _write(file, record)
    return _speed(record)


def _speed(record: Record) -> Speed:
    return Speed(
        machine=record.machine,
        product_gb_s=record.product_gb_s,
        read_gb_s=record.read_gb_s,
        weight=record.weight,
    )


def _is_fresh(record: Record, key: str, machine: str, *, anew: bool) -> bool:
    if (record.key, record.machine) != (key, machine):
        return False
    age = time.time() - record.measured_at
    if anew:
        return record.measured_at >= STARTED_AT
    return 0 <= age < (BUSY_FRESH_S if record.busy else FRESH_S)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes] | None]:
    """The file, held by this process alone; None where it cannot be had."""
    file: IO[bytes] | None = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield file
    finally:
        if file:
            file.close()


def _read(file: IO[bytes]) -> Record | None:
    """The measurement in a file; None if there is none, or it is damaged."""
    with suppress(OSError, msgspec.MsgspecError):
        file.seek(0)
        return msgspec.json.decode(file.read(MAX_RECORD_BYTES), type=Record)
    return None


def _write(file: IO[bytes], record: Record) -> None:
    """Put a measurement in place of what was there; a full disk is no reason to fail."""
    with suppress(OSError):
        file.truncate(0)
        file.write(msgspec.json.encode(record))
        file.flush()


def _cpu_model() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in CPU_FILE.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"
