"""Replies survive: nodes are killed, stopped, cut off from their worker, drained and added.

Whatever happens, a reply that goes on has exactly the tokens that it would have had.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Chunk
from tests.faults.watching import (
    GO_ON_S,
    LEADER_FIRST,
    Reading,
    all_own,
    all_vote,
    facts,
    kill,
    leader,
    member,
    mend,
    others,
    pick,
    status,
    until,
)
from tests.processes.command_line import finish, node_flags, start_cli

pytestmark = pytest.mark.xdist_group("clusters")

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_tokens=140, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=140, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, seed=7
)
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)
REFORM_S = 10.0
ZOMBIE_S = 10.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, which `trio` mends between two tests."""
    folder = tmp_path_factory.mktemp("survival")
    with LocalCluster(3, threads=1, base_port=free_base_port(3), folder=folder) as cluster:
        yield cluster


@pytest.fixture
def trio(nodes: LocalCluster) -> LocalCluster:
    """Three nodes, all there, with a vote and units: who owns nothing interrupts nobody."""
    mend(nodes)
    until(lambda: all_vote(nodes, 3) and all_own(nodes), what="the cluster with all three")
    return nodes


@pytest.fixture(scope="module")
def undisturbed(nodes: LocalCluster) -> Callable[[SamplingParams], list[int]]:
    """The tokens of the reply when nothing happens, by its settings."""
    known: dict[SamplingParams, list[int]] = {}

    def tokens(params: SamplingParams) -> list[int]:
        if params not in known:
            reply = Client([nodes.nodes[0].address]).submit_json_object(PROMPT, params)
            assert reply["error"] is None, reply
            known[params] = reply["token_ids"]
        return known[params]

    return tokens


def read(by: list[LocalNode], *settings: SamplingParams) -> list[Reading]:
    """Begin replies of these settings through the first of these nodes."""
    addresses = [node.address for node in by]
    begun = [Reading(addresses, PROMPT, params).start() for params in settings]
    return [reading.begun() for reading in begun]


def worker_of(node: LocalNode) -> psutil.Process:
    """A node's compute process."""
    (worker,) = psutil.Process(node.pid).children()
    return worker


def local_messages(node: LocalNode) -> int:
    """How many frames of steps a node has sent over Unix sockets."""
    return int(Client([node.address]).status()["counters"]["messages_local"])


def check(
    readings: list[Reading],
    undisturbed: Callable[[SamplingParams], list[int]],
) -> None:
    """All replies come to their end, with the tokens of an undisturbed one and without a pause."""
    for reading in readings:
        reading.join()
    for reading in readings:
        assert reading.finish_reason == "length", reading.errors
        assert reading.tokens == undisturbed(reading.params)
        assert reading.longest_gap() < GO_ON_S


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["follower", "leader"])
def test_replies_survive_the_death_of_a_node(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams], list[int]], kind: str
) -> None:
    """Killed in the middle of two replies: both go on, without an error, and name who was lost."""
    for params in (GREEDY, SAMPLED):
        undisturbed(params)
    victim = pick(trio, kind)
    readings = read(others(trio, victim), GREEDY, SAMPLED)
    before = [local_messages(node) for node in others(trio, victim)]
    kill(victim)
    check(readings, undisturbed)
    after = [local_messages(node) for node in others(trio, victim)]
    assert all(0 < old < new for old, new in zip(before, after, strict=True))
    for reading in readings:
        assert reading.errors == []
        assert reading.lost() == {victim.name}
        assert all(0 < failover.stall_s < GO_ON_S for failover in reading.failovers)
    assert member(others(trio, victim)[0], victim.name)["state"] == "dead"


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_replies_survive_the_death_of_the_node_that_serves_them(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams], list[int]], kind: str
) -> None:
    """Their clients go to another node with the tokens that they have, and lack none at the end."""
    for params in (GREEDY, SAMPLED):
        undisturbed(params)
    victim = pick(trio, kind)
    readings = read([victim, *others(trio, victim)], GREEDY, SAMPLED)
    kill(victim)
    check(readings, undisturbed)
    for reading in readings:
        assert [error.partition(":")[0] for error in reading.errors] == ["node_lost"]


