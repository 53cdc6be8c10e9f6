"""Partitions of a true network: nodes in namespaces, joined by a bridge, cables pulled."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client, Event
from p2pinfer.cluster import LocalNode
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from tests.faults.namespaces import NamespacedCluster, enter, why_not
from tests.faults.watching import GO_ON_S, Reading, facts, member, status, until

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.xdist_group("clusters"),
]

PROMPT = "Once upon a time"
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)
WAIT_S = 3.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamespacedCluster]:
    """Three nodes on a bridge."""
    folder = tmp_path_factory.mktemp("netns")
    with NamespacedCluster(3, folder=folder, timing="test", wait_for_nodes=WAIT_S) as cluster:
        yield cluster


@pytest.fixture
def trio(nodes: NamespacedCluster) -> NamespacedCluster:
    """Three nodes, all there, with a vote and units."""
    until(nodes.all_vote, what="the cluster with all three")
    until(lambda: len(owners(nodes, nodes.nodes[0])) == 3, what="units for everybody")
    return nodes


def owners(cluster: NamespacedCluster, node: LocalNode) -> set[str]:
    """The names of the members that own units, as a node sees it."""
    seen = cluster.within(lambda: status(node))
    return {m["name"] for m in seen.get("members", ()) if m["owned"]}


def leading(cluster: NamespacedCluster, node: LocalNode) -> str:
    """Who leads, as a node sees it."""
    return str(cluster.within(lambda: status(node)).get("leader", ""))


def read(cluster: NamespacedCluster, node: LocalNode) -> Reading:
    """Begin the long reply through a node."""
    reading = Reading([node.address], PROMPT, ENDLESS, enter=lambda: enter(cluster.switch))
    return reading.start().begun()


def ask(cluster: NamespacedCluster, node: LocalNode, max_tokens: int) -> list[int]:
    """The tokens of a short reply through a node."""
    params = replace(ENDLESS, max_tokens=max_tokens)
    reply = cluster.within(lambda: Client([node.address]).submit_json_object(PROMPT, params))
    assert reply["error"] is None, reply
    tokens: list[int] = reply["token_ids"]
    return tokens


def end(cluster: NamespacedCluster, reading: Reading) -> None:
    """Break a reply off; until then it had neither an error, nor a pause, nor another token than it
    has when nothing happens."""
    reading.goes_on(time.time())
    reading.stop()
    assert reading.errors == []
    assert reading.longest_gap() < GO_ON_S
    assert reading.tokens == ask(cluster, cluster.nodes[0], len(reading.tokens))


def test_the_majority_goes_on_when_the_leader_is_cut_off(trio: NamespacedCluster) -> None:
    """The leader alone refuses in time, and follows the new one when its cable is back."""
    cut = next(n for n in trio.nodes if n.name == leading(trio, trio.nodes[0]))
    rest = [node for node in trio.nodes if node is not cut]
    reading = read(trio, rest[0])
    minority = trio.namespace(cut)
    try:
        trio.pull(cut)
        until(lambda: owners(trio, rest[0]) == {n.name for n in rest}, what="a plan of the two")
        reading.goes_on(time.time())
        until(
            lambda: not trio.within(lambda: status(cut), minority)["leader"],
            what="the cut leader's resignation",
        )

        def submit() -> list[Event]:
            client = Client([cut.address], retry_for=0)
            return list(client.submit(PROMPT, SamplingParams(max_tokens=2)))

        with pytest.raises(ClusterError) as error:
            trio.within(submit, minority)
        assert (error.value.code, error.value.retryable) == ("no_quorum", True)
        assert all(node.name in error.value.message for node in rest)
        leads = leading(trio, rest[0])
    finally:
        trio.plug(cut)
    until(trio.all_vote, what="its return")
    until(lambda: len(owners(trio, rest[0])) == 3, what="units for everybody")
    end(trio, reading)
    assert leading(trio, cut) == leads
    assert ask(trio, cut, 20) == reading.tokens[:20]


@pytest.mark.parametrize("kind", ["followers", "leader"])
def test_two_nodes_that_cannot_reach_each_other_do_not_stop_the_rest(
    trio: NamespacedCluster, kind: str
) -> None:
    """All others see both: one of the two owns nothing until they can, and the reply goes on."""
    leads = next(n for n in trio.nodes if n.name == leading(trio, trio.nodes[0]))
    rest = [node for node in trio.nodes if node is not leads]
    one, other = rest if kind == "followers" else (leads, rest[0])
    serving = leads if kind == "followers" else rest[1]
    reading = read(trio, serving)
    struck = time.time()
    trio.part(one, other)
    try:
        until(lambda: len(owners(trio, serving)) == 2, what="a plan without one of them")
        reading.goes_on(time.time())
    finally:
        trio.join(one, other)
    until(trio.all_vote, what="the cluster with all three")
    until(lambda: len(owners(trio, serving)) == 3, what="units for everybody")
    end(trio, reading)
    assert facts(serving, "peer_dead", since=struck) == []
    assert trio.within(lambda: member(serving, other.name))["state"] == "alive"
