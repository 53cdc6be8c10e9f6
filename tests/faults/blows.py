"""The faults themselves: each is done to one node of a true cluster, and can be undone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from p2pinfer.cluster import HOST, LocalCluster, LocalNode, free_base_port
from p2pinfer.config import format_address
from tests.faults.cases import Fault
from tests.faults.clusters import Nodes
from tests.faults.namespaces import NamespacedCluster
from tests.faults.proxy import ProxiedCluster
from tests.faults.watching import kill, others, status, until

Undo = Callable[[], None]

DELAY_S = 0.05
"""One way; more than any step takes, and less than what makes a node suspect."""

LOSS = 0.02
"""A poor wireless link."""


def strike(
    fault: Fault, cluster: Nodes, victim: LocalNode, other: LocalNode, share: float = 1.0
) -> Undo:
    """Do it to `victim` (and, where it takes two, to `other`); returns how to undo it.

    `share` weakens a delay or a loss.
    """
    if fault == "kill":
        kill(victim)
        return lambda: restart(cluster, victim)
    if fault == "move":
        kill(victim)
        return lambda: move(cluster, victim)
    if fault in ("stop", "hang", "freeze"):
        control, *workers = processes(victim)
        return _stopped({"stop": [control, *workers], "hang": workers}.get(fault, [control]))
    if fault == "disk-full":
        return _full(cluster, victim)
    if isinstance(cluster, NamespacedCluster) and fault == "cut":
        cluster.pull(victim)
        return lambda: cluster.plug(victim)
    assert isinstance(cluster, ProxiedCluster), f"{fault} needs a cluster with a proxy"
    return _on_the_way(fault, cluster, victim, other, share)


def restart(cluster: Nodes, victim: LocalNode) -> None:
    """Start a node again that has ended, with its state and its address, unless that is done."""
    if victim not in cluster.nodes:
        return
    cluster.nodes[cluster.nodes.index(victim)] = cluster.start_node(number(victim))


def move(cluster: Nodes, victim: LocalNode) -> None:
    """Start a node again that has ended, with its state, at another address."""
    if victim not in cluster.nodes:
        return
    assert isinstance(cluster, LocalCluster), "the addresses in namespaces are fixed"
    if isinstance(cluster, ProxiedCluster):
        fresh = cluster.move_node(number(victim))
    else:
        listen = format_address(HOST, free_base_port(1))
        fresh = cluster.start_node(number(victim), listen=listen)
    cluster.nodes[cluster.nodes.index(victim)] = fresh


def number(node: LocalNode) -> int:
    """Which of the cluster's nodes it is, from 0."""
    return int(node.name.removeprefix("node")) - 1


def processes(node: LocalNode) -> list[psutil.Process]:
    """A node's control process and its worker, as far as they run."""
    try:
        control = psutil.Process(node.pid)
        return [control, *control.children()]
    except psutil.NoSuchProcess:
        return []


def _stopped(stopped: list[psutil.Process]) -> Undo:
    for each in stopped:
        os.kill(each.pid, signal.SIGSTOP)

    def go_on() -> None:
        for each in stopped:
            if each.is_running():
                os.kill(each.pid, signal.SIGCONT)

    return go_on


def _full(cluster: Nodes, victim: LocalNode) -> Undo:
    """Whatever the node writes of its state meets ENOSPC: the file that it writes first, before it
    takes the place of the old one, leads to the device that is always full."""
    fresh = state_folder(victim) / "cluster.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to("/dev/full")

    def empty() -> None:
        fresh.unlink(missing_ok=True)
        # A node that answers no more is on its way to its end.
        until(lambda: victim.ending or status(victim), what="its end, or an answer")
        if victim.ending:
            restart(cluster, victim)

    return empty


def state_folder(node: LocalNode) -> Path:
    """Where a node of a test cluster keeps its state."""
    return node.log.parent / node.name


def _on_the_way(
    fault: Fault, cluster: ProxiedCluster, victim: LocalNode, other: LocalNode, share: float
) -> Undo:
    proxy = cluster.proxy
    rest = [node.name for node in others(cluster, victim)]
    both = [(victim.name, name) for name in rest] + [(name, victim.name) for name in rest]
    if fault == "reset":
        proxy.reset(victim.name, other.name)
    elif fault == "cut":
        proxy.cut(*both)
    elif fault == "one-way":
        proxy.cut((victim.name, other.name))
    elif fault == "delay":
        proxy.delay(*both, seconds=share * DELAY_S)
    else:
        assert fault == "loss"
        proxy.lose(*both, share=share * LOSS)
    return proxy.mend
