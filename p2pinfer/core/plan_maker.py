"""The leader's part in the life of a plan: propose, gather the ACKs, activate, and send again.

`core/plan_rules.py` says when to propose and `core/planner.py` what. There is no time limit on
loading: a member that lives is waited for, one that dies is left out by the next proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from p2pinfer.core.events import PlanFailed, PlanProposed
from p2pinfer.core.membership import Peer
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_rules import Decision, Situation, decide
from p2pinfer.core.planner import PlacementError, holding, make_plan
from p2pinfer.types import Fence, Member, ModelSpec, Plan
from p2pinfer.wire.messages import Ack, Activate, Nack, Propose

RESEND_S = 1.0
"""How long after a PROPOSE or ACTIVATE without effect it is sent again."""

MAX_STEP_FAILURES = 3
"""Plans in a row that fail without having drawn a token; then the requests are what is wrong."""

Boot = tuple[str, str]
"""Node id and boot id: one life of one node."""


class PlanMaker:
    """What the leader knows of its newest plan, `target`. Times in seconds."""

    def __init__(self, me: Member, box: Outbox) -> None:
        self.target: Plan | None = None
        self.activated = False
        self.served = False
        self._me = me
        self._box = box
        self._acked: set[str] = set()
        self._unable: dict[Boot, str] = {}
        self._unplaceable: tuple[frozenset[Boot], str] = (frozenset(), "")
        self._step_failed = ""
        self._failures = 0
        self._epoch = 0
        self._resend_at = inf
        self.settled_at = inf
        """When the newest members will have been quiet for long enough."""

    @property
    def in_force(self) -> Plan | None:
        """The target once it is activated."""
        return self.target if self.activated else None

    def owns_units(self, node_id: str) -> bool:
        """Whether a node owns any unit of the plan in force."""
        plan = self.in_force
        if plan is None:
            return False
        ids = [member.node_id for member in plan.members]
        return node_id in ids and holding(plan, ids.index(node_id)).stage is not None

    def has_answered(self, member: Member) -> bool:
        """Whether that member has acknowledged the target."""
        return self.target is not None and member in self.target.members and (
            member.node_id in self._acked
        )

    def choose(
        self,
        peers: Sequence[Peer],
        reached: Sequence[Member],
        *,
        worker_ready: bool,
        quiet_since: float,
        settle: float,
        min_nodes: int,
        now: float,
    ) -> Decision:
        """Ask the rules; `reached` are the members that messages reach, this node included."""
        known = {(m.node_id, m.boot_id) for m in (self.target.members if self.target else ())}
        living = {(p.member.node_id, p.member.boot_id): p.member for p in peers if p.living}
        living |= {(m.node_id, m.boot_id): m for m in reached}
        self._unable = {boot: why for boot, why in self._unable.items() if boot in living}
        reachable = {(m.node_id, m.boot_id) for m in reached}
        able = tuple(
            member
            for boot, member in living.items()
            if (boot in known or boot in reachable) and boot not in self._unable
        )
        situation = Situation(
            worker_ready=worker_ready,
            able=able,
            unable=tuple(self._unable.values()),
            suspects=tuple(p.member.name for p in peers if p.living and p.state != "alive"),
            target=self.target,
            loading=self._loading(),
            quiet_s=now - quiet_since,
            settle_s=settle,
            min_nodes=min_nodes,
            served=self.served,
            step_failed=self._step_failed,
            unplaceable=self._unplaceable[1] if self._unplaceable[0] == set(_boots(able)) else "",
        )
        decision = decide(situation)
        waits = situation.newcomers and not decision.propose and now < quiet_since + settle
        self.settled_at = quiet_since + settle if waits else inf
        self.able = able
        return decision
