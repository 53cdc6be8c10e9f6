"""An owner and two standbys whose links delay, break and fill up: nothing wrong is ever covered, no
link holds more than its window, and once all is calm the standbys have what the owner has."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from p2pinfer.core import replication
from p2pinfer.core.agreement import digest
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.orders import TokenLog
from p2pinfer.core.replication import (
    ASK_AGAIN_S,
    LAG_S,
    Feed,
    Piece,
    Replicas,
    computed_units,
    fed_units,
)
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.units import Slice, kv_bytes_per_position
from p2pinfer.types import Fence, Plan, SamplingParams, Stage
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest, Slot, Step
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.plan_bench import CLUSTER, MODEL, member

ROW = kv_bytes_per_position(MODEL, MODEL.num_layers)
WINDOW, FRAME, MORE = 16, 4, 3
"""In rows."""

PARAMS = SamplingParams()
PROMPT = 1
REQUESTS = 3
MAX_ROWS = 24
"""Of a step of one request: more than the window."""

TICK_S = 0.05
ENOUGH_S = 2 * (ASK_AGAIN_S + LAG_S) + 2.0
"""What was asked, and the credit for an answer, may both have been lost just now."""

PLAN = Plan(
    fence=Fence(1, 1),
    cluster_id=CLUSTER,
    leader=0,
    members=tuple(member(n) for n in range(1, 4)),
    voters=(0,),
    model=MODEL,
    stages=(
        Stage(
            start=0,
            end=MODEL.num_layers,
            head_owners=(0, 0, 0, 0),
            mlp_owners=(0,) * 2,
            vocab_owners=(0,) * 2,
            head_standbys=((1,), (1, 2), (2,), ()),
        ),
    ),
)
UNITS = [KvUnit(Slice(0, MODEL.num_layers), unit) for unit in range(4)]

Values = tuple[str, ...]
"""KV of a run of positions: of each the digest of the tokens up to it."""


@contextmanager
def narrow() -> Iterator[None]:
    """Windows and frames of few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replication, "WINDOW_BYTES", WINDOW * ROW)
        patch.setattr(replication, "FRAME_BYTES", FRAME * ROW)
        patch.setattr(replication, "MORE_ROWS", MORE)
        yield


class Store:
    """KV by request and unit, written by position; what is behind a request's end stays."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, KvUnit], list[str]] = {}

    def write(self, request_id: int, unit: KvUnit, start: int, values: Values) -> None:
        kept = self._values.setdefault((request_id, unit), [])
        kept.extend("" for _ in range(start + len(values) - len(kept)))
        kept[start : start + len(values)] = values

    def read(self, request_id: int, unit: KvUnit, start: int, end: int) -> Values:
        return tuple(self._values.get((request_id, unit), ())[start:end])


class Node:
    """Logs and KV of one member."""

    def __init__(self, me: int) -> None:
        self.me = me
        self.logs = TokenLogs()
        self.store = Store()
        self.logs.coverage.hold(computed_units(PLAN, me).keys(), fed_units(PLAN, me).keys())

    def check(self) -> None:
        """What is covered is KV of this node's own log."""
        coverage = self.logs.coverage
        for log in self.logs.snapshot():
            for unit in UNITS:
                covered = coverage.of(log.request_id, unit)
                assert covered <= len(log.tokens)
                right = tuple(digest(log.tokens[: n + 1]) for n in range(covered))
                assert self.store.read(log.request_id, unit, 0, covered) == right


class Link:
    """One way between two nodes: in order, but it may break, and be full."""

    def __init__(self) -> None:
        self.queue: deque[Any] = deque()
        self.full = False

    def send(self, what: object) -> bool:
        if not self.full:
            self.queue.append(what)
        return not self.full


OPENED = "the link began anew"


class Standby(Node):
    """A standby with the links between it and the owner, and the steps that it will hear."""

    def __init__(self, me: int) -> None:
        super().__init__(me)
        self.steps: deque[Step] = deque()
        self.forth, self.back = Link(), Link()
        self.begin(PLAN)

    def begin(self, plan: Plan) -> None:
        """A plan is in force, and what is on its way of another counts for nothing."""
        self.plan = plan
        self.replicas = Replicas(plan, self.me, self.logs)
        self.steps.clear()
        self.forth.queue.clear()
        self.back.queue.clear()
        self.windows = 0
        """Whole windows that were granted while anything is on its way."""

    @property
    def on_its_way(self) -> int:
        """Rows in the link to this standby."""
        return sum(what[0].tensor.shape[2] for what in self.forth.queue if what is not OPENED)

    def bound(self) -> None:
        """No more is on its way than was granted."""
        rows = self.on_its_way
        if not rows and not self.back.queue:
            self.windows = 1
        assert rows <= WINDOW * self.windows

    def hear_step(self, now: float) -> None:
        """Write down one more step."""
        if self.steps:
            step = self.steps.popleft()
            self.logs.take(step)
            self.replicas.forget(step.ended)
            self.replicas.stepped(step.slots, now)

    def read(self, now: float) -> None:
        """Take one frame."""
        if not self.forth.queue:
            return
        what = self.forth.queue.popleft()
        if what is OPENED:
            self.replicas.relinked(0)
            return
        frame, values = what
        unit = self.replicas.unit_of(0, frame)
        if self.replicas.joins(unit, frame):
            self.store.write(frame.request_id, unit, frame.start, values)
            self.replicas.wrote(unit, frame, now)

    def speak(self, now: float) -> None:
        """Ask and grant what is to be asked and granted."""
        asks = [question for owner, question in self.replicas.asks(now)]
        grants = [credit for owner, credit in self.replicas.grants()]
        for question in asks:
            self.back.send(question)
        for credit in grants:
            if self.back.send(credit):
                self.windows += credit.bytes == WINDOW * ROW
            else:
                self.replicas.ungranted(0, credit)


