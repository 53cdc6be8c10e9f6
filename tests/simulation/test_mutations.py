"""Defects put into the core are found: `bin/simulate --mutation all --seeds 0..499` looks for each.

That takes minutes; here each is planted only into a seed that is known to find it. Where a change
of the core or of the faults makes another story of that seed, the same command names new ones.
"""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import simulate

FOUND_BY = {
}
"""The first seed that finds each, as that command says."""


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
