"""How a node obeys plans: PROPOSE makes it load, ACK says that it has, ACTIVATE puts it in force.

Fences only grow. A plan is acknowledged when its units are loaded and it is on the disk, and comes
into force only with the very token logs that ACTIVATE names: what a node lacks of them the leader
sends before. What the leader sends twice (an answer may be lost) is answered twice and done once.
The leader's own node obeys by the same code: its messages to itself come in here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from p2pinfer.core.agreement import digest, summary
from p2pinfer.core.durable import Durable
from p2pinfer.core.events import (
    ActivatePlan,
    FrameDropped,
    Halt,
    LoadPlan,
    PlanAdopted,
    PlanFailed,
    PlanLoaded,
    Recompute,
    StandbysLoaded,
    StandbysReady,
    TokenLog,
)
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.planner import validate
from p2pinfer.core.proposal import owners
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Fence, Member, ModelSpec, Plan
from p2pinfer.wire.messages import (
    Ack,
    Activate,
    AgreedLog,
    CoverageRun,
    InputsRun,
    LogEntry,
    LogRequest,
    Nack,
    Propose,
)


@dataclass(slots=True)
class _Pending:
    """A plan being made ready: what of it is done, and the log entries that came for it."""

    plan: Plan
    index: int
    heard_at: float
    stored: bool = False
    report: PlanLoaded | None = None
    entries: dict[int, LogEntry] = field(default_factory=dict)

    def log(self, request_id: int) -> TokenLog | None:
        """This node's own log of a request, as it stood when the worker stopped."""
        assert self.report is not None
        return next((log for log in self.report.logs if log.request_id == request_id), None)


