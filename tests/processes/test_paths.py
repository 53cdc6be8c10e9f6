"""Broken paths between nodes that themselves are well: silence one way, resets, a slow network.

The nodes reach one another through a proxy of ours; clients reach them directly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalNode
from p2pinfer.types import SamplingParams
from tests.faults.proxy import ProxiedCluster
from tests.faults.watching import (
    GO_ON_S,
    LEADER_FIRST,
    Reading,
    all_own,
    all_vote,
    facts,
    leader,
    member,
    others,
    owners,
    pick,
    status,
    until,
)

pytestmark = pytest.mark.xdist_group("clusters")

PROMPT = "Once upon a time"
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedCluster]:
    """Three nodes with a proxy between them, which `trio` mends between two tests."""
    folder = tmp_path_factory.mktemp("paths")
    with ProxiedCluster(3, threads=1, folder=folder, options={"timing": "test"}) as cluster:
        yield cluster


@pytest.fixture
def trio(nodes: ProxiedCluster) -> Iterator[ProxiedCluster]:
    """Three nodes, all there, with a vote and units."""
    until(lambda: all_vote(nodes, 3), what="the cluster with all three")
    until(lambda: all_own(nodes), what="units for everybody")
    yield nodes
    nodes.proxy.mend()


def read(node: LocalNode) -> Reading:
    """Begin the long reply through a node."""
    return Reading([node.address], PROMPT, ENDLESS).start().begun()


def end(cluster: ProxiedCluster, reading: Reading) -> None:
    """Break a reply off; until then it had neither an error, nor a pause, nor another token than it
    has when nothing happens."""
    reading.goes_on(time.time())
    reading.stop()
    assert reading.errors == []
    assert reading.longest_gap() < GO_ON_S
    params = replace(ENDLESS, max_tokens=len(reading.tokens))
    again = Client([cluster.nodes[0].address]).submit_json_object(PROMPT, params)
    assert reading.tokens == again["token_ids"]


def test_of_two_followers_one_of_which_is_deaf_one_gives_way(trio: ProxiedCluster) -> None:
    """What one sends does not reach the other: one of them loses its units until it does again."""
    leads = pick(trio, "leader")
    one, other = others(trio, leads)
    reading = read(leads)
    struck = time.time()
    trio.proxy.cut((one.name, other.name))
    without = ({leads.name, one.name}, {leads.name, other.name})
    until(lambda: owners(leads) in without, what="a plan that does without one of them")
    reading.goes_on(time.time())
    trio.proxy.mend()
    until(lambda: all_own(trio), what="units for everybody")
    end(trio, reading)
    assert facts(leads, "peer_dead", "leader_lost", since=struck) == []
    assert leader(trio) == leads.name


def test_a_follower_that_does_not_hear_the_leader_gives_way(trio: ProxiedCluster) -> None:
    """It cannot get itself elected, since the other one hears the leader; the reply goes on."""
    leads = pick(trio, "leader")
    deaf, other = others(trio, leads)
    term = status(leads)["term"]
    reading = read(other)
    trio.proxy.cut((leads.name, deaf.name))
    until(lambda: deaf.name not in owners(other), what="a plan without it")
    reading.goes_on(time.time())
    trio.proxy.mend()
    until(lambda: all_own(trio), what="units for everybody")
    end(trio, reading)
    assert (leader(trio), status(leads)["term"]) == (leads.name, term)


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_nobody_is_hurt_by_a_reset(trio: ProxiedCluster, kind: str) -> None:
    """All connections of two nodes break at once: both stay, and the reply goes on."""
    leads, last = pick(trio, "leader"), pick(trio, "follower")
    one = next(n for n in others(trio, last) if (n is leads) == (kind == "leader"))
    reading = read(trio.nodes[0])
    before = status(trio.nodes[0])
    struck = time.time()
    assert trio.proxy.reset(one.name, last.name) >= 4
    until(lambda: status(trio.nodes[0])["epoch"] > before["epoch"], what="a new epoch")
    reading.goes_on(time.time())
    until(lambda: all_vote(trio, 3) and all_own(trio), what="the cluster as before")
    end(trio, reading)
    for node in trio.nodes:
        assert facts(node, "peer_dead", "leader_lost", since=struck) == []
        adopted = facts(node, "plan_adopted", since=struck)
        assert {len(fact["owners"]) for fact in adopted} == {3}
        assert member(node, last.name)["state"] == "alive"


def test_a_slow_network_hurts_nobody(trio: ProxiedCluster) -> None:
    """Fifty milliseconds each way between all: the same tokens, only later."""
    names = [node.name for node in trio.nodes]
    pairs = [(one, other) for one in names for other in names if one != other]
    few = SamplingParams(max_tokens=12, ignore_eos=True)
    client = Client([trio.nodes[1].address])
    undisturbed = client.submit_json_object(PROMPT, few)
    struck = time.time()
    trio.proxy.delay(*pairs, seconds=0.05)
    reply = client.submit_json_object(PROMPT, few)
    assert reply["error"] is None, reply
    assert reply["token_ids"] == undisturbed["token_ids"]
    for node in trio.nodes:
        assert facts(node, "peer_dead", "leader_lost", since=struck) == []
    # A step or two are overdue on each node; then all know how long a step takes now.
    assert len(facts(pick(trio, "leader"), "plan_proposed", since=struck)) <= 4
