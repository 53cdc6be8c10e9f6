"""Nodes join, are drained, paused and told to end while a reply runs, which hardly notices."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from tests.faults.watching import (
    LEADER_FIRST,
    Reading,
    all_own,
    all_protected,
    all_vote,
    facts,
    member,
    mend,
    others,
    owners,
    pick,
    until,
)

pytestmark = pytest.mark.xdist_group("clusters")

PROMPT = "Once upon a time"
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)
NEAR = 32
"""Positions that a planned move may compute again: a standby is ready with half of that, and a few
steps pass before its plan is in force."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, which `trio` mends between two tests."""
    folder = tmp_path_factory.mktemp("coming")
    with LocalCluster(3, threads=1, base_port=free_base_port(3), folder=folder) as cluster:
        yield cluster


@pytest.fixture
def trio(nodes: LocalCluster) -> LocalCluster:
    """Three nodes, all there, with a vote and units, and all of these with a standby."""
    mend(nodes)
    until(lambda: all_vote(nodes, 3) and all_own(nodes), what="the cluster with all three")
    until(lambda: all_protected(nodes), what="a standby for every unit")
    return nodes


@pytest.fixture(scope="module")
def undisturbed(nodes: LocalCluster) -> Callable[[int], list[int]]:
    """The first tokens of the reply when nothing happens."""
    known: list[int] = []

    def tokens(count: int) -> list[int]:
        if len(known) < count:
            shorter = replace(ENDLESS, max_tokens=count)
            living = next(node for node in nodes.nodes if not node.ending)
            reply = Client([living.address]).submit_json_object(PROMPT, shorter)
            assert reply["error"] is None, reply
            known[:] = reply["token_ids"]
        return known[:count]

    return tokens


def read(by: list[LocalNode]) -> Reading:
    """Begin a reply through the first of these nodes."""
    return Reading([node.address for node in by], PROMPT, ENDLESS).start().begun()


def check(
    reading: Reading, among: list[LocalNode], undisturbed: Callable[[int], list[int]], since: float
) -> None:
    """The reply goes on, has the tokens of an undisturbed one, and hardly any were computed again;
    nobody failed it."""
    reading.goes_on(time.time())
    reading.stop()
    assert reading.errors == []
    found = [fact for node in among for fact in facts(node, "request_restored", since=since)]
    assert found
    assert max(fact["length"] - fact["restart"] for fact in found) <= NEAR
    assert reading.tokens == undisturbed(len(reading.tokens))


def test_a_node_comes_back_while_a_reply_runs(
    trio: LocalCluster, undisturbed: Callable[[int], list[int]]
) -> None:
    """It loads its share and gets its KV before it owns anything: no position is replayed."""
    guest = pick(trio, "follower")
    rest = others(trio, guest)
    guest.process.send_signal(signal.SIGTERM)
    assert guest.process.wait(30) == 0
    until(lambda: all_vote(trio, 2), what="the cluster without it")
    reading, began = read(rest), time.time()
    index = trio.nodes.index(guest)
    trio.nodes[index] = trio.start_node(index)
    until(lambda: all_own(trio), what="its share")
    check(reading, rest, undisturbed, began)


@pytest.mark.parametrize("kind", LEADER_FIRST)
@pytest.mark.parametrize("how", ["drain", "signal"])
def test_a_node_goes_while_a_reply_runs(
    trio: LocalCluster, undisturbed: Callable[[int], list[int]], kind: str, how: str
) -> None:
    """Its standbys take over what they have, and only then it ends, with 0."""
    victim = pick(trio, kind)
    rest = others(trio, victim)
    reading, began = read(rest), time.time()
    if how == "drain":
        Client([rest[0].address]).drain(victim.name)
    else:
        victim.process.send_signal(signal.SIGTERM)
    assert victim.process.wait(30) == 0
    check(reading, rest, undisturbed, began)


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_a_node_is_paused_and_resumed_while_a_reply_runs(
    trio: LocalCluster, undisturbed: Callable[[int], list[int]], kind: str
) -> None:
    """It owns nothing, and says so; the leader leads on. Resumed it has its share again."""
    victim = pick(trio, kind)
    rest = others(trio, victim)
    reading, began = read(rest), time.time()
    client = Client([rest[0].address])
    client.pause(victim.name)
    assert owners(rest[0]) == {node.name for node in rest}
    seen = member(rest[0], victim.name)
    assert (seen["paused"], seen["owned"]) == (True, [])
    assert seen["standby"]
    assert pick(trio, kind) is victim or kind == "follower"
    client.resume(victim.name)
    until(lambda: all_own(trio), what="its share")
    check(reading, trio.nodes, undisturbed, began)


def test_the_last_node_that_may_own_anything_is_not_paused(trio: LocalCluster) -> None:
    """The others are paused already: that is told at once."""
    first, second, third = trio.nodes
    client = Client([first.address])
    client.pause(second.name)
    client.pause(third.name)
    with pytest.raises(ClusterError, match="nobody else may own units"):
        client.pause(first.name)
    with pytest.raises(ClusterError, match="no member is called nobody"):
        client.pause("nobody")
    client.resume(second.name)
    client.resume(third.name)


def test_a_paused_node_owns_again_when_it_is_started_again(trio: LocalCluster) -> None:
    """A pause is not kept over a restart."""
    victim = pick(trio, "follower")
    rest = others(trio, victim)
    Client([rest[0].address]).pause(victim.name)
    victim.process.send_signal(signal.SIGTERM)
    assert victim.process.wait(30) == 0
    index = trio.nodes.index(victim)
    trio.nodes[index] = trio.start_node(index)
    until(lambda: all_own(trio), what="its share")
