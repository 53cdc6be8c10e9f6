"""What the processes of a cluster take: memory, file descriptors, logs; and which are left over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil

from p2pinfer.cluster import LocalNode
from tests.faults.blows import processes
from tests.faults.watching import Cluster, status


@dataclass(frozen=True)
class Vitals:
    """Of a node: bytes resident in its two processes, their open files, the size of its log."""

    rss_bytes: int
    fds: int
    log_bytes: int


def vitals(node: LocalNode) -> Vitals | None:
    """What a node takes now; None when it does not run."""
    rss = fds = 0
    try:
        found = processes(node)
        for process in found:
            rss += process.memory_info().rss
            fds += process.num_fds()
    except psutil.Error:
        return None
    return Vitals(rss, fds, node.log.stat().st_size) if found else None


def kv_bytes(cluster: Cluster) -> int:
    """Bytes of KV that all running nodes hold, of their own units and of others'; -1 while one of
    them does not answer."""
    total = 0
    for node in cluster.nodes:
        if node.ending:
            continue
        seen = status(node)
        if not seen:
            return -1
        own: dict[str, Any] = next(m for m in seen["members"] if m["name"] == node.name)
        total += own["kv"]["used_bytes"] + seen["counters"]["kv_standby_bytes"]
    return total


class Census:
    """Every process that the nodes of a cluster were seen to have."""

    def __init__(self) -> None:
        self._seen: set[psutil.Process] = set()

    def take(self, cluster: Cluster) -> None:
        """Look who is there now."""
        for node in cluster.nodes:
            self._seen.update(processes(node))

    def left_over(self, cluster: Cluster) -> list[int]:
        """The ids of processes seen earlier that run although their node has ended."""
        expected = {process for node in cluster.nodes for process in processes(node)}
        return sorted(each.pid for each in self._seen - expected if _runs(each))


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
