"""What a node can say of its cluster: whether it is ready, what it waits for, who holds what."""

from __future__ import annotations

from typing import Any

import msgspec

from p2pinfer.core.agreement import RUNGS
from p2pinfer.core.durable import Durable
from p2pinfer.core.election import Election
from p2pinfer.core.events import NodeConfig, WorkerStats
from p2pinfer.core.leadership import Leadership
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.pausing import Pausing
from p2pinfer.core.plan_holder import PlanHolder
from p2pinfer.core.preview import plan_object, preview
from p2pinfer.core.proposal import owners
from p2pinfer.core.status import make_status
from p2pinfer.errors import ClusterError
from p2pinfer.wire.messages import Heartbeat, MemberState

_NEVER = dict.fromkeys(RUNGS, 0)


class Outlook:
    """Reads the parts of one node, and changes nothing."""

    def __init__(
        self,
        config: NodeConfig,
        near: Neighbours,
        election: Election,
        holder: PlanHolder,
        pausing: Pausing,
    ) -> None:
        self._config = config
        self._near = near
        self._election = election
        self._holder = holder
        self._pausing = pausing

    @property
    def ready(self) -> bool:
        """Whether somebody leads and all who hold a part of the plan in force say they obey it."""
        plan, fence = self._holder.active, self._holder.obeyed
        if plan is None or plan.fence != fence or not self._election.leader_id:
            return False
        table, me = self._near.table, self._config.member.node_id
        return all(
            table.is_living(member)
            and (member.node_id == me or table[member.node_id].fence == fence)
            for member in owners(plan)
        )

    def waiting(self, leadership: Leadership | None) -> str:
        """What a cluster that is not ready waits for; empty when it is ready."""
        if self.ready:
            return ""
        if not self._near.cluster_id:
            return "a cluster to join"
        if not self._holder.worker_ready:
            return "this node's worker to start"
        if leadership:
            return leadership.waiting or "all nodes to take up the plan"
        if not self._election.leader_id:
            return self._election.waiting
        if self._holder.pending:
            return "the weights to load"
        return "the leader's plan"

    def status(
        self, own: Heartbeat, stats: WorkerStats, leadership: Leadership | None
    ) -> dict[str, Any]:
        """The object of `status --json`; `own` is this node's heartbeat as it stands."""
        return make_status(
            cluster_id=self._near.cluster_id,
            leader_id=self._election.leader_id,
            term=self._election.term,
            ready=self.ready,
            waiting=self.waiting(leadership),
            plan=self._holder.active,
            model=self._config.model,
            membership=self._near.table,
            own=own,
            stats=stats,
            restored=leadership.maker.resumption.restored if leadership else _NEVER,
        )

    def known_addresses(self, durable: Durable) -> tuple[str, ...]:
        """Where members that are not there may come back; `durable` is what this node remembers."""
        plan, table, me = durable.plan, self._near.table, self._config.member.node_id
        gone = (p.member.address for p in table.everybody() if p.state is MemberState.DEAD)
        planned = (m.address for m in plan.members if m.node_id != me) if plan else ()
        # Others that have no plan either know no more than this node: who let it in may.
        lost = not table.living() or (plan is None and not self._election.leader_id)
        before = () if durable.state.active else durable.state.addresses
        return tuple(
            dict.fromkeys((*gone, *planned, *before, *(self._config.join if lost else ())))
        )

    def plan_object(self, without: str, leadership: Leadership | None) -> dict[str, Any]:
        """The object of `plan --json`: who holds what, or would if the member so named were gone.

        Raises `ClusterError` where there is no plan, or no such member.
        """
        plan = self._holder.active
        if plan is None:
            waiting = self.waiting(leadership)
            message = f"no plan is in force; the cluster waits for {waiting}"
            raise ClusterError("not_ready", message, retryable=True)
        living = self._near.table.members()
        # What was measured since it was made, too.
        now = {(member.node_id, member.boot_id): member for member in living}
        known = (now.get((m.node_id, m.boot_id), m) for m in plan.members)
        plan = msgspec.structs.replace(plan, members=tuple(known))
        if not without:
            return plan_object(plan, self._pausing.paused_ids())
        return preview(plan, living, without)
