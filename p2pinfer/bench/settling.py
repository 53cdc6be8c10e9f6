"""When a cluster that is measured has come to rest: replicas are ready, and nothing moves.

Standbys load their weights in the background, which takes processors away from a reply.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from p2pinfer.bench.inputs import Tell
from p2pinfer.client import Client
from p2pinfer.cluster import STATUS_S, LocalCluster, LocalNode
from p2pinfer.errors import ClusterError

NEAR = 16
"""Positions that a standby may be behind of each unit and still count as up to date: those of the
last steps, which its owner has not sent yet."""

PATIENCE_S = 120.0
"""How long replicas may take to be up to date, and nodes to come to rest."""

LOOK_S = 0.1
"""Workers report their counters as often."""


def counters(nodes: Sequence[LocalNode]) -> dict[str, dict[str, Any]]:
    """By name, the counters of each node's worker, with the bytes of kept inputs."""
    found = {}
    for node in nodes:
        status = Client([node.address], timeout=STATUS_S).status()
        own = next(row for row in status["members"] if row["name"] == node.name)
        kept = own["kv"].get("inputs_bytes", 0)
        found[node.name] = status["counters"] | {"inputs_bytes": kept}
    return found


def settled_counters(nodes: Sequence[LocalNode]) -> dict[str, dict[str, Any]]:
    """The same, once nothing moves any more."""
    deadline = time.monotonic() + PATIENCE_S
    before = counters(nodes)
    while time.monotonic() < deadline:
        time.sleep(5 * LOOK_S)
        now = counters(nodes)
        still = ("steps", "bytes_sent", "delta_bytes_sent", "delta_bytes_received")
        if all(row[key] == before[name][key] for name, row in now.items() for key in still):
            return now
        before = now
    raise ClusterError("internal", "the nodes do not come to rest after the reply")


def is_protected(rows: Mapping[str, Mapping[str, Any]], near: int = NEAR) -> bool:
    """Whether all nodes have the weights of what they keep for others, of which there is some, and
    lack at most `near` positions of each unit."""
    wanted = sum(row["standby_units_wanted"] for row in rows.values())
    return wanted > 0 and all(
        row["standby_units_ready"] == row["standby_units_wanted"]
        and row["standby_lacks"] <= near * row["standby_units_wanted"]
        and not row["replicas_held"]
        for row in rows.values()
    )


def await_protection(cluster: LocalCluster) -> None:
    """Wait until every replica is up to date; raises `ClusterError` where that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_protected(counters(cluster.nodes)):
        cluster.check_alive()
        if time.monotonic() > deadline:
            raise ClusterError("not_ready", f"no replica of all after {PATIENCE_S:g} s")
        time.sleep(LOOK_S)


def settle(cluster: LocalCluster, tell: Tell) -> None:
    """Wait until standbys have their weights, where there is more than one node; where they cannot
    have them, `tell` that what is measured bears it."""
    if len(cluster.nodes) == 1:
        return
    tell("standbys load their weights")
    try:
        await_protection(cluster)
    except ClusterError as error:
        if error.code != "not_ready":
            raise
        tell(f"{error}: measured all the same")
