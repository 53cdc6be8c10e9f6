"""Requests through a whole node: served here or elsewhere, led here or elsewhere."""

from __future__ import annotations

from p2pinfer.core import events as e
from p2pinfer.types import Fence, Member, SamplingParams
from p2pinfer.wire import messages as m
from tests.node_bench import Bench, member
from tests.plan_bench import log

ONE, TWO, THREE = member(1), member(2), member(3)
FIRST, SECOND = Fence(1, 1), Fence(1, 2)


def forward(who: Member, request_id: int, *received: int) -> m.Forward:
    """A request that another member serves."""
    return m.Forward(
        request_id=request_id,
        serving_id=who.node_id,
        prompt_ids=(1, 2),
        received=received,
        params=SamplingParams(),
    )


def drawn(request_id: int, *tokens: int, start: int = 0) -> tuple[m.DrawnToken, ...]:
    """Tokens of a reply."""
    return tuple(
        m.DrawnToken(request_id=request_id, index=index, token=token)
        for index, token in enumerate(tokens, start)
    )


def fence_of(bench: Bench) -> Fence:
    """The plan in force."""
    status = bench.node.status(bench.now)
    return Fence(status["term"], status["epoch"])


def test_a_request_runs_on_a_single_node() -> None:
    """Submit, start, committed tokens, end: delivered and concluded by one node alone."""
    bench = Bench.leader()
    bench.submit(3, prompt_ids=(7, 8))
    [accepted] = bench.replied(m.Accepted)
    assert (accepted.served_by, accepted.prompt_ids, accepted.waiting) == ("node5", (7, 8), "")
    [start] = bench.ordered(e.StartRequest)
    assert (start.prompt_ids, start.received) == ((7, 8), ())
    bench.worker(e.TokensCommitted(fence=FIRST, tokens=drawn(3, 9)))
    assert bench.told(e.Deliver) == [e.Deliver(route=b"client", request_id=3, start=0, tokens=(9,))]
    bench.worker(e.RequestEnded(fence=FIRST, request_id=3, reason="length", total_tokens=1))
    [end] = bench.told(e.Conclude)
    assert (end.reason, end.total_tokens, end.code) == ("length", 1, "")
    assert [fact.reply_tokens for fact in bench.told(e.RequestFinished)] == [1]


def test_a_request_waits_for_the_plan() -> None:
    """Its client is told what for; it starts when the plan is in force."""
    bench = Bench()
    bench.worker_ready()
    bench.submit(3)
    assert [a.waiting for a in bench.replied(m.Accepted)] == ["node5 to load the weights"]
    assert not bench.ordered(e.StartRequest)
    bench.load()
    assert [order.request_id for order in bench.ordered(e.StartRequest)] == [3]


def test_a_request_without_a_cluster_ends_as_not_ready() -> None:
    """A joiner takes requests, and gives them up after wait_for_nodes."""
    bench = Bench(join=(1,), wait_for_nodes=2.0)
    bench.submit(3)
    assert [a.waiting for a in bench.replied(m.Accepted)] == ["a cluster to join"]
    bench.run(2.1)
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("not_ready", True)


def test_a_client_cancels() -> None:
    """CANCEL of whoever knows the id ends the reply and takes it from the worker."""
    bench = Bench.leader()
    bench.submit(3)
    bench.client(m.Cancel(request_id=4))
    assert not bench.told(e.Conclude)
    bench.client(m.Cancel(request_id=3))
    assert [order.request_id for order in bench.ordered(e.CancelRequest)] == [3]
    [end] = bench.told(e.Conclude)
    assert (end.reason, end.code) == ("cancelled", "cancelled")


def test_a_member_that_lost_a_client_does_not_end_its_reply_here() -> None:
    """The client came from there to the leader: what that member says is of its own connection,
    whether it counts as a member still or not."""
    bench = Bench.leader(TWO, THREE)
    bench.hear(TWO, forward(TWO, 3))
    bench.submit(3, attempt=1)
    bench.hear(TWO, m.Cancel(request_id=3, reason="orphan"))
    bench.hear(TWO, m.Cancel(request_id=3))
    bench.client(m.Cancel(request_id=3, reason="orphan"), b"some connection of old")
    assert not bench.told(e.Conclude)
    assert not bench.ordered(e.CancelRequest)


def test_a_follower_forwards_and_delivers() -> None:
    """A follower forwards to the leader and delivers what that says is committed."""
    bench = Bench.follower(ONE, TWO)
    bench.submit(3)
    [(address, asked)] = bench.sent(m.Forward)
    assert (address, asked.serving_id) == (ONE.address, bench.me.node_id)
    bench.hear(ONE, m.Drawn(tokens=drawn(3, 9)))
    assert [given.tokens for given in bench.told(e.Deliver)] == [(9,)]
    bench.hear(ONE, m.Ended(request_id=3, reason="stop", total_tokens=1))
    assert [end.reason for end in bench.told(e.Conclude)] == ["stop"]


def test_a_reply_goes_on_under_the_next_leader() -> None:
    """It is forwarded again with all tokens that it has, and no client is told of an error."""
    bench = Bench.follower(ONE, TWO)
    bench.submit(3)
    bench.hear(ONE, m.Drawn(tokens=drawn(3, 9)))
    bench.outputs.clear()
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.run(0.3, TWO, leader_id="")
    assert not bench.told(e.Conclude)
    bench.beat(TWO, term=2, leader_id=TWO.node_id)
    [(address, asked)] = bench.sent(m.Forward)
    assert (address, asked.received) == (TWO.address, (9,))
    bench.hear(ONE, m.Drawn(tokens=drawn(3, 7, start=1)))
    assert not bench.told(e.Deliver)
    bench.hear(TWO, m.Drawn(tokens=drawn(3, 8, start=1)))
    assert [given.tokens for given in bench.told(e.Deliver)] == [(8,)]


