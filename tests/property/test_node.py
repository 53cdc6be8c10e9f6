"""Whatever members, clients, worker and disk say, in any state and order, a node goes on deciding.

Messages are valid as the codec understands it, and otherwise anything: of the right fence or of any
other, about members that are there or not, from a member that may say so or not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.core import events as e
from p2pinfer.core.agreement import digest
from p2pinfer.core.planner import PlacementError
from p2pinfer.errors import ClusterError
from p2pinfer.limits import MAX_POSITIONS
from p2pinfer.types import Failover, Fence, Member, Plan, SamplingParams
from p2pinfer.wire import messages as m
from p2pinfer.wire.codec import encode
from tests.node_bench import CLUSTER, MODEL, Bench, heartbeat, member, plan_of

ONE, TWO = member(1), member(2)
MEMBERS = (
    ONE,
    TWO,
    member(3, weight=0.0),
    member(4, witness=True, numeric_class=""),
    member(5),
    member(1, boot=1, blank=True),
    member(2, boot=1),
    member(6, name="node1", numeric_class=""),
    member(7, address="tcp://h1:7720", memory_bytes=10),
    member(5, boot=7, address="tcp://h9:7720"),
)
EVENTS = 60
RESTLESS = 4
"""What one look brings about may want another at once, but not for ever."""

PARAMS = (SamplingParams(), SamplingParams(max_tokens=2, seed=3))
CODES = ("internal", "not_a_member", "wrong_cluster", "identity_taken", "no_such_code")

Draw = random.Random
Situation = Callable[[], Bench]


def stored(*, active: bool, blank: bool = False) -> e.StoredState:
    """What node 5 wrote down of a plan."""
    plan = plan_of(ONE, TWO, member(5))
    return e.StoredState(cluster_id=CLUSTER, term=1, plan=plan, active=active, blank=blank)


SITUATIONS: dict[str, Situation] = {
    "founder": Bench,
    "slow disk": lambda: Bench(slow_disk=True),
    "leader": lambda: Bench.leader(ONE, TWO),
    "lone leader": Bench.leader,
    "joiner": lambda: Bench(join=(1, 2)),
    "joined": lambda: Bench.joined(ONE, TWO),
    "follower": lambda: Bench.follower(ONE, TWO),
    "witness": lambda: Bench.joined(ONE, member=member(5, witness=True), model=None),
    "back": lambda: Bench(stored=stored(active=True)),
    "back, in doubt": lambda: Bench(stored=stored(active=False), join=(1,)),
    "back, blank": lambda: Bench(stored=stored(active=True, blank=True)),
    "back, last man": lambda: Bench(stored=stored(active=True), quorum="last-man", replicas=1),
}


class Story:
    """Draws what happens to a node, and looks at all that it does."""

    def __init__(self, bench: Bench, draw: Draw) -> None:
        self.bench = bench
        self.draw = draw
        self.plans: list[Plan] = [plan_of(ONE, TWO, bench.me)]
        self.state = bench.stored
        self.over = False
        self.number = 0
        self.check(bench.outputs)

    # --- what there is to say ---------------------------------------------------------------------

    def one(self, *values: Any) -> Any:
        return self.draw.choice(values)

    def who(self) -> Member:
        return self.draw.choice(MEMBERS)

    def fence(self) -> Fence:
        if self.draw.random() < 0.7:
            return self.plans[-1].fence
        return Fence(self.draw.randrange(4), self.draw.randrange(4))

    def term(self) -> int:
        status = self.bench.node.status(self.bench.now)
        return max(0, int(status["term"]) + self.draw.choice((-1, 0, 0, 0, 1)))

    def request(self) -> int:
        return self.draw.randrange(1, 4)

    def tokens(self) -> tuple[int, ...]:
        """Of few kinds, so that logs agree often."""
        return tuple(range(5, 5 + self.draw.randrange(6)))

    def log(self) -> e.TokenLog:
        tokens = (1, 2, *self.tokens())
        return e.TokenLog(
            request_id=self.request(),
            term=self.term(),
            prompt_tokens=2,
            params=self.draw.choice(PARAMS),
            tokens=tokens[: self.draw.randrange(len(tokens) + 1)],
        )

    def plan(self) -> Plan:
        members = list({m.node_id: m for m in self.draw.sample(MEMBERS, 4)}.values())
        mine = [*(m for m in members if m.node_id != self.bench.me.node_id), self.bench.me]
        fence = Fence(self.term(), self.plans[-1].fence.epoch + self.draw.randrange(3))
        old = tuple(sorted(m.node_id for m in self.draw.sample(mine, 1)))
        self.draw.shuffle(mine)
        try:
            return plan_of(*mine, fence=fence, old_voters=self.one((), old))
        except PlacementError:
            return self.plans[-1]

    def message(self, sender: Member) -> m.ControlMessage:
        """Any message of the control plane, mostly in the sender's own name."""
        who = sender if self.draw.random() < 0.9 else self.who()
        kinds = (self._membership, self._elections, self._plans, self._requests)
        message: m.ControlMessage = self.draw.choice(kinds)(who)
        return message

    def _membership(self, who: Member) -> m.ControlMessage:
        ids = tuple(sorted({other.node_id for other in MEMBERS}))
        rumours = tuple(
            m.Rumour(
                node_id=other.node_id,
                boot_id=other.boot_id,
                state=self.draw.choice(tuple(m.MemberState)),
                incarnation=self.draw.randrange(3),
            )
            for other in self.draw.sample(MEMBERS, 3)
        )
        hello = m.Hello(
            versions=(1,),
            member=who,
            cluster_id=self.one("", CLUSTER, CLUSTER, "e" * 16),
            model_id=self.one(MODEL.model_id, MODEL.model_id, ""),
            dtype="float32",
            quant="none",
        )
        heartbeat = m.Heartbeat(
            node_id=who.node_id,
            boot_id=who.boot_id,
            incarnation=self.draw.randrange(3),
            term=self.term(),
            fence=self.fence(),
            leader_id=self.one("", who.node_id, self.who().node_id),
            steps=self.draw.randrange(9),
            rumours=rumours,
            hears_control=self.one(ids, ids[:2]),
            sent_at_ms=self.one(0, round(self.bench.now * 1000)),
            echo_ms=self.one(0, round(self.bench.now * 1000)),
            hung=self.draw.random() < 0.1,
            draining=self.draw.random() < 0.1,
            compute_ms=self.one(0.0, 5.0, 90.0),
        )
        leave = m.Leave(node_id=who.node_id, boot_id=who.boot_id, reason=self.one("", "bye"))
        drain = m.Drain(request_id=self.request(), name=self.one("", "node1", "node5", "x"))
        return self.one(hello, hello, heartbeat, heartbeat, heartbeat, heartbeat, leave, drain)

    def _elections(self, who: Member) -> m.ControlMessage:
        term, granted = self.term(), self.draw.random() < 0.7
        return self.one(
            m.PreVoteRequest(term=term, candidate_id=who.node_id, plan_fence=self.fence()),
            m.VoteRequest(term=term, candidate_id=who.node_id, plan_fence=self.fence()),
            m.PreVoteReply(term=term, voter_id=who.node_id, granted=granted),
            m.VoteReply(term=term, voter_id=who.node_id, granted=granted),
        )

    def _plans(self, who: Member) -> m.ControlMessage:
        logs = [self.log() for _ in range(2)]
        summaries = tuple(
            m.LogDigest(
                request_id=log.request_id,
                term=log.term,
                length=len(log.tokens),
                digest=digest(log.tokens),
            )
            for log in logs
        )
        agreed = tuple(
            m.AgreedLog(request_id=s.request_id, length=s.length, digest=s.digest, restart=0)
            for s in summaries
        )
        covered = m.CoverageRun(
            request_id=self.request(), stage=self.one(0, 3), units=(0, 99), positions=4
        )
        log, fence = logs[0], self.fence()
        propose = m.Propose(plan=self.one(self.plan(), self.plans[-1]))
        if self.draw.random() < 0.3:
            self.plans.append(propose.plan)
        start = self.draw.randrange(len(log.tokens) + 1)
        return self.one(
            propose,
            propose,
            m.Ack(
                fence=fence,
                node_id=who.node_id,
                logs=summaries,
                coverage=(covered,),
                inputs=(m.InputsRun(request_id=self.request(), stage=0, positions=99),),
            ),
            m.Ack(fence=fence, node_id=who.node_id),
            m.Nack(
                fence=fence,
                node_id=who.node_id,
                code="internal",
                message="no",
                about=self.one("", self.who().node_id),
            ),
            m.LogRequest(fence=fence, request_ids=(self.request(), 9)),
            m.LogEntry(
                fence=fence,
                request_id=log.request_id,
                term=log.term,
                prompt_tokens=self.one(2, 0, MAX_POSITIONS),
                params=log.params,
                start=start,
                tokens=log.tokens[start:],
            ),
            m.Activate(fence=fence, logs=self.one((), agreed)),
            m.Activate(fence=fence),
        )

    def _requests(self, who: Member) -> m.ControlMessage:
        failover = Failover(
            position=self.draw.randrange(9), lost=("x",), rung="none", detect_s=0.1, stall_s=0.0
        )
        return self.one(
            m.Forward(
                request_id=self.request(),
                serving_id=who.node_id,
                prompt_ids=self.one((1, 2), (1,)),
                received=self.tokens(),
                params=self.draw.choice(PARAMS),
            ),
            m.Drawn(
                tokens=self.drawn(),
                interruptions=(m.Interruption(request_id=self.request(), failover=failover),),
            ),
            m.Ended(
                request_id=self.request(),
                reason=self.one("stop", "error"),
                total_tokens=self.draw.randrange(6),
                code=self.one("", "", "internal", "no_such_code"),
            ),
            m.Cancel(request_id=self.request(), reason=self.one("client", "stop", "orphan")),
            m.Done(request_id=self.request()),
            m.StatusRequest(request_id=1),
        )

    def drawn(self) -> tuple[m.DrawnToken, ...]:
        start, request_id = self.draw.randrange(3), self.request()
        return tuple(
            m.DrawnToken(request_id=request_id, index=index, token=5 + index)
            for index in range(start, start + self.draw.randrange(1, 4))
        )

    def report(self) -> e.AnyReport:
        fence, request_id, about = self.fence(), self.request(), self.who().node_id
        loaded = e.PlanLoaded(
            fence=fence,
            error=self.one("", "", "", "no memory"),
            logs=tuple({log.request_id: log for log in (self.log(), self.log())}.values()),
            coverage=(e.Covered(request_id=request_id, stage=0, units=(1,), positions=3),),
        )
        ready = e.WorkerReady(numeric_class="n", device="cpu", threads=1, memory_bytes=0)
        return self.one(
            ready,
            loaded,
            loaded,
            e.FenceSettled(fence=fence),
            e.TokensCommitted(fence=fence, tokens=self.drawn()),
            e.RequestEnded(
                fence=fence,
                request_id=request_id,
                reason="stop",
                total_tokens=self.draw.randrange(6),
                code=self.one("", "internal"),
            ),
            e.StepFailed(
                fence=fence,
                step=1,
                node_id=self.one("", about),
                reason="overdue",
                broken=self.draw.random() < 0.2,
            ),
            e.StepFailed(fence=Fence(), step=1, node_id="", reason="nothing is obeyed"),
            e.LinkLost(node_id=about),
            e.LoadProgress(done_bytes=1, total_bytes=2),
            e.WorkerStats(steps=self.draw.randrange(9), hears_steps=(about,), compute_ms=4.0),
        )

    # --- what happens -----------------------------------------------------------------------------

    def event(self) -> e.Input:
        """The next thing that happens."""
        who, kind = self.who(), self.draw.random()
        if kind < 0.45:
            return e.Received(message=self.message(who), route=who.name.encode())
        if kind < 0.55:
            return self._answer(who)
        if kind < 0.75:
            return e.WorkerSaid(report=self.report())
        if kind < 0.9:
            return self.one(
                e.LinkUp(address=who.address),
                e.LinkDown(address=who.address),
                e.ProbeAnswered(address=who.address, refused=self.one(True, False)),
                e.Persisted(number=self.number),
                e.Received(message=self.message(who), route=b"client"),
            )
        if kind < 0.995:
            return self.one(
                e.ClientSubmitted(
                    route=b"client",
                    request_id=self.request(),
                    prompt_ids=self.one((1, 2), (1, 2), ()),
                    received=self.tokens(),
                    params=self.draw.choice(PARAMS),
                ),
                e.ClientCancelled(request_id=self.request(), reason=self.one("client", "stop")),
            )
        return self.one(
            e.ShutdownAsked(),
            e.WorkerDied(detail="signal 9"),
            e.PersistFailed(reason="full"),
            e.WorkerSaid(report=e.WorkerFailed(message="no GPU")),
        )

    def _answer(self, who: Member) -> e.Input:
        """What comes back on a link of this node's."""
        welcome = m.Welcome(
            version=self.one(1, 1, 1, 9),
            member=who,
            cluster_id=self.one(CLUSTER, CLUSTER, "e" * 16),
            leader_id=self.one("", who.node_id),
            members=tuple(self.draw.sample(MEMBERS, 2)),
        )
        refused = m.Refused(
            code=self.draw.choice(CODES), message="no", retryable=self.draw.random() < 0.9
        )
        message = self.one(welcome, welcome, welcome, refused, self.message(who))
        return e.Received(message=message, link=who.address)

    def expected(self) -> list[e.Input]:
        """What would bring the newest plan that this node loads into force."""
        plan = self.plans[-1]
        inputs: list[e.Input] = [
            e.Persisted(number=self.number),
            e.WorkerSaid(report=e.PlanLoaded(fence=plan.fence, logs=(self.log(),))),
        ]
        for who in plan.members:
            for message in (
                m.Ack(fence=plan.fence, node_id=who.node_id),
                m.Activate(fence=plan.fence),
                heartbeat(who, term=plan.fence.term, fence=plan.fence),
            ):
                inputs.append(e.Received(message=message, route=who.name.encode()))
        return inputs

    def step(self) -> None:
        """One thing happens, and then the time that the node asked for may come."""
        self.bench.now += self.one(0.0, 0.001, 0.04)
        inputs = [self.event()]
        if self.draw.random() < 0.8:
            inputs.append(e.WorkerSaid(report=e.WorkerStats()))
        if self.draw.random() < 0.1:
            inputs += self.expected()
        for event in inputs:
            self.check(self.bench.take(event))
        if self.draw.random() < 0.1:
            self.ask()
        wait = self.bench.node.deadline - self.bench.now
        if not self.over and wait < 2.0 and self.draw.random() < 0.4:
            self.bench.now += max(0.0, wait) + self.one(0.0, 0.0, 0.3)
            for _ in range(RESTLESS):
                if not self.over and self.bench.node.deadline <= self.bench.now:
                    self.check(self.bench.take(e.Ticked()))
            assert self.over or self.bench.node.deadline > self.bench.now, "it never rests"

    # --- what must hold ---------------------------------------------------------------------------

    def check(self, outputs: list[e.Output]) -> None:
        """All that it does can be done."""
        assert not (self.over and outputs), "a node that has ended does no more"
        for output in outputs:
            assert not self.over, "its end is the last that it wants"
            match output:
                case e.Send() | e.ReplyTo():
                    encode(output.message)
                    assert not isinstance(output, e.ReplyTo) or output.route
                case e.Persist():
                    self.number = output.number
                    self._check_state(output.state)
                case e.TellWorker(order=e.LoadPlan(plan=plan)):
                    self.plans.append(plan)
                case e.Exit():
                    self.over = True

    def ask(self) -> None:
        """What it says of its cluster can be told, in any state."""
        json.dumps(self.bench.node.status(self.bench.now))
        try:
            json.dumps(self.bench.node.plan_object(self.one("", "node1", "node5")))
        except ClusterError as error:
            assert error.message

    def _check_state(self, state: e.StoredState | None) -> None:
        """Terms and plans only grow, and a vote is given once."""
        old, self.state = self.state, state
        if old is None or state is None:
            return
        assert state.term >= old.term
        assert state.voted_for == old.voted_for or state.term > old.term or not old.voted_for
        if old.plan is not None:
            assert state.plan is not None
            assert state.plan.fence >= old.plan.fence


@pytest.mark.parametrize("situation", SITUATIONS)
@settings(max_examples=25)
@given(seed=st.integers(0, (1 << 32) - 1))
def test_a_node_goes_on_deciding(situation: str, seed: int) -> None:
    """No input raises; messages can be encoded, promises hold, and the end is the end."""
    story = Story(SITUATIONS[situation](), random.Random(seed))
    for _ in range(EVENTS):
        if not story.over:
            story.step()
        story.ask()