def test_a_killed_node_comes_back_as_itself(trio: LocalCluster) -> None:
    """It has its node id and its vote, in a new boot, and owns units again."""
    witness, victim = trio.nodes[0], trio.nodes[2]
    before = member(witness, victim.name)
    kill(victim)
    until(lambda: member(witness, victim.name).get("state") == "dead")
    trio.nodes[2] = trio.start_node(2)
    until(lambda: all_vote(trio, 3), what="its return")
    after = member(witness, victim.name)
    assert after["node_id"] == before["node_id"]
    assert after["boot_id"] != before["boot_id"]
    assert after["state"] == "alive"
    until(lambda: member(witness, victim.name).get("head_units"), what="its units")


def test_a_cluster_comes_back_after_all_nodes_were_killed(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams], list[int]]
) -> None:
    """Nobody is told whom to join, and the reply goes on from what its client holds, by itself."""
    tokens = undisturbed(GREEDY)
    seen = status(trio.nodes[0])
    (reading,) = read(trio.nodes, GREEDY)
    kill(*trio.nodes)
    struck = time.time()
    for index in range(3):
        trio.nodes[index] = trio.start_node(index, join=())
    until(lambda: all_vote(trio, 3), what="the cluster")
    # Counted from the first election: what comes before is the start of the processes.
    began = min(fact["at"] for n in trio.nodes for fact in facts(n, "leader_elected", since=struck))
    assert time.time() - began < REFORM_S
    after = status(trio.nodes[2])
    assert after["cluster_id"] == seen["cluster_id"]
    assert after["term"] > seen["term"]
    assert after["epoch"] > seen["epoch"]
    reading.join()
    assert reading.tokens == tokens


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_a_node_that_sleeps_disturbs_nobody_when_it_wakes(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams], list[int]], kind: str
) -> None:
    """Stopped for ten seconds it is replaced; awake it follows whoever leads, and rejoins."""
    undisturbed(GREEDY)
    victim = pick(trio, kind)
    rest = others(trio, victim)
    readings = read(rest, GREEDY)
    worker = worker_of(victim)
    stopped = time.time()
    for pid in (victim.pid, worker.pid):
        os.kill(pid, signal.SIGSTOP)
    try:
        check(readings, undisturbed)
        assert readings[0].errors == []
        until(lambda: time.time() - stopped > ZOMBIE_S, what="the ten seconds")
        leads, term = (status(rest[0])[key] for key in ("leader", "term"))
        assert leads != victim.name
        readings = read(rest, GREEDY)
    finally:
        for pid in (worker.pid, victim.pid):
            os.kill(pid, signal.SIGCONT)
    woke = time.time()
    check(readings, undisturbed)
    until(lambda: all_vote(trio, 3), what="its return")
    for node in trio.nodes:
        seen = status(node)
        assert (seen["leader"], seen["term"]) == (leads, term)
    for node in rest:
        assert facts(node, "peer_dead", "leader_lost", since=woke) == []


@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_a_node_whose_worker_hangs_hands_its_part_over(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams], list[int]], kind: str
) -> None:
    """It says so itself, replies go on without it, and it gets its part back when it moves."""
    victim = pick(trio, kind)
    rest = others(trio, victim)
    (reading,) = read(rest, ENDLESS)
    worker = worker_of(victim)
    struck = time.time()
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        until(lambda: member(rest[0], victim.name).get("hung"), what="its being shown as hung")
        until(lambda: not member(rest[0], victim.name).get("head_units"), what="a plan without it")
        reading.goes_on(time.time())
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert reading.longest_gap() < GO_ON_S
    until(lambda: member(rest[0], victim.name).get("head_units"), what="its part again")
    for node in rest:
        assert facts(node, "peer_dead", since=struck) == []
    reading.goes_on(time.time())
    reading.stop()
    assert reading.errors == []
    assert reading.tokens == undisturbed(replace(ENDLESS, max_tokens=len(reading.tokens)))


