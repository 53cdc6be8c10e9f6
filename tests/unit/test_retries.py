"""Which node a client asks next when its reply broke off, and when it gives up."""

from __future__ import annotations

from math import inf

import pytest

from p2pinfer.errors import ClusterError
from p2pinfer.retries import LEAST_S, MAX_DEFECTS, PAUSE_MAX_S, PAUSE_S, WAITING_S, Retries
from p2pinfer.wire.messages import Accepted, Contact

A, B, C = "tcp://a:7720", "tcp://b:7720", "tcp://c:7720"
LOST = ClusterError("node_lost", "the connection broke", retryable=True)
NO_QUORUM = ClusterError("no_quorum", "nobody leads", retryable=True)


def accepted(name: str = "a", *others: str, waiting: str = "") -> Accepted:
    """A node has the request, and knows others by the last letter of their hosts."""
    return Accepted(
        request_id=1,
        served_by=name,
        prompt_ids=(1,),
        waiting=waiting,
        others=tuple(Contact(name=each[6], address=each) for each in others),
    )


def begun(*others: str, given: tuple[str, ...] = (A,), retry_for: float = 10.0) -> Retries:
    """A request in order on node a, since time 0."""
    retries = Retries(given, retry_for)
    retries.attached(A, 0.0)
    retries.accepted(A, accepted("a", *others), 0.0)
    return retries


def test_each_node_is_asked_once_in_a_round() -> None:
    """Those that were given come first, then those that the node named; all at once."""
    retries = begun(B, C, given=(A, C))
    assert (retries.deadline, retries.leave_at) == (inf, inf)
    retries.failed(A, LOST, 1.0)
    assert retries.next(1.0) == C
    retries.passed(C, 1.0)
    assert retries.next(1.0) == B
    retries.passed(B, 1.0)
    assert retries.next(1.0) is None
    assert retries.next_at == 1.0 + PAUSE_S


def test_the_pause_between_rounds_doubles_until_tokens_come() -> None:
    """A node that refuses each time is not flooded, and one that restarts is met soon."""
    retries, now, pauses = begun(retry_for=100.0), 0.0, []
    for _ in range(7):
        retries.failed(A, LOST, now)
        assert retries.next(now) is None
        assert retries.next(now) is None
        pauses.append(retries.next_at - now)
        now = retries.next_at
        assert retries.next(now) == A
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, PAUSE_MAX_S, PAUSE_MAX_S])
    retries.progress()
    retries.failed(A, LOST, now)
    assert retries.next(now) is None
    assert retries.next_at == now + PAUSE_S


def test_it_is_given_up_in_time() -> None:
    """The error is the first one, with who was asked; the pause does not reach beyond it."""
    retries = begun(B)
    retries.failed(A, LOST, 5.0)
    assert retries.deadline == 15.0
    retries.passed(B, 14.95)
    assert retries.next(14.96) is None
    assert retries.next_at == 15.0
    with pytest.raises(ClusterError) as error:
        retries.next(15.0)
    assert (error.value.code, error.value.retryable) == ("node_lost", True)
    assert error.value.message == (
        "the connection broke; no node went on with it within 10 s (asked: a, b)"
    )
    with pytest.raises(ClusterError):
        retries.passed(B, 15.0)


def test_without_time_the_error_is_told_as_it_is() -> None:
    """`retry_for` 0: nobody else is asked."""
    retries = begun(B, retry_for=0.0)
    with pytest.raises(ClusterError) as error:
        retries.failed(A, LOST, 5.0)
    assert error.value is LOST


def test_a_node_that_has_it_stops_the_clock_and_tokens_set_it_back() -> None:
    """So a long prompt takes its time, and a reply that fails again and again comes to an end."""
    retries = begun(B)
    retries.failed(A, LOST, 0.0)
    retries.attached(B, 4.0)
    retries.accepted(B, accepted("b", A), 4.0)
    assert retries.deadline == inf
    retries.failed(B, LOST, 100.0)
    assert retries.deadline == 106.0
    retries.attached(A, 101.0)
    retries.accepted(A, accepted("a", B), 101.0)
    retries.progress()
    retries.failed(A, LOST, 200.0)
    assert retries.deadline == 210.0


