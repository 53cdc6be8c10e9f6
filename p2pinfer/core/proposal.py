"""One plan on its leader: gathers the ACKs, agrees on the logs, activates, and sends again.

There is no time limit on loading: an owner that lives is waited for, one that is lost is left out
by the next proposal. Members that own nothing are waited for a little once all others are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from math import inf

from p2pinfer.core import quorum
from p2pinfer.core.agreement import (
    Agreed,
    Choice,
    Prefixes,
    choose,
    digest,
    reported,
    restart,
    rung,
    tail_start,
)
from p2pinfer.core.events import TokenLog
from p2pinfer.core.holdings import standbys_of
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.pace import DEAF_S
from p2pinfer.core.plan_rules import Boot, boot
from p2pinfer.core.planner import stage_members
from p2pinfer.core.timing import Timing
from p2pinfer.types import Fence, Member, Plan
from p2pinfer.wire.messages import Ack, Activate, AgreedLog, LogEntry, LogRequest, Propose


def owners(plan: Plan) -> tuple[Member, ...]:
    """The members that own anything by a plan."""
    stages = range(len(plan.stages))
    indices = {index for stage in stages for index in stage_members(plan, stage)}
    return tuple(plan.members[index] for index in sorted(indices))


def holders(plan: Plan) -> tuple[Member, ...]:
    """The members that own or keep anything by a plan."""
    kept = {i for s in plan.stages for kind in standbys_of(s) for copies in kind for i in copies}
    ids = kept | {i for s in range(len(plan.stages)) for i in stage_members(plan, s)}
    return tuple(plan.members[index] for index in sorted(ids))


def offered(
    plan: Plan, able: frozenset[Boot], before: Proposal | None, *, rebalance: bool
) -> frozenset[Boot]:
    """Members that could have got units by this plan, which follows `before`; others are asked
    again when settled."""
    if rebalance:
        return able
    return (able & before.offered if before else frozenset()) | frozenset(map(boot, owners(plan)))


class Proposal:
    """The newest plan of a leader. Times in seconds.

    `before` is the plan last in force, as far as the leader knows; `first`: it has activated none
    itself. `offered` are the members that could have got
    units, `gone` those that are listed only because of their votes. `heard` are the node ids of
    those whose word counts (`quorum.credible`). `relieved` are those that own nothing as soon as
    others are ready; `moving`: a later plan is to follow once standbys are ready.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        before: Plan | None,
        first: bool,
        offered: frozenset[Boot],
        gone: frozenset[Boot],
        heard: frozenset[str],
        timing: Timing,
        box: Outbox,
        relieved: frozenset[Boot] = frozenset(),
        moving: bool = False,
    ) -> None:
        self.plan = plan
        self.owners = owners(plan)
        self.holders = holders(plan)
        self.relieved = relieved
        self.moving = moving
        self.offered = offered
        self.gone = gone
        self._before = before
        self._heard = heard
        self.activated = False
        self.activated_at = inf
        self.listeners: tuple[int, ...] = ()
        """Indices of the members that take part in steps; known once it is activated."""
        self.refused: set[str] = set()
        self.late: set[str] = set()
        """Node ids of those that acknowledged when it was activated already."""
        self._first = first
        self._timing = timing
        self._box = box
        self._acks: dict[str, Ack] = {}
        self._logs: dict[int, tuple[str, TokenLog]] = {}
        """Logs that this node has the tokens of, and their digests."""
        self._asked: dict[int, Choice] = {}
        self._alone_since = inf
        self._resend_at = inf
        self._agreed: tuple[Agreed, ...] = ()
        self._obeys: dict[str, Fence] = {}
        self._strayed: set[str] = set()

    @property
    def deadlines(self) -> tuple[float, ...]:
        """When this wants to look again; some may be over."""
        straggle = self._timing.straggle
        return self._resend_at, self._alone_since + straggle, self.activated_at + straggle

    def lists(self, node_id: str) -> bool:
        """Whether this plan lists a member, in whichever life."""
        return any(member.node_id == node_id for member in self.plan.members)

    def has_acked(self, node_id: str) -> bool:
        """Whether a member has acknowledged this plan, in time or not."""
        return node_id in self._acks or node_id in self.late

    def unanswered(self, living: AbstractSet[Boot]) -> tuple[Member, ...]:
        """Members that live, and have neither acknowledged nor refused."""
        return tuple(
            member
            for member in self.plan.members
            if boot(member) in living
            and not self.has_acked(member.node_id)
            and member.node_id not in self.refused
        )

    # --- acknowledgements and logs ----------------------------------------------------------------

    def propose(self, now: float) -> None:
        """Send it to everybody."""
        self._resend_at = now + self._timing.resend_every
        for member in self.plan.members:
            self._box.send(member.node_id, Propose(plan=self.plan))

    def ack(self, message: Ack) -> None:
        """A member is ready; once it is activated, too late for this plan."""
        if not self.activated:
            self._acks[message.node_id] = message
        elif message.node_id not in self._acks:
            self.late.add(message.node_id)

    def refuse(self, node_id: str) -> None:
        """A member cannot hold its part."""
        self.lost(node_id)
        self.refused.add(node_id)

    def lost(self, node_id: str) -> None:
        """A member is gone, and may have lost what it acknowledged."""
        if not self.activated:
            self._acks.pop(node_id, None)

    def enough(self, living: AbstractSet[Boot], lost: AbstractSet[str], now: float) -> bool:
        """Whether all that must have acknowledged it have, and others that could were waited for.

        Those are every owner, the leader, and a quorum of voters, new and old.
        """
        plan, acked = self.plan, frozenset(self._acks)
        needed = {member.node_id for member in (*self.owners, plan.members[plan.leader])}
        heard = acked & self._heard
        if not needed <= acked or not quorum.adopts(plan, heard, first=self._first, lost=lost):
            self._alone_since = inf
            return False
        if not self.unanswered(living):
            return True
        self._alone_since = min(self._alone_since, now)
        return now >= self._alone_since + self._timing.straggle

    def collect(self, wants: Callable[[int], bool]) -> tuple[Agreed, ...] | None:
        """The logs agreed on, if this node has their tokens; None: it has asked for them."""
        chosen = {i: best for i, best in choose(self.plan, self._acks).items() if wants(i)}
        missing = {
            i: best
            for i, best in chosen.items()
            if i not in self._logs or self._logs[i][0] != best.log.digest
        }
        new = {i: best for i, best in missing.items() if self._asked.get(i) != best}
        self._asked = missing
        if missing:
            self._ask(new)
            return None
        agreed = []
        for request_id in chosen:
            log = self._logs[request_id][1]
            computed = restart(self.plan, request_id, Prefixes(log.tokens), self._acks)
            agreed.append(
                Agreed(
                    request_id=request_id,
                    log=log,
                    restart=computed.position,
                    recompute=computed.recompute,
                    rung=rung(self._before, self.plan, computed),
                )
            )
        return tuple(agreed)

    def _ask(self, missing: dict[int, Choice]) -> None:
        by_holder: defaultdict[str, list[int]] = defaultdict(list)
        for request_id, best in missing.items():
            by_holder[best.holder].append(request_id)
        for holder, request_ids in by_holder.items():
            request = LogRequest(fence=self.plan.fence, request_ids=tuple(request_ids))
            self._box.send(holder, request)

    def log_entry(self, message: LogEntry, sender: str) -> bool:
        """A member sends a log that was asked for; true: it was the last one that lacked."""
        best = self._asked.get(message.request_id)
        if message.fence != self.plan.fence or message.start or best is None:
            return False
        if sender != best.holder or digest(message.tokens) != best.log.digest:
            return False
        log = TokenLog(
            request_id=message.request_id,
            term=self.plan.fence.term,
            prompt_tokens=message.prompt_tokens,
            params=message.params,
            tokens=message.tokens,
        )
        self._logs[message.request_id] = best.log.digest, log
        del self._asked[message.request_id]
        return not self._asked

    # --- in force ---------------------------------------------------------------------------------

    def activate(self, agreed: tuple[Agreed, ...], now: float) -> None:
        """Put it in force, with these logs, on all that have acknowledged it."""
        self.activated, self.activated_at, self._agreed = True, now, agreed
        self._resend_at = now + self._timing.resend_every
        self._logs, self._asked = {}, {}
        members = enumerate(self.plan.members)
        self.listeners = tuple(i for i, member in members if member.node_id in self._acks)
        self._send_activate(frozenset(self._acks))

    def _send_activate(self, node_ids: AbstractSet[str]) -> None:
        """First what each of these members lacks of the logs, then ACTIVATE itself."""
        logs = []
        for agreed in self._agreed:
            log, prefixes = agreed.log, Prefixes(agreed.log.tokens)
            logs.append(
                AgreedLog(
                    request_id=agreed.request_id,
                    length=prefixes.length,
                    digest=digest(log.tokens),
                    restart=agreed.restart,
                    recompute=agreed.recompute,
                )
            )
            for node_id in sorted(node_ids):
                start = tail_start(reported(self._acks[node_id], agreed.request_id), prefixes)
                if start < prefixes.length:
                    self._box.send(node_id, self._tail(log, start))
        for node_id in sorted(node_ids):
            self._box.send(node_id, Activate(fence=self.plan.fence, logs=tuple(logs)))

    def _tail(self, log: TokenLog, start: int) -> LogEntry:
        return LogEntry(
            fence=self.plan.fence,
            request_id=log.request_id,
            term=log.term,
            prompt_tokens=log.prompt_tokens,
            params=log.params,
            start=start,
            tokens=log.tokens[start:],
        )

    def obeys(self, node_id: str, fence: Fence) -> None:
        """A heartbeat says which plan a member obeys."""
        if self._obeys.get(node_id) == self.plan.fence != fence:
            self._strayed.add(node_id)
        self._obeys[node_id] = fence

    def astray(self, now: float) -> tuple[Member, ...]:
        """Members that take part, but do not obey: any more, or for too long.

        A member that took its leader for lost has stopped, and nothing but a new plan starts it.
        """
        if not self.activated:
            return ()
        late = self._unheard() if now >= self.activated_at + self._timing.straggle else frozenset()
        away = late | self._strayed
        return tuple(member for member in self.plan.members if member.node_id in away)

    def listening(self, now: float) -> tuple[Member, ...]:
        """Members that get the steps of the plan; nobody while it is not in force for long."""
        if not self.activated or now < self.activated_at + DEAF_S:
            return ()
        return tuple(self.plan.members[index] for index in self.listeners)

    def _unheard(self) -> frozenset[str]:
        """Members that have not yet said that they obey this plan; the leader itself does."""
        ids = [self.plan.members[index].node_id for index in self.listeners]
        fence, leader = self.plan.fence, self.plan.members[self.plan.leader].node_id
        return frozenset(i for i in ids if i != leader and self._obeys.get(i) != fence)

    # --- sending again ----------------------------------------------------------------------------

    def look(self, living: AbstractSet[Boot], now: float) -> None:
        """A connection that broke may have taken what was sent with it: send it again."""
        waited_for = self.unanswered(living)
        unheard = self._unheard() if self.activated else frozenset()
        if not (waited_for or unheard or self._asked):
            self._resend_at = inf
        elif self._resend_at == inf:
            self._resend_at = now + self._timing.resend_every
        elif now >= self._resend_at:
            self._resend_at = now + self._timing.resend_every
            for member in waited_for:
                self._box.send(member.node_id, Propose(plan=self.plan))
            self._ask(self._asked)
            if unheard:
                self._send_activate(unheard)