class Owner(Node):
    """The owner of all units, which makes the steps too."""

    def __init__(self) -> None:
        super().__init__(0)
        self.standbys = {1: Standby(1), 2: Standby(2)}
        self.ended: list[int] = []
        self.number = 0
        self.tells = True
        """Whether it takes note of what a link does not take."""
        self.begin(PLAN)

    def begin(self, plan: Plan) -> None:
        """A plan is in force."""
        self.plan = plan
        self.feed = Feed(plan, 0, self.logs)
        self.introduced: set[int] = set()
        for standby in self.standbys.values():
            standby.begin(plan)

    def step(self, request_id: int, tokens: tuple[int, ...], back: int = 0) -> None:
        """Compute so many tokens of a request, from the first position without KV on: those that
        are known, then these. Or, where it goes `back` some positions, these instead."""
        logs, first = self.logs, request_id not in self.introduced
        covered = logs.coverage.least(request_id)
        start = max(0, covered - back)
        known = tuple(logs.tokens(request_id))[start:] if request_id in logs and not back else ()
        slot = Slot(
            request_id=request_id,
            start=start,
            tokens=(known + tokens)[: max(len(tokens), 1)],
            params=PARAMS if first else None,
            prompt_tokens=PROMPT if first else 0,
        )
        self.introduced.add(request_id)
        self.number += 1
        step = Step(
            fence=self.plan.fence,
            step=self.number,
            link_seq=0,
            slots=(slot,),
            ended=tuple(self.ended),
        )
        self.ended.clear()
        logs.take(step)
        for standby in self.standbys.values():
            standby.steps.append(step)
        told = tuple(logs.tokens(request_id))
        for position in range(slot.start, slot.start + len(slot.tokens)):
            for unit in computed_units(self.plan, 0):
                self.store.write(request_id, unit, position, (digest(told[: position + 1]),))
        logs.finish(step.slots)
        for piece in self.feed.finished(step.slots):
            self.send(piece)

    def end(self, request_id: int) -> None:
        """A request is over; all are told with the next step."""
        if request_id in self.introduced:
            self.introduced.discard(request_id)
            self.logs.forget((request_id,))
            self.ended.append(request_id)

    def send(self, piece: Piece) -> None:
        rows = piece.end - piece.start
        told = self.logs.digest(piece.request_id, piece.end)
        assert told is not None
        frame = KvDelta(
            fence=self.plan.fence,
            step=0,
            link_seq=0,
            sender=0,
            request_id=piece.request_id,
            stage=self.feed.stage_of(piece.unit),
            unit=piece.unit.unit,
            start=piece.start,
            log_digest=told,
            tensor=Tensor(
                WireDType.FLOAT32,
                (MODEL.num_layers, 2, rows, MODEL.head_dim),
                bytes(rows * ROW),
            ),
        )
        values = self.store.read(piece.request_id, piece.unit, piece.start, piece.end)
        if not self.standbys[piece.member].forth.send((frame, values)) and self.tells:
            self.feed.unsent(piece)

    def read(self, standby: Standby) -> None:
        """Take one message of a standby."""
        if standby.back.queue:
            match standby.back.queue.popleft():
                case KvRequest() as question:
                    self.feed.ask(standby.me, question)
                case Credit() as credit:
                    self.feed.grant(standby.me, credit)
                case _:
                    self.feed.relinked(standby.me)

    def answer(self, rows: int) -> None:
        """Answer questions within a budget."""
        for piece in self.feed.answers(rows * ROW):
            self.send(piece)

    def change_plan(self, cut: int, tail: tuple[int, ...]) -> None:
        """A new epoch: logs are cut, and go on otherwise; KV stays as far as they are the same."""
        agreed = tuple(
            TokenLog(
                request_id=log.request_id,
                term=1,
                prompt_tokens=PROMPT,
                params=PARAMS,
                tokens=log.tokens[: max(1, len(log.tokens) - cut)] + tail,
            )
            for log in self.logs.snapshot()
        )
        for node in (self, *self.standbys.values()):
            node.logs.adopt(agreed)
        self.ended.clear()
        self.begin(replace(self.plan, fence=Fence(1, self.plan.fence.epoch + 1)))


