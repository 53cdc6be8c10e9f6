"""Loading in the background: out of the way, and not for longer than wanted."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from p2pinfer.core.holdings import Holding
from p2pinfer.core.units import Slice
from p2pinfer.errors import ModelError
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.part import Part, empty_cache
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.model.weights import Weights
from p2pinfer.priority import LAST
from p2pinfer.standby_loader import StandbyLoader
from tests.random_models import write_random_model

CPU = torch.device("cpu")
DEADLINE_S = 60.0


class Source(Weights):
    """Weights that are handed out as far as the gate lets."""

    def __init__(self, folder: Path, gate: threading.Semaphore) -> None:
        super().__init__(Checkpoint.open(folder, load_config(folder)))
        self._gate = gate

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Waits at the gate."""
        assert self._gate.acquire(timeout=DEADLINE_S)
        return super().rows(name, start, end)


class Bench:
    """Parts of a small model, and what its loader was like."""

    def __init__(self, folder: Path) -> None:
        self.gate = threading.Semaphore(0)
        self._config = load_config(folder)
        self._model = model_spec(self._config, name="t", model_id="0" * 64)
        self._folder = folder
        self.threads = 0
        self.nice = 0
        self.grad = True

    def part(self, *heads: int) -> Part:
        """Head units, not loaded."""
        held = Holding(
            stage=0, span=Slice(0, 2), head_units=heads, mlp_units=(0,), vocab_units=(0,)
        )
        return Part(held, empty_cache(held, self._model, CPU))

    def open(self) -> StageLoader:
        """What a loader calls in its thread."""
        self.threads = torch.get_num_threads()
        self.grad = torch.is_grad_enabled()
        if sys.platform == "linux":
            self.nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return StageLoader(Source(self._folder, self.gate), self._config, self._model, CPU)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A small model."""
    return Bench(write_random_model(tmp_path / "model", seed=3))


def test_it_is_last_and_alone(bench: Bench) -> None:
    """One thread of torch's, of lowest priority; those of the caller stay as they are."""
    threads = torch.get_num_threads()
    bench.gate.release(1000)
    part = bench.part(0, 1)
    with torch.no_grad():
        loader = StandbyLoader((part,), bench.open)
        assert loader.wait(DEADLINE_S)
    assert part.stage is not None
    assert part.loaded_bytes == part.stage.nbytes > 0
    assert (bench.threads, bench.grad) == (1, False)
    assert torch.get_num_threads() == threads
    if sys.platform == "linux":
        assert bench.nice == LAST
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < LAST


def test_it_stops_between_two_pieces(bench: Bench) -> None:
    """What is loaded by then stays, and another goes on from there."""
    part, other = bench.part(0, 1), bench.part(2, 3)
    loader = StandbyLoader((part, other), bench.open)
    bench.gate.release(8)
    stopper = threading.Thread(target=loader.stop)
    stopper.start()
    while stopper.is_alive():
        bench.gate.release()
        stopper.join(0.001)
    loader.stop()
    assert (part.stage, other.stage, other.loaded_bytes) == (None, None, 0)
    loaded = part.loaded_bytes
    bench.gate.release(1000)
    again = StandbyLoader((part, other), bench.open)
    assert again.wait(DEADLINE_S)
    assert part.stage is not None
    assert other.stage is not None
    assert part.loaded_bytes == other.loaded_bytes == part.stage.nbytes > loaded


def test_it_gives_others_a_head_start(bench: Bench) -> None:
    """Until then nothing is begun, and it can be stopped."""
    part = bench.part(0)
    bench.gate.release(1000)
    loader = StandbyLoader((part,), bench.open, after_s=DEADLINE_S)
    assert not loader.wait(0.05)
    loader.stop()
    assert (loader.wait(0.0), part.loaded_bytes) == (True, 0)


def test_what_cannot_be_loaded_says_why(bench: Bench) -> None:
    """The other parts are loaded all the same."""
    bench.gate.release(1000)
    bad, good = bench.part(0), bench.part(1)
    failing = iter([ModelError("no such file\nat all")])

    def opened() -> StageLoader:
        for error in failing:
            raise error
        return bench.open()

    assert StandbyLoader((bad, good), opened).wait(DEADLINE_S)
    assert (bad.stage, bad.error, good.error) == (None, "no such file", "")
    assert good.stage is not None
    assert StandbyLoader((bad,), opened).wait(DEADLINE_S)
    assert (bad.stage is not None, bad.error) == (True, "")
