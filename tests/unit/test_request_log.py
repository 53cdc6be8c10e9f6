"""The leader's log of requests: entering, starting, committed tokens, ends and failures."""

from __future__ import annotations

from math import inf

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.request_log import (
    MAX_KEPT_REPLIES,
    MAX_KEPT_TOKENS,
    MAX_STEP_FAILURES,
    REPLY_KEPT_S,
    surplus,
)
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS
from p2pinfer.wire import messages as m
from tests.request_bench import OTHER, PARAMS, PROMPT, THIRD, Ledger, agreed, started


def test_a_request_starts_once() -> None:
    """What was received goes to the worker with it; forwarding again does not start it again."""
    ledger = Ledger().forward(received=(5,))
    ledger.log.start_all(ledger.fence)
    orders, sent = ledger.take()
    assert [(o.prompt_ids, o.received, o.computed) for o in orders] == [(PROMPT, (5,), 0)]
    assert sent == []
    ledger.forward(received=(5,)).log.start_all(ledger.fence)
    assert ledger.take() == ([], [])


def test_requests_start_in_the_order_in_which_they_came() -> None:
    """First come, first served, in every fence."""
    ledger = Ledger()
    for number in (5, 3, 9):
        ledger.forward(request_id=number)
    assert [o.request_id for o in ledger.start()] == [5, 3, 9]
    ledger.adopt(agreed(request_id=3))
    assert [o.request_id for o in ledger.start()] == [5, 3, 9]


def test_committed_tokens_go_to_their_serving_nodes() -> None:
    """Each node gets its tokens; those of unknown requests, or beyond a gap, go nowhere."""
    ledger = Ledger().forward().forward(request_id=2, serving=THIRD).started()
    tokens = ((1, 0, 10), (2, 0, 20), (3, 0, 30), (1, 5, 40))
    found = tuple(m.DrawnToken(request_id=r, index=i, token=t) for r, i, t in tokens)
    ledger.log.committed(e.TokensCommitted(fence=ledger.fence, tokens=found))
    assert ledger.drawn() == [(OTHER, [(0, 10)]), (THIRD, [(0, 20)])]
    assert ledger.log.running == 2


def test_the_largest_request_is_one_that_has_not_ended() -> None:
    """Its prompt and all tokens that it may get."""
    ledger = Ledger()
    assert ledger.log.largest == 0
    ledger.forward().forward(request_id=2, serving=THIRD).started()
    assert ledger.log.largest == len(PROMPT) + PARAMS.max_tokens


def test_what_is_committed_again_is_sent_once() -> None:
    """Tokens that the client brought, or that were committed before, are no news."""
    ledger = Ledger().forward(received=(10,)).started().committed(0, 10, 11).committed(1, 11)
    assert ledger.drawn() == [(OTHER, [(1, 11)])]


def test_reports_of_another_fence_are_ignored() -> None:
    """What a worker says of the plan before was said before it stopped, and proves nothing now."""
    ledger = Ledger().forward().started().committed(0, 10).adopt(agreed(10)).started()
    ledger.committed(1, 99, epoch=1).ended(1, epoch=1).settled(epoch=1)
    assert ledger.take() == ([], [])
    assert ledger.committed(1, 11).drawn() == [(OTHER, [(1, 11)])]


def test_nothing_is_taken_from_the_worker_between_two_plans() -> None:
    """From the activation until the worker obeys, its reports are of the plan before."""
    ledger = Ledger().forward().started().adopt(agreed())
    ledger.epoch = 1
    ledger.committed(0, 10).ended(0)
    assert ledger.take() == ([], [])


def test_forwarding_again_brings_the_rest() -> None:
    """The tail of the log is sent, in messages of bounded size, and the end when it has ended."""
    ledger = Ledger().forward().started().committed(0, *range(100))
    ledger.take()
    sent = ledger.forward(received=tuple(range(10))).sent()
    assert [len(message.tokens) for _, message in sent] == [MAX_STEP_SLOTS, 26]
    assert sent[0][1].tokens[0].index == 10
    ledger.ended(100).take()
    sent = ledger.forward(received=tuple(range(100))).sent()
    assert [type(message) for _, message in sent] == [m.Ended]


def test_the_last_token_comes_before_the_end() -> None:
    """A final token is committed like any other, and then the reply ends."""
    ledger = Ledger().forward().started().committed(0, 10).committed(1, 2).ended(2)
    sent = ledger.sent()
    assert [type(message) for _, message in sent] == [m.Drawn, m.Drawn, m.Ended]
    assert (sent[-1][1].total_tokens, sent[-1][1].reason, sent[-1][1].code) == (2, "stop", "")
    assert ledger.log.running == 0
    assert ledger.committed(2, 4).take() == ([], [])


def test_a_full_log_refuses() -> None:
    """The request after MAX_REQUESTS is ended as overloaded, retryable."""
    ledger = Ledger()
    for number in range(MAX_REQUESTS):
        ledger.forward(request_id=number)
    [(_, ended)] = ledger.forward(request_id=9999).sent()
    assert (ended.code, ended.retryable) == ("overloaded", True)


