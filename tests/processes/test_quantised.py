"""Quantised nodes: replies outlive them, with the tokens that they would have had."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, free_base_port
from p2pinfer.types import SamplingParams
from tests.faults.watching import (
    LEADER_FIRST,
    Reading,
    await_whole,
    facts,
    kill,
    others,
    pick,
    status,
    until,
)

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(max_tokens=120, ignore_eos=True)

pytestmark = pytest.mark.xdist_group("clusters")


@pytest.fixture(scope="module")
def cluster_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LocalCluster]]:
    """Three nodes of a quantisation, with standbys of one kind; made once, whatever the order."""
    with ExitStack() as clusters:

        @cache
        def cluster_of(quant: str, standby: str) -> LocalCluster:
            cluster = LocalCluster(
                3,
                threads=1,
                base_port=free_base_port(3),
                folder=tmp_path_factory.mktemp(f"quantised-{quant}"),
                options={"quant": quant, "standby": standby},
            )
            return clusters.enter_context(cluster)

        yield cluster_of


@pytest.fixture(params=[("int4", "hot"), ("int8", "warm")], ids=str)
def trio(request: pytest.FixtureRequest, cluster_of: Callable[..., LocalCluster]) -> LocalCluster:
    """Three nodes, all there, with a vote and units, and all of these with a standby."""
    return await_whole(cluster_of(*request.param))


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_a_reply_goes_on_from_replicas(trio: LocalCluster, kind: str) -> None:
    """A node is killed in the middle of it: its standby's products have the same bits."""
    victim = pick(trio, kind)
    rest = others(trio, victim)
    reading = Reading([node.address for node in rest], PROMPT, GREEDY).start().begun()
    struck = time.time()
    kill(victim)

    def rungs() -> list[str]:
        told = [fact for node in rest for fact in facts(node, "request_restored", since=struck)]
        return [str(fact["rung"]) for fact in told]

    until(lambda: "replica" in rungs(), what="a plan without it")
    reading.goes_on(time.time())
    reading.stop()
    assert not reading.errors
    undisturbed = Client([rest[0].address]).submit_json_object(
        PROMPT, replace(GREEDY, max_tokens=len(reading.tokens))
    )
    assert undisturbed["token_ids"] == reading.tokens


def test_one_node_says_the_same(trio: LocalCluster, tmp_path: Path) -> None:
    """The reply of three nodes is that of one with two threads; `status` names the format."""
    quant = status(trio.nodes[0])["model"]["quant"]
    together = Client([trio.nodes[0].address]).submit_json_object(PROMPT, SHORT)
    with LocalCluster(
        1,
        threads=2,
        base_port=free_base_port(1),
        folder=tmp_path,
        options={"quant": quant},
    ) as single:
        alone = Client([single.nodes[0].address]).submit_json_object(PROMPT, SHORT)
    assert together["error"] is None
    assert alone["token_ids"] == together["token_ids"]
    assert len(set(alone["token_ids"])) > 8, "a constant reply would prove nothing"
