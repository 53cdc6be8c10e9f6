"""Sums in bfloat16, over TCP: the tokens are those of one node, also when a node is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, free_base_port
from tests.faults.watching import all_own, all_protected, all_vote, others, pick, until
from tests.processes.test_replicas import read, strike
from tests.processes.test_stages import GREEDY, PROMPT, SAMPLED

pytestmark = pytest.mark.xdist_group("clusters")


def test_rounded_sums_outlive_a_node(tmp_path: Path) -> None:
    """One node that rounds its sums and three, of which one dies, draw the same tokens."""
    options, nodes = {"wire_dtype": "bfloat16"}, 3
    with LocalCluster(
        nodes,
        threads=1,
        base_port=free_base_port(nodes),
        folder=tmp_path / "three",
        options=options,
    ) as cluster:
        until(lambda: all_vote(cluster, nodes) and all_own(cluster), what="the cluster")
        until(lambda: all_protected(cluster), what="a standby for every unit")
        victim = pick(cluster, "follower")
        rest = others(cluster, victim)
        readings = read(rest, GREEDY, SAMPLED)
        strike(victim, rest, readings)
        for reading in readings:
            reading.stop()
    with LocalCluster(
        1, threads=1, base_port=free_base_port(1), folder=tmp_path / "one", options=options
    ) as alone:
        client = Client([alone.nodes[0].address])
        for reading in readings:
            wanted = replace(reading.params, max_tokens=len(reading.tokens))
            assert reading.tokens == client.submit_json_object(PROMPT, wanted)["token_ids"]
