"""A node's control plane as one value that takes inputs and gives outputs, without any I/O.

`Node` joins the parts: who is there (`neighbours`, `greeter`), who leads (`election`), which plan
is in force (`plan_maker` on the leader, `plan_holder` on every node), and the requests (`requests`
on the serving node, `request_log` on the leader). It passes messages between them and decides what
the loss of a member, of the leader or of the worker means.
"""

from __future__ import annotations

from math import inf
from typing import Any

from msgspec.structs import replace

from p2pinfer.core.election import Election
from p2pinfer.core.events import (
    ClientCancelled,
    ClientSubmitted,
    Exit,
    Input,
    LeaderElected,
    LinkDown,
    LinkLost,
    LinkUp,
    NodeConfig,
    Output,
    PlanLoaded,
    ProbeAnswered,
    Received,
    ReplyTo,
    RequestEnded,
    ShutdownAsked,
    StepFailed,
    StopWorker,
    TokensDrawn,
    WorkerDied,
    WorkerFailed,
    WorkerReady,
    WorkerSaid,
    WorkerStats,
)
from p2pinfer.core.greeter import Greeter
from p2pinfer.core.links import Links
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_holder import PlanHolder
from p2pinfer.core.plan_maker import PlanMaker, View
from p2pinfer.core.request_log import RequestLog
from p2pinfer.core.requests import Serving
from p2pinfer.core.status import make_status
from p2pinfer.types import Fence, Member
from p2pinfer.wire.messages import (
    Ack,
    Activate,
    Cancel,
    ControlMessage,
    Drawn,
    Ended,
    Forward,
    Heartbeat,
    Hello,
    Leave,
    MemberState,
    Nack,
    PreVoteReply,
    PreVoteRequest,
    Propose,
    Refused,
    VoteReply,
    VoteRequest,
    Welcome,
)


