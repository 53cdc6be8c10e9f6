"""Division by the root mean square (Zhang and Sennrich, 2019), in float32, row by row.

Who multiplies norms as well: what torch does in nine steps ZenDNN does in one, and between products
every step takes longer than what it computes (decision 29).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

RmsNorm = Callable[[Tensor, Tensor, float], Tensor]
"""Of `x` [rows, hidden], a weight [hidden], both float32, and what is added to the mean square:
[rows, hidden] float32, each row with bits of its own."""


def rms_norm_of(library: str) -> RmsNorm:
    """The norm of a library, as `kernels.library` names it."""
    if library == "zendnn":
        norm: RmsNorm = torch.ops.zentorch.zentorch_rms_norm.default
        return norm
    return _by_torch


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[1],), weight, eps)
