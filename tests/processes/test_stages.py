"""Replies go on when a stage of the model loses all of its owners: others take over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.types import SamplingParams
from tests.faults.watching import (
    LEADER_FIRST,
    Reading,
    all_own,
    all_protected,
    all_vote,
    others,
    pick,
    status,
    until,
)
from tests.processes.test_replicas import NEAR, read, strike

pytestmark = pytest.mark.xdist_group("clusters")

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_tokens=1500, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=1500, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, seed=7
)

Undisturbed = Callable[[SamplingParams, int], list[int]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """The first tokens of one node's reply, by its settings and how many are wanted."""
    folder = tmp_path_factory.mktemp("alone")
    with LocalCluster(1, threads=1, base_port=free_base_port(1), folder=folder) as cluster:
        client = Client([cluster.nodes[0].address])

        def tokens(params: SamplingParams, count: int) -> list[int]:
            reply = client.submit_json_object(PROMPT, replace(params, max_tokens=count))
            return list(reply["token_ids"])

        yield tokens


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    """Nodes in a layout, all with a vote and units, and all of these with a standby."""
    nodes, layout = request.param
    options, port = {"layout": layout}, free_base_port(nodes)
    with LocalCluster(
        nodes, threads=1, base_port=port, folder=tmp_path, options=options
    ) as started:
        until(lambda: all_vote(started, nodes) and all_own(started), what="the cluster")
        until(lambda: all_protected(started), what="a standby for every unit")
        yield started


def check(readings: list[Reading], undisturbed: Undisturbed) -> None:
    """The replies so far have the tokens of undisturbed ones."""
    for reading in readings:
        reading.stop()
    for reading in readings:
        assert reading.tokens == undisturbed(reading.params, len(reading.tokens))


def stages(node: LocalNode) -> dict[str, list[list[int]]]:
    """Which layers each node owns units of, by its name."""
    members = status(node)["members"]
    return {m["name"]: [part["span"] for part in m["owned"]] for m in members if m["owned"]}


@pytest.mark.parametrize("cluster", [(3, "layers")], indirect=True)
@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_layers_go_on_from_replicas(
    cluster: LocalCluster, undisturbed: Undisturbed, kind: str
) -> None:
    """One of the others owns two stages, until the killed node is back and has one again."""
    before = stages(cluster.nodes[0])
    victim = pick(cluster, kind)
    rest = others(cluster, victim)
    readings = read(rest, GREEDY, SAMPLED)
    strike(victim, rest, readings)
    check(readings, undisturbed)
    assert sorted(map(len, stages(rest[0]).values())) == [1, 2]
    index = cluster.nodes.index(victim)
    cluster.nodes[index] = cluster.start_node(index)
    until(lambda: all_vote(cluster, 3) and all_own(cluster), what="its return")
    again = stages(rest[0])
    assert sorted(again.values()) == sorted(before.values())
    reply = Client([rest[0].address]).submit_json_object(
        PROMPT, SamplingParams(max_tokens=40, ignore_eos=True)
    )
    assert reply["token_ids"] == undisturbed(GREEDY, 40)


@pytest.mark.parametrize("cluster", [(4, "2x2")], indirect=True)
def test_both_nodes_of_a_stage_may_die(cluster: LocalCluster, undisturbed: Undisturbed) -> None:
    """One after the other: the nodes of the other stage compute both."""
    held = stages(cluster.nodes[0])
    leader = pick(cluster, "leader")
    pair = [node for node in cluster.nodes if held[node.name] != held[leader.name]]
    rest = others(cluster, pair[0])
    readings = read([leader], GREEDY, SAMPLED)
    strike(pair[0], rest, readings)
    until(lambda: all_vote(cluster, 3), what="the votes of the rest")
    until(lambda: all_protected(cluster, behind=NEAR), what="a replica of all")
    rest = others(cluster, pair[1])
    rest.remove(pair[0])
    strike(pair[1], rest, readings)
    check(readings, undisturbed)
    assert sorted(map(len, stages(leader).values())) == [2, 2]
