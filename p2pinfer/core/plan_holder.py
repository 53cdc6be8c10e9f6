"""How a node obeys plans: PROPOSE makes it load, ACK says that it has, ACTIVATE puts it in force.

Fences only grow. What the leader sends twice (because an answer may be lost) is answered twice and
done once. The leader's own node obeys by the same code: its messages to itself come in here too.
"""

from __future__ import annotations

from p2pinfer.core.events import (
    ActivatePlan,
    FrameDropped,
    LoadPlan,
    PlanAdopted,
    PlanFailed,
    PlanLoaded,
)
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.planner import validate
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Fence, Member, ModelSpec, Plan
from p2pinfer.wire.messages import Ack, Activate, Nack, Propose


class PlanHolder:
    """The plan in force here (`active`) and the one being made ready (`pending`).

    `model` is None for a witness, which holds nothing and has no worker to ask.
    """

    def __init__(self, me: Member, model: ModelSpec | None, box: Outbox) -> None:
        self.active: Plan | None = None
        self.pending: Plan | None = None
        self.worker_ready = model is None
        self._highest = Fence()
        self._loaded = False
        self._me = me
        self._model = model
        self._box = box

    @property
    def obeyed(self) -> Fence:
        """The fence of the plan in force, or (0, 0) while there is none or the next one loads."""
        return self.active.fence if self.active and not self.pending else Fence()

    def propose(self, message: Propose, cluster_id: str, leader_id: str) -> None:
        """The leader proposes a plan: check it and make ready."""
        plan = message.plan
        if self.pending and plan.fence == self.pending.fence:
            if self._loaded:
                self._acknowledge(plan)
            return
        if plan.fence <= self._highest:
            self._drop(f"its fence {_text(plan.fence)} is not above {_text(self._highest)}")
        elif plan.cluster_id != cluster_id:
            self._drop(f"it is of cluster {plan.cluster_id}")
        elif plan.leader >= len(plan.members) or plan.members[plan.leader].node_id != leader_id:
            self._drop("it names a leader that its sender is not")
        elif self._index(plan) is None:
            self._highest, self.active, self.pending = plan.fence, None, None
            self._drop("this node has no place in it")
        else:
            self._accept(plan)

    def _accept(self, plan: Plan) -> None:
        self._highest, self.pending, self._loaded = plan.fence, plan, False
        try:
            validate(plan)
            self._check_model(plan)
        except RemoteProtocolError as error:
            self._refuse(plan, str(error))
            return
        if self._model is None:
            self._acknowledge(plan)
        elif self.worker_ready:
            self._load(plan)

    def _check_model(self, plan: Plan) -> None:
        ours, theirs = self._model, plan.model
        if ours is None:
            return
        mine = (ours.model_id, ours.dtype, ours.quant)
        if mine != (theirs.model_id, theirs.dtype, theirs.quant):
            raise RemoteProtocolError(
                f"the plan is for model {theirs.name} (id {theirs.model_id[:12]}…) as "
                f"{theirs.dtype}, {theirs.quant}; {self._me.name} has {ours.name} "
                f"(id {ours.model_id[:12]}…) as {ours.dtype}, {ours.quant}"
            )

    def worker_started(self) -> None:
        """The worker can take orders; a plan may be waiting for it."""
        self.worker_ready = True
        if self.pending:
            self._load(self.pending)

    def loaded(self, report: PlanLoaded) -> None:
        """The worker has loaded a plan, or failed to."""
        plan = self.pending
        if plan is None or report.fence != plan.fence:
            return
        if report.error:
            self._refuse(plan, report.error)
        else:
            self._acknowledge(plan)

    def activate(self, message: Activate) -> None:
        """The leader puts the loaded plan in force; a repetition changes nothing."""
        plan = self.pending
        if plan is None or message.fence != plan.fence or not self._loaded:
            if message.fence != self.obeyed:
                self._box.add(
                    FrameDropped(reason=f"ACTIVATE of {_text(message.fence)}, not loaded here")
                )
            return
        self.active, self.pending = plan, None
        if self._model is not None:
            self._box.order(ActivatePlan(fence=plan.fence))
        names = tuple(member.name for member in plan.members)
        self._box.add(PlanAdopted(fence=plan.fence, members=names))

    def forget(self) -> None:
        """The cluster is gone for this node, and its fences with it."""
        self.active = self.pending = None
        self._highest = Fence()

    def _index(self, plan: Plan) -> int | None:
        identity = (self._me.node_id, self._me.boot_id)
        for index, member in enumerate(plan.members):
            if (member.node_id, member.boot_id) == identity:
                return index
        return None

    def _load(self, plan: Plan) -> None:
        index = self._index(plan)
        assert index is not None
        self._box.order(LoadPlan(plan=plan, me=index))

    def _acknowledge(self, plan: Plan) -> None:
        self._loaded = True
        leader = plan.members[plan.leader].node_id
        self._box.send(leader, Ack(fence=plan.fence, node_id=self._me.node_id))

    def _refuse(self, plan: Plan, reason: str) -> None:
        """This node cannot hold its part. It obeys no plan until the leader proposes another."""
        self.active = self.pending = None
        self._box.add(PlanFailed(fence=plan.fence, reason=reason))
        nack = Nack(
            fence=plan.fence, node_id=self._me.node_id, code="internal", message=reason[:4096]
        )
        self._box.send(plan.members[plan.leader].node_id, nack)

    def _drop(self, reason: str) -> None:
        self._box.add(FrameDropped(reason=f"PROPOSE: {reason}"))


def _text(fence: Fence) -> str:
    return f"({fence.term}, {fence.epoch})"
