"""True clusters for faults: which kind a fault needs, and what their nodes may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from tests.faults.cases import Network
from tests.faults.namespaces import NamespacedCluster, inside, why_not
from tests.faults.proxy import ProxiedCluster
from tests.faults.watching import until

Nodes = LocalCluster | NamespacedCluster

CGROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 100_000


class Unavailable(Exception):
    """What a fault needs cannot be had on this machine."""


@contextmanager
def cluster_for(
    network: Network, nodes: int, folder: Path, options: Mapping[str, Any], model: str = "demo"
) -> Iterator[Nodes]:
    """A cluster in which faults that need this network can be made; raises `Unavailable`."""
    if network == "namespaces":
        if reason := why_not():
            raise Unavailable(f"network namespaces: {reason}")
        with (
            NamespacedCluster(nodes, folder=folder, model=model, **options) as spaced,
            inside(spaced.switch),
        ):
            yield spaced
    elif network == "proxy":
        with ProxiedCluster(
            nodes, model=model, folder=folder, threads=1, options=options
        ) as proxied:
            yield proxied
    else:
        base = free_base_port(nodes)
        with LocalCluster(
            nodes, model=model, threads=1, base_port=base, folder=folder, options=options
        ) as cluster:
            yield cluster


class Quota:
    """Gives each node at most `cores` of CPU time, by a control group (version 1) of its own.

    Raises `Unavailable` where there are none.
    """

    def __init__(self, cores: float | None) -> None:
        self._cores = cores
        self._groups: set[Path] = set()
        if cores is not None and not (CGROUPS / "cgroup.procs").exists():
            raise Unavailable(f"control groups at {CGROUPS}")

    def hold(self, nodes: list[LocalNode]) -> None:
        """Put all processes of these nodes into their groups."""
        if self._cores is None:
            return
        for node in nodes:
            group = CGROUPS / f"p2pinfer-{os.getpid()}-{node.name}"
            if group not in self._groups:
                group.mkdir()
                self._groups.add(group)
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(int(self._cores * PERIOD_US)))
            process = psutil.Process(node.pid)
            for each in (process, *process.children()):
                (group / "cgroup.procs").write_text(str(each.pid))

    def close(self) -> None:
        """Remove the groups, once the nodes are gone."""
        for group in self._groups:
            procs = group / "cgroup.procs"
            until(lambda procs=procs: not procs.read_text())  # type: ignore[misc]
            group.rmdir()
        self._groups.clear()
