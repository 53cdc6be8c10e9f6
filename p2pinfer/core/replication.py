"""Delta KV: what an owner sends of its units' KV to their standbys, and what these write and ask.

Between steps an owner sends the new rows of each of its head units to the unit's standbys, as far
as these have granted it credit; it waits for nobody. A standby writes only what joins its watermark
and belongs to its log. What did not reach it, or came before it had the step's tokens, it asks for
by position: once it has fallen behind for `LAG_S`, or as soon as a frame shows that there is a gap.
An answer and the frames after it take the same link, so nothing lacks between them.

All frames to a standby, answers too, use up the same credit; what has come to it is granted again,
wanted or not. So no more than the window is on the way to it, and a window more for each time that
the way back began anew meanwhile. Bytes are those of K and V; a frame's head is not counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.holdings import holdings
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.units import Slice, kv_bytes_per_position
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_CREDIT_BYTES
from p2pinfer.types import Plan
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest, Slot

FRAME_BYTES = 1 << 20
"""Of one frame: large enough to be rare, small enough to send between two steps."""

WINDOW_BYTES = MAX_CREDIT_BYTES
"""What a standby grants each owner, and asks of it at once at most: a prefill may need more, and
what goes beyond is asked for."""

LAG_S = 0.2
"""A standby is one step behind by nature, or more where steps are fast; it asks for what lacks when
it has been, and nothing has come, for so long."""

ASK_AGAIN_S = 2.0
"""An answer of which nothing has come for so long is lost: a whole window may be before it in a
slow link."""

GAP = -inf
"""Since when a unit lacks what a frame has shown to be lost: it is asked for at once."""

MORE_ROWS = 64
"""Positions that may have been computed between a question and its answer."""


class Piece(NamedTuple):
    """Positions `[start, end)` of one of this node's head units, for one standby (index)."""

    member: int
    request_id: int
    unit: KvUnit
    start: int
    end: int


def computed_units(plan: Plan, member: int) -> dict[KvUnit, int]:
    """The head units that a member owns, with their stage."""
    return {
        KvUnit(held.span, unit): held.stage
        for held in holdings(plan, member)
        for unit in held.head_units
    }


def fed_units(plan: Plan, member: int) -> dict[KvUnit, int]:
    """The head units that a member is a standby of, with the index of the owner of each."""
    return {
        KvUnit(Slice(stage.start, stage.end), unit): stage.head_owners[unit]
        for stage in plan.stages
        for unit, copies in enumerate(stage.head_standbys)
        if member in copies
    }


def _row_bytes(plan: Plan, unit: KvUnit) -> int:
    """Bytes of one position."""
    return kv_bytes_per_position(plan.model, unit.span.end - unit.span.start)


