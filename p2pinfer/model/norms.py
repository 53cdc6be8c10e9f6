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


def rms_norm_of(kernels: str) -> RmsNorm:
    """The norm that goes with the products of a library, as `linear.kernels` names it."""
    if kernels == "zendnn":
        norm: RmsNorm = torch.ops.zentorch.zentorch_rms_norm.default
        return norm
    return _by_torch


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[1],), weight, eps)
