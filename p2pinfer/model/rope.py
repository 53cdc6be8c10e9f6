"""Rotary position embedding (Su et al., 2021; RoFormer) with `linear` and `llama3` scaling.

Angles are computed per block of 64 positions, always with the same shapes, so that a position's
cosines have the same bits however many positions run together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> NDArray[np.float32]:
    """[head_dim / 2] in radians per position, in float32 as `transformers` has them."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    base: NDArray[np.float32] = (1.0 / np.power(np.float32(config.rope_theta), half)).astype("f4")
    scaling = config.rope_scaling
    if scaling is None:
        return base
    if scaling.rope_type == "linear":
        return np.asarray(base / np.float32(scaling.factor), np.float32)
    # llama3 (Llama 3.1): long wavelengths are stretched, short ones kept, those between blended.
    old = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base
    smooth = (old / wavelength - low) / (high - low)
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    scaled = np.where(wavelength > old / low, base / scaling.factor, base)
    between = (wavelength <= old / low) & (wavelength >= old / high)
    return np.asarray(np.where(between, blended, scaled), np.float32)


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of a step's rows, each [rows, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor

    @property
    def rows(self) -> int:
        """How many rows these are of."""
        return self.cos.shape[0]

    @cached_property
    def of_halves(self) -> tuple[Tensor, Tensor]:
        """What both halves of a head are multiplied with, and what the halves in each other's place
        are, each [rows, 1, head_dim]."""
        cos, sin = self.cos, self.sin
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


class Rope:
    """Cosines and sines by position, kept per block once computed."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config)
        self._device = device
        self._blocks: dict[int, Tensor] = {}

    def _block(self, number: int) -> Tensor:
        block = self._blocks.get(number)
        if block is None:
            first = number * BLOCK_POSITIONS
            positions = np.arange(first, first + BLOCK_POSITIONS, dtype=np.float32)
            angles = positions[:, None] * self._frequencies[None, :]
            both = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
            block = self._blocks[number] = torch.from_numpy(both).to(self._device)
        return block

    def rows(self, runs: list[tuple[int, int]]) -> Angles:
        """The angles of runs `[start, end)` of positions."""
        pieces: list[Tensor] = []
        for start, end in runs:
            for number in range(start // BLOCK_POSITIONS, (end - 1) // BLOCK_POSITIONS + 1):
                first = number * BLOCK_POSITIONS
                pieces.append(self._block(number)[max(start - first, 0) : end - first])
        both = torch.cat(pieces)
        return Angles(both[:, 0].contiguous(), both[:, 1].contiguous())


class Turning:
    """Rotates heads [rows, heads, head_dim] that lie in one place, in float32, halves as in
    `transformers`; `turned` has what comes out, the same shape.

    Products and sums are separate calls, each rounded: a fused one would round differently in a
    vector's tail.
    """

    def __init__(self, heads: Tensor) -> None:
        half = heads.shape[-1] // 2
        self._heads = heads
        self._straight = torch.empty_like(heads, dtype=torch.float32)
        self.turned = torch.empty_like(self._straight)
        left, right = torch.split(heads, half, -1)
        self._crossed = tuple(zip(torch.split(self.turned, half, -1), (right, left), strict=True))

    def turn(self, angles: Angles) -> None:
        """Turn what lies there now."""
        cos, sin = angles.of_halves
        for half, other in self._crossed:
            half.copy_(other)
        self._straight.copy_(self._heads)
        self.turned.mul_(sin).add_(self._straight.mul_(cos))


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate heads `x` [rows, heads, head_dim] as `Turning` does."""
    turning = Turning(x)
    turning.turn(angles)
    return turning.turned