def test_an_error_of_the_worker_is_passed_on_and_forgotten() -> None:
    """RequestEnded with a code: ENDED with it, and the same id is a new request afterwards."""
    ledger = Ledger().forward().started().ended(0, reason="error", code="prompt_too_long")
    [(_, ended)] = ledger.sent()
    assert (ended.reason, ended.code, ended.retryable) == ("error", "prompt_too_long", False)
    assert (ledger.log.running, ledger.log.wants(1)) == (0, False)
    assert ledger.ended(0).take() == ([], [])
    assert started(ledger.forward().start()) == [(1, (), 0)]
    assert ledger.log.wants(1)


def test_finished_replies_are_forgotten_in_time() -> None:
    """A finished reply is kept for a minute, and not more than a bounded number of them."""
    ledger = Ledger()
    for number in range(MAX_KEPT_REPLIES + 2):
        ledger.forward(request_id=number).started().ended(0, request_id=number, now=float(number))
    ledger.log.look(0.0)
    assert ledger.log.deadline == 2 + REPLY_KEPT_S
    assert not ledger.log.wants(2)
    ledger.log.look(1e6)
    assert ledger.log.deadline == inf


def test_kept_tokens_are_bounded() -> None:
    """The latest replies are kept whose tokens, with their prompts, find room."""
    for sizes, gone in (
        ([], 0),
        ([MAX_KEPT_TOKENS], 0),
        ([MAX_KEPT_TOKENS, 1], 1),
        ([MAX_KEPT_TOKENS + 1], 1),
        ([1, MAX_KEPT_TOKENS + 1, 1], 2),
        ([1] * MAX_KEPT_REPLIES, 0),
        ([1] * (MAX_KEPT_REPLIES + 3), 3),
    ):
        assert surplus(sizes) == gone
    ledger = Ledger().forward(prompt_ids=(7,) * MAX_KEPT_TOKENS).started().ended(0)
    ledger.log.look(0.0)
    assert ledger.log.deadline == REPLY_KEPT_S
    ledger.forward(request_id=2).started().ended(0, request_id=2, now=1.0)
    ledger.log.look(1.0)
    assert ledger.log.deadline == 1.0 + REPLY_KEPT_S


@pytest.mark.parametrize("received", [(), (10,), (10, 11)], ids=["none", "one", "all"])
def test_a_client_that_lost_its_node_at_the_end_gets_the_rest(received: tuple[int, ...]) -> None:
    """Through another node, with the same end; the same id with another prompt is refused."""
    ledger = Ledger().forward(attempt=1).started().committed(0, 10, 11).ended(2, reason="length")
    ledger.log.serving_lost(OTHER, 1.0)
    ledger.take()
    orders, sent = ledger.forward(2.0, serving=THIRD, received=received, attempt=2).take()
    assert orders == []
    *drawn, (to, ended) = sent
    assert [token.token for _, message in drawn for token in message.tokens] == [10, 11][
        len(received) :
    ]
    assert (to, ended.reason, ended.total_tokens, ended.code) == (THIRD, "length", 2, "")
    [(_, refused)] = ledger.forward(3.0, serving=THIRD, prompt_ids=(9, 9), attempt=3).sent()
    assert refused.code == "log_conflict"


def test_a_finished_reply_that_is_forgotten_is_found_again() -> None:
    """What the client has is forced: the worker draws the rest, or says at once that it is
    complete."""
    ledger = Ledger().forward().started().committed(0, 10, 11).ended(2)
    ledger.log.look(REPLY_KEPT_S)
    assert started(ledger.forward(99.0, serving=THIRD, received=(10, 11)).start()) == [
        (1, (10, 11), 0)
    ]
    [(to, ended)] = ledger.ended(2).sent()
    assert (to, ended.reason, ended.total_tokens) == (THIRD, "stop", 2)


def test_failing_spares_what_has_not_begun() -> None:
    """fail_started ends what the worker has; requests that still wait go on waiting."""
    ledger = Ledger().forward().started().forward(request_id=2)
    ledger.log.fail_started("internal", "broken")
    orders, [(_, ended)] = ledger.take()
    assert orders == [e.CancelRequest(request_id=1)]
    assert (ended.request_id, ended.code, ended.retryable) == (1, "internal", True)
    assert ledger.log.running == 1


@pytest.mark.parametrize("cure", ["a token", "a lost member"])
def test_only_failures_in_a_row_end_requests(cure: str) -> None:
    """Progress, or a loss that explains the failure, begins the count anew."""
    ledger = Ledger().forward().started()
    for index in range(4):
        for _ in range(MAX_STEP_FAILURES - 1):
            ledger.log.step_failed("gap")
        if cure == "a token":
            ledger.committed(index, 9)
        else:
            ledger.adopt(agreed(), lost=("n2",)).started()
    assert ledger.log.running == 1
    for _ in range(MAX_STEP_FAILURES):
        ledger.adopt(agreed(9, 9, 9, 9)).started().log.step_failed("gap")
    _, [(_, ended)] = ledger.take()
    assert (ended.code, ended.message) == ("internal", "3 steps in a row failed: gap")
