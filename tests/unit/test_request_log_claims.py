"""Who serves a request: claims, attempts, contradictions, cancelling, and orphans."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.request_log import MOVED_S, REPLY_KEPT_S
from p2pinfer.types import SamplingParams
from p2pinfer.wire import messages as m
from tests.request_bench import OTHER, THIRD, Ledger, agreed, started

# --- claims ---------------------------------------------------------------------------------------


def test_a_moved_request_stays_moved() -> None:
    """The old node is told, gets no more tokens, and its late messages move nothing back."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.take()
    sent = ledger.forward(1.0, serving=THIRD).sent()
    assert [(to, type(message)) for to, message in sent] == [(OTHER, m.Ended), (THIRD, m.Drawn)]
    assert (sent[0][1].code, sent[0][1].total_tokens) == ("cancelled", 1)
    ledger.forward(1.0 + MOVED_S / 2).cancel(OTHER)
    assert ledger.committed(1, 11).drawn() == [(THIRD, [(1, 11)])]
    ledger.ended(2).take()
    sent = ledger.forward(5.0).sent()
    assert [(to, type(message)) for to, message in sent] == [(OTHER, m.Drawn), (OTHER, m.Ended)]


def test_a_later_attempt_moves_a_request_at_once() -> None:
    """However freshly it has moved: the client itself says which of its submissions is the last."""
    ledger = Ledger().forward(attempt=1).forward(1.0, serving=THIRD, attempt=2)
    ledger.take()
    assert [to for to, _ in ledger.forward(1.01, attempt=3).sent()] == [THIRD]
    assert [to for to, _ in ledger.forward(1.02, serving=THIRD, attempt=4).sent()] == [OTHER]


def test_an_earlier_attempt_moves_nothing() -> None:
    """Its node is told that the client has gone on, however late it comes."""
    ledger = Ledger().forward(attempt=2).started()
    [(to, ended)] = ledger.forward(99.0, serving=THIRD, attempt=1).sent()
    assert (to, ended.reason, ended.code) == (THIRD, "cancelled", "cancelled")
    assert ledger.committed(0, 10).drawn() == [(OTHER, [(0, 10)])]


def test_an_earlier_attempt_with_other_tokens_is_told_of_the_contradiction() -> None:
    """Whoever came later in its name is somebody else: the client has not gone on."""
    ledger = Ledger().forward(received=(10, 99), attempt=2).started()
    [(to, ended)] = ledger.forward(9.0, serving=THIRD, received=(10, 11), attempt=1).sent()
    assert (to, ended.reason, ended.code) == (THIRD, "error", "log_conflict")


def test_before_the_logs_are_agreed_on_an_earlier_attempt_is_not_answered() -> None:
    """The later one may yet contradict the log; who is right forwards again."""
    ledger = Ledger().forward(attempt=2)
    assert ledger.forward(1.0, serving=THIRD, attempt=1).sent() == []


def test_an_earlier_attempt_does_not_claim_an_orphan() -> None:
    """The node of the last one died; the client comes back with a later one still."""
    ledger = Ledger().forward(attempt=2).started()
    ledger.log.serving_lost(OTHER, 1.0)
    assert [to for to, _ in ledger.forward(2.0, serving=THIRD, attempt=1).sent()] == [THIRD]
    assert ledger.forward(2.0, serving=THIRD, attempt=3).sent() == []
    assert ledger.committed(0, 10).drawn() == [(THIRD, [(0, 10)])]


def test_the_same_node_may_forward_an_earlier_attempt() -> None:
    """A message of it that was overtaken changes neither who serves nor which attempt is last."""
    ledger = Ledger().forward(attempt=2).forward(attempt=1).started()
    assert [to for to, _ in ledger.forward(9.0, serving=THIRD, attempt=1).sent()] == [THIRD]


def test_a_new_leader_believes_the_last_attempt() -> None:
    """Whichever of two nodes claims a log first, that of the later attempt keeps it."""
    for first, second in ((1, 2), (2, 1)):
        ledger = Ledger().adopt(agreed(10)).started()
        ledger.forward(1.0, serving=OTHER, attempt=first)
        moved = ledger.forward(1.01, serving=THIRD, attempt=second).sent()
        assert [to for to, _ in moved] == [OTHER if second > first else THIRD]


def test_a_new_request_may_move_at_once() -> None:
    """A client that changes its node early is not held up."""
    assert Ledger().forward().forward(0.1, serving=THIRD).sent()[0][1].code == "cancelled"


def test_two_nodes_that_find_a_new_leader_do_not_fight() -> None:
    """The first claim stands for a while; if the other node's client is the true one, it claims
    the request by forwarding it again."""
    ledger = Ledger().adopt(agreed(10)).started().forward(1.0)
    assert ledger.forward(1.01, serving=THIRD).sent() == []
    assert [to for to, _ in ledger.forward(2.01, serving=THIRD).sent()] == [OTHER]


