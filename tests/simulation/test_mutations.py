"""Defects put into the core are found: `bin/simulate --mutation all --seeds 0..499` looks for each.

That takes minutes; here each is planted only into a seed that is known to find it. Where a change
of the core or of the faults makes another story of that seed, the same command names new ones.
"""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import simulate

FOUND_BY = {
    "fence-unchecked": 326,
    "gap-unchecked": 60,
    "held-unchecked": 402,
    "emitted-before-commit": 0,
    "owners-not-needed": 5,
    "watermark-off-by-one": 2,
    "stale-coverage-trusted": 4,
    "slot-reused": 0,
    "inputs-beyond-a-hole": 11,
    "delta-beyond-a-gap": 1,
    "delta-digest-unchecked": 15,
    "freed-replica-counted": 4,
    "promotion-trusted": 196,
    "vote-not-persisted": 27,
    "votes-for-all": 173,
    "older-plan-voted-for": 30,
    "acked-before-persisted": 0,
    "half-elects": 9,
    "owner-without-ack": 12,
    "two-voters-added": 0,
    "resume-without-hash": 0,
}
"""A seed that finds each."""


def test_every_mutation_has_a_seed() -> None:
    """Each planted defect is looked for."""
    assert FOUND_BY.keys() == MUTATIONS.keys()


@pytest.mark.parametrize(("name", "seed"), FOUND_BY.items())
def test_a_planted_defect_is_found(name: str, seed: int) -> None:
    """A rule left out of the core is a violation in a seed in which the core as it is has none."""
    with mutated(name):
        found = simulate(seed)
    assert found.violation
    assert not simulate(seed).violation
