"""The units that a worker holds: loaded once, kept as long as plans give it the same."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

from p2pinfer.core.planner import Holding
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology, weight_bytes
from p2pinfer.core.units import Slice
from p2pinfer.errors import LocalProtocolError
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import LlamaConfig, load_config
from p2pinfer.model.kv_cache import KvCache
from p2pinfer.model.llama import StageLoader
from p2pinfer.model.runner import StageRunner
from p2pinfer.model.weights import Weights

PROGRESS_EVERY_S = 0.1
"""A worker that says nothing for a while counts as hung, also while it loads."""


class UnitHolder:
    """Weights and KV of one node. `folder` is the model's; None for a witness, which has none.

    `progress` is called several times a second while loading, with the bytes that are loaded and
    those of all.
    """

    def __init__(
        self,
        folder: Path | None,
        device: torch.device,
        logs: TokenLogs,
        progress: Callable[[int, int], None],
    ) -> None:
        self._folder = folder
        self._config: LlamaConfig | None = load_config(folder) if folder else None
        self._device = device
        self._logs = logs
        self._progress = progress
        self._holding: Holding | None = None
        self.runner: StageRunner | None = None
        """None where the last plan gave this node no units."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held."""
        return self.runner.weight_bytes if self.runner else 0

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of KV written."""
        return self.runner.cache.used_bytes if self.runner else 0

    def hold(self, mine: Topology) -> None:
        """Hold what a plan gives to this node; what else it held is freed first.

        KV stays where layers and head units stay; where not, the logs lose their coverage. Raises
        what reading the model's files raises: nothing is held then.
        """
        wanted, held = mine.holding, self._holding
        if held == wanted:
            return
        cache = self._let_go(wanted)
        if wanted.stage is not None:
            self.runner = self._load(mine, cache)
        self._holding = wanted

    def _let_go(self, wanted: Holding) -> KvCache | None:
        """Free the weights, and the KV unless it is of the units that are wanted."""
        held, runner = self._holding, self.runner
        self._holding = self.runner = None
        if runner is None or held is None or _kv_of(held) != _kv_of(wanted):
            self._logs.lose_kv()
            return None
        return runner.cache

    def _load(self, mine: Topology, cache: KvCache | None) -> StageRunner:
        if self._folder is None or self._config is None:
            raise LocalProtocolError("a plan gives units to a witness, which has no model")
        model, holding = mine.plan.model, mine.holding
        total = weight_bytes(model, holding)
        done, told = 0, time.monotonic()
        self._progress(0, total)

        def progress(more: int) -> None:
            nonlocal done, told
            done += more
            if time.monotonic() - told >= PROGRESS_EVERY_S:
                told = time.monotonic()
                self._progress(done, max(done, total))

        try:
            weights = Weights(Checkpoint.open(self._folder, self._config))
            loader = StageLoader(weights, self._config, model, self._device, progress)
            stage = loader.load(holding)
        except BaseException:  # an order may break the load off, too: no KV is left without units
            self._logs.lose_kv()
            raise
        # What is loaded stays: without this a collection now and then walks all of torch, in the
        # middle of a step that other nodes wait for.
        gc.collect()
        gc.freeze()
        return StageRunner(stage, holding, self._config, model, self._device, cache=cache)

    def adopt(self, gone: tuple[int, ...], kept: tuple[int, ...]) -> None:
        """The logs were agreed on: free the KV of requests that are gone, cut that of the others
        to what the logs say is covered."""
        if self.runner is None:
            return
        self.runner.forget(gone)
        for request_id in kept:
            self.runner.cache.cut(request_id, self._logs.covered(request_id))


def _kv_of(held: Holding) -> tuple[Slice, tuple[int, ...]]:
    """What a node's KV is of."""
    return (held.span, held.head_units)
