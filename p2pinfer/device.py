"""Where a worker computes, with whose kernels, how many threads, and how much memory to offer."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from p2pinfer.errors import UsageError
from p2pinfer.model import attention, kernels, zendnn
from p2pinfer.model.llama import TORCH_DTYPES
from p2pinfer.types import ModelSpec

HEADROOM_BYTES = 450 << 20

CONTROL_GROUP = Path("/sys/fs/cgroup")


def choose_device(wanted: str, quant: str = "none") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`; raises `UsageError` where there is no such device.

    Quantised weights are for CPUs: `auto` takes one then.
    """
    if wanted == "auto" and quant != "none":
        return torch.device("cpu")
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {wanted}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def use_kernels(wanted: str, model: ModelSpec | None, device: torch.device) -> None:
    """Have what is not quantised computed on a CPU by `zendnn`, by `onednn`, or (`auto`) by the
    faster one that is here; to be called before threads are started, since a library is loaded.

    Raises `UsageError` where those that are wanted cannot be had for the `model`.
    """
    kernels.use(wanted)
    found = kernels_of(model, device)
    if model and wanted == "zendnn" and found != "zendnn" and device.type == "cpu":
        why_not = zendnn.missing() or "it does not compute in this number format on this processor"
        raise UsageError(f"--kernels zendnn: {why_not}; take --kernels auto, or onednn")


def kernels_of(model: ModelSpec | None, device: torch.device) -> str:
    """Whose kernels compute on `device` what is not quantised of a model: see `kernels.library`;
    empty without a model."""
    if model is None:
        return ""
    return kernels.library(
        TORCH_DTYPES[model.dtype if model.quant == "none" else model.kv_dtype], device
    )


def use_threads(count: int, quant: str) -> None:
    """Give `count` threads to the library that multiplies weights that are quantised so, and no
    other thread to anything else: what two libraries start would keep each other from the cores.

    Attention has threads of its own where torch multiplies, whose others sleep soon. Those of
    onnxruntime look for work without sleep: beside them a second thread gained nothing.
    """
    if quant == "none":
        torch.set_num_threads(count)
        attention.use_threads(count)
        return
    # Only who quantises pays for the import.
    from p2pinfer.model import product_graph

    torch.set_num_threads(1)
    attention.use_threads(1)
    product_graph.use_threads(count)


def threads_of(quant: str) -> int:
    """How many threads multiply weights that are quantised so, in this process."""
    if quant == "none":
        return torch.get_num_threads()
    from p2pinfer.model import product_graph

    return product_graph.threads()


def offered_memory(device: torch.device, group: Path = CONTROL_GROUP) -> int:
    """Bytes that the device has free for weights and KV, within the control group's limit.

    `HEADROOM_BYTES` are left for activations, masks and temporary copies while loading. Pages of
    files that were read once, the model's for example, are no use of the group that lasts.
    """
    if device.type == "cuda":
        return max(1, int(torch.cuda.mem_get_info(device)[0]) - HEADROOM_BYTES)
    available = max(1, psutil.virtual_memory().available - HEADROOM_BYTES)
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(counts.get("inactive_file", 0))
    except (OSError, ValueError):  # no control group, or "max"
        return int(available)
    return int(min(available, max(1, limit - used - HEADROOM_BYTES)))
