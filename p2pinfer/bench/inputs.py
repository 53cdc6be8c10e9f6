"""What the benchmarks of a local cluster share: what to start, what to ask, and how to say it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from p2pinfer.cluster import LocalCluster, check_ports
from p2pinfer.config import load_settings
from p2pinfer.errors import UsageError
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.shapes import make_model
from p2pinfer.types import DType, ModelSpec

MODEL_SEED = 0
PROMPT_SEED_STEP = 7919

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The cluster to measure: `nodes` nodes of `threads` threads that hold a model of `shape`."""

    shape: str = "llama-3.2-1b"
    nodes: int = 2
    threads: int = 1
    layout: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    kernels: str = "auto"
    local_links: bool = True
    wire_dtype: str = "float32"
    base_port: int = 7820

    def check(self) -> None:
        """Raise `UsageError` for settings that no node takes, and for a port that is taken."""
        load_settings(self.options())
        check_ports(self.base_port, self.nodes)

    def options(self) -> dict[str, str]:
        """The settings of its nodes."""
        return {
            "layout": self.layout,
            "dtype": self.dtype,
            "quant": self.quant,
            "kernels": self.kernels,
            "wire_dtype": self.wire_dtype,
        }

    def fields(self) -> dict[str, Any]:
        """What every result says of the cluster."""
        return {
            "shape": self.shape,
            "nodes": self.nodes,
            "threads_per_node": self.threads,
            "layout": self.layout,
            "kernels": self.kernels,
            "local_links": self.local_links,
        }


def model_folder(shape: str) -> Path:
    """Where the random model of a shape is kept between runs."""
    return platformdirs.user_cache_path("p2pinfer") / "models" / shape


def open_model(inputs: Inputs, tell: Tell) -> tuple[Path, ModelSpec]:
    """The folder of the model, made where there is none yet, and the model as nodes compute it."""
    folder = model_folder(inputs.shape)
    tell(f"the model of shape {inputs.shape} in {folder}")
    make_model(inputs.shape, folder, seed=MODEL_SEED)
    config = load_config(folder)
    dtype = config.dtype if inputs.dtype == "auto" else DType(inputs.dtype)
    return folder, model_spec(
        config,
        name=inputs.shape,
        model_id="",
        dtype=dtype,
        quant=inputs.quant,
        wire_dtype=inputs.wire_dtype,
    )


def check_positions(spec: ModelSpec, positions: int, flags: str) -> None:
    """Raise `UsageError`, naming `flags`, where a prompt and its reply have more `positions` than
    the model."""
    if positions > spec.max_positions:
        raise UsageError(
            f"{flags}: {positions} positions are more than the {spec.max_positions} of {spec.name}"
        )


def local_cluster(inputs: Inputs, folder: Path, tell: Tell, **options: Any) -> LocalCluster:
    """The cluster that is measured; `options` are more settings of its nodes.

    Each node has CPUs of its own where there are enough.
    """
    return LocalCluster(
        inputs.nodes,
        model=str(folder),
        base_port=inputs.base_port,
        threads=inputs.threads,
        pin=inputs.nodes * inputs.threads <= (os.cpu_count() or 1),
        options={**inputs.options(), "local_links": inputs.local_links, **options},
        on_progress=tell,
    )


def prompt_of(vocab: int, tokens: int, seed: int) -> tuple[int, ...]:
    """A fixed prompt of token ids, without special ones at the vocabulary's end."""
    usable = max(2, vocab // 2)
    return tuple((seed * PROMPT_SEED_STEP + i * i * 31 + 17 * i) % usable for i in range(tokens))


def spread(name: str, values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """A figure's median, with its least and greatest value beside it."""
    return {
        name: round(statistics.median(values), digits),
        f"{name}_min": round(min(values), digits),
        f"{name}_max": round(max(values), digits),
    }
