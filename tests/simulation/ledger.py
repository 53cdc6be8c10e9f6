"""Counts which faults met in one place: each name is a double fault that really happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.kv_judge import heads

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.machine import Machine, Process


class Ledger:
    """Looks at the cluster whenever a fault strikes, and counts what it strikes into."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._count = cluster.world.count
        self._dead: set[str] = set()
        """Boot ids of those killed since the plan in force is."""
        self._since = -1.0

    def death(self, machine: Machine, *, wipe: bool) -> None:
        """A process is about to be killed."""
        cluster, process = self._cluster, machine.process
        assert process is not None
        leads = cluster.leader() is machine
        if leads and cluster.activating():
            self._count("leader killed during activation")
        elif leads and cluster.changing():
            self._count("leader killed with a plan proposed")
        elif cluster.changing():
            self._count("member killed during an epoch change")
        if cluster.recovering():
            self._count("second death during recovery")
        if cluster.leader() is None:
            self._count("death while nobody leads")
        if machine.disk.pending:
            self._count("crash with a write under way")
        if process.worker.loading is not None:
            self._count("killed while loading")
        self._death_of_replicas(process)
        if wipe and cluster.changing():
            self._count("state lost during an epoch change")
        serves = [c for c in cluster.clients.waiting if c.attempt and c.attempt.process is process]
        if leads and serves:
            self._count("leader killed that also serves a client")

    def _death_of_replicas(self, process: Process) -> None:
        cluster, judge = self._cluster, self._cluster.judge
        if process.worker.bulk.filling:
            self._count("standby killed while it filled")
        if cluster.changing() and judge.promotes:
            self._count("killed in the middle of a failover to replicas")
        if self._since != judge.adopted_at:
            self._since, self._dead = judge.adopted_at, set()
        self._dead.add(process.boot_id)
        if judge.in_force is not None:
            for _, head in heads(judge.in_force):
                both = {head.owner, *head.standbys}
                if head.standbys and process.boot_id in both and both <= self._dead:
                    self._count("owner and standbys of a unit killed")
                    break

    def standstill(self, machine: Machine) -> None:
        """A process or its worker stops."""
        process = machine.process
        assert process is not None
        if process.worker.loading is not None:
            self._count("hang while loading")
        if self._cluster.changing():
            self._count("standstill during an epoch change")

    def zombie(self, machine: Machine, term: int) -> None:
        """A leader of `term` goes on after it stood still."""
        leader = self._cluster.leader()
        if leader is None or leader is machine or leader.process is None:
            return
        if leader.process.leads_in > term:
            self._count("stopped leader came back after another was elected")
            if self._cluster.clients.waiting:
                self._count("zombie leader with running requests")

    def cut(self) -> None:
        """The network is about to be cut."""
        if self._cluster.leader() is None:
            self._count("partition while nobody leads")
        if self._cluster.changing():
            self._count("partition during an epoch change")

    def reset(self) -> None:
        """A connection is about to break."""
        if self._cluster.changing() or self._cluster.activating():
            self._count("connection reset during an epoch change")

    def change(self, what: str) -> None:
        """Somebody joins, drains or leaves."""
        if self._cluster.recovering() or self._cluster.changing():
            self._count(f"{what} during recovery")

    def disk(self) -> None:
        """A disk becomes slow or fails."""
        if self._cluster.leader() is None:
            self._count("slow or failing disk during an election")
