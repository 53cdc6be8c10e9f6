"""What a node does because it leads: made when it is elected, dropped when it loses the office.

It joins the leader's parts: plans (`plan_maker`), token logs (`request_log`), and what it makes of
its members' words: who hears whom (`hearing`) and who is slow (`pace`).
"""

from __future__ import annotations

from p2pinfer.core.choice import Chooser
from p2pinfer.core.durable import Durable
from p2pinfer.core.events import (
    FenceSettled,
    MemberSlow,
    NodeConfig,
    PairBroken,
    RequestEnded,
    StepFailed,
    TokensCommitted,
)
from p2pinfer.core.hearing import Hearing
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.orders import GaveWay
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.pace import Pace
from p2pinfer.core.plan_maker import PlanMaker
from p2pinfer.core.plan_rules import View, may_work
from p2pinfer.core.planner import may_own
from p2pinfer.core.request_log import RequestLog
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.messages import (
    Ack,
    Cancel,
    ControlMessage,
    Forward,
    Heartbeat,
    LogEntry,
    MemberState,
    Nack,
)

LATELY_S = 10.0
"""Losses of so long before the election are part of what interrupted the replies."""


class Leadership:
    """The leader's part of a node, in one term. Times in seconds."""

    def __init__(
        self,
        config: NodeConfig,
        term: int,
        durable: Durable,
        near: Neighbours,
        box: Outbox,
        *,
        now: float,
    ) -> None:
        assert config.model is not None, "a witness never leads"
        self.term = term
        self._me = config.member.node_id
        self._near = near
        self._box = box
        self._log = RequestLog(config, box)
        self._hearing = Hearing(config.timing)
        self._pace = Pace(config.timing)
        self._chooser = Chooser(config)
        self._outcasts: frozenset[str] = frozenset()
        self._slow: frozenset[str] = frozenset()
        self.maker = PlanMaker(
            config, config.model, term, durable.plan, durable.state.active, box, self._log
        )
        lately = [
            peer
            for peer in near.table.everybody()
            if not peer.living and now - peer.gone_at < LATELY_S
        ]
        for peer in lately:
            # Whose loss made this node the leader, say: its units and replies are to be mended.
            self.maker.lost(peer.member, silence_s=max(0.0, peer.gone_at - peer.heard_at))
        if lately:
            self.maker.resumption.lost(max(peer.gone_at for peer in lately))

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        return min(self.maker.deadline, self._log.deadline, self._hearing.deadline)

    @property
    def waiting(self) -> str:
        """What the next plan waits for; empty when it waits for nothing."""
        return self.maker.waiting

    def in_force(self) -> bool:
        """Whether the newest plan is active, and all its owners live."""
        return self.maker.in_force(self._near.table.members())

    def start(self, obeyed: Fence) -> None:
        """Give the worker what it may start, once it too obeys the newest plan."""
        target = self.maker.target
        if target is not None and obeyed == target.fence and self.in_force():
            self._log.start_all(obeyed)

    # --- what happens -----------------------------------------------------------------------------

    def lost(self, peer: Peer, now: float) -> None:
        """A member died or left."""
        self._hearing.member_lost()
        self.maker.lost(peer.member, silence_s=max(0.0, now - peer.heard_at))
        self.maker.resumption.lost(now)
        self._log.serving_lost(peer.member.node_id, now)

    def heard(self, heartbeat: Heartbeat, now: float) -> None:
        """A member's heartbeat: what it obeys, whom it hears, how fast it computes."""
        self.maker.obeys(heartbeat.node_id, heartbeat.fence)
        self._hearing.heard(heartbeat)
        self._pace.heard(heartbeat, now)

    def said(self, message: ControlMessage, sender: str, now: float) -> bool:
        """What members say to their leader; false when it is none of that."""
        match message:
            case Ack() if message.node_id == sender:
                self.maker.ack(message, now)
            case Nack() if message.node_id == sender:
                if not self.maker.nack(message, now):
                    self.step_failed(message.fence, sender, message.message, message.about, now)
            case LogEntry():
                self.maker.log_entry(message, sender, now)
            case Forward() if message.serving_id == sender:
                self._log.forward(message, now)
            case Cancel():
                self._log.cancel(message, sender)
            case _:
                return False
        return True

    def reported(
        self, report: TokensCommitted | FenceSettled | RequestEnded | GaveWay, now: float
    ) -> None:
        """The leader's own worker: tokens are committed, replies end, steps give way."""
        match report:
            case TokensCommitted():
                self._hearing.step_succeeded()
                self._log.committed(report)
                self.maker.committed(report, now)
            case GaveWay():
                self.maker.gave_way(report.fence, now)
            case FenceSettled():
                self._log.settled(report)
            case _:
                self._log.ended(report, now)

    def step_failed(
        self, fence: Fence, reporter: str, why: str, about: str, now: float, *, broken: bool = False
    ) -> None:
        """A step of the plan in force failed on some member: a new epoch is the cure."""
        if self.maker.step_failed(fence, why, about=about, broken=broken, now=now):
            self._log.step_failed(why)
            self.maker.resumption.failed(now)
            self._hearing.step_failed(reporter, about, now)
        else:
            self._hearing.also_failed(reporter, about, now)

    def own_step_failed(self, report: StepFailed, why: str, now: float) -> None:
        """The same, on the leader's own worker."""
        self.step_failed(report.fence, self._me, why, report.node_id, now, broken=report.broken)

    # --- time -------------------------------------------------------------------------------------

    def look(self, plan: Plan | None, own: Heartbeat, *, worker_ready: bool, now: float) -> None:
        """Judge the members, propose what is due, and mind the requests. `own` is this node's
        heartbeat as it stands, `plan` the one in force here."""
        table = self._near.table
        living = table.living()
        self._judge(plan, own, now)
        reached = [p.member.node_id for p in living if self._near.links.to(p.member.node_id)]
        others = [(p.member.node_id, p.heartbeat) for p in living if p.heartbeat]
        words = [*others, (self._me, own)]
        draining = frozenset(node_id for node_id, word in words if word.draining)
        paused = frozenset(node_id for node_id, word in words if word.paused)
        hung = frozenset(node_id for node_id, word in others if word.hung)
        out = hung | self._outcasts | self._slow | draining | paused
        can = (m for m in table.members() if may_own(m) and may_work(m) and m.node_id not in out)
        newest = self.maker.target or plan
        self.maker.look(
            View(
                living=table.members(),
                chosen=self._chooser.look(newest, can, table.me),
                reached=frozenset((self._me, *reached)),
                suspects=tuple(p.member.name for p in living if p.state is MemberState.SUSPECT),
                lost=table.lost_ids(),
                hung=hung,
                outcasts=self._outcasts,
                slow=self._slow,
                deaf=self._pace.deaf(self._me, now),
                draining=draining,
                paused=paused,
                standbys_ready={
                    node_id: word.standby_fence
                    for node_id, word in words
                    if word.standbys_ready and word.standby_fence
                },
                worker_ready=worker_ready,
                quiet_since=table.changed_at,
            ),
            now,
        )
        self._log.look(now)

    def _judge(self, plan: Plan | None, own: Heartbeat, now: float) -> None:
        """Find broken pairs and slow members, and say what is new about them."""
        names = {m.node_id: m.name for m in self._near.table.members()}
        pairs = self._hearing.broken(self._near.table.members(), own, now)
        outcasts = self._hearing.outcasts(pairs, frozenset(names), self._me)
        for pair in sorted(pairs):
            lost = next((names[i] for i in pair if i in outcasts), "")
            if lost and not set(pair) & self._outcasts:
                told = (names[pair[0]], names[pair[1]])
                self._box.add(PairBroken(names=told, loses=lost))
        self._outcasts = outcasts
        slow = self._pace.slow(plan, own, now) if plan else {}
        for node_id, factor in slow.items():
            if node_id not in self._slow and node_id in names:
                self._box.add(MemberSlow(name=names[node_id], factor=round(factor, 1)))
        self._slow = frozenset(slow)
