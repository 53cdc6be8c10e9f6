"""Keeps replicas up to date under one plan: sends what steps have written, takes what others send.

All of it happens between two steps, after what steps need, and in portions that a running reply
does not notice. What does not fit into one step's portion follows after the next ones; a request's
positions that wait together go in one frame. While no step runs there is more room.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from p2pinfer.bulk_links import BulkLinks
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.replication import Feed, Piece, Replicas, computed_units, fed_units
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_STANDBY_LAG
from p2pinfer.types import DType, Plan
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest, LinkOpen, Slot, Step
from p2pinfer.wire.tensors import Tensor, WireDType

STEP_BYTES = 1 << 20
"""Read, and as many sent in answers, between two steps."""

STEP_FRAMES = 16
"""Sent of what finished steps have written, between two steps: more requests take turns."""

SEND_EVERY_S = 0.05
"""What steps write in that time goes together: a frame costs more than the few rows of a fast step,
and to compute these again costs a standby that takes over nothing but one small step. Two tokens of
30 milliseconds still are one pair of rows, which quantised products take as long for as for one."""

SEND_ROWS = MAX_STANDBY_LAG // 2
"""As soon as so many positions of a request wait they go out: standbys of fast steps must not seem
unable to take over."""

SLOW_STEP_S = 0.02
"""A step that takes longer leaves room for more in proportion."""

LEAST_BYTES = 16 << 10
"""What a frame that was read counts for at least: a small one takes more than its bytes' time."""

IDLE_AFTER_S = 0.05
"""Without a step for so long nobody is kept waiting."""

IDLE_ROOM = 8
"""So many times as much is done at once then: orders and steps are looked at in between."""

ASK_EVERY_S = 0.02

DRAIN_S = 0.2
"""At most so long is read what came under a plan that is left: nobody may hold up the next."""

KV_DTYPES = {
    DType.FLOAT32: WireDType.FLOAT32,
    DType.BFLOAT16: WireDType.BFLOAT16,
    DType.FLOAT16: WireDType.FLOAT16,
}


class KvStore(Protocol):
    """Where the KV of this node's units lies."""

    def read_kv(self, unit: KvUnit, request_id: int, start: int, end: int) -> Tensor:
        """[layers, 2, end - start, head_dim] of an open request."""

    def write_kv(self, unit: KvUnit, request_id: int, start: int, tensor: Tensor) -> bool:
        """Write such rows; False: the request is not open here."""


def partners(plan: Plan, me: int) -> frozenset[int]:
    """The members (indices) that send delta KV to a member, or get it."""
    found = set(fed_units(plan, me).values())
    for unit, number in computed_units(plan, me).items():
        copies = plan.stages[number].head_standbys
        found.update(copies[unit.unit] if copies else ())
    return frozenset(found)


