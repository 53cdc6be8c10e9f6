"""The leader's part in the life of a plan: when to propose one, and what it says.

`core/plan_rules.py` says when, `core/replan.py` who holds what, `core/voters.py` who votes;
`core/proposal.py` then brings the plan into force. The request log learns with which token logs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from math import inf

from p2pinfer.core.agreement import same_bits
from p2pinfer.core.choice import charter, faster
from p2pinfer.core.events import NodeConfig, PlanFailed, PlanProposed, TokensCommitted
from p2pinfer.core.left_out import LeftOut, Refusal
from p2pinfer.core.lull import Lull
from p2pinfer.core.moves import Progress, Staged, Standing, Steps, progress, staged
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_rules import (
    Boot,
    Decision,
    Situation,
    View,
    boot,
    boots,
    decide,
    may_work,
)
from p2pinfer.core.planner import PlacementError, may_own
from p2pinfer.core.proposal import Proposal, offered
from p2pinfer.core.quorum import credible
from p2pinfer.core.replan import next_plan
from p2pinfer.core.request_log import RequestLog
from p2pinfer.core.resumption import Resumption
from p2pinfer.core.voters import (
    NodeIds,
    change_of_votes,
    dead_votes,
    listed_as,
    next_voters,
    recorded,
)
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Member, ModelSpec, Plan
from p2pinfer.wire.messages import Ack, LogEntry, Nack

_NOTHING = (frozenset[Boot](), Refusal("", inf))


class PlanMaker:
    """What the leader knows of its newest plan, in one term. Times in seconds.

    `base` is the newest plan that it has accepted, and `base_active` whether that is known to be in
    force; from then on `base` is the last plan that it activated itself.
    """

    def __init__(  # noqa: PLR0917 - all that a term of office begins with
        self,
        config: NodeConfig,
        model: ModelSpec,
        term: int,
        base: Plan | None,
        base_active: bool,
        box: Outbox,
        log: RequestLog,
    ) -> None:
        self.waiting = ""
        """What the next plan waits for; empty when it waits for nothing."""
        self._config = config
        self._timing = config.timing
        self._model = model
        self._me = config.member.node_id
        self._term = term
        self._epoch = base.fence.epoch if base else 0
        known = base or config.stored
        self._cluster_id = known.cluster_id if known else config.cluster_id
        self._base = base
        self._base_active = base_active
        self._first = True
        self._box = box
        self._log = log
        self.resumption = Resumption(box)
        self._current: Proposal | None = None
        self._view: View | None = None
        self._looked_at = -inf
        self._broken: set[Boot] = set()
        self._missed: dict[Boot, float] = {}
        """Who was lost since the last plan in force, and after what silence."""
        self._out = LeftOut(config.timing)
        self._steps = Steps()
        self._lull = Lull(config.timing, box)
        self._unplaceable = _NOTHING
        """The able members for which no plan could be made, and why."""
        self._step_failed = ""

    # --- what it knows ----------------------------------------------------------------------------

    @property
    def target(self) -> Plan | None:
        """The newest plan that this leader has proposed."""
        return self._current.plan if self._current else None

    @property
    def activated(self) -> bool:
        """Whether that plan is in force."""
        return self._current is not None and self._current.activated

    @property
    def listeners(self) -> tuple[int, ...]:
        """The members of the plan in force, by index, that take part in its steps."""
        return self._current.listeners if self._current else ()

    @property
    def deadline(self) -> float:
        """When this wants to look again; what is over was looked at already."""
        if self._view is None:
            return -inf
        times = (
            self._view.quiet_since + self._timing.settle,
            self._unplaceable[1].until,
            *self._out.deadlines,
            *(self._current.deadlines if self._current else ()),
            self._steps.deadline,
            self._lull.deadline,
        )
        return min((time for time in times if time > self._looked_at), default=inf)

    def in_force(self, living: Iterable[Member]) -> bool:
        """Whether the plan is active and all its owners live: requests may be started."""
        if self._current is None or not self._current.activated or self._step_failed:
            return False
        return boots(self._current.owners) <= boots(living) - self._broken

    def has_acked(self, member: Member) -> bool:
        """Whether that very member has acknowledged the newest plan."""
        current = self._current
        if current is None or boot(member) not in boots(current.plan.members) - self._broken:
            return False
        return current.has_acked(member.node_id)

    # --- deciding ---------------------------------------------------------------------------------

    def look(self, view: View, now: float) -> None:
        """Bring the newest plan into force if it can be; propose if the rules say so."""
        self._view, self._looked_at = view, now
        self._out.forget_old(boots(view.living), now)
        if now >= self._unplaceable[1].until:
            self._unplaceable = _NOTHING
        self._advance(now)
        situation = self._situation(view, now)
        decision = decide(situation)
        self.waiting = decision.why
        if decision.propose:
            self._propose(view, decision, now)
        elif self._current:
            self._lull.look(situation, self._current.plan.fence, now)
            self._current.look(boots(view.living) - self._broken, now)

    def _situation(self, view: View, now: float) -> Situation:
        able = self._able(view)
        members, refusal = self._unplaceable
        situation = Situation(
            worker_ready=view.worker_ready,
            suspects=view.suspects,
            able=_names(self._can_own(view)),
            unable=self._out.reasons(view),
            min_nodes=self._config.min_nodes,
            served=self._base is not None,
            unplaceable=refusal.why if members == boots(able) else "",
            proposed=self._current is not None,
            step_failed=self._step_failed,
            settled=now >= view.quiet_since + self._timing.settle,
        )
        return self._with_news(situation, self._current, able, now) if self._current else situation

    def _with_news(
        self, situation: Situation, current: Proposal, able: tuple[Member, ...], now: float
    ) -> Situation:
        """What has changed since the newest plan was proposed."""
        plan, view = current.plan, self._view
        assert view is not None
        here, listed = boots(view.living) - self._broken, boots(plan.members)
        voters, _ = self._voters(view)
        at_hand = boots(self._at_hand(view))
        current.relieved &= self._out.relieved(view)
        gone = [m for m in plan.members if boot(m) not in here | current.gone]
        unfit = (m for m in current.owners if boot(m) in here and self._out.cannot(m, view))
        kept = (m for m in current.holders if boot(m) in here - current.relieved)
        missing = listed - current.offered
        late = (m for m in plan.members if m.node_id in current.late)
        running = current.activated and self._log.running
        # Whom no reply and no replica misses is taken out when nothing runs.
        missed = current.holders if running else plan.members
        return dataclasses.replace(
            situation,
            lost=_names(m for m in gone if m in current.owners),
            absent=_names(m for m in gone if m in missed and m not in current.owners),
            unfit=_names(unfit),
            relieved=_names(m for m in kept if self._hands_over(m, view, current)),
            astray=_names((*current.astray(now), *self._deaf(view, now))),
            dead_votes=dead_votes(plan, voters, view.lost) if current.activated else (),
            newcomers=_names(m for m in self._listed(view, voters) if boot(m) in at_hand - listed),
            fit_again=_names(m for m in able if boot(m) in missing),
            votes=change_of_votes(plan, voters, view.living) if current.activated else "",
            stragglers=_names(m for m in late if not self._out.is_left_alone(m, now)),
            loading=() if current.activated else _names(current.unanswered(here)),
            faster=faster(plan, view.chosen),
            prepared=self._prepared(current, view, now),
            lull=not running or self._lull.is_at(now),
        )

    def _deaf(self, view: View, now: float) -> tuple[Member, ...]:
        """Those that steps do not reach any more: only a new plan brings them back."""
        listening = self._current.listening(now) if self._current else ()
        deaf = (m for m in listening if m.node_id in view.deaf)
        return tuple(m for m in deaf if not self._out.is_left_alone(m, now))

    def _hands_over(self, member: Member, view: View, current: Proposal) -> bool:
        """Whether a member is to hand over what it owns; one that leaves, what it keeps too."""
        owns = boot(member) in boots(current.owners)
        return member.node_id in view.draining or (owns and self._out.rests(member, view))

    def _able(self, view: View) -> tuple[Member, ...]:
        """Members that may own units now: where nobody else can, those too that should rest."""
        return self._out.able(self._can_own(view), view)

    def _can_own(self, view: View) -> tuple[Member, ...]:
        return tuple(m for m in self._at_hand(view) if may_own(m) and self._out.may_own(m, view))

    def _at_hand(self, view: View) -> list[Member]:
        """Members that can take part at all. Who was reached before will be again."""
        plan = self.target or self._base
        known = boots(plan.members) - self._broken if plan else frozenset()
        return [
            member
            for member in view.living
            if may_work(member) and (member.node_id in view.reached or boot(member) in known)
        ]

    def _voters(self, view: View) -> tuple[NodeIds, NodeIds]:
        """Node ids of the next plan's voters, and of its old voters."""
        ready = self._acked(view) - view.draining if self.activated else set()
        return next_voters(
            self._base,
            base_active=self._base_active,
            first=self._first,
            leader_id=self._me,
            living=view.living,
            lost=view.lost,
            ready=ready,
            leaving=view.draining,
        )

    def _acked(self, view: View) -> set[str]:
        """Node ids of those living members that have acknowledged the newest plan."""
        current = self._current
        assert current is not None
        lives = boots(current.plan.members) - self._broken
        return {
            member.node_id
            for member in view.living
            if boot(member) in lives and current.has_acked(member.node_id)
        }

    def _listed(self, view: View, voters: NodeIds) -> tuple[Member, ...]:
        """The next plan's members: voters, be they here or not, then all that are at hand."""
        before = {m.node_id: m for m in (self._base.members if self._base else ())}
        living = {m.node_id: m for m in view.living}
        others = [m.node_id for m in self._at_hand(view) if boot(m) not in self._out.useless]
        ids = list(dict.fromkeys((self._me, *voters, *others)))[:MAX_NODES]
        keep = frozenset() if self._base_active else frozenset(voters)
        return tuple(listed_as(living.get(i), before.get(i), keep=i in keep) for i in ids)

    def _next(self, view: View, *, rebalance: bool) -> Staged:
        """The plan to propose, by what is known now. Raises `PlacementError`."""
        try:
            return self._by(self._able(view), view, rebalance=rebalance)
        except PlacementError:
            # Better one that should rest than nobody.
            return self._by(self._can_own(view), view, rebalance=rebalance)

    def _by(self, able: Iterable[Member], view: View, *, rebalance: bool) -> Staged:
        voters, old_voters = self._voters(view)
        members = recorded(self._listed(view, voters), self._base, active=self._base_active)
        previous = self.target or self._base
        ready = self._ready(view)
        goal = next_plan(
            previous=previous,
            members=members,
            able=frozenset(member.node_id for member in able),
            model=self._model,
            **charter(previous, self._config, view.chosen),
            fence=Fence(self._term, self._epoch + 1),
            cluster_id=self._cluster_id,
            leader_id=self._me,
            voters=voters,
            old_voters=old_voters,
            replicas=self._config.replicas,
            rebalance=rebalance,
            ready=ready,
            positions=self._log.largest,
        )
        if self._base is None or previous is None:
            return Staged(goal, moving=False)
        here = [m for m in self._at_hand(view) if not self._out.cannot(m, view)]
        standing = Standing(
            here=frozenset(m.node_id for m in here),
            resting=frozenset(m.node_id for m in here if self._out.rests(m, view)) - view.draining,
            ready=ready,
        )
        return staged(previous, goal, standing, self._log.largest)

    def _ready(self, view: View) -> frozenset[str]:
        """Node ids of those that have all that the newest plan makes them keep."""
        plan = self.target or self._base
        fence = plan.fence if plan else None
        return frozenset(i for i, known in view.standbys_ready.items() if known == fence)

    def _prepared(self, current: Proposal, view: View, now: float) -> str:
        """What standbys that are ready allow to do next, or empty."""
        if not (current.activated and current.moving):
            return ""
        ready = self._ready(view)
        members = boots(self._can_own(view)), boots(self._able(view))
        key = current.plan.fence, ready, members, view.draining

        def find() -> Progress:
            try:
                found = self._next(view, rebalance=True)
            except PlacementError:
                return Progress()
            return progress(current.plan, found.plan, view.draining)

        coming = {m.node_id for m in current.holders if not self._out.cannot(m, view)}
        # Only memory may need that a part of what it keeps is taken from who leaves.
        patience = self._timing.replicas_late * (1 if coming.isdisjoint(view.draining) else 2)
        return self._steps.look(
            key,
            find,
            earliest=current.activated_at + self._timing.settle,
            trims_from=current.activated_at + (0 if coming <= ready else patience),
            now=now,
        )

    def _propose(self, view: View, decision: Decision, now: float) -> None:
        able = self._able(view)
        rebalance = decision.rebalance or (self._current is not None and self._current.moving)
        fence = Fence(self._term, self._epoch + 1)
        self._out.let_rest(self._current.owners if self._current else (), view, now)
        self._out.be_patient(self._deaf(view, now), now)
        try:
            found = self._next(view, rebalance=rebalance)
        except PlacementError as error:
            self._cannot_place(able, fence, error.message, inf)
            return
        plan = found.plan
        self._epoch += 1
        self._current = Proposal(
            plan,
            before=self._base,
            first=self._first,
            offered=offered(plan, boots(able), self._current, rebalance=rebalance),
            gone=boots(plan.members) - boots(view.living),
            relieved=self._out.relieved(view),
            moving=found.moving,
            heard=credible(plan, view.living),
            timing=self._timing,
            box=self._box,
        )
        self._broken, self._step_failed = set(), ""
        names = _names(plan.members)
        self._box.add(PlanProposed(fence=fence, members=names, why=decision.why))
        self.resumption.proposed(now)
        self._current.propose(now)
        self.waiting = f"{', '.join(names)} to load the weights"

    def _cannot_place(self, able: Iterable[Member], fence: Fence, why: str, until: float) -> None:
        """These members cannot hold the model: wait for others."""
        why = "; ".join((why, *(refusal.why for refusal in self._out.unable.values())))
        self._unplaceable = (boots(able), Refusal(why, until))
        self.waiting = why
        self._box.add(PlanFailed(fence=fence, reason=why))

    # --- answers ----------------------------------------------------------------------------------

    def ack(self, message: Ack, now: float) -> None:
        """A member has loaded its part; after the last one the plan comes into force."""
        current = self._current
        if current and message.fence == current.plan.fence and current.lists(message.node_id):
            current.ack(message)
            self._advance(now)

    def nack(self, message: Nack, now: float) -> bool:
        """A member cannot hold its part: go on without it, and ask it again after a while.

        False: it says something else, of a step of the plan in force.
        """
        current = self._current
        if current is None or message.fence != current.plan.fence:
            return True
        indices = {m.node_id: index for index, m in enumerate(current.plan.members)}
        index = indices.get(message.node_id)
        if index in current.listeners:
            return False
        if index is not None:
            self._refused(current, current.plan.members[index], message.message, now)
        return True

    def _refused(self, current: Proposal, member: Member, message: str, now: float) -> None:
        why = f"{member.name}: {message}"
        self._box.add(PlanFailed(fence=current.plan.fence, reason=why))
        current.refuse(member.node_id)
        refusal = Refusal(why, self._out.until(member, now))
        if boot(member) in boots(current.owners):
            self._out.unable[boot(member)] = refusal
        elif member.node_id != self._me:
            self._out.useless[boot(member)] = refusal
        else:
            # No plan goes without its leader, even if that owns nothing.
            able = self._able(self._view) if self._view else ()
            self._cannot_place(able, current.plan.fence, why, refusal.until)
            self._current = None

    def log_entry(self, message: LogEntry, sender: str, now: float) -> None:
        """A member sends a token log that was asked for."""
        if self._current and self._current.log_entry(message, sender):
            self._advance(now)

    def step_failed(
        self, fence: Fence, why: str, *, about: str = "", broken: bool = False, now: float
    ) -> bool:
        """A step of the plan in force broke: a new epoch begins. False: stale, or known already.

        `broken`: the member `about` computed what is no number, and is to own nothing for a while.
        """
        current = self._current
        if current is None or not current.activated or fence != current.plan.fence:
            return False
        if broken:
            for member in current.owners:
                if member.node_id == about and boot(member) not in self._out.unable:
                    refusal = Refusal(f"{member.name}: {why}", self._out.until(member, now))
                    self._out.unable[boot(member)] = refusal
        known, self._step_failed = self._step_failed, self._step_failed or why
        return not known

    def lost(self, member: Member, silence_s: float = 0.0) -> None:
        """A member died or left: if it comes back it knows nothing of the plan any more."""
        self._broken.add(boot(member))
        self._missed[boot(member)] = silence_s
        if self._current and boot(member) in boots(self._current.plan.members):
            self._current.lost(member.node_id)

    def obeys(self, node_id: str, fence: Fence) -> None:
        """A heartbeat says which plan a member obeys."""
        if self._current:
            self._current.obeys(node_id, fence)

    # --- in force ---------------------------------------------------------------------------------

    def committed(self, report: TokensCommitted, now: float) -> None:
        """Replies go on under the plan in force."""
        self._lull.stepped(now)
        self.resumption.committed(report, now)

    def gave_way(self, fence: Fence, now: float) -> None:
        """The leader's worker computes no step for a moment."""
        if self._current and fence == self._current.plan.fence:
            self._lull.gave_way(now)

    def _advance(self, now: float) -> None:
        """Put the newest plan in force once it is acknowledged and its logs are here."""
        current, view = self._current, self._view
        if current is None or view is None or current.activated:
            return
        # Who hangs, or has yet to start or to be reached, is not waited for.
        here = boots(m for m in self._at_hand(view) if m.node_id not in view.hung) - self._broken
        if not current.enough(here, view.lost, now):
            return
        agreed = current.collect(self._log.wants)
        if agreed is None:
            return
        lost, detect_s = self._out.interrupted(self._base, current.owners, view, self._missed)
        exact = self._base is None or same_bits(self._base, current.plan)
        self._out.be_patient(current.unanswered(here), now)
        self._base, self._base_active, self._first = current.plan, True, False
        self._missed = {}
        # What could not be made from nothing may follow from this plan.
        self._unplaceable = _NOTHING
        current.activate(agreed, now)
        self._lull.activated(now)
        self._log.adopt(agreed, lost, detect_s, exact, now)
        self.resumption.activated(agreed, lost, detect_s, now)


def _names(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(member.name for member in members)
