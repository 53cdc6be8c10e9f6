"""Replies on the serving node."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.request_log import MAX_KEPT_REPLIES, MAX_KEPT_TOKENS, REPLY_KEPT_S
from p2pinfer.core.requests import TELL_AFTER_S, Serving
from p2pinfer.limits import MAX_FAILOVERS, MAX_REQUESTS
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire import messages as m
from tests.serving_bench import LEADER, ME, MODEL, OTHER, Desk

# --- the serving node -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "code", "says"),
    [
        ({"prompt_ids": ()}, "empty_prompt", "no tokens"),
        ({"prompt_ids": (1,) * 128}, "prompt_too_long", "127"),
        ({"params": SamplingParams(top_p=0.0)}, "invalid_request", "top_p"),
    ],
)
def test_a_wrong_request_is_refused(values: dict[str, Any], code: str, says: str) -> None:
    """What cannot be served fails at once, naming what is wrong; nothing is forwarded."""
    desk = Desk().submit(**values)
    [failed] = desk.messages(m.Failed)
    assert (failed.code, failed.retryable) == (code, False)
    assert says in failed.message
    assert desk.messages(m.Forward) == []


def test_the_longest_prompt_is_accepted() -> None:
    """A prompt that leaves room for one token is served; without a model the leader will tell."""
    assert Desk().submit(prompt_ids=(1,) * 127).messages(m.Accepted)
    assert Desk(model=None).submit(prompt_ids=(1,) * 500).messages(m.Accepted)


def test_too_many_requests_are_refused() -> None:
    """The request after MAX_REQUESTS open ones is refused as overloaded, retryable."""
    desk = Desk()
    for number in range(MAX_REQUESTS):
        desk.submit(request_id=number)
    assert desk.messages(m.Failed) == []
    [failed] = desk.submit(request_id=9999).messages(m.Failed)
    assert (failed.code, failed.retryable) == ("overloaded", True)


def test_tokens_are_delivered_once_and_in_order() -> None:
    """Repeated tokens are not delivered again, those of one message in one piece."""
    desk = Desk().submit()
    assert desk.told(e.RequestAccepted) == [e.RequestAccepted(request_id=1, prompt_tokens=2)]
    desk.drawn(0, 10, 11).drawn(0, 10, 11).drawn(1, 11, 12)
    assert [(d.start, d.tokens) for d in desk.told(e.Deliver)] == [(0, (10, 11)), (2, (12,))]


def test_a_gap_is_asked_for_once_per_burst() -> None:
    """A lost message is mended by forwarding with what is here, soon but not at every token."""
    desk = Desk().submit()
    desk.drawn(0, 10)
    desk.messages(m.Forward)
    for index in range(5):
        desk.drawn(3 + index, 50, now=0.1)
    assert desk.messages(m.Forward) == []
    desk.look(0.21)
    assert [f.received for f in desk.messages(m.Forward)] == [(10,)]
    desk.ended(4, now=0.5)
    assert desk.told(e.Conclude) == []
    assert desk.messages(m.Forward)
    desk.drawn(1, 11, 12, 13, now=0.6).ended(4, now=0.6)
    assert [end.total_tokens for end in desk.told(e.Conclude)] == [4]


def test_forwarding_is_repeated_ever_more_slowly() -> None:
    """Without a word of a request it is forwarded after 1, 2, 4, 8, 8 s; a token begins anew."""
    desk = Desk().submit()
    times = []
    for tenth in range(0, 300):
        if desk.look(tenth / 10).messages(m.Forward):
            times.append(tenth / 10)
    assert times == [0.0, 1.0, 3.0, 7.0, 15.0, 23.0]
    desk.drawn(0, 10, now=30.0)
    assert desk.serving.deadline == 31.0


def test_without_a_leader_a_request_waits_for_one() -> None:
    """Nothing is forwarded until somebody leads."""
    desk = Desk(leader="").submit(waiting="a cluster")
    assert desk.messages(m.Forward) == []
    assert desk.serving.deadline == 30.0
    desk.serving.leader_found(LEADER, 1)
    desk.look(0.0, ready=False)
    assert desk.messages(m.Forward)
    desk.serving.leader_found(LEADER, 1)
    assert desk.look(0.5, ready=False).messages(m.Forward) == []


def test_waiting_ends_as_not_ready() -> None:
    """A request that no ready cluster came for fails after wait_for_nodes and is cancelled."""
    desk = Desk(wait_for_nodes=10.0).submit(waiting="2 more")
    assert [a.waiting for a in desk.messages(m.Accepted)] == ["2 more"]
    desk.look(9.0, ready=False)
    assert desk.told(e.Conclude) == []
    desk.look(10.0, ready=False)
    [end] = desk.told(e.Conclude)
    assert (end.code, end.retryable) == ("not_ready", True)
    assert "2 more" in end.message
    assert desk.messages(m.Cancel)
    without = Desk(leader="", wait_for_nodes=10.0).submit(waiting="2 more").look(11.0, ready=False)
    assert without.told(e.Conclude)
    assert without.messages(m.Cancel) == []


def test_without_a_leader_patience_ends_as_no_quorum() -> None:
    """A reply in a cluster that cannot elect anybody ends in a retryable error, keeping its tokens
    for the client to bring along."""
    desk = Desk(wait_for_nodes=10.0).submit().drawn(0, 10)
    desk.serving.leader_lost()
    desk.look(1.0, ready=False, leaderless=True)
    assert desk.serving.deadline == 11.0
    desk.look(10.9, ready=False, leaderless=True)
    assert desk.told(e.Conclude) == []
    [end] = desk.look(11.0, ready=False, leaderless=True).told(e.Conclude)
    assert (end.code, end.retryable, end.total_tokens) == ("no_quorum", True, 1)
    assert desk.messages(m.Cancel) == []


def test_patience_begins_again_when_the_cluster_was_ready() -> None:
    """Only standing still for the whole time counts: a plan in force begins the time anew."""
    desk = Desk(wait_for_nodes=10.0).submit(waiting="2 more").look(5.0)
    desk.look(6.0, ready=False).look(15.9, ready=False)
    assert desk.told(e.Conclude) == []
    assert desk.look(16.0, ready=False).told(e.Conclude)


def test_a_token_for_any_reply_shows_that_the_cluster_works() -> None:
    """A member that lags behind the plan makes a queued reply wait no shorter."""
    desk = Desk(wait_for_nodes=10.0).submit().submit(request_id=2).look(0.0, ready=False)
    desk.serving.drawn(
        m.Drawn(tokens=(m.DrawnToken(request_id=2, index=0, token=4),)),
        9.0,
    )
    desk.look(18.9, ready=False)
    assert desk.told(e.Conclude) == []
    assert len(desk.look(19.0, ready=False).told(e.Conclude)) == 2


def test_a_client_is_told_when_the_reason_changes() -> None:
    """ACCEPTED goes out again for another reason and when there is none any more, not for the same
    one."""
    desk = Desk(leader="").submit(waiting="a cluster to join")
    desk.look(0.1, ready=False, waiting="a cluster to join").look(0.2, ready=False, waiting="b")
    desk.look(0.3, ready=False, waiting="b").look(0.4).look(0.5)
    assert [a.waiting for a in desk.messages(m.Accepted)] == ["a cluster to join", "b", ""]


def test_a_client_is_told_where_else_it_may_go() -> None:
    """With every ACCEPTED, as it is at that moment."""
    others = [m.Contact(name="b", address="tcp://b:7720")]
    desk = Desk()
    desk.serving = Serving(
        e.NodeConfig(member=ME, model=MODEL, cluster_id="5" * 16), desk.box, lambda: tuple(others)
    )
    desk.submit(waiting="a leader")
    others.append(m.Contact(name="c", address="tcp://c:7720"))
    desk.look(0.1)
    told = [[other.name for other in a.others] for a in desk.messages(m.Accepted)]
    assert told == [["b"], ["b", "c"]]


def test_a_running_reply_tells_of_long_interruptions_only() -> None:
    """Most changes of plan are over before a client would be told of them."""
    desk = Desk().submit()
    desk.messages(m.Accepted)
    desk.look(1.0, ready=False).look(1.9, ready=False).look(2.0)
    assert desk.messages(m.Accepted) == []
    desk.look(3.0, ready=False).look(3.0 + TELL_AFTER_S, ready=False)
    [accepted] = desk.messages(m.Accepted)
    assert (accepted.waiting, accepted.prompt_ids) == ("2 more", (7, 8))


def test_the_same_id_again_attaches() -> None:
    """Another connection with the same request gets what it lacks, and all that follows."""
    desk = Desk().submit().drawn(0, 10, 11, 12)
    desk.outputs.clear()
    desk.submit(route=b"b", received=(10,))
    [deliver] = desk.told(e.Deliver)
    assert (deliver.route, deliver.start, deliver.tokens) == (b"b", 1, (11, 12))
    assert len(desk.messages(m.Accepted)) == 1
    desk.drawn(3, 13)
    assert [d.route for d in desk.told(e.Deliver)] == [b"b"]
    desk.submit(route=b"c", received=(10, 11, 12, 13))
    assert desk.told(e.Deliver) == []


def test_a_later_attempt_is_told_to_the_leader_at_once() -> None:
    """Another node may have served the request meanwhile; the same attempt again is no news."""
    desk = Desk().submit(attempt=5)
    assert [f.attempt for f in desk.messages(m.Forward)] == [5]
    desk.submit(0.1, attempt=5).submit(0.1, attempt=4)
    assert desk.messages(m.Forward) == []
    desk.submit(0.2, attempt=6)
    assert [f.attempt for f in desk.messages(m.Forward)] == [6]


def test_a_finished_reply_can_be_asked_for_again() -> None:
    """For a minute a finished reply is delivered and concluded again."""
    desk = Desk().submit().drawn(0, 10, 11, now=0.5).ended(2, now=0.5)
    desk.outputs.clear()
    desk.submit(5.0, route=b"b", received=(10,))
    assert [d.tokens for d in desk.told(e.Deliver)] == [(11,)]
    [end] = desk.told(e.Conclude)
    assert (end.route, end.reason, end.total_tokens, end.ttft_s) == (b"b", "stop", 2, 0.5)
    assert desk.told(e.RequestFinished) == []
    assert desk.serving.deadline == REPLY_KEPT_S + 0.5
    desk.look(REPLY_KEPT_S + 0.5)
    assert desk.serving.deadline == inf
    assert desk.submit(REPLY_KEPT_S + 0.5).messages(m.Forward)


def test_kept_replies_are_bounded() -> None:
    """Of more finished replies than are kept the oldest is forgotten."""
    desk = Desk()
    for number in range(MAX_KEPT_REPLIES + 1):
        desk.submit(float(number) / 100, request_id=number)
        desk.ended(0, now=float(number) / 100, request_id=number)
    desk.outputs.clear()
    desk.submit(3.0, request_id=1)
    assert desk.told(e.Conclude)
    desk.submit(3.0, request_id=0)
    assert desk.told(e.Conclude) == []


def test_kept_tokens_are_bounded() -> None:
    """However few they are, finished replies are kept only as long as their tokens find room."""
    desk = Desk(model=None)
    half = (7,) * (MAX_KEPT_TOKENS // 2)
    for number in range(3):
        desk.submit(0.01 * number, request_id=number, prompt_ids=half)
        desk.ended(0, now=0.01 * number, request_id=number)
    desk.outputs.clear()
    desk.submit(1.0, request_id=1, prompt_ids=half)
    assert desk.told(e.Conclude)
    desk.submit(1.0, request_id=0, prompt_ids=half)
    assert desk.told(e.Conclude) == []


def test_more_tokens_than_the_log_has_extend_it() -> None:
    """A client that has more than this node makes it forward at once with those tokens."""
    desk = Desk().submit().drawn(0, 10)
    desk.outputs.clear()
    desk.submit(route=b"b", received=(10, 11, 12))
    assert [f.received for f in desk.messages(m.Forward)] == [(10, 11, 12)]
    desk.drawn(3, 13)
    assert [d.start for d in desk.told(e.Deliver)] == [3]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt_ids": (9,)}, "another prompt"),
        ({"params": SamplingParams(seed=4)}, "other settings"),
        ({"received": (10, 99)}, "token 1"),
        ({"received": (10, 11, 12)}, "ended with 2"),
    ],
)
def test_a_contradiction_is_a_log_conflict(values: dict[str, Any], says: str) -> None:
    """A repetition that differs from what is known fails, and harms the reply that is known."""
    desk = Desk().submit().drawn(0, 10, 11).ended(2)
    desk.outputs.clear()
    [failed] = desk.submit(route=b"b", **values).messages(m.Failed)
    assert (failed.code, failed.retryable) == ("log_conflict", False)
    assert says in failed.message
    assert desk.submit(route=b"b").told(e.Conclude)


def test_after_an_error_the_same_id_is_a_new_attempt() -> None:
    """A reply that failed is forgotten when it is submitted again."""
    desk = Desk().submit().drawn(0, 10)
    desk.ended(1, reason="error", code="node_lost", message="gone", retryable=True)
    [end] = desk.told(e.Conclude)
    assert (end.code, end.message, end.retryable, end.total_tokens) == (
        "node_lost",
        "gone",
        True,
        1,
    )
    desk.outputs.clear()
    desk.submit(received=(10,))
    assert [f.received for f in desk.messages(m.Forward)] == [(10,)]
    assert desk.told(e.Conclude) == []


def test_a_stop_string_ends_a_reply_well() -> None:
    """`stop` concludes without an error and cancels at the leader; a second cancel is nothing."""
    desk = Desk().submit().drawn(0, 10)
    for _ in range(2):
        desk.serving.cancelled(e.ClientCancelled(request_id=1, reason="stop"), 0.0)
    desk.serving.cancelled(e.ClientCancelled(request_id=77), 0.0)
    desk.look(0.0)
    assert [(end.reason, end.code) for end in desk.told(e.Conclude)] == [("stop", "")]
    assert [c.reason for c in desk.messages(m.Cancel)] == ["stop"]
    desk.ended(5)
    assert desk.told(e.Conclude) == []


@pytest.mark.parametrize("leader", [LEADER, ""])
def test_a_client_that_has_the_stop_string_lacks_the_end_only(leader: str) -> None:
    """It gets that at once. The leader is told that the request is this node's, so that this node
    may end it."""
    desk = Desk(leader).submit(received=(10, 11), attempt=5, stopped=True)
    [end] = desk.told(e.Conclude)
    assert (end.reason, end.code, end.total_tokens) == ("stop", "", 2)
    sent = [o.message for o in desk.told(e.Send)]
    assert [type(message) for message in sent] == ([m.Forward, m.Cancel] if leader else [])
    assert all(getattr(message, "reason", "stop") == "stop" for message in sent)
    desk.submit(received=(10, 11), attempt=6, stopped=True)
    assert len(desk.told(e.Conclude)) == 1
    assert desk.told(e.Send) == []


def test_a_stop_string_of_another_reply_ends_nothing() -> None:
    """Tokens that contradict the reply are refused, whatever they spell."""
    desk = Desk().submit().drawn(0, 10)
    desk.submit(route=b"b", received=(99,), stopped=True)
    assert [failed.code for failed in desk.messages(m.Failed)] == ["log_conflict"]
    assert desk.told(e.Conclude) == []


def test_tokens_that_nobody_waits_for_are_cancelled() -> None:
    """The leader is told to stop a reply that this node does not know or has concluded."""
    desk = Desk().drawn(0, 10, request_id=6)
    assert [c.request_id for c in desk.messages(m.Cancel)] == [6]


def test_a_cancelled_request_is_told_to_the_leader_if_there_is_one() -> None:
    """Without a leader the request is left to be forgotten by the next one."""
    for leader, cancels in ((LEADER, 1), ("", 0)):
        desk = Desk(leader=leader).submit()
        desk.serving.cancelled(e.ClientCancelled(request_id=1), 0.0)
        desk.look(0.0)
        assert [end.code for end in desk.told(e.Conclude)] == ["cancelled"]
        assert len(desk.messages(m.Cancel)) == cancels


def test_the_leader_learns_why_a_request_is_cancelled() -> None:
    """Of a client that is gone another node may know more."""
    desk = Desk().submit()
    desk.serving.cancelled(e.ClientCancelled(request_id=1, reason="orphan"), 0.0)
    desk.look(0.0)
    assert [cancel.reason for cancel in desk.messages(m.Cancel)] == ["orphan"]


def test_leaving_ends_open_replies_only() -> None:
    """A retryable error for what is open; what was finished stays so."""
    desk = Desk().submit().submit(request_id=2).ended(0)
    desk.outputs.clear()
    desk.serving.fail_all("leaving", "node me is leaving", 1.0)
    desk.look(1.0)
    [end] = desk.told(e.Conclude)
    assert (end.request_id, end.code, end.retryable) == (2, "leaving", True)


# --- another leader -------------------------------------------------------------------------------


def test_a_reply_outlives_its_leader() -> None:
    """It waits, is forwarded to the next leader with all its tokens at once, and goes on."""
    desk = Desk().submit().drawn(0, 10, 11)
    desk.messages(m.Forward)
    desk.serving.leader_lost()
    desk.look(5.0, ready=False)
    assert (desk.told(e.Conclude), desk.messages(m.Forward)) == ([], [])
    desk.serving.leader_found(OTHER, 2)
    [forward] = desk.look(6.0, ready=False).messages(m.Forward)
    assert (forward.received, forward.serving_id) == ((10, 11), ME.node_id)
    desk.told(e.Deliver)
    desk.drawn(1, 11, 12, now=7.0)
    assert [(d.start, d.tokens) for d in desk.told(e.Deliver)] == [(2, (12,))]


def test_the_same_leader_in_another_term_is_another_leader() -> None:
    """It may have lost its log in between, so every reply is forwarded again; patience is short."""
    desk = Desk().submit().look(1.0).look(3.0)
    desk.messages(m.Forward)
    desk.serving.leader_found(LEADER, 3)
    assert desk.look(3.1).messages(m.Forward)
    assert desk.serving.deadline == 4.1


def test_a_leader_that_knows_another_log_is_not_followed() -> None:
    """A token that differs from one that the client has ends the reply at once."""
    desk = Desk().submit(received=(10, 11))
    desk.drawn(1, 99, 12)
    [end] = desk.told(e.Conclude)
    assert (end.code, end.retryable, end.total_tokens) == ("log_conflict", False, 2)
    assert "token 1 that you have is 11, the log has 99" in end.message
    assert desk.told(e.Deliver) == []
    assert len(desk.messages(m.Cancel)) == 2


# --- times and interruptions ----------------------------------------------------------------------


def interruption(position: int, *lost: str, request_id: int = 1) -> m.Interruption:
    """As a leader tells it."""
    failover = Failover(
        position=position, lost=lost, rung="replay", detect_s=0.5, stall_s=0.0, exact=False
    )
    return m.Interruption(request_id=request_id, failover=failover)


def test_the_serving_node_measures_the_times() -> None:
    """First token after submission, and the rate of those after it; 0 where there are none."""
    desk = Desk().submit(1.0).drawn(0, 10, now=3.0).drawn(1, 11, 12, now=3.5).ended(3, now=4.0)
    [end], [fact] = desk.told(e.Conclude), desk.told(e.RequestFinished)
    assert (end.ttft_s, end.tokens_per_s) == (fact.ttft_s, fact.tokens_per_s) == (2.0, 4.0)
    [end] = Desk().submit(1.0, received=(1,)).ended(1, now=3.0).told(e.Conclude)
    assert (end.ttft_s, end.tokens_per_s) == (0.0, 0.0)
    [end] = Desk().submit().drawn(0, 10, 11, now=2.0).ended(2, now=2.0).told(e.Conclude)
    assert (end.ttft_s, end.tokens_per_s) == (2.0, 0.0)


def test_interruptions_are_told_with_the_pause_that_the_client_saw() -> None:
    """Position and stall are those of this reply; the rest is what the leader says."""
    desk = Desk().submit(1.0).drawn(0, 10, now=2.0)
    desk.drawn(1, 11, now=4.5, interruptions=(interruption(3, "n2"),))
    desk.drawn(2, 12, now=4.6).ended(3, now=5.0)
    [end] = desk.told(e.Conclude)
    assert end.failovers == (
        Failover(position=3, lost=("n2",), rung="replay", detect_s=0.5, stall_s=2.5, exact=False),
    )
    assert [again.failovers for again in desk.submit().told(e.Conclude)] == [end.failovers]


def test_before_the_first_token_a_pause_counts_from_the_submission() -> None:
    """A reply that was interrupted in its prompt has no token before."""
    desk = Desk().submit(1.0).drawn(0, 10, now=4.0, interruptions=(interruption(2, "n2"),))
    [end] = desk.ended(1, now=4.0).told(e.Conclude)
    assert [(f.position, f.stall_s) for f in end.failovers] == [(2, 3.0)]


def test_an_interruption_is_taken_once() -> None:
    """Told again it is no second one; one that lies behind, or of no open reply, is nothing."""
    desk = Desk().submit().drawn(0, 10)
    both = (interruption(3, "n2"), interruption(3, "n2"))
    desk.drawn(3, 13, now=1.0, interruptions=both)
    desk.drawn(1, 11, now=2.0, interruptions=both[:1])
    desk.drawn(1, 11, now=3.0, interruptions=both[:1])
    desk.drawn(2, 12, now=3.5, interruptions=(interruption(9, "n3", request_id=8),))
    [end] = desk.ended(3, now=4.0).told(e.Conclude)
    assert [(f.position, f.stall_s) for f in end.failovers] == [(3, 2.0)]
    desk.drawn(3, 13, now=5.0, interruptions=(interruption(5, "n3"),))
    assert [again.failovers for again in desk.submit(6.0).told(e.Conclude)] == [end.failovers]


def test_an_interruption_that_nothing_came_after_is_not_told() -> None:
    """Its pause never ended for this client."""
    desk = Desk().submit().drawn(0, 10)
    desk.drawn(2, 12, interruptions=(interruption(3, "n2"),))
    [end] = desk.ended(1).told(e.Conclude)
    assert end.failovers == ()


def test_interruptions_are_bounded() -> None:
    """The last message of a reply tells of MAX_FAILOVERS at most."""
    desk = Desk(model=None).submit()
    for index in range(MAX_FAILOVERS + 1):
        desk.drawn(index, 10, interruptions=(interruption(2 + index, "n2"),))
    [end] = desk.ended(MAX_FAILOVERS + 1).told(e.Conclude)
    assert len(end.failovers) == MAX_FAILOVERS
