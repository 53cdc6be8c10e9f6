"""A node's control plane as one value that takes inputs and gives outputs, without any I/O.

`Node` joins the parts: who is there (`neighbours`, `greeter`), who leads (`election`), which plan
is in force (`plan_holder`; on the leader `leadership`, which makes it), what may not be forgotten
(`durable`), and the requests of this node's clients (`requests`). It passes messages between them
and decides what the loss of a member, of the leader or of the worker means.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from msgspec.structs import replace

from p2pinfer.core.departure import Departure
from p2pinfer.core.durable import Durable
from p2pinfer.core.echoes import EchoDesk
from p2pinfer.core.election import Election, ElectionView
from p2pinfer.core.events import (
    ClientCancelled,
    ClientSubmitted,
    Exit,
    FenceSettled,
    Input,
    LinkDown,
    LinkLost,
    LinkUp,
    LoadProgress,
    NodeConfig,
    Output,
    Persisted,
    PersistFailed,
    PlanLoaded,
    ProbeAnswered,
    Received,
    RequestEnded,
    ShutdownAsked,
    StandbysLoaded,
    StepFailed,
    StopWorker,
    TokensCommitted,
    WorkerDied,
    WorkerFailed,
    WorkerHung,
    WorkerReady,
    WorkerSaid,
    WorkerStats,
)
from p2pinfer.core.greeter import Greeter
from p2pinfer.core.health import LocalHealth, WorkerWatch
from p2pinfer.core.leadership import Leadership
from p2pinfer.core.links import Links
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import REFUSES, Neighbours
from p2pinfer.core.orders import EchoesMeasured, GaveWay
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.outlook import Outlook
from p2pinfer.core.plan_holder import PlanHolder
from p2pinfer.core.requests import Serving
from p2pinfer.core.speed import described
from p2pinfer.wire.messages import (
    Activate,
    Cancel,
    ControlMessage,
    Drain,
    Drawn,
    Ended,
    Heartbeat,
    Hello,
    Leave,
    LogEntry,
    LogRequest,
    MeasureLink,
    MemberState,
    Nack,
    Pause,
    PreVoteReply,
    PreVoteRequest,
    Propose,
    Refused,
    VoteReply,
    VoteRequest,
    Welcome,
)


class Node:
    """One node. `now` is in seconds of a clock that never goes back; `handle` never blocks.

    `draw` gives random numbers in [0, 1): elections need them, and the caller has the source.
    """

    def __init__(self, config: NodeConfig, draw: Callable[[], float]) -> None:
        links = Links(config.timing)
        self._me = config.member.node_id
        self._started = self._stopped = False
        self._box = Outbox(self._me, links.to)
        self._durable = Durable(config.stored, config.member.boot_id, self._box)
        state, founds = self._durable.state, config.stored is None and not config.join
        me = replace(config.member, memory=state.memory, blank=state.blank and not founds)
        self._config = config = replace(config, member=me)
        self._election = Election(me, self._durable, config.timing, self._box, draw)
        self._near = Neighbours(config, links, self._election, self._box, self._lost)
        self._greeter = Greeter(config, self._near, self._election, self._box, self)
        self._holder = PlanHolder(me, config.model, self._durable, self._box)
        self._serving = Serving(config, self._box, self._near.table.contacts)
        self._departure = Departure(config, self._near, self._box)
        self._echoes = EchoDesk(me, self._near, self._holder, self._box)
        self._outlook = Outlook(
            config, self._near, self._election, self._holder, self._departure.pausing
        )
        self._leadership: Leadership | None = None
        self._followed = ("", 0)
        self._stats = WorkerStats()
        self._health = LocalHealth(config.timing)
        self._watch = WorkerWatch(config.timing)
        self._hung = False
        self._wanted = inf

    # --- the interface ----------------------------------------------------------------------------

    def handle(self, event: Input, now: float) -> list[Output]:
        """Take one input, at time `now`; returns what is to be done, in order.

        Inside, time is the node's awake time (`core/health`).
        """
        now = self._health.look(self._wanted, now)
        if not self._started:
            self._started = True
            self._start(now)
        for step in (self._take, self._look_around, self._look):
            if not self._stopped:
                step(event, now)
                self._settle(now)
        self._wanted = inf if self._stopped else self._health.told(self._deadline())
        return self._box.take()

    @property
    def deadline(self) -> float:
        """When `handle` next wants a `Ticked`, in the seconds of `now`."""
        return self._wanted if self._started else -inf

    def _deadline(self) -> float:
        return min(
            self._greeter.deadline,
            self._near.deadline,
            self._election.deadline,
            self._serving.deadline,
            self._departure.deadline,
            self._watch.deadline,
            self._leadership.deadline if self._leadership else inf,
        )

    @property
    def ready(self) -> bool:
        """Whether somebody leads and all who hold a part of the plan in force say they obey it."""
        return self._outlook.ready

    @property
    def waiting(self) -> str:
        """What a cluster that is not ready waits for; empty when it is ready."""
        return self._outlook.waiting(self._leadership)

    def status(self, now: float) -> dict[str, Any]:
        """The object of `status --json`."""
        own = self._own_heartbeat(self._health.awake(now))
        return self._outlook.status(own, self._stats, self._leadership)

    def plan_object(self, without: str = "") -> dict[str, Any]:
        """The object of `plan --json`, or of `plan --without NAME`; raises `ClusterError`."""
        return self._outlook.plan_object(without, self._leadership)

    # --- inputs -----------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        stored, config = self._config.stored, self._config
        table = self._near.table
        table.changed_at = now
        if stored is not None:
            self._near.cluster_id = stored.cluster_id
            self._election.resume(now)
            known = stored.plan.members if stored.plan else ()
            others = [m.address for m in known if m.node_id != self._me]
            self._greeter.come_back((*others, *config.join), now)
        elif config.join:
            self._greeter.join(now)
        elif config.model is None:
            self.fail(
                "a witness holds no model, so it cannot found a cluster: give it the address of "
                "a node with --join",
                2,
                now,
            )
        else:
            self._near.cluster_id = config.cluster_id
            self._election.found(config.cluster_id)

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
                self._watch.said(now)
                self._worker_said(event, now)
            case WorkerDied():
                self.fail(f"this node's worker died: {event.detail}", 1, now)
            case Persisted():
                self._durable.persisted(event.number, now)
            case PersistFailed():
                self.fail(f"the state of this node could not be written: {event.reason}", 1, now)
            case ClientSubmitted():
                self._serving.submit(event, self.waiting, now)
            case ClientCancelled():
                self._serving.cancelled(event, now)
            case ShutdownAsked():
                self._departure.leave(now)

    def _settle(self, now: float) -> None:
        """Handle messages to oneself until there are no more; follow whoever leads by then."""
        while not self._stopped:
            self._mind_the_leader(now)
            if not self._box.to_self:
                break
            self._member_said(self._box.to_self.popleft(), self._me, now)
        if self._leadership and not self._stopped:
            self._leadership.start(self._holder.obeyed)

    def _mind_the_leader(self, now: float) -> None:
        """Take up or lay down the office; tell the requests who leads."""
        election = self._election
        leader = (election.leader_id, election.term if election.leader_id else 0)
        if leader == self._followed:
            return
        self._followed = leader
        self._leadership = None
        # A plan ends with its leader's office, even where the next leader is known at once.
        self._holder.halt()
        if not election.leader_id:
            self._serving.leader_lost()
            return
        if election.leads:
            self._leadership = Leadership(
                self._config, election.term, self._durable, self._near, self._box, now=now
            )
            self._near.speak_soon(now)
        self._serving.leader_found(election.leader_id, election.term)

    def _look_around(self, _event: Input, now: float) -> None:
        """What time brings about among the members: silence, heartbeats, greetings, hangs."""
        self._look_at_worker(now)
        if self._stopped:
            return
        plan = self._durable.plan
        kept = [member.node_id for member in plan.members] if plan else []
        own = self._own_heartbeat(now)
        self._near.look(own, now, stretch=self._health.stretch, kept=kept)
        self._greeter.look(now)

    def _look_at_worker(self, now: float) -> None:
        hung, silence = self._watch.hung(now), self._watch.silence(now)
        if hung != self._hung:
            self._hung = hung
            self._box.add(WorkerHung(hung=hung, silence_s=silence))
            if hung:
                self._election.resign("its own worker hangs", now)
            self._near.speak_soon(now)
        if self._watch.given_up(now):
            self.fail(f"this node's worker has been hanging for {silence:.0f} s", 1, now)

    def _look(self, _event: Input, now: float) -> None:
        """What time, or what just happened, brings about for elections, plans and requests."""
        table = self._near.table
        if table.me.blank and not self._durable.blank and self._durable.state.cluster_id:
            table.me = replace(table.me, blank=False)
        draining = self._departure.draining
        self._election.look(
            ElectionView(
                members=table.members(),
                lost=table.lost_ids(),
                gone=tuple(p.member for p in table.everybody() if not p.living),
                able=self._holder.worker_ready
                and not self._hung
                and not draining
                and self._config.model is not None,
            ),
            now,
        )
        self._mind_the_leader(now)
        if self._leadership:
            self._leadership.look(
                self._holder.active,
                self._own_heartbeat(now),
                worker_ready=self._holder.worker_ready,
                now=now,
            )
        self._serving.look(
            ready=self.ready,
            waiting=self.waiting,
            leaderless=not self._election.leader_id and self._durable.plan is not None,
            now=now,
        )
        held = self._holder
        began = self._durable.plan is not None and held.worker_ready
        led = bool(self._election.leader_id)
        if self._departure.look(held.active, ready=self.ready, began=began, led=led, now=now):
            self.fail("", 0, now)

    def _own_heartbeat(self, now: float) -> Heartbeat:
        return self._near.heartbeat(
            self._holder.obeyed,
            self._stats,
            now,
            hung=self._hung,
            draining=self._departure.draining,
            paused=self._departure.pausing.paused,
        )

    @property
    def planned(self) -> bool:
        """Whether this node has accepted a plan of its cluster."""
        return self._durable.plan is not None

    def known_addresses(self) -> tuple[str, ...]:
        """Where members that are not there may come back: hints, no more."""
        return self._outlook.known_addresses(self._durable)

    # --- joining, leaving, losing -----------------------------------------------------------------

    def fail(self, error: str, exit_code: int, now: float) -> None:
        """Leave cluster and process: on request (`error` empty), or because there is no way on."""
        me = self._near.table.me
        self._serving.fail_all(
            "leaving", f"node {me.name} is leaving; submit through another node", now
        )
        leave = Leave(node_id=me.node_id, boot_id=me.boot_id, reason=error[:4096])
        for peer in self._near.table.living():
            self._box.send(peer.member.node_id, leave)
        self._departure.end(error)
        if self._departure.for_good and not error:
            self._durable.forget()
        self._box.order(StopWorker())
        self._box.add(Exit(error=error, exit_code=exit_code))
        self._stopped = True

    def _lost(self, peer: Peer, state: MemberState, reason: str, now: float) -> None:
        """What the loss of a member means: for the leadership, its units and its requests."""
        if self._leadership:
            self._leadership.lost(peer, now)
        self._election.lost(peer.member.node_id, reason, now)
        self._departure.lost(peer.member, state, ended=reason == REFUSES)

    # --- the worker -------------------------------------------------------------------------------

    def _worker_said(self, event: WorkerSaid, now: float) -> None:
        match event.report:
            case WorkerReady() as report:
                self._worker_started(report, now)
            case WorkerFailed() as report:
                self.fail(report.message, 2 if report.usage else 1, now)
            case LoadProgress():
                self._watch.loading = True
            case PlanLoaded() as report:
                self._watch.loading = False
                self._holder.loaded(report)
            case StandbysLoaded() as report:
                self._holder.standbys_loaded(report)
            case TokensCommitted() | FenceSettled() | RequestEnded() | GaveWay() as report:
                if self._leadership:
                    self._leadership.reported(report, now)
            case StepFailed() as report:
                self._step_failed(report, now)
            case LinkLost() as report:
                if peer := self._near.table.get(report.node_id):
                    self._near.doubt(peer, "its step link broke")
            case EchoesMeasured() as report:
                self._echoes.measured(report, now)
            case report:
                self._stats = report

    def _worker_started(self, report: WorkerReady, now: float) -> None:
        """Now it is known how this node computes: tell all whom it has greeted, answered or not."""
        table = self._near.table
        me = described(table.me, report, weighed=self._config.weighed)
        if me != table.me:
            table.me = me
            for address in self._near.links.connected():
                self._greeter.greet(address, now)
        self._holder.worker_started()

    def _step_failed(self, report: StepFailed, now: float) -> None:
        """The leader begins a new epoch; any other node tells the leader."""
        peer = self._near.table.get(report.node_id)
        who = f" ({peer.member.name})" if peer else ""
        why = f"step {report.step} failed{who}: {report.reason}"
        if not self._holder.broke_off(report.fence):
            return
        if self._leadership:
            self._leadership.own_step_failed(report, why, now)
        else:
            assert self._election.leader_id, "a plan ends with its leader's office"
            nack = Nack(
                fence=report.fence,
                node_id=self._me,
                code="internal",
                message=why[:4096],
                about=report.node_id,
            )
            self._box.send(self._election.leader_id, nack)
        if peer:
            self._near.doubt(peer, "a step waited for it")

    # --- messages ---------------------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> None:
        sender = self._near.sender(event.route)
        match event.message:
            case Welcome() as message if event.link:
                self._greeter.welcomed(message, event.link, now)
            case Refused() as message if event.link:
                self._greeter.refused(message, event.link, now)
            case Hello() as message if event.route:
                self._greeter.greeted(message, event.route, now)
            case Cancel(reason="client") as message if event.route and not sender:
                self._serving.cancelled(ClientCancelled(request_id=message.request_id), now)
            case Drain() | Pause() as message if event.route and not sender:
                self._departure.asked(message, event.route, now)
            case MeasureLink() as message if event.route and not sender:
                self._echoes.asked(message, event.route, now)
            case message if sender:
                self._member_said(message, sender, now)
            case message:
                self._stranger_said(message, event.route)

    def _stranger_said(self, message: ControlMessage, route: bytes) -> None:
        """Somebody takes us for a fellow member."""
        self._near.drop(message, "its sender is no member")
        if isinstance(message, Heartbeat) and route:
            self._greeter.unknown(route)

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
            case Propose() if message.plan.members[message.plan.leader].node_id == sender:
                if self._election.follow(sender, message.plan.fence.term, now):
                    self._mind_the_leader(now)
                    self._holder.propose(message, self._near.cluster_id, sender, now)
            case LogRequest() if leading:
                self._holder.log_request(message, sender)
            case LogEntry():
                # The leader's own entries to itself are for both sides of it.
                if leading:
                    self._holder.log_entry(message)
                if self._leadership:
                    self._leadership.said(message, sender, now)
            case Activate() if leading:
                self._activate(message, now)
            case Drawn() if leading:
                self._serving.drawn(message, now)
            case Ended() if leading:
                self._serving.ended(message, now)
            case PreVoteRequest() | PreVoteReply() | VoteRequest() | VoteReply():
                self._election.handle(message, sender, now)
            case Drain() | Pause():
                self._departure.told(message, now)
            case _ if not (self._leadership and self._leadership.said(message, sender, now)):
                self._near.drop(message, "it is not for its sender to say, or not to this node")

    def _activate(self, message: Activate, now: float) -> None:
        listeners = self._leadership.maker.listeners if self._leadership else ()
        self._holder.activate(message, now, listeners)

    def _heard(self, heartbeat: Heartbeat, now: float) -> None:
        if self._near.heard(heartbeat, now):
            self._election.heard(heartbeat, now)
            if self._leadership:
                self._leadership.heard(heartbeat, now)
