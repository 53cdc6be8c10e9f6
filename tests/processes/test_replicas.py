"""Replies go on from replicas: nodes are killed, and hardly a position is computed again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    all_protected,
    all_vote,
    await_whole,
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
SAMPLED = SamplingParams(
    max_tokens=1500, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, seed=7
)
SHORT = SamplingParams(max_tokens=30, ignore_eos=True)
NEAR = 16
"""Tokens that a standby may be behind: those of the last steps, which its owner did not send."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Four nodes, which `quartet` mends between two tests."""
    folder = tmp_path_factory.mktemp("replicas")
    with LocalCluster(4, threads=1, base_port=free_base_port(4), folder=folder) as cluster:
        yield cluster


@pytest.fixture
def quartet(nodes: LocalCluster) -> LocalCluster:
    """Four nodes, all there, with a vote and units, and all of these with a standby."""
    return await_whole(nodes)


@pytest.fixture(scope="module")
def undisturbed(nodes: LocalCluster) -> Callable[..., list[int]]:
    """The first tokens of the reply when nothing happens, by its settings and prompt."""
    known: dict[tuple[SamplingParams, str], list[int]] = {}

    def tokens(params: SamplingParams, count: int, prompt: str = PROMPT) -> list[int]:
        key = (params, prompt)
        if len(known.get(key, ())) < count:
            shorter = replace(params, max_tokens=count)
            living = next(node for node in nodes.nodes if not node.ending)
            reply = Client([living.address]).submit_json_object(prompt, shorter)
            assert reply["error"] is None, reply
            known[key] = reply["token_ids"]
        return known[key][:count]

    return tokens


def read(by: list[LocalNode], *settings: SamplingParams) -> list[Reading]:
    """Begin replies of these settings through the first of these nodes."""
    addresses = [node.address for node in by]
    begun = [Reading(addresses, PROMPT, params).start() for params in settings]
    return [reading.begun() for reading in begun]


def restored(among: list[LocalNode], since: float) -> list[Fact]:
    """What the leaders said of requests that went on under a new plan."""
    return [fact for node in among for fact in facts(node, "request_restored", since=since)]


def _rungs(among: list[LocalNode], since: float) -> list[str]:
    return [str(fact["rung"]) for fact in restored(among, since)]


def strike(victim: LocalNode, rest: list[LocalNode], readings: list[Reading]) -> list[Fact]:
    """Kill a node in the middle of replies, wait until they go on, and say how they did.

    Every plan that follows has all but the last positions, and one of them from replicas.
    """
    struck = time.time()
    kill(victim)
    # A plan that was on its way, and tokens of before the kill, may come first.
    until(lambda: _rungs(rest, struck).count("replica") >= len(readings), what="a plan without it")
    went_on = time.time()
    for reading in readings:
        reading.goes_on(went_on)
    found = restored(rest, struck)
    assert {fact["rung"] for fact in found} <= {"replica", "none"}
    assert max(fact["length"] - fact["restart"] for fact in found) <= NEAR
    return found


def check(readings: list[Reading], undisturbed: Callable[..., list[int]]) -> None:
    """The replies so far have the tokens of undisturbed ones."""
    for reading in readings:
        reading.stop()
    for reading in readings:
        assert reading.tokens == undisturbed(reading.params, len(reading.tokens))


@pytest.mark.parametrize("kind", ["follower", "leader"])
def test_replies_go_on_from_replicas(
    quartet: LocalCluster, undisturbed: Callable[..., list[int]], kind: str
) -> None:
    """Killed in the middle of two replies: both go on with the tokens that they would have had."""
    victim = pick(quartet, kind)
    rest = others(quartet, victim)
    readings = read(rest, GREEDY, SAMPLED)
    strike(victim, rest, readings)
    check(readings, undisturbed)
    assert [reading.errors for reading in readings] == [[], []]


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_replies_go_on_from_replicas_when_their_serving_node_dies(
    quartet: LocalCluster, undisturbed: Callable[..., list[int]], kind: str
) -> None:
    """Their clients go to another node, which has the KV of what they bring along."""
    victim = pick(quartet, kind)
    rest = others(quartet, victim)
    readings = read([victim, *rest], GREEDY)
    strike(victim, rest, readings)
    check(readings, undisturbed)
    assert [error.partition(":")[0] for error in readings[0].errors] == ["node_lost"]


def test_a_reply_tells_of_the_replica(quartet: LocalCluster) -> None:
    """Its failovers name the rung."""
    victim = pick(quartet, "follower")
    rest = others(quartet, victim)
    (reading,) = read(rest, replace(GREEDY, max_tokens=200))
    struck = len(reading.tokens)
    kill(victim)
    reading.join()
    first = reading.failovers[0]
    assert (first.rung, first.lost) == ("replica", (victim.name,))
    assert struck <= first.position < 200


