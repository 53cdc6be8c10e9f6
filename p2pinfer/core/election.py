"""Who leads, and in which term: Raft's election, with pre-vote and quorum check.

As in Ongaro and Ousterhout (2014) and section 9.6 of Ongaro's thesis, with these differences. What
must not be older at the candidate than at the voter is the accepted plan. Followers do not wait
for a silent leader: the membership says when it is lost. A leader announces itself by heartbeats,
and lays its office down when it hears too few voters to decide anything. Who is blank votes like
others; the candidate knows from its plan where that counts (`core/quorum.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from math import inf

from msgspec import Struct
from msgspec.structs import replace

from p2pinfer.core import quorum
from p2pinfer.core.durable import Durable
from p2pinfer.core.events import ElectionStarted, FrameDropped, LeaderElected, LeaderLost
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.timing import Timing
from p2pinfer.types import Fence, Member, Plan
from p2pinfer.wire.messages import (
    Heartbeat,
    PreVoteReply,
    PreVoteRequest,
    VoteReply,
    VoteRequest,
)

ElectionMessage = PreVoteRequest | PreVoteReply | VoteRequest | VoteReply
FOUNDING_TERM = 1

MAX_BACKOFF = 8
"""After each election in a row that did not end in time the next waits twice as long, up to this:
where a vote takes longer to write than an attempt lasts, none would ever end otherwise."""


class ElectionView(Struct, frozen=True, kw_only=True):
    """What an election needs to know of the membership.

    `members` are the living members as they describe themselves, this node among them; `lost` are
    the node ids of those known to be dead or to have left, and `gone` how they once described
    themselves, for their names. `able` says whether this node may campaign: its worker is ready and
    does not hang, it is no witness and not draining.
    """

    members: tuple[Member, ...] = ()
    lost: frozenset[str] = frozenset()
    gone: tuple[Member, ...] = ()
    able: bool = False


class Election:
    """One node's part in the elections. Times in seconds; `draw` gives numbers in [0, 1).

    `leader_id` is empty while nobody is known to lead, and `deadline` is when this wants to look
    again. Votes are counted in `look`, which has to follow every other call.
    """

    def __init__(
        self,
        me: Member,
        durable: Durable,
        timing: Timing,
        box: Outbox,
        draw: Callable[[], float],
    ) -> None:
        self.leader_id = ""
        self.deadline = inf
        self._me = me.node_id
        self._own = me
        self._durable = durable
        self._timing = timing
        self._box = box
        self._draw = draw
        self._view = ElectionView()
        self._asked = 0
        """The term that pre-votes are asked for; 0: none."""
        self._allowed: set[str] = set()
        self._standing = 0
        """The term that this boot stands for election in; 0: none."""
        self._votes: set[str] = set()
        self._in_vain = 0
        """Elections since somebody led."""
        self._seat: tuple[Plan, bool] | None = None
        """What the leader's power rests on: the last plan that it activated or, until then, the one
        that it was elected with and whether that was known to be in force."""
        self._settled = False
        """Whether the leader has activated a plan."""

    # --- the state --------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        """The newest term that this node has seen."""
        return self._durable.state.term

    @property
    def leads(self) -> bool:
        """Whether this node is the leader."""
        return self.leader_id == self._me

    @property
    def campaigning(self) -> bool:
        """Whether this node asks for votes, or asks whether it should."""
        return bool(self._asked or self._standing)

    @property
    def waiting(self) -> str:
        """What the election of a leader waits for; empty while somebody leads."""
        plan, here = self._durable.plan, self._here()
        if self.leader_id:
            return ""
        if plan is None or self._elects(here):
            return "the election of a leader"
        active = self._durable.state.active
        voters = frozenset[str]().union(*quorum.electorate(plan, active=active))
        names = sorted(self._name(node_id) for node_id in voters - here)
        return f"more of the cluster's voters; missing: {', '.join(names)}"

    # --- what happens -----------------------------------------------------------------------------

    def found(self, cluster_id: str) -> None:
        """This node founds a cluster, and leads it once the disk has that: so nobody has ever been
        led by a founder that does not know of it after a crash."""
        self._durable.found(cluster_id, FOUNDING_TERM, self._me, self._founded)

    def resume(self, now: float) -> None:
        """This node comes back with its state: perhaps the others are there, and led."""
        self.deadline = now + self._wait()

    def follow(self, leader_id: str, term: int, now: float) -> bool:
        """`leader_id` itself shows that it leads in `term`; false if that is not so any more."""
        if leader_id == self._me:
            return self.leads and term == self.term
        if term < self.term:
            return False
        if self.leads and term == self.term:
            # Two of one term: each has taken the other for lost, which `last-man` allows.
            self._enter(term + 1, f"{self._name(leader_id)} leads in term {term} too", now)
            return False
        if (leader_id, term) != (self.leader_id, self.term):
            if self.leads:
                self._enter(term, f"{self._name(leader_id)} leads in term {term}", now)
            self._durable.enter_term(term)
            self._lead_by(leader_id)
        return True

    def heard(self, heartbeat: Heartbeat, now: float) -> None:
        """A member's heartbeat: its term, and whether it leads."""
        sender, term = heartbeat.node_id, heartbeat.term
        if heartbeat.leader_id == sender:
            self.follow(sender, term, now)
            return
        if sender == self.leader_id and term >= self.term:
            self._leaderless("it leads no longer", self._soon(), now)
        self._enter(term, f"{self._name(sender)} is in term {term}", now)

    def lost(self, node_id: str, reason: str, now: float) -> None:
        """A member died or left."""
        if node_id == self.leader_id:
            self._leaderless(reason, self._soon(), now)

    def resign(self, reason: str, now: float) -> None:
        """Lay the office down, if this node holds it."""
        if self.leads:
            self._leaderless(reason, self._wait(), now)

    def handle(self, message: ElectionMessage, sender: str, now: float) -> None:
        """A message of the election from member `sender`."""
        match message:
            case PreVoteRequest() if message.candidate_id == sender:
                self._pre_vote_asked(message)
            case VoteRequest() if message.candidate_id == sender:
                self._vote_asked(message, now)
            case PreVoteReply() | VoteReply() if message.voter_id == sender:
                self._answered(message, now)
            case _:
                kind = type(message).__name__
                self._box.add(FrameDropped(reason=f"{kind}: it speaks for another than its sender"))

    def look(self, view: ElectionView, now: float) -> None:
        """Count votes and look at the time; `view` is how the membership stands now."""
        self._view = view
        if self.leads:
            self._check_quorum(now)
        elif self.leader_id and self.leader_id not in self._here():
            self._leaderless("it is no member here", self._soon(), now)
        if self.leader_id:
            return
        if not self._may_campaign():
            self._stop()
            self.deadline = inf
            return
        if self.deadline == inf:
            self.deadline = now + self._wait()
        if now >= self.deadline:
            self._ask(now)
        if self._asked and self._elects(self._allowed):
            self._stand(now)
        if self._standing and self._elects(self._votes):
            self._win()

    # --- voting -----------------------------------------------------------------------------------

    def _pre_vote_asked(self, asked: PreVoteRequest) -> None:
        hears_leader = bool(self.leader_id) and (self.leads or self.leader_id in self._here())
        granted = not hears_leader and self._would_vote(
            asked.term, asked.candidate_id, asked.plan_fence
        )
        newer = self._durable.plan if asked.plan_fence < self._durable.fence else None
        reply = PreVoteReply(
            term=asked.term if granted else self.term,
            voter_id=self._me,
            granted=granted,
            plan=None if hears_leader else newer,
        )
        self._box.send(asked.candidate_id, reply)

    def _vote_asked(self, asked: VoteRequest, now: float) -> None:
        candidate, term = asked.candidate_id, asked.term
        reply = VoteReply(term=term, voter_id=self._me, granted=True)
        if self._would_vote(term, candidate, asked.plan_fence):
            if term > self.term:
                self._end_term(f"{self._name(candidate)} asks for votes in term {term}", now)
            if not self.leader_id:
                self.deadline = now + self._wait()
            self._durable.vote(term, candidate, lambda _: self._box.send(candidate, reply))
            return
        self._enter(term, f"{self._name(candidate)} asks for votes in term {term}", now)
        denied = VoteReply(term=self.term, voter_id=self._me, granted=False)
        self._box.send(candidate, denied)

    def _would_vote(self, term: int, candidate: str, plan_fence: Fence) -> bool:
        state = self._durable.state
        free = term > state.term or (term == state.term and state.voted_for in ("", candidate))
        return free and plan_fence >= self._durable.fence

    def _answered(self, reply: PreVoteReply | VoteReply, now: float) -> None:
        if not reply.granted:
            if isinstance(reply, PreVoteReply) and reply.plan:
                self._catch_up(reply.plan, now)
            if reply.term > self.term:
                self._enter(reply.term, f"a voter is in term {reply.term}", now)
                self.deadline = min(self.deadline, now + self._soon())  # ask for a higher one
        elif isinstance(reply, PreVoteReply):
            if reply.term == self._asked:
                self._allowed.add(reply.voter_id)
        elif reply.term == self._standing:
            self._votes.add(reply.voter_id)

    def _catch_up(self, plan: Plan, now: float) -> None:
        """A voter denies its vote for want of a plan that it has: take it over and ask again."""
        ours = plan.cluster_id == self._durable.state.cluster_id
        if ours and plan.fence > self._durable.fence and not self.leader_id:
            self._stop()
            self._durable.catch_up(plan)
            self.deadline = min(self.deadline, now + self._soon())

    # --- campaigning ------------------------------------------------------------------------------

    def _may_campaign(self) -> bool:
        """Whether this node may become the leader: it is able, and a voter of its newest plan."""
        if not self._view.able:
            return False
        plan = self._durable.plan
        if plan is None:  # a founder whose cluster has never had a plan
            return not self._durable.blank
        return self._me in quorum.voter_ids(plan)

    def _ask(self, now: float) -> None:
        """Would I be elected? (Raft thesis, 9.6) Late votes for the term before still count."""
        self.deadline = now + self._wait()
        if self._standing and self._me not in self._votes:
            return  # the disk is slower than an election; another term would not be faster
        self._asked, self._allowed = self.term + 1, {self._me}
        self._tell_voters(
            PreVoteRequest(term=self._asked, candidate_id=self._me, plan_fence=self._durable.fence)
        )

    def _stand(self, now: float) -> None:
        term = self._asked
        self._stop()
        self._standing = term
        self._durable.vote(term, self._me, lambda _: self._voted_for_itself(term))
        self._box.add(ElectionStarted(term=term))
        self._tell_voters(
            VoteRequest(term=term, candidate_id=self._me, plan_fence=self._durable.fence)
        )
        self.deadline = now + self._wait() * min(2**self._in_vain, MAX_BACKOFF)
        self._in_vain += 1

    def _voted_for_itself(self, term: int) -> None:
        if self._standing == term:
            self._votes.add(self._me)

    def _tell_voters(self, message: PreVoteRequest | VoteRequest) -> None:
        if plan := self._durable.plan:
            active = self._durable.state.active
            voters = frozenset[str]().union(*quorum.electorate(plan, active=active))
            for voter in sorted(voters - {self._me}):
                self._box.send(voter, message)

    def _elects(self, yes: AbstractSet[str]) -> bool:
        """Whether `yes` would make this node the leader. Whoever is gone by now does not count."""
        plan, here = self._durable.plan, [m for m in self._view.members if m.node_id != self._me]
        if plan is None:
            return self._me in yes
        here.append(replace(self._own, blank=self._durable.blank))
        return quorum.elects(
            plan,
            yes & quorum.credible(plan, here),
            active=self._durable.state.active,
            lost=self._view.lost,
        )

    # --- the office -------------------------------------------------------------------------------

    def _founded(self, now: float) -> None:
        if self.term == FOUNDING_TERM:
            self._win()

    def _win(self) -> None:
        plan = self._durable.plan
        self._seat = (plan, self._durable.state.active) if plan else None
        self._settled = False
        self._lead_by(self._me)

    def _lead_by(self, leader_id: str) -> None:
        self._stop()
        self._in_vain = 0
        self.leader_id, self.deadline = leader_id, inf
        self._box.add(LeaderElected(name=self._name(leader_id), node_id=leader_id, term=self.term))

    def _check_quorum(self, now: float) -> None:
        """Resign when too few voters are heard to decide anything: perhaps others hear more."""
        plan, state = self._durable.plan, self._durable.state
        if plan is not None and state.active and plan.fence.term == self.term:
            self._seat, self._settled = (plan, True), True
        if self._seat is None:
            return
        here, lost = self._here(), self._view.lost
        base, active = self._seat
        if self._settled:
            enough = quorum.leads_on(base, here, lost)
        else:
            enough = quorum.elects(base, here, active=active, lost=lost)
        if not enough:
            voters = quorum.voter_ids(base)
            self.resign(f"it hears {len(voters & here)} of {len(voters)} voters", now)

    # --- losing -----------------------------------------------------------------------------------

    def _enter(self, term: int, why: str, now: float) -> None:
        """A higher term was seen: who led before leads no longer, and no vote of before counts."""
        if term > self.term:
            self._end_term(why, now)
            self._durable.enter_term(term)

    def _end_term(self, why: str, now: float) -> None:
        self._stop()
        if self.leader_id:
            self._leaderless(why, self._wait(), now)

    def _leaderless(self, reason: str, wait: float, now: float) -> None:
        leader_id, self.leader_id = self.leader_id, ""
        self._stop()
        self._box.add(
            LeaderLost(name=self._name(leader_id), node_id=leader_id, term=self.term, reason=reason)
        )
        self.deadline = now + wait

    def _stop(self) -> None:
        """Neither ask nor stand."""
        self._asked = self._standing = 0
        self._allowed, self._votes = set(), set()

    def _here(self) -> frozenset[str]:
        return frozenset((self._me, *(member.node_id for member in self._view.members)))

    def _name(self, node_id: str) -> str:
        planned = self._durable.plan.members if self._durable.plan else ()
        known = (self._own, *self._view.members, *planned, *self._view.gone)
        return next((member.name for member in known if member.node_id == node_id), node_id)

    def _wait(self) -> float:
        """Between two attempts: random, so that two candidates do not split the votes for ever."""
        low, high = self._timing.election_min, self._timing.election_max
        return low + self._draw() * (high - low)

    def _soon(self) -> float:
        """Before the first attempt when the leader is known to be gone."""
        return self._draw() * self._timing.election_first
