"""Loading never keeps its caller waiting for long."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.quantise import QuantisedWeight
from p2pinfer.model.quantised_products import QuantisedPacker
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.model.unit_products import Norm, UnitProducts, Units
from p2pinfer.model.weights import Weights
from tests.lockstep import CPU, Lockstep
from tests.random_models import write_random_model

DEADLINE_S = 30.0


def test_a_graph_that_takes_long_is_made_aside(tmp_path: Path) -> None:
    """Whoever loads hears of it meanwhile, again and again, and gets the very stage at the end."""
    folder = write_random_model(tmp_path / "model")
    config = load_config(folder)
    spec = model_spec(config, name="m", model_id="", quant="int8")
    heard = threading.Event()

    class Slow(QuantisedPacker):
        def fanned(
            self, units: Units, weights: Sequence[QuantisedWeight], norm: Norm
        ) -> UnitProducts:
            assert heard.wait(DEADLINE_S)
            return super().fanned(units, weights, norm)

    weights = Weights(Checkpoint.open(folder, config))
    held = Lockstep(folder, quant="int8").topologies[0].holdings[0]
    loader = StageLoader(weights, config, spec, CPU, Slow(weights, QUANT_FORMATS["int8"]))
    pieces = loader.pieces(held)
    loaded, quiet = 0, 0
    while True:
        try:
            more = next(pieces)
        except StopIteration as done:
            assert done.value.nbytes == loaded
            break
        loaded, quiet = loaded + more, 0 if more else quiet + 1
        # No half of a layer has so many slices.
        if quiet > 100:
            heard.set()
    assert heard.is_set()
