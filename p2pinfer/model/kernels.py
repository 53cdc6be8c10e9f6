"""Whose kernels compute on a CPU what is not quantised: products, norms and attention.

oneDNN's operators are private to torch: where they are missing, torch's own products serve.
"""

from __future__ import annotations

import torch

from p2pinfer.model import zendnn


class _Choice:
    """What is wanted; told once."""

    wanted = "auto"


def use(wanted: str) -> None:
    """Let what is made from now on compute by `zendnn`, which is to be there, by `onednn`, or
    (`auto`) by the faster one that is here."""
    _Choice.wanted = wanted


def library(dtype: torch.dtype, device: torch.device) -> str:
    """Whose kernels are for `dtype` on `device`: `zendnn`, `onednn`, or `torch`."""
    if device.type != "cpu":
        return "torch"
    is_wanted = _Choice.wanted == "zendnn" or (_Choice.wanted == "auto" and zendnn.is_of_vendor())
    if is_wanted and not zendnn.missing() and zendnn.is_for(dtype):
        return "zendnn"
    return "onednn" if _onednn_is_for(dtype) else "torch"


def _onednn_is_for(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