def test_who_only_waits_is_left_for_who_was_not_asked() -> None:
    """The network may be cut in two; with nobody else to ask it is waited for to the end."""
    retries = begun(B, C)
    retries.failed(A, LOST, 0.0)
    retries.attached(B, 1.0)
    assert retries.leave_at == 1.0 + WAITING_S
    retries.accepted(B, accepted("b", A, C, waiting="more voters"), 1.1)
    assert (retries.leave_at, retries.deadline) == (1.0 + WAITING_S, 10.0)
    retries.passed(B, 4.0)
    assert retries.next(4.0) == C
    retries.attached(C, 4.0)
    retries.passed(C, 5.0)
    assert retries.next(5.0) is None
    assert retries.next(5.0 + PAUSE_S) == A
    retries.passed(A, 5.2)
    retries.passed(C, 5.2)
    retries.attached(B, 5.2)
    retries.passed(B, 5.2)
    retries.accepted(B, accepted("b", A, C, waiting="more voters"), 5.3)
    assert retries.leave_at == 10.0
    with pytest.raises(ClusterError, match=r"broke, and b waits for more voters; .* a, b, c"):
        retries.passed(B, 10.0)


def test_a_node_that_waits_and_has_not_failed_is_not_left() -> None:
    """How long it waits for its cluster is its own matter."""
    retries = Retries((A, B), 10.0)
    retries.attached(A, 0.0)
    retries.accepted(A, accepted(waiting="2 more nodes"), 0.0)
    retries.accepted(A, accepted(waiting="1 more node"), 20.0)
    assert (retries.leave_at, retries.deadline) == (inf, inf)


def test_what_a_node_waited_in_vain_counts() -> None:
    """The others are asked once all the same; a connection that broke is another matter."""
    for error, deadline in ((NO_QUORUM, 30.0 + LEAST_S), (LOST, 40.0)):
        retries = Retries((A, B), 10.0)
        retries.attached(A, 0.0)
        retries.accepted(A, accepted(waiting="more voters"), 0.0)
        retries.failed(A, error, 30.0)
        assert retries.deadline == deadline
        assert retries.next(30.0) == B


def test_the_error_that_is_told_is_the_last_that_may_pass() -> None:
    """That another node refuses the request says nothing of the request."""
    retries = begun(B, C)
    refused = ClusterError("invalid_request", "I am a witness")
    retries.failed(A, LOST, 0.0)
    retries.failed(B, refused, 0.0)
    retries.failed(C, NO_QUORUM, 0.0)
    with pytest.raises(ClusterError, match="nobody leads; no node went on") as error:
        retries.next(10.0)
    assert error.value.code == "no_quorum"
    retries = begun(B)
    retries.failed(A, LOST, 0.0)
    with pytest.raises(ClusterError, match="the connection broke; no node"):
        retries.failed(B, refused, 10.0)


def test_a_defect_is_not_met_for_ever() -> None:
    """A request that breaks every step is given up after a few times, unless tokens come."""
    defect = ClusterError("internal", "3 steps in a row failed", retryable=True)
    retries = begun(B, C)
    for _ in range(2):
        for now in range(MAX_DEFECTS - 1):
            retries.failed(A, defect, float(now))
            retries.failed(B, LOST, float(now))
        retries.progress()
    for now in range(MAX_DEFECTS - 1):
        retries.failed(A, defect, float(now))
    with pytest.raises(ClusterError) as error:
        retries.failed(A, defect, 3.0)
    assert error.value is defect


def test_nodes_are_called_by_their_names() -> None:
    """As soon as they are known; before that, by their addresses."""
    retries = Retries((A,), 10.0)
    assert retries.name(A) == A
    retries.accepted(A, accepted("anna", B), 0.0)
    assert (retries.name(A), retries.name(B)) == ("anna", "b")