def test_the_leader_serves_other_nodes_requests() -> None:
    """FORWARD enters it; what is committed goes back as DRAWN, and its end as ENDED."""
    bench = Bench.leader(TWO)
    bench.hear(TWO, forward(TWO, 4))
    assert [order.request_id for order in bench.ordered(e.StartRequest)] == [4]
    bench.worker(e.TokensCommitted(fence=fence_of(bench), tokens=drawn(4, 9)))
    assert [said.tokens for _, said in bench.sent(m.Drawn)] == [drawn(4, 9)]
    ended = e.RequestEnded(fence=fence_of(bench), request_id=4, reason="stop", total_tokens=1)
    bench.worker(ended)
    assert [said.total_tokens for _, said in bench.sent(m.Ended)] == [1]


def test_only_its_serving_node_ends_a_request() -> None:
    """CANCEL of another member changes nothing, nor does FORWARD in another's name."""
    bench = Bench.leader(TWO, THREE)
    bench.hear(THREE, forward(TWO, 4))
    assert not bench.ordered(e.StartRequest)
    bench.hear(TWO, forward(TWO, 4))
    assert bench.ordered(e.StartRequest)
    bench.hear(THREE, m.Cancel(request_id=4))
    assert not bench.ordered(e.CancelRequest)
    bench.hear(TWO, m.Cancel(request_id=4))
    assert bench.ordered(e.CancelRequest)


def test_a_request_outlives_its_serving_node_for_a_while() -> None:
    """Its client may resume it elsewhere; unclaimed it is forgotten after orphan_timeout."""
    bench = Bench.leader(TWO, THREE, orphan_timeout=4.0)
    bench.hear(TWO, forward(TWO, 4))
    bench.hear(TWO, forward(TWO, 5))
    bench.ordered(e.StartRequest)
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    bench.load_all(THREE)
    assert {order.request_id for order in bench.ordered(e.StartRequest)} == {4, 5}
    bench.run(1.0, THREE)
    bench.hear(THREE, forward(THREE, 4))
    bench.run(4.0, THREE)
    assert [order.request_id for order in bench.ordered(e.CancelRequest)] == [5]


def test_a_lost_owner_interrupts_a_reply_and_does_not_end_it() -> None:
    """The next plan starts it again with its tokens; its client learns who was lost."""
    bench = Bench.leader(TWO, THREE)
    bench.submit(3)
    bench.ordered(e.StartRequest)
    fence = fence_of(bench)
    bench.worker(e.TokensCommitted(fence=fence, tokens=drawn(3, 9)))
    bench.take(e.LinkDown(address=TWO.address))
    bench.take(e.ProbeAnswered(address=TWO.address, refused=True))
    fence = bench.load(THREE)
    [start] = bench.ordered(e.StartRequest)
    assert start.received == (9,)
    bench.worker(e.TokensCommitted(fence=fence, tokens=drawn(3, 9, 8)))
    bench.worker(e.RequestEnded(fence=fence, request_id=3, reason="stop", total_tokens=2))
    [end] = bench.told(e.Conclude)
    assert [failover.lost for failover in end.failovers] == [("node2",)]


def test_logs_of_the_leader_before_wait_for_their_clients() -> None:
    """A new leader takes them over; one that is claimed goes on where it was, once settled."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.run(0.2, TWO, leader_id="")
    bench.hear(TWO, m.PreVoteReply(term=2, voter_id=TWO.node_id, granted=True))
    bench.hear(TWO, m.VoteReply(term=2, voter_id=TWO.node_id, granted=True))
    known = log("pqr", term=1, request_id=4)
    fence = bench.load(TWO, logs=(known,))
    assert [fact.length for fact in bench.told(e.RequestRestored)] == [3]
    assert not bench.ordered(e.StartRequest)
    claim = m.Forward(
        request_id=4,
        serving_id=TWO.node_id,
        prompt_ids=known.tokens[:1],
        params=SamplingParams(),
    )
    bench.hear(TWO, claim)
    [start] = bench.ordered(e.StartRequest)
    assert start.received == known.tokens[1:]
    assert not bench.sent(m.Drawn)
    bench.worker(e.FenceSettled(fence=fence))
    assert [said.tokens for _, said in bench.sent(m.Drawn)] == [drawn(4, *known.tokens[1:])]


def test_steps_that_fail_for_ever_end_the_requests() -> None:
    """After three failed steps without a token the requests end as internal."""
    bench = Bench.leader()
    bench.submit()
    for _ in range(3):
        failed = e.StepFailed(fence=fence_of(bench), step=1, node_id="", reason="not finite")
        bench.worker(failed)
        bench.load()
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("internal", True)
    assert "not finite" in end.message


def test_what_a_worker_says_of_requests_is_for_the_leader() -> None:
    """A follower's worker that still speaks as the leader's is not heard."""
    bench = Bench.follower(ONE, TWO)
    bench.submit(3)
    bench.worker(e.TokensCommitted(fence=FIRST, tokens=drawn(3, 9)))
    bench.worker(e.RequestEnded(fence=FIRST, request_id=3, reason="stop", total_tokens=1))
    assert not bench.told(e.Deliver)
    assert not bench.told(e.Conclude)


def test_a_step_that_fails_without_a_leader_is_nobodys() -> None:
    """The plan has ended with its leader; there is nobody to tell."""
    bench = Bench.follower(ONE, TWO)
    failed = e.StepFailed(fence=FIRST, step=1, node_id=TWO.node_id, reason="overdue")
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.worker(failed)
    assert not bench.sent(m.Nack)
    assert not bench.told(e.Probe)
