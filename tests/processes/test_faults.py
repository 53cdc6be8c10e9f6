"""A sample of `bin/kills` and `bin/soak`, which do the same for as long as wanted."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.faults.cases import BY_NAME
from tests.faults.clusters import Nodes, cluster_for
from tests.faults.playing import PATIENCE_S, Play, whole
from tests.faults.truth import Truth
from tests.faults.vitals import Census
from tests.faults.watching import until

pytestmark = [
    pytest.mark.xdist_group("clusters"),
    pytest.mark.sample,
    pytest.mark.timeout(2 * PATIENCE_S),
]

SEED = 1


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    """A node that nobody strikes."""
    with Truth(tmp_path_factory.mktemp("truth"), dtype="float32") as node:
        yield node


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """One cluster that lives through all of it."""
    folder = tmp_path_factory.mktemp("faults")
    with cluster_for("proxy", 4, folder, {"dtype": "float32"}) as cluster:
        yield cluster


@pytest.mark.parametrize(
    "name",
    [
        "disk-full",
        pytest.param("one-way-leader", marks=pytest.mark.long),
        pytest.param("move-leader", marks=pytest.mark.long),
    ],
)
def test_replies_live_through(name: str, nodes: Nodes, truth: Truth) -> None:
    """They are those of a node that nobody strikes, and the cluster is then as it was before."""
    until(lambda: whole(nodes), what="the cluster")
    play = Play(BY_NAME[name], nodes, truth, random.Random(f"{SEED}/{name}"), Census())
    assert play.run()["failures"] == []
