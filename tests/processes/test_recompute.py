"""Replies go on from KV that is made of kept inputs: `--replicas 0 --keep-inputs`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.types import SamplingParams
from tests.faults.watching import (
    LEADER_FIRST,
    Fact,
    Reading,
    all_own,
    all_vote,
    facts,
    kill,
    others,
    pick,
    status,
    until,
)

pytestmark = pytest.mark.xdist_group("clusters")

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_tokens=1500, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=40, seed=7)
OPTIONS = {"replicas": 0, "keep_inputs": True}
LENGTH = 120
"""Tokens of a reply that is read to its end."""

NEAR = 16
"""Positions that are computed again: those of the last steps."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes that keep inputs, which `trio` mends between two tests."""
    folder, port = tmp_path_factory.mktemp("recompute"), free_base_port(3)
    with LocalCluster(3, threads=1, base_port=port, folder=folder, options=OPTIONS) as cluster:
        yield cluster


@pytest.fixture
def trio(nodes: LocalCluster) -> LocalCluster:
    """Three nodes, all there, with a vote and units, which all keep inputs."""
    return mended(nodes)


def mended(cluster: LocalCluster, index: int | None = None, **changes: bool) -> LocalCluster:
    """All nodes run; `index` is started anew, with `changes` to its settings."""
    if index is not None and not cluster.nodes[index].ending:
        kill(cluster.nodes[index])
    for place, node in enumerate(cluster.nodes):
        if node.ending:
            cluster.nodes[place] = cluster.start_node(place, **changes)
    until(lambda: all_vote(cluster, 3) and all_own(cluster), what="the cluster with all three")
    return cluster


@pytest.fixture(scope="module")
def undisturbed(nodes: LocalCluster) -> Callable[[SamplingParams, int], list[int]]:
    """The first tokens of the reply when nothing happens, by its settings."""
    known: dict[SamplingParams, list[int]] = {}

    def tokens(params: SamplingParams, count: int) -> list[int]:
        if len(known.get(params, ())) < count:
            living = next(node for node in nodes.nodes if not node.ending)
            reply = Client([living.address]).submit_json_object(
                PROMPT, replace(params, max_tokens=count)
            )
            assert reply["error"] is None, reply
            known[params] = reply["token_ids"]
        return known[params][:count]

    return tokens


def strike(victim: LocalNode, rest: list[LocalNode], readings: list[Reading]) -> list[Fact]:
    """Kill a node in the middle of replies, wait until they go on, and say how they did."""
    struck = time.time()
    kill(victim)

    def restored() -> list[Fact]:
        return [fact for node in rest for fact in facts(node, "request_restored", since=struck)]

    # Tokens of before the kill may still be on their way to the clients.
    until(lambda: len(restored()) >= len(readings), what="a plan without it")
    went_on = time.time()
    for reading in readings:
        reading.goes_on(went_on)
    return restored()


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_replies_go_on_from_inputs(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams, int], list[int]], kind: str
) -> None:
    """Killed in the middle of two replies: both go on with the tokens that they would have had, and
    hardly a position is computed again."""
    victim = pick(trio, kind)
    rest = others(trio, victim)
    short = [replace(params, max_tokens=LENGTH) for params in (GREEDY, SAMPLED)]
    readings = [Reading([node.address for node in rest], PROMPT, each).start() for each in short]
    for reading in readings:
        reading.begun()
        until(lambda reading=reading: len(reading.tokens) > 40, what="forty tokens")  # type: ignore[misc]
    kept = [member["kv"]["inputs_bytes"] for member in status(rest[0])["members"]]
    assert max(kept) > 0
    found = strike(victim, rest, readings)
    assert sum(fact["rung"] == "recompute" for fact in found) >= 2
    assert max(fact["length"] - fact["restart"] for fact in found) <= NEAR
    for reading in readings:
        reading.join()
        assert reading.tokens == undisturbed(reading.params, LENGTH)
        assert reading.errors == []
        assert (reading.failovers[0].rung, reading.failovers[0].lost) == (
            "recompute",
            (victim.name,),
        )


def test_where_one_owner_keeps_no_inputs_all_is_computed_again(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams, int], list[int]]
) -> None:
    """Its new units have nothing that their KV could be made of. It is no fault, and the reply goes
    on all the same."""
    victim = pick(trio, "follower")
    bare = others(trio, victim)[-1]
    index = trio.nodes.index(bare)
    mended(trio, index, keep_inputs=False)
    rest = others(trio, victim)
    reading = Reading([node.address for node in rest], PROMPT, GREEDY).start().begun()
    until(lambda: len(reading.tokens) > 40, what="forty tokens")
    found = strike(victim, rest, [reading])
    assert found[0]["rung"] == "replay"
    reading.stop()
    assert reading.tokens == undisturbed(GREEDY, len(reading.tokens))
    mended(trio, index)
