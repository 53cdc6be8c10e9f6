"""How long interrupted replies stood still, as the leader tells it."""

from __future__ import annotations

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.agreement import Agreed
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.resumption import RequestResumed, Resumption
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import DrawnToken

PROMPT = 3


class Bench:
    """One leader's standstills, and what is told of them."""

    def __init__(self) -> None:
        self._box = Outbox("a" * 16, lambda _: "")
        self.resumption = Resumption(self._box)

    def activate(self, now: float, *lost: str, tokens: int = 5, requests: int = 1) -> None:
        """A plan is in force, whose logs have so many tokens."""
        agreed = [
            Agreed(request_id=number, log=log(number, tokens), restart=tokens - 1, rung="replica")
            for number in range(1, requests + 1)
        ]
        self.resumption.activated(agreed, lost, 0.5, now)

    def commit(self, now: float, index: int, request_id: int = 1) -> list[RequestResumed]:
        """A reply's token is committed; returns what is told of requests that go on."""
        token = DrawnToken(request_id=request_id, index=index, token=7)
        self.resumption.committed(e.TokensCommitted(fence=Fence(1, 1), tokens=(token,)), now)
        return [fact for fact in self._box.take() if isinstance(fact, RequestResumed)]


def log(request_id: int, tokens: int) -> e.TokenLog:
    """A request's log of so many tokens, three of which are its prompt."""
    return e.TokenLog(
        request_id=request_id,
        term=1,
        prompt_tokens=PROMPT,
        params=SamplingParams(),
        tokens=tuple(range(tokens)),
    )


def test_the_phases_of_a_loss_are_told_with_the_first_new_token() -> None:
    """From the first loss to PROPOSE, to ACTIVATE, and from there to the token; once."""
    bench = Bench()
    bench.resumption.failed(9.5)
    bench.resumption.lost(10.0)
    bench.resumption.lost(10.1)
    bench.resumption.proposed(10.25)
    bench.resumption.proposed(10.5)
    bench.activate(11.0, "node2")
    assert bench.commit(11.5, 1) == []
    (fact,) = bench.commit(13.0, 2)
    assert (fact.position, fact.restart, fact.rung, fact.lost) == (5, 4, "replica", ("node2",))
    assert (fact.detect_s, fact.propose_s, fact.agree_s, fact.restore_s) == (0.5, 0.25, 1.0, 2.0)
    assert bench.commit(14.0, 3) == []


def test_without_a_loss_a_failed_step_counts() -> None:
    """And without that the proposal: a planned change stands still from there on."""
    bench = Bench()
    bench.resumption.failed(10.0)
    bench.resumption.failed(10.5)
    bench.resumption.proposed(11.0)
    bench.activate(12.0)
    (fact,) = bench.commit(13.0, 2)
    assert (fact.propose_s, fact.agree_s) == (1.0, 2.0)
    bench.resumption.proposed(20.0)
    bench.activate(21.0, tokens=6)
    (fact,) = bench.commit(22.0, 3)
    assert (fact.propose_s, fact.agree_s) == (0.0, 1.0)


def test_two_plans_without_a_token_between_are_one_standstill() -> None:
    """It began with the first loss, and has all names."""
    bench = Bench()
    bench.resumption.lost(10.0)
    bench.resumption.proposed(10.5)
    bench.activate(11.0, "node2")
    bench.resumption.lost(12.0)
    bench.resumption.proposed(12.5)
    bench.activate(13.0, "node3", "node2", requests=2)
    (fact,) = bench.commit(14.0, 2)
    assert (fact.lost, fact.propose_s, fact.agree_s) == (("node2", "node3"), 0.5, 3.0)
    assert fact.restore_s == pytest.approx(1.0)
    (other,) = bench.commit(14.0, 2, request_id=2)
    assert (other.lost, other.agree_s) == (("node3", "node2"), 1.0)


def test_requests_that_were_not_interrupted_are_not_told_of() -> None:
    """One that began under the new plan went on from nothing."""
    bench = Bench()
    bench.resumption.proposed(1.0)
    bench.activate(2.0)
    assert bench.commit(3.0, 2, request_id=9) == []


def test_what_went_on_is_counted_by_rung() -> None:
    """Once for each request and plan."""
    bench = Bench()
    bench.activate(1.0, "node2", requests=2)
    bench.activate(2.0)
    assert bench.resumption.restored == {"none": 0, "replica": 3, "recompute": 0, "replay": 0}