class PlanHolder:
    """The plan in force here (`active`) and the one being made ready (`pending`).

    `model` is None for a witness, which owns nothing: its worker only writes logs. `durable.plan`
    is what this node has accepted; after a restart nothing of it is loaded, so none is active.
    """

    def __init__(self, me: Member, model: ModelSpec | None, durable: Durable, box: Outbox) -> None:
        self.active: Plan | None = None
        self.worker_ready = False
        self._broken = False
        self._next: _Pending | None = None
        self._refusal: Nack | None = None
        self._me = me
        self._model = model
        self._durable = durable
        self._box = box

    @property
    def pending(self) -> Plan | None:
        """The plan being made ready, or acknowledged and not yet in force."""
        return self._next.plan if self._next else None

    @property
    def obeyed(self) -> Fence:
        """The fence of the plan in force; (0, 0) while there is none, the next one loads, or a step
        has failed here: then the worker obeys it no more."""
        if self.active is None or self._next or self._broken:
            return Fence()
        return self.active.fence

    # --- making ready -----------------------------------------------------------------------------

    def propose(self, message: Propose, cluster_id: str, sender: str, now: float) -> None:
        """The leader proposes a plan: check it and make ready. `cluster_id` is this node's."""
        plan = message.plan
        if self._next and plan.fence == self._next.plan.fence:
            self._acknowledge(self._next)
        elif self._refusal and plan.fence == self._refusal.fence:
            self._box.send(sender, self._refusal)
        elif plan.fence == self.obeyed:
            pass  # Sent again before our ACK had come.
        elif problem := self._objection(plan, cluster_id, sender):
            self._box.add(FrameDropped(reason=f"PROPOSE: {problem}"))
        else:
            self._accept(plan, cluster_id, now)

    def _objection(self, plan: Plan, cluster_id: str, sender: str) -> str:
        """Why a plan is none of this node's; empty: it is."""
        known, term = self._durable.fence, self._durable.state.term
        if plan.leader >= len(plan.members) or plan.members[plan.leader].node_id != sender:
            return "it names a leader that its sender is not"
        if plan.cluster_id != cluster_id:
            return f"it is of cluster {plan.cluster_id}"
        if plan.fence.term < term:
            return f"its term {plan.fence.term} is over, the term is {term}"
        if plan.fence <= known:
            return f"its fence {_text(plan.fence)} is not above {_text(known)}"
        return "" if self._index(plan) is not None else "this life of the node has no place in it"

    def _accept(self, plan: Plan, cluster_id: str, now: float) -> None:
        index = self._index(plan)
        assert index is not None
        self._refusal = None
        try:
            validate(plan)
            self._check_model(plan)
        except RemoteProtocolError as error:
            self.halt()
            self._refuse(plan, str(error))
            return
        self._next = _Pending(plan, index, now)
        if self.worker_ready:
            self._box.order(LoadPlan(plan=plan, me=index))
        self._durable.accept(plan, cluster_id, partial(self._stored, plan.fence))

    def _check_model(self, plan: Plan) -> None:
        ours, theirs = self._model, plan.model
        if ours is None:
            return
        mine = (ours.model_id, ours.dtype, ours.quant, ours.wire_dtype)
        if mine != (theirs.model_id, theirs.dtype, theirs.quant, theirs.wire_dtype):
            raise RemoteProtocolError(
                f"the plan is for model {theirs.name} (id {theirs.model_id[:12]}…) as "
                f"{theirs.dtype}, {theirs.quant}, sums in {theirs.wire_dtype}; {self._me.name} "
                f"has {ours.name} (id {ours.model_id[:12]}…) as {ours.dtype}, {ours.quant}, "
                f"sums in {ours.wire_dtype}"
            )

    def worker_started(self) -> None:
        """The worker can take orders; a plan may be waiting for it."""
        self.worker_ready = True
        if self._next:
            self._box.order(LoadPlan(plan=self._next.plan, me=self._next.index))

    def loaded(self, report: PlanLoaded) -> None:
        """The worker has loaded a plan, or failed to."""
        if self._next is None or report.fence != self._next.plan.fence:
            return
        if report.error:
            self._refuse(self._next.plan, report.error)
            return
        self._next.report = report
        self._acknowledge(self._next)

    def standbys_loaded(self, report: StandbysLoaded) -> None:
        """The worker has what this node keeps for others by the plan in force, or says why not."""
        self._box.add(
            StandbysReady(
                fence=report.fence,
                units=report.units,
                units_warm=report.units_warm,
                weight_bytes=report.weight_bytes,
                reason=report.reason,
                error=report.error,
            )
        )

    def _stored(self, fence: Fence, _now: float) -> None:
        """The plan of that fence is on the disk."""
        if self._next and self._next.plan.fence == fence:
            self._next.stored = True
            self._acknowledge(self._next)

    def _acknowledge(self, pending: _Pending) -> None:
        """Say that the plan is ready here, if it is."""
        plan, report = pending.plan, pending.report
        if report is None or not pending.stored:
            return
        ack = Ack(
            fence=plan.fence,
            node_id=self._me.node_id,
            logs=tuple(summary(log) for log in report.logs),
            coverage=tuple(_coverage(plan, report)),
            inputs=tuple(
                InputsRun(request_id=each.request_id, stage=each.stage, positions=each.positions)
                for each in report.inputs
            ),
        )
        self._box.send(plan.members[plan.leader].node_id, ack)

    def _refuse(self, plan: Plan, reason: str) -> None:
        """This node cannot hold its part. It obeys no plan until the leader proposes another."""
        self.active, self._next = None, None
        self._box.add(PlanFailed(fence=plan.fence, reason=reason))
        self._refusal = Nack(
            fence=plan.fence, node_id=self._me.node_id, code="internal", message=reason[:4096]
        )
        self._box.send(plan.members[plan.leader].node_id, self._refusal)

    # --- the logs ---------------------------------------------------------------------------------

    def log_request(self, message: LogRequest, sender: str) -> None:
        """The leader lacks the tokens of logs that this node acknowledged with."""
        pending = self._next
        if pending is None or pending.report is None or message.fence != pending.plan.fence:
            self._box.add(FrameDropped(reason=f"LOG_REQUEST of {_text(message.fence)}, not ready"))
            return
        for request_id in message.request_ids:
            if log := pending.log(request_id):
                entry = LogEntry(
                    fence=message.fence,
                    request_id=request_id,
                    term=log.term,
                    prompt_tokens=log.prompt_tokens,
                    params=log.params,
                    tokens=log.tokens,
                )
                self._box.send(sender, entry)

    def log_entry(self, message: LogEntry) -> None:
        """The leader sends what this node lacks of a log, ahead of ACTIVATE."""
        pending = self._next
        if pending and pending.report and message.fence == pending.plan.fence:
            pending.entries[message.request_id] = message

    def _matching(self, pending: _Pending, agreed: AgreedLog) -> TokenLog | None:
        """The log agreed on, made of what this node has and what came; None: that is not it."""
        own, entry = pending.log(agreed.request_id), pending.entries.get(agreed.request_id)
        for source, tokens in _versions(own, entry):
            kept = tokens[: agreed.length]
            if len(kept) == agreed.length and digest(kept) == agreed.digest:
                return TokenLog(
                    request_id=agreed.request_id,
                    term=pending.plan.fence.term,
                    prompt_tokens=source.prompt_tokens,
                    params=source.params,
                    tokens=kept,
                )
        return None

    # --- in force ---------------------------------------------------------------------------------

    def activate(self, message: Activate, now: float, listeners: tuple[int, ...] = ()) -> None:
        """The leader puts the loaded plan in force; a repetition changes nothing.

        `listeners` are known on the leader's own node only: the members that take part in steps.
        """
        pending = self._next
        ready = pending is not None and pending.report is not None and pending.stored
        if pending is None or not ready or message.fence != pending.plan.fence:
            if message.fence != self.obeyed:
                self._drop_activate(message.fence, "it is not loaded here")
            return
        logs = []
        for agreed in message.logs:
            log = self._matching(pending, agreed)
            if log is None:
                self._drop_activate(message.fence, f"the log of request {agreed.request_id} lacks")
                return
            logs.append(log)
        plan = pending.plan
        self.active, self._next, self._broken = plan, None, False
        self._durable.activated(plan.fence)
        self._box.order(
            ActivatePlan(
                fence=plan.fence,
                logs=tuple(logs),
                recomputes=tuple(_recomputes(message)),
                listeners=listeners,
                computed={agreed.request_id: agreed.restart for agreed in message.logs},
            )
        )
        self._box.add(
            PlanAdopted(
                fence=plan.fence,
                members=tuple(member.name for member in plan.members),
                leader=plan.members[plan.leader].name,
                voters=tuple(plan.members[index].name for index in plan.voters),
                owners=tuple(member.name for member in owners(plan)),
                agree_s=now - pending.heard_at,
            )
        )

    def _drop_activate(self, fence: Fence, why: str) -> None:
        self._box.add(FrameDropped(reason=f"ACTIVATE of {_text(fence)}: {why}"))

    def broke_off(self, fence: Fence) -> bool:
        """A step of the plan in force failed on this node's worker; false: of another plan.

        This node's heartbeats tell it too: what it sends to the leader may be lost.
        """
        if self.active is None or fence != self.obeyed:
            return False
        self._broken = True
        return True

    def halt(self) -> None:
        """Nobody leads any more, as far as this node knows: steps end, logs and KV stay.

        A plan that is being made ready stays so: if its leader led on after all, it may activate
        it; no other leader can.
        """
        if self.active and not self._next:
            self._box.order(Halt())
        self.active = None

    def _index(self, plan: Plan) -> int | None:
        identity = (self._me.node_id, self._me.boot_id)
        for index, member in enumerate(plan.members):
            if (member.node_id, member.boot_id) == identity:
                return index
        return None


