"""What must hold at every step, looked at from outside: from messages, orders, reports and facts.

Raises `Violation` at the first thing that may not be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from p2pinfer.core import events as e
from p2pinfer.core.commits import owners
from p2pinfer.core.holdings import validate
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.messages import ControlMessage, Heartbeat, Propose
from tests.simulation import toy_model as toy
from tests.simulation.kv_judge import KvJudge, promoted
from tests.simulation.world import Violation, check

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.machine import Process

_ENCODER = msgspec.msgpack.Encoder()
_KNOWN_LOGS = 50_000

Mark = tuple[str, Fence]
"""A plan, by its cluster and its fence."""


def electorates(plan: Plan) -> list[set[str]]:
    """The sets of voters (node ids) that must agree while a plan is not known to be in force."""
    voters = {plan.members[index].node_id for index in plan.voters}
    return [each for each in (voters, set(plan.old_voters)) if each]


class Judge:
    """Knows what was promised to whom, and holds everybody to it."""

    def __init__(self, cluster: Cluster, reference: toy.Reference) -> None:
        self.world = cluster.world
        self.newest = Fence()
        """The newest plan that was ever ordered to be loaded."""
        self.adopted = Fence()
        """The newest that was ever in force anywhere."""
        self.adopted_at = -1.0
        self.in_force: Plan | None = None
        """The plan of `adopted`."""
        self.kv = KvJudge(cluster, reference)
        self._cluster = cluster
        self._reference = reference
        self._leaders: dict[tuple[str, int], str] = {}
        self._began_with: dict[tuple[str, int], Fence] = {}
        """The plan that the leader of a term had accepted when it was elected."""
        self._plans: dict[Mark, bytes] = {}
        self._valid: dict[Mark, Plan] = {}
        self._accepted: dict[int, Mark] = {}
        self._kept: dict[Mark, set[str]] = {}
        """Boot ids of those whose disk has a plan."""
        self._loaded: dict[Mark, set[str]] = {}
        self._in_force: dict[Mark, set[str]] = {}
        self._active: dict[str, Fence] = {}
        """The newest fence that each process was ordered to obey."""

    # --- leaders and plans ------------------------------------------------------------------------

    def fact(self, process: Process, fact: e.Fact) -> None:
        """A node says that something became true."""
        if isinstance(fact, e.LeaderElected) and fact.node_id == process.config.member.node_id:
            self._leads(process, fact.term)
        elif isinstance(fact, e.LeaderLost):
            process.leads_in = 0
        elif isinstance(fact, e.RequestRestored):
            plan = self._valid[self._accepted[process.number]]
            mark = (plan.cluster_id, plan.fence.term)
            knows = self.adopted.term == mark[1] or self.adopted == self._began_with.get(mark)
            self.kv.restored(fact, self.in_force, plan, knows=knows)

    def sent(self, process: Process, message: ControlMessage) -> None:
        """A node sends a message to another."""
        if isinstance(message, Heartbeat):
            if message.leader_id == message.node_id:
                self._leads(process, message.term)
            else:
                process.leads_in = 0
        elif isinstance(message, Propose):
            self._plan(message.plan)
            self._leads(process, message.plan.fence.term)

    def _leads(self, process: Process, term: int) -> None:
        """Only one process ever leads in a term (a later run of the same node is another one)."""
        cluster_id = process.cluster_id or process.config.cluster_id
        if (cluster_id, term) not in self._leaders:
            self._complete(process, cluster_id, term)
        first = self._leaders.setdefault((cluster_id, term), process.boot_id)
        check(first == process.boot_id, f"{process.boot_id} and {first} both lead in term {term}")
        process.leads_in = term

    def _complete(self, process: Process, cluster_id: str, term: int) -> None:
        """A new leader knows every plan that was in force before its term (Raft's leader
        completeness): otherwise it would build on voters who are none any more."""
        of_before = (f for c, f in self._in_force if c == cluster_id and f.term < term)
        newest = max(of_before, default=Fence())
        accepted = self._accepted.get(process.number)
        known = accepted[1] if accepted is not None else Fence()
        check(known >= newest, f"{process.boot_id} leads in term {term} and lacks {newest}")
        self._began_with[cluster_id, term] = known

    def _plan(self, plan: Plan) -> Mark:
        """All that name a fence mean the same, valid plan; it adds one voter at most."""
        mark = (plan.cluster_id, plan.fence)
        if mark in self._valid and self._valid[mark] is plan:
            return mark
        body = _ENCODER.encode(plan)
        known = self._plans.setdefault(mark, body)
        check(known == body, f"two plans have the fence {plan.fence}")
        if mark not in self._valid:
            self._valid[mark] = plan
            try:
                validate(plan)
            except RemoteProtocolError as error:
                raise Violation(f"the plan of {plan.fence}: {error}") from error
            voters = {plan.members[index].node_id for index in plan.voters}
            added = voters - set(plan.old_voters)
            check(len(added) <= 1, f"the plan of {plan.fence} adds voters {sorted(added)}")
        return mark

    def persist(self, process: Process, output: e.Persist) -> None:
        """A node writes down what it must not forget."""
        state = output.state
        if state is None:
            self._accepted.pop(process.number, None)
            return
        process.cluster_id = state.cluster_id
        if state.plan is None:
            return
        mark = self._plan(state.plan)
        before = self._accepted.get(process.number)
        if before is not None and before[0] == mark[0]:
            check(before[1] <= mark[1], f"node{process.number} goes back from {before} to {mark}")
        self._accepted[process.number] = mark
        check(state.term >= state.plan.fence.term, "a plan of a later term than its node's")

    def stored(self, process: Process, state: e.StoredState) -> None:
        """A state is on the disk."""
        if state.plan is not None:
            mark = (state.plan.cluster_id, state.plan.fence)
            self._kept.setdefault(mark, set()).add(process.boot_id)

    def started(self, number: int, stored: e.StoredState | None) -> None:
        """A process starts with what the disk has: what was not written is not promised."""
        self._accepted.pop(number, None)
        if stored is not None and stored.plan is not None:
            self._accepted[number] = self._plan(stored.plan)

    @property
    def promotes(self) -> bool:
        """Whether a plan on its way makes standbys the owners of what they keep."""
        newest = max(self._valid, key=lambda mark: mark[1], default=None)
        if newest is None or self.in_force is None or newest[1] <= self.adopted:
            return False
        return bool(promoted(self.in_force, self._valid[newest]))

    def accepted(self) -> list[Plan]:
        """The newest plan that each node has accepted, as far as it did not lose it."""
        return [self._valid[mark] for mark in self._accepted.values()]

    def hopeless(self) -> bool:
        """Whether too many voters have lost their state for anybody ever to be elected."""
        living = self._cluster.living()
        keep = {p.config.member.node_id for p in living if self._has_a_say(p)}
        for process in living:
            mark = self._accepted.get(process.number)
            if mark is None or not self._has_a_say(process):
                continue
            voters = electorates(self._valid[mark])
            if all(2 * len(each & keep) > len(each) for each in voters):
                return False
        return True

    def _has_a_say(self, process: Process) -> bool:
        """Whether a process remembers what it promised, or was made a voter with what it does."""
        stored = process.config.stored
        memory = stored.memory if stored else process.config.member.boot_id
        mark = self._accepted.get(process.number)
        plan = self._valid[mark] if mark is not None else None
        named = plan is not None and any(
            plan.members[index].memory == memory for index in plan.voters
        )
        return plan is not None and (named or not (stored is None or stored.blank))

    # --- workers ----------------------------------------------------------------------------------

    def order(self, process: Process, order: e.AnyOrder) -> None:
        """A control plane tells its worker something."""
        if isinstance(order, e.LoadPlan):
            self._plan(order.plan)
            self.newest = max(self.newest, order.plan.fence)
        elif isinstance(order, e.ActivatePlan):
            before = self._active.get(process.boot_id, Fence())
            check(before < order.fence, f"node{process.number} obeys {order.fence} after {before}")
            self._active[process.boot_id] = order.fence

    def activated(self, process: Process, order: e.ActivatePlan) -> None:
        """A worker obeys a plan: all its owners have it, and a quorum has it for good."""
        assert process.worker.engine is not None
        plan = process.worker.engine.topology.plan
        mark = (plan.cluster_id, plan.fence)
        if order.fence > self.adopted:
            self.adopted, self.adopted_at = order.fence, self.world.now
            self.in_force = plan
        if mark in self._in_force:
            return
        self._in_force[mark] = set()
        loaded = self._loaded.get(mark, set())
        for index in owners(plan):
            owner = plan.members[index]
            check(owner.boot_id in loaded, f"{plan.fence} is in force; {owner.name} lacks it")
        kept = self._kept.get(mark, set())
        have = {member.node_id for member in plan.members if member.boot_id in kept}
        leader = plan.members[plan.leader].node_id
        check(leader in have, f"the leader of {plan.fence} has not kept it")
        if plan.quorum == "majority":
            for voters in electorates(plan):
                agreed = 2 * len(have & voters) >= len(voters)
                check(agreed, f"{plan.fence} is in force by {sorted(have)} of {sorted(voters)}")

    def report(self, process: Process, report: e.AnyReport) -> None:
        """A worker says something to its control plane."""
        if isinstance(report, e.PlanLoaded) and not report.error:
            plan = process.worker.links.gate.active
            assert plan is None, "a worker that loads a plan obeys none"
            mark = (process.cluster_id, report.fence)
            self._loaded.setdefault(mark, set()).add(process.boot_id)
            check(len(report.logs) <= MAX_REQUESTS, "more logs than an ACK can tell of")
            if mark in self._valid:
                self.kv.loaded(process, report, self._valid[mark])
        elif isinstance(report, e.TokensCommitted):
            self._committed(process, report)

    def _committed(self, process: Process, report: e.TokensCommitted) -> None:
        """What is committed is in the log of every owner that still obeys this plan."""
        mine = process.worker.active
        if mine is None or mine.plan.fence != report.fence:
            return
        for index in sorted(owners(mine.plan)):
            other = self._cluster.by_boot(mine.plan.members[index].boot_id)
            active = other.worker.active if other is not None else None
            if other is None or active is None or active.plan.fence != report.fence:
                continue
            for token in report.tokens:
                self._has(other, token.request_id, token.index, token.token)

    def _has(self, owner: Process, request_id: int, index: int, token: int) -> None:
        logs = owner.worker.logs
        if request_id not in logs:
            # It was told to forget the request meanwhile, which comes after the commit.
            return
        prompt = self._cluster.clients.prompt_tokens(request_id)
        tokens = logs.tokens(request_id)
        held = tokens[prompt + index] if len(tokens) > prompt + index else None
        check(
            held == token,
            f"token {index} of request {request_id} is committed as {token}; "
            f"node{owner.number} has {held}",
        )

    # --- computing --------------------------------------------------------------------------------

    def summed(self, before: int, token: int, position: int, half: int, x: int) -> None:
        """A node's residual after `half` half layers: what it sums of must be true."""
        truth = self._reference.computed(before, token, position)
        check(
            truth.position == position and truth.residuals[half] == x,
            f"a wrong sum at position {position}, half layer {half}",
        )