def test_new_standbys_are_filled(
    quartet: LocalCluster, undisturbed: Callable[..., list[int]]
) -> None:
    """After one death the rest name new ones, which survive the next: down to two nodes."""
    readings = read(quartet.nodes[:1], GREEDY)
    for left in (3, 2):
        until(lambda: all_protected(quartet, behind=NEAR), what="a replica of all")
        strike(quartet.nodes[left], quartet.nodes[:left], readings)
        until(lambda left=left: all_vote(quartet, left), what="the votes of the rest")  # type: ignore[misc]
    check(readings, undisturbed)


@pytest.mark.long
def test_a_node_that_comes_back_is_a_standby_and_owner_again(
    quartet: LocalCluster, undisturbed: Callable[..., list[int]]
) -> None:
    """And the reply in flight notices nothing of either way."""
    victim = pick(quartet, "follower")
    rest = others(quartet, victim)
    readings = read(rest, GREEDY)
    strike(victim, rest, readings)
    index = quartet.nodes.index(victim)
    quartet.nodes[index] = quartet.start_node(index)
    until(lambda: all_vote(quartet, 4) and all_own(quartet), what="its return")
    until(lambda: all_protected(quartet, behind=NEAR), what="a replica of all")
    readings[0].goes_on(time.time())
    check(readings, undisturbed)


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_a_long_prompt_goes_on_where_its_replica_ends(
    quartet: LocalCluster, undisturbed: Callable[..., list[int]], kind: str
) -> None:
    """Killed while prompts of many steps are read: what is done of them is not done again."""
    prompts = [f"{number} little foxes. " + "Once upon a time. " * 300 for number in range(4)]
    for prompt in prompts:
        undisturbed(SHORT, 30, prompt)
    victim = pick(quartet, kind)
    rest = others(quartet, victim)
    before = received(rest[0])
    addresses = [node.address for node in rest]
    readings = [Reading(addresses, prompt, SHORT).start() for prompt in prompts]
    until(lambda: received(rest[0]) > before + 300_000, what="a good part of the prompts")
    struck = time.time()
    kill(victim)
    for reading in readings:
        reading.join()
    begun = [fact for fact in restored(rest, struck) if fact["restart"]]
    assert "replica" in {fact["rung"] for fact in begun}
    for prompt, reading in zip(prompts, readings, strict=True):
        assert reading.tokens == undisturbed(SHORT, 30, prompt)


def received(node: LocalNode) -> int:
    """Bytes of delta KV that have come to a node."""
    counters: dict[str, Any] = status(node)["counters"]
    return int(counters["delta_bytes_received"])


def test_a_warm_replica_is_loaded_when_it_is_needed(
    tmp_path: Path, undisturbed: Callable[..., list[int]]
) -> None:
    """`--standby warm`: nobody has another's weights in memory, and replies go on all the same."""
    options = {"standby": "warm"}
    port = free_base_port(3)
    with LocalCluster(3, threads=1, base_port=port, folder=tmp_path, options=options) as cluster:
        until(lambda: all_vote(cluster, 3) and all_own(cluster), what="the cluster")
        until(lambda: all_protected(cluster), what="a standby for every unit")
        for node in cluster.nodes:
            counters: dict[str, Any] = status(node)["counters"]
            assert counters["standby_units_warm"] == counters["standby_units_wanted"] > 0
            assert counters["standby_weight_bytes"] == 0
        victim = pick(cluster, "follower")
        rest = others(cluster, victim)
        readings = read(rest, GREEDY, SAMPLED)
        strike(victim, rest, readings)
        check(readings, undisturbed)


def test_without_replicas_a_reply_is_computed_again(
    tmp_path: Path, undisturbed: Callable[..., list[int]]
) -> None:
    """`--replicas 0`: nothing is sent beside the steps, and the tokens are computed anew."""
    options = {"replicas": 0}
    port = free_base_port(3)
    with LocalCluster(3, threads=1, base_port=port, folder=tmp_path, options=options) as cluster:
        until(lambda: all_vote(cluster, 3) and all_own(cluster), what="the cluster")
        victim = pick(cluster, "follower")
        rest = others(cluster, victim)
        readings = read(rest, GREEDY)
        struck = time.time()
        kill(victim)
        until(lambda: restored(rest, struck), what="a plan without it")
        readings[0].goes_on(time.time())
        assert restored(rest, struck)[0]["rung"] == "replay"
        assert [received(node) for node in rest] == [0, 0]
        check(readings, undisturbed)