class Node:
    """One node. `now` is in seconds of a clock that never goes back; `handle` never blocks."""

    def __init__(self, config: NodeConfig) -> None:
        me = config.member.node_id
        links = Links()
        self._config = config
        self._me = me
        self._started = self._stopped = False
        self._box = Outbox(me, links.to)
        self._election = Election(me)
        self._near = Neighbours(config, links, self._election, self._box, self._lost)
        self._greeter = Greeter(config, self._near, self._election, self._box, self)
        self._holder = PlanHolder(config.member, config.model, self._box)
        self._maker: PlanMaker | None = None
        self._log = RequestLog(self._box)
        self._serving = Serving(config, self._box)
        self._stats = WorkerStats()

    # --- the interface ----------------------------------------------------------------------------

    def handle(self, event: Input, now: float) -> list[Output]:
        """Take one input, at time `now`; returns what is to be done, in order."""
        if not self._started:
            self._started = True
            self._start(now)
        for step in (self._take, self._look_around, self._look):
            if not self._stopped:
                step(event, now)
                self._hear_itself(now)
        return self._box.take()

    @property
    def deadline(self) -> float:
        """When `handle` next wants a `Ticked`, in the seconds of `now`."""
        if not self._started:
            return -inf
        if self._stopped:
            return inf
        return min(
            self._greeter.deadline,
            self._near.deadline,
            self._election.deadline,
            self._serving.deadline,
            self._log.deadline,
            self._maker.deadline if self._maker else inf,
        )

    @property
    def ready(self) -> bool:
        """Whether a plan is in force here and all its members say that they obey it too."""
        plan, fence = self._holder.active, self._holder.obeyed
        if plan is None or plan.fence != fence:
            return False
        table = self._near.table
        return all(
            table.is_living(member)
            and (member.node_id == self._me or table[member.node_id].fence == fence)
            for member in plan.members
        )

    @property
    def waiting(self) -> str:
        """What a cluster that is not ready waits for; empty when it is ready."""
        if self.ready:
            return ""
        if not self._near.cluster_id:
            return "a cluster to join"
        if self._maker:
            return self._maker.waiting or "all nodes to take up the plan"
        if not self._holder.worker_ready:
            return "this node's worker to start"
        if self._holder.pending:
            return "the weights to load"
        return "the leader's plan"

    def status(self, now: float) -> dict[str, Any]:
        """The object of `status --json`."""
        return make_status(
            cluster_id=self._near.cluster_id,
            leader_id=self._election.leader_id,
            term=self._election.term,
            ready=self.ready,
            waiting=self.waiting,
            plan=self._holder.active,
            model=self._config.model,
            membership=self._near.table,
            own=self._near.heartbeat(self._holder.obeyed, self._stats, now),
            stats=self._stats,
        )

    # --- inputs -----------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        model, me = self._config.model, self._near.table.me
        if self._config.join:
            self._greeter.join(now)
        elif model is None:
            self.fail(
                "a witness holds no model, so it cannot found a cluster: give it the address of "
                "a node with --join",
                2,
                now,
            )
        else:
            self._near.cluster_id = self._config.cluster_id
            self._election.found()
            self._maker = PlanMaker(self._config, model, self._election.term, self._box)
            self._near.table.changed_at = now
            self._follow(me)

    def _take(self, event: Input, now: float) -> None:
        match event:
            case Received():
                self._received(event, now)
            case LinkUp():
                self._greeter.link_up(event.address, now)
            case LinkDown():
                self._near.link_down(event.address)
            case ProbeAnswered():
                self._near.probe_answered(event, now)
            case WorkerSaid():
                self._worker_said(event, now)
            case WorkerDied():
                self.fail(f"this node's worker died: {event.detail}", 1, now)
            case ClientSubmitted():
                self._serving.submit(event, self.waiting, now)
            case ClientCancelled():
                self._serving.cancelled(event, now)
            case ShutdownAsked():
                self.fail("", 0, now)

    def _hear_itself(self, now: float) -> None:
        """Handle messages to oneself until there are no more, then start what may start."""
        while self._box.to_self and not self._stopped:
            self._member_said(self._box.to_self.popleft(), self._me, now)
        if self._maker and self._maker.in_force(self._near.table.members()):
            self._log.start_all()

    def _look_around(self, _event: Input, now: float) -> None:
        """What time brings about among the members: silence, heartbeats, greetings."""
        self._near.look(self._holder.obeyed, self._stats, now)
        self._greeter.look(now)

    def _look(self, _event: Input, now: float) -> None:
        """What time, or what just happened, brings about for plans and requests."""
        if self._maker:
            table = self._near.table
            living = table.living()
            ids = [
                peer.member.node_id for peer in living if self._near.links.to(peer.member.node_id)
            ]
            suspects = (p.member.name for p in living if p.state is MemberState.SUSPECT)
            view = View(
                living=table.members(),
                reached=frozenset((self._me, *ids)),
                suspects=tuple(suspects),
                worker_ready=self._holder.worker_ready,
                quiet_since=table.changed_at,
            )
            self._maker.look(view, now)
            self._log.forget_old(now)
        self._serving.look(ready=self.ready, waiting=self.waiting, now=now)

    # --- joining, leaving, losing -----------------------------------------------------------------

    def joined(self, leader: Member, now: float) -> None:
        """This node is in a cluster now, and follows `leader`, whose term its heartbeats tell."""
        self._election.follow(leader.node_id, 0)
        self._follow(leader)

    def _follow(self, leader: Member) -> None:
        self._box.add(
            LeaderElected(name=leader.name, node_id=leader.node_id, term=self._election.term)
        )
        self._serving.leader_found(leader.node_id)

    def has_acked(self, member: Member) -> bool:
        """Whether this node leads, and that member has acknowledged its newest plan."""
        return self._maker is not None and self._maker.has_acked(member)

    def fail(self, error: str, exit_code: int, now: float) -> None:
        """Leave cluster and process: on request (`error` empty), or because there is no way on."""
        me = self._near.table.me
        self._serving.fail_all(
            "leaving", f"node {me.name} is leaving; submit through another node", now
        )
        leave = Leave(node_id=me.node_id, boot_id=me.boot_id, reason=error[:4096])
        for peer in self._near.table.living():
            self._box.send(peer.member.node_id, leave)
        self._box.order(StopWorker())
        self._box.add(Exit(error=error, exit_code=exit_code))
        self._stopped = True

    def _lost(self, peer: Peer, state: MemberState, reason: str, now: float) -> None:
        """What the loss of a member means for its requests, its units, or the cluster."""
        member, node_id = peer.member, peer.member.node_id
        if self._election.node_lost(node_id):
            self._serving.leader_lost(
                f"the leader {member.name} was lost ({reason}); submit again when the cluster is "
                f"back",
                now,
            )
            addresses = tuple(p.member.address for p in self._near.table.everybody())
            self._election.forget()
            self._holder.forget()
            self._near.forget()
            self._greeter.rejoin(member, addresses, now)
        elif self._maker:
            self._maker.lost(member)
            self._log.serving_lost(node_id)
            if state is MemberState.DEAD and self._maker.is_owner(node_id):
                self._log.fail_started(
                    "node_lost",
                    f"node {member.name}, which held a part of the model, was lost: {reason}; "
                    f"submit again",
                )

    # --- the worker -------------------------------------------------------------------------------

    def _worker_said(self, event: WorkerSaid, now: float) -> None:
        match event.report:
            case WorkerReady() as report:
                self._worker_started(report, now)
            case WorkerFailed() as report:
                self.fail(report.message, 2 if report.usage else 1, now)
            case PlanLoaded() as report:
                self._holder.loaded(report)
            case TokensDrawn() as report:
                self._log.drawn(report.tokens)
            case RequestEnded() as report:
                self._log.ended(report, now)
            case StepFailed() as report:
                self._step_failed(report)
            case LinkLost() as report:
                if peer := self._near.table.get(report.node_id):
                    self._near.doubt(peer, "its step link broke")
            case WorkerStats() as report:
                self._stats = report

    def _worker_started(self, report: WorkerReady, now: float) -> None:
        """Now it is known how this node computes: tell all whom it has greeted, answered or not."""
        table = self._near.table
        me = replace(
            table.me,
            numeric_class=report.numeric_class,
            threads=report.threads,
            memory_bytes=report.memory_bytes,
        )
        if me != table.me:
            table.me = me
            for address in self._near.links.connected():
                self._greeter.greet(address, now)
        self._holder.worker_started()

    def _step_failed(self, report: StepFailed) -> None:
        """The leader proposes the same owners again; any other node tells the leader."""
        peer = self._near.table.get(report.node_id)
        who = f" ({peer.member.name})" if peer else ""
        why = f"step {report.step} failed{who}: {report.reason}"
        if report.fence != self._holder.obeyed:
            return
        if self._maker is None:
            nack = Nack(fence=report.fence, node_id=self._me, code="internal", message=why[:4096])
            self._box.send(self._election.leader_id, nack)
            return
        self._break_off(report.fence, why)
        if peer:
            self._near.doubt(peer, "a step waited for it")

    def _break_off(self, fence: Fence, why: str) -> None:
        """A step of the plan in force failed on some node: begin a new epoch."""
        if self._maker and self._maker.step_failed(fence, why):
            self._log.step_failed(why)

    # --- messages ---------------------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> None:
        match event.message:
            case Welcome() as message if event.link:
                self._greeter.welcomed(message, event.link, now)
            case Refused() as message if event.link:
                self._greeter.refused(message, event.link, now)
            case Hello() as message if event.route:
                self._greeter.greeted(message, event.route, now)
            case message:
                if sender := self._near.sender(event.route):
                    self._member_said(message, sender, now)
                else:
                    self._stranger_said(message, event.route)

    def _stranger_said(self, message: ControlMessage, route: bytes) -> None:
        """Somebody takes us for a fellow member: it must greet us (again)."""
        self._near.drop(message, "its sender is no member")
        if isinstance(message, Heartbeat) and route:
            name = self._config.member.name
            answer = Refused(
                code="not_a_member", message=f"{name} does not know you; greet it", retryable=True
            )
            self._box.add(ReplyTo(route=route, message=answer))

    def _member_said(self, message: ControlMessage, sender: str, now: float) -> None:
        """A message of a living member, or of this node to itself."""
        leading = sender == self._election.leader_id
        match message:
            case Heartbeat() if message.node_id == sender:
                self._heard(message, now)
            case Leave() if message.node_id == sender:
                peer = self._near.table[sender]
                if peer.member.boot_id == message.boot_id:
                    self._near.lose(peer, MemberState.LEFT, message.reason or "it left", now)
            case Propose() if leading:
                self._holder.propose(message, self._near.cluster_id, sender)
            case Activate() if leading:
                self._holder.activate(message)
            case Drawn() if leading:
                self._serving.drawn(message, now)
            case Ended() if leading:
                self._serving.ended(message, now)
            case PreVoteRequest() | PreVoteReply() | VoteRequest() | VoteReply():
                for fact in self._election.handle(message, sender, now):
                    self._box.add(fact)
            case _ if not (self._maker and self._to_leader(self._maker, message, sender, now)):
                self._near.drop(message, "it is not for its sender to say, or not to this node")

    def _to_leader(
        self, maker: PlanMaker, message: ControlMessage, sender: str, now: float
    ) -> bool:
        """What members say to their leader; false when it is none of that."""
        match message:
            case Ack() if message.node_id == sender:
                maker.ack(message, now)
            case Nack() if message.node_id == sender:
                maker.nack(message, now)
                self._break_off(message.fence, message.message)
            case Forward() if message.serving_id == sender:
                self._log.forward(message, now)
            case Cancel():
                self._log.cancel(message, sender)
            case _:
                return False
        return True

    def _heard(self, heartbeat: Heartbeat, now: float) -> None:
        if self._near.heard(heartbeat, now):
            self._election.handle(heartbeat, heartbeat.node_id, now)
            if self._maker:
                self._maker.obeys(heartbeat.node_id, heartbeat.fence)