class Replicator:
    """One node's part under one plan; `links` are those to its `partners`, in force.

    `computed` says by request how many positions all owners have as it begins.
    """

    def __init__(
        self,
        mine: Topology,
        store: KvStore,
        links: BulkLinks,
        logs: TokenLogs,
        computed: Mapping[int, int],
    ) -> None:
        self._plan = mine.plan
        self._me = mine.me
        self._store = store
        self._links = links
        self._logs = logs
        self._feed = Feed(mine.plan, mine.me, logs)
        self._replicas = Replicas(mine.plan, mine.me, logs)
        self._replicas.began(computed, time.monotonic())
        self._alone = not partners(mine.plan, mine.me)
        self._dtype = KV_DTYPES[mine.plan.model.kv_dtype]
        self._unsent: dict[int, Slot] = {}
        """By request: a run of positions that finished steps have written, oldest first."""
        self._halted = self._held = False
        self._began = 0.0
        self._stepped = 0.0
        self._sent = 0.0
        self._asked = 0.0
        self._frames = STEP_FRAMES
        self._to_read = self._to_answer = STEP_BYTES

    @property
    def has_room(self) -> bool:
        """Whether a frame that arrives now would be read before the next step."""
        return self._to_read > 0 and not self._alone and not self._held

    @property
    def lacking(self) -> int:
        """Positions that replicas here lack, over all requests and units."""
        return self._replicas.lacking

    @property
    def behind(self) -> int:
        """Positions that the replica here lacks that lacks the most of a request."""
        return self._replicas.behind

    # --- steps ------------------------------------------------------------------------------------

    def stepped(self, step: Step) -> None:
        """A step begins, and its tokens are written down."""
        self._began = self._stepped = time.monotonic()
        self._replicas.forget(step.ended)
        self._replicas.stepped(step.slots, self._began)

    def finished(self, step: Step) -> None:
        """This node has done its part of a step: what it wrote is to be sent."""
        if self._feed.standbys and not self._held:
            for slot in step.slots:
                before = self._unsent.get(slot.request_id)
                self._unsent[slot.request_id] = _joined(before, slot) if before else slot
        self._stepped = time.monotonic()
        self._refill(max(1.0, (self._stepped - self._began) / SLOW_STEP_S))

    def halt(self) -> None:
        """No more steps: only what still comes is read."""
        self._halted = True

    def hold(self, held: bool) -> None:
        """Do as without partners for as long as `held`: nothing is sent, read, answered or asked.

        What steps write meanwhile is not sent later: standbys ask for it when that is over.
        """
        self._held = held
        if held:
            self._unsent.clear()

    def _refill(self, times: float) -> None:
        self._frames = int(times * STEP_FRAMES)
        self._to_read = self._to_answer = int(times * STEP_BYTES)

    # --- between steps ----------------------------------------------------------------------------

    def turn(self) -> bool:
        """Send, read, answer and ask, as far as there is room; returns whether there was any of it
        to do. Without partners that is nothing while steps run, and while it is held nothing."""
        if self._held:
            return False
        now = time.monotonic()
        idle = now >= self._stepped + IDLE_AFTER_S
        if idle:
            self._refill(IDLE_ROOM)
        elif self._alone:
            return False
        for member in self._links.begun():
            self._relink(member)
        if self._halted:
            return self._read(now)
        due = idle or now >= self._sent + SEND_EVERY_S
        due = due or any(len(slot.tokens) >= SEND_ROWS for slot in self._unsent.values())
        sent = due and self._send_finished(now)
        read = self._read(now)
        answered = self._answer()
        if now >= self._asked + ASK_EVERY_S:
            self._asked = now
            for owner, question in self._replicas.asks(now):
                self._links.send(owner, question)
        for owner, credit in tuple(self._replicas.grants()):
            if not self._links.send(owner, credit):
                self._replicas.ungranted(owner, credit)
        return sent or read or answered

    def drain(self) -> None:
        """Take all that has come under the plan, which is being left."""
        deadline = time.monotonic() + DRAIN_S
        while (now := time.monotonic()) < deadline:
            self._to_read = STEP_BYTES
            if not self._read(now):
                return

    def _relink(self, member: int) -> None:
        self._feed.relinked(member)
        self._replicas.relinked(member)

    # --- the owner's side -------------------------------------------------------------------------

    def _send_finished(self, now: float) -> bool:
        some = bool(self._unsent) and self._frames > 0
        while self._unsent and self._frames > 0:
            slot = self._unsent.pop(next(iter(self._unsent)))
            for piece in self._feed.finished((slot,)):
                self._frames -= 1
                self._send(piece)
        if some and not self._unsent:
            self._sent = now
        return some

    def _answer(self) -> bool:
        some = False
        for piece in self._feed.answers(self._to_answer):
            some = True
            self._to_answer -= self._send(piece)
        return some

    def _send(self, piece: Piece) -> int:
        """Send a piece; returns its bytes, 0 when its link does not take it."""
        frame = self._frame(piece) if self._links.ready(piece.member) else None
        if frame is None or not self._links.send(piece.member, frame):
            self._feed.unsent(piece)
            return 0
        return frame.tensor.nbytes

    def _frame(self, piece: Piece) -> KvDelta:
        digest = self._logs.digest(piece.request_id, piece.end)
        assert digest is not None, "what has its KV has its tokens"
        return KvDelta(
            fence=self._plan.fence,
            step=0,
            link_seq=self._links.next_number(piece.member),
            sender=self._me,
            request_id=piece.request_id,
            stage=self._feed.stage_of(piece.unit),
            unit=piece.unit.unit,
            start=piece.start,
            log_digest=digest,
            tensor=self._store.read_kv(piece.unit, piece.request_id, piece.start, piece.end),
        )

    # --- the standby's side -----------------------------------------------------------------------

    def _read(self, now: float) -> bool:
        some = False
        while self._to_read > 0 and (arrival := self._links.receive()) is not None:
            some = True
            self._to_read -= max(arrival.nbytes, LEAST_BYTES)
            try:
                match arrival.message:
                    case KvDelta() as frame:
                        self._write(arrival.sender, frame, now)
                    case KvRequest() as question:
                        self._feed.ask(arrival.sender, question)
                    case Credit() as credit:
                        self._feed.grant(arrival.sender, credit)
                    case LinkOpen():
                        self._relink(arrival.sender)
            except RemoteProtocolError:
                self._links.traffic.dropped += 1
        return some

    def _write(self, sender: int, frame: KvDelta, now: float) -> None:
        """Write what joins what is here. Raises `RemoteProtocolError` for what may not be sent."""
        unit = self._replicas.unit_of(sender, frame)
        if frame.tensor.dtype is not self._dtype:
            raise RemoteProtocolError("KV of another number format")
        if not self._replicas.joins(unit, frame):
            return
        if self._store.write_kv(unit, frame.request_id, frame.start, frame.tensor):
            self._replicas.wrote(unit, frame, now)


def _joined(before: Slot, after: Slot) -> Slot:
    """Both runs as one, if the one follows the other; otherwise the later one."""
    if before.start + len(before.tokens) != after.start:
        return after
    tokens = before.tokens + after.tokens
    return Slot(request_id=after.request_id, start=before.start, tokens=tokens)
