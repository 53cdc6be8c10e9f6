"""Echoes over a step link: how long a frame takes to a member and back, when a client asks.

They go over the very sockets that steps use, and only while the node has no step in hand: a step
never waits for more than one of them. What met a step all the same is told apart and does not
count. One run at a time on each node, and after it a pause as long as it was: a client may learn
how fast links are, and not keep them busy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import inf

from p2pinfer.core.events import ReplyTo
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.orders import EchoesMeasured, MeasureEchoes
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_holder import PlanHolder
from p2pinfer.limits import MAX_ECHO_RUN_BYTES
from p2pinfer.types import Member
from p2pinfer.wire.messages import EchoReply, EchoRequest, MeasureLink, StatusReply

ECHO_S = 2.0
"""An echo that is not back by then is lost: a frame that is never sent again, or a long step."""

RUN_S = 8.0
"""A run that is not over by then reports what it has: the node may have steps without a pause."""

GRACE_S = 2.0
"""So much later the control plane waits for its worker's report no more, nor does a client."""


@dataclass
class _Asked:
    message: MeasureLink
    route: bytes
    began: float


class EchoDesk:
    """The control plane's side: who may ask, and the answer. Times in seconds."""

    def __init__(self, me: Member, near: Neighbours, holder: PlanHolder, box: Outbox) -> None:
        self._me = me
        self._near = near
        self._holder = holder
        self._box = box
        self._asked: _Asked | None = None
        self._free_at = -inf

    def asked(self, message: MeasureLink, route: bytes, now: float) -> None:
        """A client wants the step link to a member measured."""
        plan = self._holder.active
        if plan is None or self._holder.obeyed != plan.fence:
            reason = "no plan is in force: there are no step links"
            self._box.refuse(route, message.request_id, "not_ready", reason)
            return
        others = {
            member.name: index
            for index, member in enumerate(plan.members)
            if member.node_id != self._me.node_id and self._near.table.is_living(member)
        }
        filler = message.count * (message.there + message.back)
        if message.name not in others:
            names = ", ".join(sorted(others)) or "none"
            reason = f"{self._me.name} has no link to {message.name}; it has to: {names}"
            self._box.refuse(route, message.request_id, "invalid_request", reason)
        elif filler > MAX_ECHO_RUN_BYTES:
            reason = f"{filler} bytes are more than the {MAX_ECHO_RUN_BYTES} of one run"
            self._box.refuse(route, message.request_id, "invalid_request", reason)
        elif self._busy(now):
            reason = "links are being measured, or were just now; ask again"
            self._box.refuse(route, message.request_id, "overloaded", reason)
        else:
            self._asked = _Asked(message, route, now)
            self._box.order(
                MeasureEchoes(
                    run=message.request_id,
                    member=others[message.name],
                    there=message.there,
                    back=message.back,
                    count=message.count,
                )
            )

    def measured(self, report: EchoesMeasured, now: float) -> None:
        """The worker is done with a run; one that nobody waits for any more is ignored."""
        asked = self._asked
        if asked is None or asked.message.request_id != report.run:
            return
        self._asked = None
        self._free_at = now + (now - asked.began)
        body = {
            "from": self._me.name,
            "to": asked.message.name,
            "there_bytes": asked.message.there,
            "back_bytes": asked.message.back,
            "asked": asked.message.count,
            "round_trips_ms": [round(1000 * seconds, 4) for seconds in report.round_trips_s],
            "disturbed": report.disturbed,
            "lost": report.lost,
        }
        reply = StatusReply(request_id=report.run, body=json.dumps(body).encode())
        self._box.add(ReplyTo(route=asked.route, message=reply))

    def _busy(self, now: float) -> bool:
        if self._asked is not None:
            return now < self._asked.began + RUN_S + GRACE_S
        return now < self._free_at


@dataclass
class _Run:
    """A run in hand. `number` is that of the echo on its way, sent at `sent_at`; inf: none is."""

    order: MeasureEchoes
    until: float
    number: int = 0
    sent_at: float = inf
    disturbed_now: bool = False
    trips: list[float] = field(default_factory=list)
    disturbed: int = 0
    lost: int = 0

    @property
    def over(self) -> bool:
        return len(self.trips) + self.disturbed + self.lost >= self.order.count


class Echoes:
    """The worker's side: one run of its own, and what others ask of it. Times in seconds.

    Members are indices into the plan in force. Only whoever has no step in hand asks for `next` and
    for the answers that are `due`.
    """

    def __init__(self) -> None:
        self._run: _Run | None = None
        self._last = 0
        self._due: dict[int, EchoReply] = {}

    # --- one's own --------------------------------------------------------------------------------

    def begin(self, order: MeasureEchoes, now: float) -> None:
        """A run is ordered; it takes the place of one in hand."""
        self._run = _Run(order, now + RUN_S)

    def next(self) -> tuple[int, EchoRequest] | None:
        """The next echo and the member it goes to; None while one is on its way, or none is wanted.

        To be followed by `sent`.
        """
        run = self._run
        if run is None or run.over or run.sent_at < inf:
            return None
        self._last = run.number = (self._last + 1) % (1 << 32)
        order = run.order
        return order.member, EchoRequest(
            number=run.number, back=order.back, filler=bytes(order.there)
        )

    def sent(self, taken: bool, now: float) -> None:
        """The echo of `next` is on its way since `now`, or the link did not take it."""
        assert self._run is not None, "an echo was sent"
        if taken:
            self._run.sent_at, self._run.disturbed_now = now, False
        else:
            self._run.lost += 1

    def replied(self, member: int, reply: EchoReply, now: float) -> bool:
        """An answer has come; returns whether it is that of the echo on its way."""
        run = self._run
        if run is None or run.sent_at == inf:
            return False
        if (member, reply.number, len(reply.filler)) != (
            run.order.member,
            run.number,
            run.order.back,
        ):
            return False
        if run.disturbed_now or reply.late:
            run.disturbed += 1
        else:
            run.trips.append(now - run.sent_at)
        run.sent_at = inf
        return True

    def disturb(self) -> None:
        """A step begins: the echo on its way may wait for it."""
        if self._run is not None:
            self._run.disturbed_now = True

    def done(self, now: float) -> EchoesMeasured | None:
        """The report of a run that is over, once."""
        run = self._run
        if run is None:
            return None
        if now - run.sent_at >= ECHO_S:
            run.lost += 1
            run.sent_at = inf
        if not run.over and now < run.until:
            return None
        self._run = None
        return EchoesMeasured(
            run=run.order.run,
            round_trips_s=tuple(run.trips),
            disturbed=run.disturbed,
            lost=run.lost,
        )

    # --- others' ----------------------------------------------------------------------------------

    def asked(self, member: int, request: EchoRequest, *, late: bool) -> None:
        """A member wants an answer; of one member only the last question counts. `late`: a step is
        in hand."""
        self._due[member] = EchoReply(number=request.number, late=late, filler=bytes(request.back))

    def due(self) -> list[tuple[int, EchoReply]]:
        """The answers to send now, and to whom."""
        due, self._due = list(self._due.items()), {}
        return due

    def close(self, now: float) -> None:
        """The plan ends, and with it what its members are called: nothing more is asked or
        answered, and the run in hand reports what it has."""
        self._due = {}
        if self._run is not None:
            self._run.until = now
            self._run.sent_at = inf
