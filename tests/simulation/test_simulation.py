"""Seeds of the simulation: no violation, the same story each time, and faults that really met."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.simulation.faults import CLASSES
from tests.simulation.run import simulate

ROOT = Path(__file__).resolve().parents[2]
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "60"))
BATCH = 20


@cache
def outcomes(first: int) -> tuple[object, ...]:
    """What became of a batch of seeds."""
    return tuple(simulate(seed) for seed in range(first, first + BATCH))


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_no_seed_violates_anything(first: int) -> None:
    """Whatever goes wrong, no invariant breaks, and calm brings agreement and ends all requests."""
    bad = [f"seed {o.seed}: {o.violation}" for o in outcomes(first) if o.violation]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("seed", [3, 8])
def test_a_seed_is_the_same_story_in_every_process(seed: int) -> None:
    """The hash over all inputs and outputs does not depend on the process or its hash seed."""
    code = (
        "from tests.simulation.run import simulate;"
        f"print(*(simulate(s).digest for s in ({seed + 1}, {seed})))"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        told = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(told.stdout.split()[1])
    assert digests == {simulate(seed).digest}


def test_leaving_a_class_out_leaves_the_others_as_they_are() -> None:
    """A seed without one of its classes has the same cluster, clients and other classes."""
    whole = simulate(4)
    less = simulate(4, whole.classes[:1])
    assert less.classes == whole.classes[1:]
    assert simulate(4, tuple(CLASSES)).classes == ()


def test_replies_survive() -> None:
    """Nearly all requests of clients that stay end with the whole reply, faults or not."""
    ends: Counter[str] = Counter()
    for first in range(0, SEEDS, BATCH):
        for outcome in outcomes(first):
            ends.update(outcome.counters)
    told = {name: n for name, n in ends.items() if name.startswith("a request ended")}
    assert told["a request ended: complete"] > 0.9 * sum(told.values())