def test_a_longer_log_of_the_client_is_forced() -> None:
    """The worker begins again from 0 with the tokens that the client has; old news is ignored."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.take()
    assert ledger.forward(received=(10, 11, 12)).orders() == [e.CancelRequest(request_id=1)]
    assert ledger.committed(1, 11).ended(1).take() == ([], [])
    assert started(ledger.start()) == [(1, (10, 11, 12), 0)]
    assert ledger.committed(1, 11).ended(4).take() == ([], [])
    assert ledger.committed(3, 13).drawn() == [(OTHER, [(3, 13)])]
    assert Ledger().forward().forward(received=(4,)).take() == ([], [])


def test_tokens_committed_meanwhile_that_differ_are_a_log_conflict() -> None:
    """The client has other tokens than those computed here: neither is passed off as the other."""
    ledger = Ledger().forward().started().committed(0, 10).forward(received=(10, 11, 12)).started()
    ledger.committed(1, 99, 98, 97)
    orders, [(to, ended)] = ledger.take()
    assert orders == [e.CancelRequest(request_id=1)]
    assert (to, ended.code) == (OTHER, "log_conflict")
    assert ledger.log.running == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt_ids": (1,)}, "another prompt"),
        ({"prompt_ids": (7, 9)}, "another prompt"),
        ({"params": SamplingParams(seed=3)}, "settings"),
        ({"received": (10, 99)}, "token 1 that you have is 99, the log has 11"),
        ({"received": (10, 11, 12)}, "ended with 2"),
    ],
)
def test_a_forwarded_contradiction_is_a_log_conflict(values: dict[str, Any], says: str) -> None:
    """What contradicts the log is ended at the node that forwarded it, and moves nothing."""
    ledger = Ledger().forward().started().committed(0, 10, 11).ended(2)
    ledger.take()
    [(to, ended)] = ledger.forward(serving=THIRD, **values).sent()
    assert (to, ended.code, ended.retryable) == (THIRD, "log_conflict", False)
    assert says in ended.message


def test_more_tokens_than_a_reply_can_have_are_a_log_conflict() -> None:
    """A client that sends tokens beyond the end of the reply is told so."""
    ledger = Ledger().forward(received=(10, 11, 12)).started().ended(2)
    [(_, ended)] = ledger.sent()
    assert (ended.reason, ended.code) == ("error", "log_conflict")
    assert "ends after 2" in ended.message


def test_cancelling_frees_the_slot() -> None:
    """A cancelled request leaves the worker if it had begun, and the log in any case."""
    ledger = Ledger().forward().cancel()
    assert ledger.take() == ([], [])
    assert ledger.forward().started().cancel().orders() == [e.CancelRequest(request_id=1)]
    ledger.forward().started().ended(0).cancel().cancel(request_id=5)
    assert ledger.orders() == []


# --- orphans --------------------------------------------------------------------------------------


def test_requests_of_a_lost_serving_node_go_on() -> None:
    """They run, end and are resumed through another node, which gets what its client lacks."""
    ledger = Ledger().forward().forward(request_id=2, serving=THIRD).started().committed(0, 10)
    ledger.log.serving_lost(OTHER, 1.0)
    ledger.take()
    assert ledger.committed(1, 11).take() == ([], [])
    assert ledger.log.deadline == 11.0
    ledger.forward(2.0, serving=THIRD, received=(10,))
    assert ledger.take() == ([], [(THIRD, m.Drawn(tokens=ledger_tokens(1, 11)))])
    assert ledger.log.deadline == inf


def ledger_tokens(start: int, *tokens: int) -> tuple[m.DrawnToken, ...]:
    """Tokens of request 1."""
    return tuple(
        m.DrawnToken(request_id=1, index=start + i, token=token) for i, token in enumerate(tokens)
    )


def test_an_orphan_runs_on_under_the_next_plan() -> None:
    """The death of its serving node is the very reason for that plan."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.log.serving_lost(OTHER, 1.0)
    assert started(ledger.adopt(agreed(10), lost=("n4",)).start()) == [(1, (10,), 0)]


def test_an_orphan_that_ended_can_be_claimed() -> None:
    """Its end waits for its client as long as any other."""
    ledger = Ledger().forward().started()
    ledger.log.serving_lost(OTHER, 1.0)
    ledger.committed(0, 10).ended(1, now=2.0)
    assert ledger.sent() == []
    ledger.log.look(11.0)
    sent = ledger.forward(12.0, serving=THIRD).sent()
    assert [(to, type(message)) for to, message in sent] == [(THIRD, m.Drawn), (THIRD, m.Ended)]
    ledger.log.serving_lost(THIRD, 13.0)
    assert ledger.log.deadline == 2.0 + REPLY_KEPT_S


def test_nobody_claims_an_orphan() -> None:
    """After orphan_timeout it is cancelled, and a log that members have of it is not wanted."""
    ledger = Ledger().forward().started()
    ledger.log.serving_lost(OTHER, 1.0)
    ledger.log.look(10.9)
    assert ledger.log.running == 1
    ledger.log.look(11.0)
    assert ledger.orders() == [e.CancelRequest(request_id=1)]
    assert (ledger.log.running, ledger.log.wants(1)) == (0, False)


def test_the_same_node_claims_its_request_after_a_restart() -> None:
    """A client that comes back through the same node finds its request."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.log.serving_lost(OTHER, 1.0)
    ledger.take()
    assert ledger.forward(2.0).drawn() == [(OTHER, [(0, 10)])]


def test_who_may_cancel_an_orphan() -> None:
    """A node whose client is gone says nothing: it may be on its way to another node."""
    ledger = Ledger().forward().started()
    ledger.log.serving_lost(OTHER, 1.0)
    ledger.cancel(THIRD, reason="orphan")
    assert ledger.log.running == 1
    ledger.cancel(THIRD)
    assert ledger.log.running == 0


def test_an_error_of_an_orphan_is_told_to_nobody() -> None:
    """It is removed, and begins anew if its client comes back."""
    ledger = Ledger().forward().started()
    ledger.log.serving_lost(OTHER, 1.0)
    assert ledger.ended(0, code="internal").sent() == []
    assert ledger.log.running == 0