def _coverage(plan: Plan, report: PlanLoaded) -> Iterator[CoverageRun]:
    """What the worker has of the KV of head units, its own and those it is a standby of."""
    for covered in report.coverage:
        assert covered.stage < len(plan.stages), "the worker goes by the plan's stages"
        assert max(covered.units) < len(plan.stages[covered.stage].head_owners), "and its units"
        yield CoverageRun(
            request_id=covered.request_id,
            stage=covered.stage,
            units=covered.units,
            positions=covered.positions,
        )


def _recomputes(message: Activate) -> Iterator[Recompute]:
    """The requests of which any owner makes KV of inputs."""
    for agreed in message.logs:
        if agreed.recompute:
            yield Recompute(
                request_id=agreed.request_id, position=agreed.restart, rows=agreed.recompute
            )


def _versions(
    own: TokenLog | None, entry: LogEntry | None
) -> Iterator[tuple[TokenLog | LogEntry, tuple[int, ...]]]:
    """What a node may have of a log, and who says so: with the leader's tail, and without."""
    if entry:
        head = own.tokens[: entry.start] if own else ()
        if len(head) == entry.start:
            yield entry, head + entry.tokens
    if own:
        yield own, own.tokens


def _text(fence: Fence) -> str:
    return f"({fence.term}, {fence.epoch})"