def pieces(plan: Plan, member: int, request_id: int, unit: KvUnit, run: Slice) -> Iterator[Piece]:
    """A run of positions, cut into frames."""
    rows = max(1, FRAME_BYTES // _row_bytes(plan, unit))
    for start in range(run.start, run.end, rows):
        yield Piece(member, request_id, unit, start, min(start + rows, run.end))


def _cost(plan: Plan, piece: Piece) -> int:
    """Bytes of a piece."""
    return (piece.end - piece.start) * _row_bytes(plan, piece.unit)


_Key = tuple[int, int, KvUnit]
"""A standby (index), a request and one of its units."""


class Feed:
    """An owner's side under one plan: which pieces go to whom. `me` is an index into its members.

    A piece that has no credit is left out for good: the standby will ask.
    """

    def __init__(self, plan: Plan, me: int, logs: TokenLogs) -> None:
        self._plan = plan
        self._logs = logs
        self._stage_of = computed_units(plan, me)
        self._standbys: dict[KvUnit, tuple[int, ...]] = {}
        for unit, number in self._stage_of.items():
            copies = plan.stages[number].head_standbys
            if copies and copies[unit.unit]:
                self._standbys[unit] = copies[unit.unit]
        self._credit: defaultdict[int, int] = defaultdict(int)
        self._asked: dict[_Key, Slice] = {}
        """Positions yet to be sent that a standby has asked for, oldest question first."""

    @property
    def standbys(self) -> frozenset[int]:
        """Members (indices) that keep a replica of anything of this node's."""
        return frozenset(member for each in self._standbys.values() for member in each)

    def stage_of(self, unit: KvUnit) -> int:
        """The stage that a unit of this node is of."""
        return self._stage_of[unit]

    def grant(self, member: int, credit: Credit) -> None:
        """A standby grants bytes; what was granted and not used adds up to a bound.

        Raises `RemoteProtocolError` for a member that is no standby of this node's.
        """
        if member not in self.standbys:
            raise RemoteProtocolError("credit from a member that keeps no replica of mine")
        self._grant(member, credit.bytes)

    def _grant(self, member: int, more: int) -> None:
        self._credit[member] = min(self._credit[member] + more, WINDOW_BYTES)

    def relinked(self, member: int) -> None:
        """The link to or from a standby began anew: what the old one held is lost, credit too, and
        the standby grants and asks again."""
        self._credit.pop(member, None)
        for key in [key for key in self._asked if key[0] == member]:
            del self._asked[key]

    def finished(self, slots: Sequence[Slot]) -> Iterator[Piece]:
        """What a finished step of `slots` has written, for each standby, as far as its credit goes.

        Not what a standby lacks the positions before of: the answer to its question has them all.
        """
        for slot in slots:
            run = Slice(slot.start, slot.start + len(slot.tokens))
            for unit, members in self._standbys.items():
                if self._logs.coverage.of(slot.request_id, unit) < run.end:
                    continue  # The request has ended meanwhile.
                for member in members:
                    if (member, slot.request_id, unit) in self._asked:
                        continue
                    for piece in pieces(self._plan, member, slot.request_id, unit, run):
                        if not self._pays(piece):
                            break
                        yield piece

    def _pays(self, piece: Piece) -> bool:
        """Whether a standby's credit is enough for a piece; it is used then."""
        cost = _cost(self._plan, piece)
        if self._credit[piece.member] < cost:
            return False
        self._credit[piece.member] -= cost
        return True

    def unsent(self, piece: Piece) -> None:
        """A link did not take a piece: nothing of its credit is used."""
        self._grant(piece.member, _cost(self._plan, piece))

    def ask(self, member: int, request: KvRequest) -> None:
        """A standby asks for positions; a newer question about the same unit takes its place.

        Raises `RemoteProtocolError` for a unit that this member is no standby of.
        """
        stages = self._plan.stages
        if request.stage >= len(stages):
            raise RemoteProtocolError("KV of a stage that the plan does not have")
        stage = stages[request.stage]
        unit = KvUnit(Slice(stage.start, stage.end), request.unit)
        if member not in self._standbys.get(unit, ()):
            raise RemoteProtocolError("KV asked for by a member that is no standby of that unit")
        key = member, request.request_id, unit
        rows = min(request.end - request.start, request.credit // _row_bytes(self._plan, unit))
        if rows > 0 and self._logs.coverage.of(request.request_id, unit) > request.start:
            self._asked[key] = Slice(request.start, request.start + rows)
        else:
            self._asked.pop(key, None)

    def answers(self, budget: int) -> Iterator[Piece]:
        """Pieces that were asked for, oldest question first, until `budget` bytes are reached or
        there is no credit for more.

        What is not covered here (yet) is not sent. A question is over when all of it is sent that
        is covered: what is computed next follows by itself.
        """
        for key in tuple(self._asked):
            while budget > 0 and key in self._asked:
                piece = self._answer(key)
                if piece is None:
                    break
                budget -= _cost(self._plan, piece)
                yield piece

    def _answer(self, key: _Key) -> Piece | None:
        """The next piece of an answer; None: there is nothing (more) of it, or no credit."""
        member, request_id, unit = key
        asked = self._asked[key]
        run = Slice(asked.start, min(asked.end, self._logs.coverage.of(request_id, unit)))
        piece = next(pieces(self._plan, member, request_id, unit, run), None)
        if piece is not None and not self._pays(piece):
            return None
        if piece is None or piece.end == run.end:
            del self._asked[key]
        else:
            self._asked[key] = Slice(piece.end, asked.end)
        return piece


class _Question(NamedTuple):
    """What a standby has asked for up to `limit`, and when something of it came last.

    `end` is what is known to be there. `frames` had come from the owner when it was asked.
    """

    end: int
    limit: int
    at: float
    frames: int

    @property
    def whole(self) -> bool:
        """Whether it is about all that lacked: the window left room for it, and for some more."""
        return self.end < self.limit


class Replicas:
    """A standby's side under one plan: what it may write, what it grants, what it asks for.

    `expected` positions of a request are known to be computed by all owners. Times in seconds.
    """

    def __init__(self, plan: Plan, me: int, logs: TokenLogs) -> None:
        self._plan = plan
        self._logs = logs
        self.owner_of: Mapping[KvUnit, int] = fed_units(plan, me)
        self._stages = {Slice(s.start, s.end): number for number, s in enumerate(plan.stages)}
        self._expected: dict[int, int] = {}
        self._behind: dict[tuple[int, KvUnit], float] = {}
        """Since when a unit lacks what is expected of a request, and nothing has come; or `GAP`."""
        self._asked: dict[tuple[int, KvUnit], _Question] = {}
        self._used: defaultdict[int, int] = defaultdict(int)
        """Bytes that came from each owner and were not granted again yet."""
        self._frames: Counter[int] = Counter()
        """Frames that came from each owner."""
        self._fresh = self.owners

    @property
    def owners(self) -> frozenset[int]:
        """Members (indices) whose units this node keeps a replica of."""
        return frozenset(self.owner_of.values())

    @property
    def lacking(self) -> int:
        """Positions that lack of what is expected, over all requests and units; of each unit one
        step's lack by nature while steps run."""
        return sum(self._lacks())

    @property
    def behind(self) -> int:
        """Positions that the one replica lacks that lacks the most of a request."""
        return max(self._lacks(), default=0)

    def _lacks(self) -> Iterator[int]:
        for request_id, unit in self._behind:
            lack = self._expected.get(request_id, 0) - self._logs.coverage.of(request_id, unit)
            # When steps have stopped, what comes of the last one is more than was expected.
            yield max(0, lack)

    def began(self, computed: Mapping[int, int], now: float) -> None:
        """The plan is in force; so many positions of each request are computed by all owners."""
        for request_id, positions in computed.items():
            self._expected[request_id] = positions
            self._look(request_id, now)

    def relinked(self, owner: int) -> None:
        """The link to or from an owner began anew: what was granted and asked before is lost."""
        if owner in self.owners:
            self._fresh |= {owner}
            self._used.pop(owner, None)
            for key in [key for key in self._asked if self.owner_of[key[1]] == owner]:
                del self._asked[key]

    def stepped(self, slots: Iterable[Slot], now: float) -> None:
        """A step begins: what lies before its slots is computed by all owners."""
        for slot in slots:
            self._expected[slot.request_id] = slot.start
            self._look(slot.request_id, now)

    def forget(self, request_ids: Iterable[int]) -> None:
        """Requests are over."""
        for request_id in request_ids:
            self._expected.pop(request_id, None)
            for unit in self.owner_of:
                self._behind.pop((request_id, unit), None)
                self._asked.pop((request_id, unit), None)

    def unit_of(self, sender: int, frame: KvDelta) -> KvUnit:
        """The unit that a frame is of. Raises `RemoteProtocolError` for what the plan does not let
        `sender` send to me: another's unit, or rows of another shape."""
        stages, model = self._plan.stages, self._plan.model
        if frame.stage < len(stages):
            span = Slice(stages[frame.stage].start, stages[frame.stage].end)
            unit = KvUnit(span, frame.unit)
            layers, pair, _, width = frame.tensor.shape
            shape = (layers, pair, width) == (span.end - span.start, 2, model.head_dim)
            if self.owner_of.get(unit) == sender and shape:
                return unit
        raise RemoteProtocolError("KV_DELTA: the plan does not let this member send that")

    def joins(self, unit: KvUnit, frame: KvDelta) -> bool:
        """Whether a frame is to be written: it joins the watermark, and its tokens are those here.

        Counts its bytes as used, and a frame beyond the watermark as the proof of a gap.
        """
        rows = frame.tensor.shape[2]
        owner, end = self.owner_of[unit], frame.start + rows
        self._used[owner] += rows * _row_bytes(self._plan, unit)
        self._frames[owner] += 1
        if self._logs.digest(frame.request_id, end) != frame.log_digest:
            return False
        if frame.start > self._logs.coverage.of(frame.request_id, unit):
            self._behind[frame.request_id, unit] = GAP
            return False
        return True

    def wrote(self, unit: KvUnit, frame: KvDelta, now: float) -> None:
        """A frame's rows are in their place."""
        request_id, end = frame.request_id, frame.start + frame.tensor.shape[2]
        self._logs.coverage.join(request_id, unit, frame.start, end)
        key = request_id, unit
        question = self._asked.pop(key, None)
        if question is not None and end < question.end:
            self._asked[key] = question._replace(at=now)
        elif key in self._behind and (question.whole if question else self._behind[key] > GAP):
            self._behind[key] = now  # it gets on: what lacks still is on its way
        self._look(request_id, now)

    def _look(self, request_id: int, now: float) -> None:
        """Note since when something of a request lacks."""
        expected = self._expected.get(request_id, 0)
        for unit in self.owner_of:
            key = (request_id, unit)
            if self._logs.coverage.of(request_id, unit) >= expected:
                self._behind.pop(key, None)
            else:
                self._behind.setdefault(key, now)

    def asks(self, now: float) -> Iterator[tuple[int, KvRequest]]:
        """What to ask of which owner now, within the window; each thing once at a time."""
        open_bytes = self._open_bytes(now)
        for (request_id, unit), since in tuple(self._behind.items()):
            owner, row = self.owner_of[unit], _row_bytes(self._plan, unit)
            room = (WINDOW_BYTES - open_bytes[owner]) // row
            if (request_id, unit) in self._asked or now < since + LAG_S or room <= 0:
                continue
            start = self._logs.coverage.of(request_id, unit)
            # An answer may go beyond what is known to be there: then nothing lacks between it and
            # the frames of the next steps, which follow it on the same link.
            lacking = max(1, self._expected.get(request_id, 0) - start)
            rows = min(room, lacking + MORE_ROWS)
            open_bytes[owner] += rows * row
            self._asked[request_id, unit] = _Question(
                end=start + min(rows, lacking),
                limit=start + rows,
                at=now,
                frames=self._frames[owner],
            )
            yield (
                owner,
                KvRequest(
                    fence=self._plan.fence,
                    request_id=request_id,
                    stage=self._stages[unit.span],
                    unit=unit.unit,
                    start=start,
                    end=start + rows,
                    credit=rows * row,
                ),
            )

    def _open_bytes(self, now: float) -> Counter[int]:
        """What each owner has been asked for and has not answered; what is lost is given up.

        An owner that has sent nothing at all since may have no credit left: it was lost as well.
        """
        found = Counter[int]()
        for (request_id, unit), question in tuple(self._asked.items()):
            owner = self.owner_of[unit]
            if now < question.at + ASK_AGAIN_S:
                start = self._logs.coverage.of(request_id, unit)
                found[owner] += (question.limit - start) * _row_bytes(self._plan, unit)
                continue
            del self._asked[request_id, unit]
            if self._frames[owner] == question.frames:
                self._used.pop(owner, None)
                self._fresh |= {owner}
        return found

    def grants(self) -> Iterator[tuple[int, Credit]]:
        """Credit for owners: a whole window at first and after a silence, then what was used."""
        for owner in sorted(self._fresh):
            yield owner, Credit(fence=self._plan.fence, bytes=WINDOW_BYTES)
        self._fresh = frozenset()
        for owner, used in sorted(self._used.items()):
            if used >= WINDOW_BYTES // 4:
                granted = min(used, WINDOW_BYTES)
                self._used[owner] -= granted
                yield owner, Credit(fence=self._plan.fence, bytes=granted)

    def ungranted(self, owner: int, credit: Credit) -> None:
        """A link did not take this credit: it is granted again with what is used next. Otherwise
        the window would be smaller by it for as long as anything comes."""
        self._used[owner] += credit.bytes