class World:
    """All of them, and the time."""

    def __init__(self) -> None:
        self.owner = Owner()
        self.now = 0.0

    def act(self, what: str, which: int, amount: int) -> None:
        """One thing happens."""
        owner = self.owner
        standby = owner.standbys[1 + which % 2]
        request_id = 1 + which % REQUESTS
        match what:
            case "step":
                owner.step(request_id, tuple((amount + n) % 3 for n in range(amount)))
            case "decode":
                owner.step(request_id, (amount % 3,))
            case "end":
                owner.end(request_id)
            case "hear":
                standby.hear_step(self.now)
            case "read":
                for _ in range(amount):
                    standby.read(self.now)
            case "speak":
                standby.speak(self.now)
            case "listen":
                for _ in range(amount):
                    owner.read(standby)
            case "answer":
                owner.answer(amount)
            case "time":
                self.now += TICK_S * amount
            case _:
                self.fault(what, standby, amount)
        self.check()

    def fault(self, what: str, standby: Standby, amount: int) -> None:
        """A link breaks, what it holds is lost, and both sides hear of it; or logs change.

        The side that sends on a link sees at once that it begins anew.
        """
        owner = self.owner
        match what:
            case "break forth":
                standby.forth.queue.clear()
                owner.feed.relinked(standby.me)
                standby.forth.queue.append(OPENED)
            case "break back":
                standby.back.queue.clear()
                standby.replicas.relinked(0)
                standby.back.queue.append(OPENED)
            case "full forth":
                standby.forth.full = not standby.forth.full
            case "full back":
                standby.back.full = not standby.back.full
            case "other tokens":
                owner.step(1 + amount % REQUESTS, (9,) * (amount % 5 + 1), back=amount % 7 + 1)
            case _:
                owner.change_plan(amount % 4, (7,) * (amount % 3))

    def check(self) -> None:
        for node in (self.owner, *self.owner.standbys.values()):
            node.check()
        for standby in self.owner.standbys.values():
            standby.bound()

    def calm(self) -> None:
        """Everything arrives, and steps go on at leisure."""
        owner = self.owner
        for standby in owner.standbys.values():
            standby.forth.full = standby.back.full = False
        for turn in range(int(ENOUGH_S / TICK_S)):
            if turn % 4 == 0:
                for request_id in sorted(owner.introduced):
                    owner.step(request_id, (turn % 3,))
            for standby in owner.standbys.values():
                while standby.steps:
                    standby.hear_step(self.now)
                for link, take in ((standby.back, owner.read), (standby.forth, None)):
                    while link.queue:
                        take(standby) if take else standby.read(self.now)
                standby.speak(self.now)
                while standby.back.queue:
                    owner.read(standby)
            owner.answer(WINDOW)
            self.now += TICK_S
            self.check()

    def lags(self) -> list[tuple[int, int, int, int, int]]:
        """What standbys lack: standby, request, unit, what they have, what the owner has."""
        found = []
        for me, standby in self.owner.standbys.items():
            while standby.forth.queue:
                standby.read(self.now)
            for request_id in self.owner.introduced:
                for unit in fed_units(PLAN, me):
                    theirs = standby.logs.coverage.of(request_id, unit)
                    ours = self.owner.logs.coverage.of(request_id, unit)
                    if theirs != ours:
                        found.append((me, request_id, unit.unit, theirs, ours))
        return found


ORDINARY = ("step", "decode", "decode", "end", "hear", "hear", "read", "speak", "listen", "answer")
FAULTS = ("break forth", "break back", "full forth", "full back", "plan", "other tokens", "time")


def acts_of(*kinds: str) -> st.SearchStrategy[tuple[str, int, int]]:
    """Acts of these kinds, with whom and how much."""
    return st.tuples(st.sampled_from(kinds), st.integers(0, 5), st.integers(1, MAX_ROWS))


acts = acts_of(*ORDINARY, *ORDINARY, *FAULTS)
calm_acts = acts_of(*ORDINARY)


@given(st.lists(acts, min_size=40, max_size=160), st.booleans())
def test_standbys_reach_their_owner_and_never_cover_what_is_not_theirs(
    story: list[tuple[str, int, int]], tells: bool
) -> None:
    """Whatever is delayed, lost or void, coverage is right at any time, what is on its way is
    bounded, and some seconds of calm suffice to catch up."""
    with narrow():
        world = World()
        world.owner.tells = tells
        for act in story:
            world.act(*act)
        world.calm()
        assert world.lags() == []


@given(st.lists(calm_acts, min_size=40, max_size=160))
def test_without_faults_no_more_than_the_window_is_on_its_way(
    story: list[tuple[str, int, int]],
) -> None:
    """However slowly things are read, and answers too use up the credit."""
    with narrow():
        world = World()
        for act in story:
            world.act(*act)
            for standby in world.owner.standbys.values():
                assert standby.on_its_way <= WINDOW
