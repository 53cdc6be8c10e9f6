"""The leader's part in the life of a plan: propose, gather the ACKs, activate, and send again.

`core/plan_rules.py` says when to propose and `core/planner.py` what. There is no time limit on
loading: a member that lives is waited for, one that dies is left out by the next proposal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from p2pinfer.core.events import NodeConfig, PlanFailed, PlanProposed
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_rules import Boot, Situation, boot, boots, decide
from p2pinfer.core.planner import PlacementError, holding, make_plan
from p2pinfer.types import Fence, Member, ModelSpec, Plan
from p2pinfer.wire.messages import Ack, Activate, Nack, Propose

RESEND_S = 1.0
"""How long after a PROPOSE or ACTIVATE without effect it is sent again."""

UNABLE_S = 10.0
UNABLE_MAX_S = 640.0
"""How long a member that could not hold its part is left out: doubling, since each further try
makes running replies begin again, but never for good, since a blocked port may be opened."""


@dataclass(frozen=True, slots=True)
class View:
    """The members as the leader sees them now, itself included; `quiet_since` in seconds."""

    living: tuple[Member, ...]
    reached: frozenset[str]
    """Node ids of those that our messages reach."""
    suspects: tuple[str, ...]
    worker_ready: bool
    quiet_since: float


class Refusal(NamedTuple):
    """Why a member, or all members together, cannot hold their part, and until when that counts."""

    why: str
    until: float


def may_work(member: Member) -> bool:
    """Whether a member can take part in a plan: its worker has said how it computes."""
    return member.witness or bool(member.numeric_class)


class PlanMaker:
    """What the leader knows of its newest plan. Times in seconds."""

    def __init__(self, config: NodeConfig, model: ModelSpec, term: int, box: Outbox) -> None:
        self.target: Plan | None = None
        self.activated = False
        self.waiting = ""
        """What the next plan waits for; empty when it waits for nothing."""
        self._config = config
        self._model = model
        self._term = term
        self._epoch = 0
        self._box = box
        self._acked: set[str] = set()
        self._obeyed: dict[str, Fence] = {}
        self._broken: set[Boot] = set()
        self._unable: dict[Boot, Refusal] = {}
        self._unplaceable: tuple[frozenset[Boot], Refusal] = (frozenset(), Refusal("", inf))
        self._refusals: dict[Boot, int] = {}
        self._step_failed = ""
        self._served = False
        self._resend_at = inf
        self._quiet_at = inf

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        refusals = (*self._unable.values(), self._unplaceable[1])
        return min(self._resend_at, self._quiet_at, *(refusal.until for refusal in refusals))

    def in_force(self, living: Iterable[Member]) -> bool:
        """Whether the plan is active and all its members live: requests may be started."""
        if self.target is None or not self.activated or self._step_failed:
            return False
        return boots(self.target.members) <= boots(living) - self._broken

    def is_owner(self, node_id: str) -> bool:
        """Whether a node owns any unit of the plan that was activated."""
        if self.target is None or not self.activated:
            return False
        ids = [member.node_id for member in self.target.members]
        return node_id in ids and holding(self.target, ids.index(node_id)).stage is not None

    def has_acked(self, member: Member) -> bool:
        """Whether that very member has acknowledged the newest plan."""
        return (
            self.target is not None
            and member.node_id in self._acked
            and (member.node_id, member.boot_id) in boots(self.target.members)
        )

    # --- deciding ---------------------------------------------------------------------------------

    def look(self, view: View, now: float) -> None:
        """Propose if the rules say so, and send again what may have been lost."""
        here = boots(view.living)
        self._unable = {
            life: refusal
            for life, refusal in self._unable.items()
            if life in here and now < refusal.until
        }
        if now >= self._unplaceable[1].until:
            self._unplaceable = (frozenset(), Refusal("", inf))
        known = boots(self.target.members if self.target else ()) - self._broken
        able = tuple(
            member
            for member in view.living
            if (member.node_id in view.reached or boot(member) in known)
            and boot(member) not in self._unable
            and may_work(member)
        )
        decision = decide(self._situation(view, able, now))
        self.waiting = decision.why
        settled_at = view.quiet_since + self._config.settle
        self._quiet_at = settled_at if now < settled_at and not decision.propose else inf
        if decision.propose:
            self._propose(able, decision.why, now)
        elif now >= self._resend_at:
            self._send_again(now)

    def _situation(self, view: View, able: tuple[Member, ...], now: float) -> Situation:
        members, refusal = self._unplaceable
        return Situation(
            worker_ready=view.worker_ready,
            able=able,
            unable=(
                *(refusal.why for refusal in self._unable.values()),
                *(f"{m.name}'s worker to start" for m in view.living if not may_work(m)),
            ),
            suspects=view.suspects,
            target=self.target,
            broken=frozenset(self._broken),
            loading=tuple(m.name for m in self._unacked()) if not self.activated else (),
            settled=now >= view.quiet_since + self._config.settle,
            min_nodes=self._config.min_nodes,
            served=self._served,
            step_failed=self._step_failed,
            unplaceable=refusal.why if members == boots(able) else "",
        )

    def _propose(self, able: tuple[Member, ...], why: str, now: float) -> None:
        fence = Fence(self._term, self._epoch + 1)
        try:
            plan = make_plan(
                members=able,
                model=self._model,
                layout=self._config.layout,
                fence=fence,
                cluster_id=self._config.cluster_id,
                leader_id=self._config.member.node_id,
            )
        except PlacementError as error:
            self._cannot_place(able, fence, error.message, inf)
            return
        self._epoch += 1
        self.target, self.activated, self._step_failed = plan, False, ""
        self._acked, self._broken = set(), set()
        self._resend_at = now + RESEND_S
        names = tuple(member.name for member in plan.members)
        self._box.add(PlanProposed(fence=fence, members=names, why=why))
        for member in plan.members:
            self._box.send(member.node_id, Propose(plan=plan))
        self.waiting = f"{', '.join(names)} to load the weights"

    def _cannot_place(self, able: Iterable[Member], fence: Fence, why: str, until: float) -> None:
        """These members cannot hold the model: wait for others; the old plan is over."""
        why = "; ".join((why, *(refusal.why for refusal in self._unable.values())))
        self._unplaceable = (boots(able), Refusal(why, until))
        self.target, self.activated, self.waiting = None, False, why
        self._resend_at = inf
        self._box.add(PlanFailed(fence=fence, reason=why))

    # --- answers ----------------------------------------------------------------------------------

    def ack(self, message: Ack, now: float) -> None:
        """A member has loaded its part; after the last one the plan is in force."""
        if self.target is None or self.activated or message.fence != self.target.fence:
            return
        self._acked.add(message.node_id)
        if self._unacked():
            return
        self.activated = self._served = True
        self._resend_at = now + RESEND_S
        for member in self.target.members:
            self._box.send(member.node_id, Activate(fence=self.target.fence))

    def nack(self, message: Nack, now: float) -> None:
        """A member cannot hold its part: go on without it, and ask it again after a while."""
        if self.target is None or self.activated or message.fence != self.target.fence:
            return
        member = next((m for m in self.target.members if m.node_id == message.node_id), None)
        if member is None:
            return
        why = f"{member.name}: {message.message}"
        self._box.add(PlanFailed(fence=message.fence, reason=why))
        if member.node_id == self._config.member.node_id:
            # No plan goes without its leader: wait until other members would share the load.
            self._cannot_place(self.target.members, message.fence, why, self._until(member, now))
        else:
            self._unable[boot(member)] = Refusal(why, self._until(member, now))

    def _until(self, member: Member, now: float) -> float:
        """When to try a member again that has just refused."""
        times = self._refusals.get(boot(member), 0)
        self._refusals[boot(member)] = times + 1
        return now + min(UNABLE_MAX_S, UNABLE_S * (1 << min(times, 10)))

    def step_failed(self, fence: Fence, why: str) -> bool:
        """A step of the plan in force broke: the same members begin a new epoch. False: stale."""
        if self.target is None or not self.activated or fence != self.target.fence:
            return False
        self._step_failed = why
        return True

    def lost(self, member: Member) -> None:
        """A member died or left: if it comes back it knows nothing of the plan any more."""
        self._broken.add(boot(member))

    def obeys(self, node_id: str, fence: Fence) -> None:
        """A heartbeat says which plan a member obeys."""
        self._obeyed[node_id] = fence

    def _unacked(self) -> list[Member]:
        members = self.target.members if self.target else ()
        return [member for member in members if member.node_id not in self._acked]

    def _send_again(self, now: float) -> None:
        """A connection that broke may have taken PROPOSE or ACTIVATE with it."""
        plan = self.target
        assert plan is not None
        self._resend_at = now + RESEND_S
        if not self.activated:
            for member in self._unacked():
                self._box.send(member.node_id, Propose(plan=plan))
            return
        for member in plan.members:
            others = member.node_id != self._config.member.node_id
            if others and self._obeyed.get(member.node_id) != plan.fence:
                self._box.send(member.node_id, Activate(fence=plan.fence))