# --- leaving and joining --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", LEADER_FIRST)
def test_nodes_leave_and_join_under_load(
    trio: LocalCluster, undisturbed: Callable[[SamplingParams], list[int]], kind: str
) -> None:
    """Drained it ends by itself, started again it takes its part, and a reply notices neither."""
    victim = pick(trio, kind)
    rest = others(trio, victim)
    (reading,) = read(rest, ENDLESS)
    Client([rest[0].address]).drain(victim.name)
    assert victim.process.wait(30) == 0
    assert member(rest[0], victim.name)["state"] == "left"
    reading.goes_on(time.time())
    trio.nodes[trio.nodes.index(victim)] = trio.start_node(int(victim.name[-1]) - 1)
    until(lambda: all_vote(trio, 3), what="its return")
    reading.goes_on(time.time())
    reading.stop()
    assert reading.longest_gap() < GO_ON_S
    assert reading.errors == []
    assert reading.tokens == undisturbed(replace(ENDLESS, max_tokens=len(reading.tokens)))


def test_a_copied_identity_is_refused(trio: LocalCluster, tmp_path: Path) -> None:
    """A second node with the state folder of a running one ends with the reason."""
    victim = trio.nodes[2]
    copy = tmp_path / "copy"
    shutil.copytree(victim.log.parent / victim.name, copy)
    flags = node_flags(tmp_path, free_base_port(1), copy.name)
    code, _, err = finish(start_cli(*flags, "--join", trio.nodes[0].address))
    assert code == 1
    assert "state" in err.splitlines()[-1]
    assert victim.name in err.splitlines()[-1]
    assert all_vote(trio, 3)


# --- two nodes ------------------------------------------------------------------------------------


def assembled(cluster: LocalCluster, *changes: dict[str, object]) -> LocalCluster:
    """Start a cluster whose nodes differ by these changes, and wait until all vote."""
    for index, change in enumerate(changes):
        cluster.nodes.append(cluster.start_node(index, **change))
    until(lambda: all_vote(cluster, len(changes)), what="the cluster")
    return cluster


def test_two_nodes_and_a_witness_survive_the_leader(
    tmp_path: Path, undisturbed: Callable[[SamplingParams], list[int]]
) -> None:
    """The witness holds no model, and its vote makes the follower the leader."""
    undisturbed(GREEDY)
    cluster = LocalCluster(
        3, threads=1, base_port=free_base_port(3), folder=tmp_path, options={"min_nodes": 2}
    )
    try:
        assembled(cluster, {}, {}, {"witness": True})
        assert leader(cluster) == "node1"
        readings = read(cluster.nodes[1:], GREEDY)
        kill(cluster.nodes[0])
        check(readings, undisturbed)
        assert readings[0].lost() == {"node1"}
        assert leader(cluster) == "node2"
    finally:
        cluster.stop()


def test_two_nodes_survive_the_follower_and_wait_for_the_leader(
    tmp_path: Path, undisturbed: Callable[[SamplingParams], list[int]]
) -> None:
    """Without the leader a client is told within --wait-for-nodes; with it all is well again."""
    undisturbed(GREEDY)
    with LocalCluster(
        2,
        threads=1,
        base_port=free_base_port(2),
        folder=tmp_path,
        options={"wait_for_nodes": 3.0},
    ) as cluster:
        readings = read(cluster.nodes[:1], GREEDY)
        kill(cluster.nodes[1])
        check(readings, undisturbed)
        assert readings[0].lost() == {"node2"}
        cluster.nodes[1] = cluster.start_node(1)
        until(lambda: all_vote(cluster, 2), what="both nodes")
        events = Client([cluster.nodes[1].address], retry_for=0).submit(PROMPT, ENDLESS)
        while not isinstance(next(events), Chunk):
            pass
        began = time.monotonic()
        kill(cluster.nodes[0])
        with pytest.raises(ClusterError) as error:
            list(events)
        assert (error.value.code, error.value.retryable) == ("no_quorum", True)
        assert "node1" in error.value.message
        assert 2.0 < time.monotonic() - began < 8.0
        assert not status(cluster.nodes[1])["ready"]
        cluster.nodes[0] = cluster.start_node(0, join=())
        until(lambda: all_vote(cluster, 2), what="both nodes")
        check(read(cluster.nodes[1:], GREEDY), undisturbed)
