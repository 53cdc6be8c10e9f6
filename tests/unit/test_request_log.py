"""The leader's log of requests: claims, committed tokens, and what a new plan does to both."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.agreement import Agreed
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.request_log import (
    MAX_KEPT_REPLIES,
    MAX_KEPT_TOKENS,
    MAX_STEP_FAILURES,
    MOVED_S,
    REPLY_KEPT_S,
    RequestLog,
    surplus,
)
from p2pinfer.limits import MAX_FAILOVERS, MAX_NODES, MAX_REQUESTS, MAX_STEP_SLOTS
from p2pinfer.types import Fence, Member, SamplingParams
from p2pinfer.wire import messages as m

LEADER, OTHER, THIRD = "3" * 16, "4" * 16, "5" * 16
ME = Member(node_id=LEADER, boot_id="2" * 16, name="me", address="tcp://me:7720")
PROMPT = (7, 8)
PARAMS = SamplingParams()


class Ledger:
    """A leader's log under plans (1, 1), (1, 2) and so on; messages to every node are seen."""

    def __init__(self) -> None:
        self.box = Outbox("6" * 16, lambda node_id: node_id)
        config = e.NodeConfig(member=ME, model=None, cluster_id="5" * 16, orphan_timeout=10.0)
        self.log = RequestLog(config, self.box)
        self.epoch = 1

    @property
    def fence(self) -> Fence:
        """Of the plan in force, or of the next one."""
        return Fence(1, self.epoch)

    def forward(self, now: float = 0.0, serving: str = OTHER, **values: Any) -> Ledger:
        fields: dict[str, Any] = {
            "request_id": 1,
            "prompt_ids": PROMPT,
            "params": PARAMS,
            **values,
        }
        self.log.forward(m.Forward(serving_id=serving, **fields), now)
        return self

    def cancel(self, sender: str = OTHER, request_id: int = 1, reason: str = "client") -> Ledger:
        self.log.cancel(m.Cancel(request_id=request_id, reason=reason), sender)
        return self

    def committed(self, start: int, *tokens: int, request_id: int = 1, epoch: int = 0) -> Ledger:
        found = tuple(
            m.DrawnToken(request_id=request_id, index=start + i, token=token)
            for i, token in enumerate(tokens)
        )
        fence = Fence(1, epoch or self.epoch)
        self.log.committed(e.TokensCommitted(fence=fence, tokens=found))
        return self

    def settled(self, epoch: int = 0) -> Ledger:
        self.log.settled(e.FenceSettled(fence=Fence(1, epoch or self.epoch)))
        return self

    def ended(self, total: int, *, now: float = 0.0, epoch: int = 0, **values: Any) -> Ledger:
        fields = {"request_id": 1, "reason": "stop", **values}
        fence = Fence(1, epoch or self.epoch)
        self.log.ended(e.RequestEnded(fence=fence, total_tokens=total, **fields), now)
        return self

    def adopt(
        self,
        *agreed: Agreed,
        lost: tuple[str, ...] = (),
        now: float = 0.0,
        exact: bool = True,
        detect_s: float = 0.5,
    ) -> Ledger:
        """The next plan is activated."""
        self.log.adopt(agreed, lost, detect_s, exact, now)
        self.epoch += 1
        return self

    def start(self) -> list[Any]:
        """The orders that the worker gets when the plan is in force."""
        self.box.take()
        self.log.start_all(self.fence)
        return self.orders()

    def started(self) -> Ledger:
        self.start()
        return self

    def orders(self) -> list[Any]:
        return self.take()[0]

    def sent(self) -> list[tuple[str, Any]]:
        return self.take()[1]

    def drawn(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """(node, [(index, token)]) of every DRAWN sent."""
        return [
            (to, [(t.index, t.token) for t in message.tokens])
            for to, message in self.sent()
            if isinstance(message, m.Drawn)
        ]

    def take(self) -> tuple[list[Any], list[tuple[str, Any]]]:
        """Orders to the worker, and messages with their receivers."""
        outputs = self.box.take()
        orders = [o.order for o in outputs if isinstance(o, e.TellWorker)]
        sent = [(o.address, o.message) for o in outputs if isinstance(o, e.Send)]
        return orders, sent


def agreed(*tokens: int, restart: int = 0, prompt_tokens: int = 2, **values: Any) -> Agreed:
    """A log that the members agreed on: PROMPT, then these."""
    request_id = values.pop("request_id", 1)
    log = e.TokenLog(
        request_id=request_id,
        term=1,
        prompt_tokens=prompt_tokens,
        params=values.pop("params", PARAMS),
        tokens=(*values.pop("prompt", PROMPT), *tokens),
    )
    rung = values.pop("rung", "none")
    assert not values
    return Agreed(request_id=request_id, log=log, restart=restart, rung=rung)


def started(orders: list[Any]) -> list[tuple[int, tuple[int, ...], int]]:
    """(request, reply tokens, position it is computed from) of each start."""
    return [(o.request_id, o.received, o.computed) for o in orders if isinstance(o, e.StartRequest)]


# --- entering, and committed tokens ---------------------------------------------------------------


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


# --- a new plan -----------------------------------------------------------------------------------


def test_a_new_plan_starts_all_requests_anew() -> None:
    """From where the KV is right; tokens that were drawn but not committed are forced."""
    ledger = Ledger().forward().started().committed(0, 10).forward(request_id=2)
    ledger.adopt(agreed(10, 11, restart=3))
    assert started(ledger.start()) == [(1, (10, 11), 3), (2, (), 0)]
    assert ledger.drawn() == []


def test_what_was_agreed_is_sent_when_it_is_committed() -> None:
    """Under the new plan, by its first commit: before that another leader might know nothing of
    it."""
    ledger = Ledger().forward().started().committed(0, 10).adopt(agreed(10, 11, 12)).started()
    ledger.forward(received=(10,))
    assert ledger.drawn() == []
    assert ledger.settled().drawn() == [(OTHER, [(1, 11), (2, 12)])]
    assert ledger.settled().drawn() == []


def test_a_token_commits_all_before_it() -> None:
    """A commit of a later token may be told of first."""
    ledger = Ledger().forward().started().adopt(agreed(10, 11)).started().committed(2, 12)
    assert ledger.drawn() == [(OTHER, [(0, 10), (1, 11), (2, 12)])]


def test_a_plan_may_be_settled_before_requests_may_start() -> None:
    """The worker's word is kept until this node knows that the plan is in force."""
    ledger = Ledger().forward().started().adopt(agreed(10)).settled()
    assert ledger.drawn() == []
    ledger.log.start_all(ledger.fence)
    assert ledger.drawn() == [(OTHER, [(0, 10)])]


def test_a_log_that_was_complete_ends_when_it_is_committed() -> None:
    """The worker sees at once that nothing is left to draw; the last tokens are committed later."""
    ledger = Ledger().forward().started().adopt(agreed(10, 11)).started().ended(2, now=3.0)
    assert ledger.take() == ([], [])
    sent = ledger.settled().sent()
    assert [type(message) for _, message in sent] == [m.Drawn, m.Ended]
    assert ledger.log.deadline == 3.0 + REPLY_KEPT_S


def test_a_complete_log_that_the_client_has_ends_at_once() -> None:
    """There is nothing to commit that it has not been shown."""
    ledger = Ledger().forward(received=(10, 11)).started().ended(2)
    assert [type(message) for _, message in ledger.sent()] == [m.Ended]


def test_a_complete_log_that_is_extended_is_started_again() -> None:
    """The end that was waiting is void: the worker will say what is wrong with those tokens."""
    ledger = Ledger().forward().started().adopt(agreed(10)).started().ended(1)
    assert ledger.forward(received=(10, 11)).orders() == [e.CancelRequest(request_id=1)]
    assert ledger.settled().take() == ([], [])
    ledger.started().ended(1)
    assert [message.code for _, message in ledger.sent()] == ["log_conflict"]


def test_a_waiting_end_does_not_outlive_its_plan() -> None:
    """Under the next plan the worker sees again that the log is complete."""
    ledger = Ledger().forward().started().adopt(agreed(10)).started().ended(1)
    ledger.adopt(agreed(10)).started().settled()
    assert [type(message) for _, message in ledger.sent()] == [m.Drawn]
    assert [type(message) for _, message in ledger.ended(1).sent()] == [m.Ended]


@pytest.mark.parametrize(
    ("log", "restart"),
    [
        (agreed(restart=1), 1),
        (agreed(10, restart=3), 3),
        (agreed(10, 99, 98, restart=4), 3),
        (agreed(10, 99, 98, restart=2), 2),
        (agreed(params=SamplingParams(seed=1), restart=2), 0),
    ],
)
def test_committed_tokens_are_never_lost(log: Agreed, restart: int) -> None:
    """Whatever is agreed on, what this leader knows as committed stays; computing begins where
    both logs are still the same."""
    ledger = Ledger().forward().started().committed(0, 10, 11).adopt(log)
    assert started(ledger.start()) == [(1, (10, 11), restart)]


def test_the_last_known_token_is_always_computed() -> None:
    """Its logits are those that the next token is drawn from."""
    ledger = Ledger().forward().started().adopt(agreed(10, restart=9))
    assert started(ledger.start()) == [(1, (10,), 2)]


def test_a_log_that_nobody_has_begins_at_0() -> None:
    """No plan before left KV that could be counted on."""
    ledger = Ledger().forward().started().committed(0, 10).adopt(agreed(10, restart=1)).adopt()
    assert started(ledger.start()) == [(1, (10,), 0)]


def test_tokens_that_a_client_brought_meanwhile_stay() -> None:
    """A request that was forwarded to a new leader before the logs were agreed on keeps what is
    longer; the shared beginning is not computed again."""
    ledger = Ledger().forward(received=(10, 11)).adopt(agreed(10, restart=2))
    assert started(ledger.start()) == [(1, (10, 11), 2)]
    ledger = Ledger().forward(received=(10,)).adopt(agreed(10, 11, restart=2)).started()
    assert ledger.settled().drawn() == [(OTHER, [(1, 11)])]


@pytest.mark.parametrize("log", [agreed(10, 99), agreed(10, params=SamplingParams(seed=1))])
def test_a_request_that_came_before_the_logs_may_contradict_them(log: Agreed) -> None:
    """It ends in log_conflict, as it would have later, and the agreed log is kept for its owner."""
    ledger = Ledger().forward(received=(10, 11)).adopt(log, now=5.0)
    [(to, ended)] = ledger.sent()
    assert (to, ended.code, ended.retryable) == (OTHER, "log_conflict", False)
    assert ledger.log.deadline == 15.0
    assert ledger.start() == []


def test_a_cancelled_request_does_not_come_back_with_the_logs() -> None:
    """It is not wanted; where its log came all the same, the members are told to forget it."""
    ledger = Ledger().forward().started().cancel()
    assert not ledger.log.wants(1)
    assert ledger.adopt(agreed(10)).start() == [e.CancelRequest(request_id=1)]
    assert ledger.log.running == 0


def test_a_request_may_be_cancelled_before_its_log_is_known() -> None:
    """A new leader remembers it, unless only the client's connection is gone."""
    ledger = Ledger().cancel().cancel(request_id=2, reason="orphan")
    assert (ledger.log.wants(1), ledger.log.wants(2)) == (False, True)


def test_a_request_may_be_cancelled_between_two_plans() -> None:
    """The worker is told when it obeys again, since it stops to listen in between."""
    ledger = Ledger().forward().started().adopt(agreed(10)).cancel()
    assert ledger.orders() == []
    assert ledger.start() == [e.CancelRequest(request_id=1)]


def test_an_id_may_be_used_again() -> None:
    """What members have of the cancelled request is not taken for the new one."""
    ledger = Ledger().forward().started().cancel().forward(prompt_ids=(3,))
    assert not ledger.log.wants(1)
    assert started(ledger.adopt(agreed(10)).start()) == [(1, (), 0)]


def test_remembered_ids_are_bounded() -> None:
    """The oldest of the requests that were removed is forgotten."""
    ledger = Ledger()
    for number in range(MAX_KEPT_REPLIES + 1):
        ledger.cancel(request_id=number)
    assert (ledger.log.wants(0), ledger.log.wants(1)) == (True, False)


def test_an_ended_request_is_left_alone() -> None:
    """Its reply is kept, whatever members still have of it."""
    ledger = Ledger().forward().started().committed(0, 10).ended(1).adopt(agreed(10), lost=("n2",))
    assert ledger.start() == [e.CancelRequest(request_id=1)]
    sent = ledger.forward().sent()
    assert [type(message) for _, message in sent] == [m.Drawn, m.Ended]


# --- a new leader ---------------------------------------------------------------------------------


def test_a_taken_over_request_waits_for_its_claim() -> None:
    """It is started when a serving node forwards it; then the client gets what it lacks, once that
    is committed."""
    ledger = Ledger().adopt(agreed(10, 11, restart=2), now=1.0)
    assert (ledger.start(), ledger.log.deadline, ledger.log.running) == ([], 11.0, 1)
    ledger.settled().forward(2.0, received=(10,))
    assert ledger.drawn() == [(OTHER, [(1, 11)])]
    assert started(ledger.start()) == [(1, (10, 11), 2)]


def test_taken_over_requests_are_ordered_by_their_ids() -> None:
    """All that are claimed when the plan is in force start in the same order on any leader."""
    ledger = Ledger().adopt(agreed(request_id=5), agreed(request_id=2))
    ledger.forward(request_id=5).forward(request_id=2)
    assert [request_id for request_id, _, _ in started(ledger.start())] == [2, 5]


def test_a_claim_with_more_tokens_extends_the_log() -> None:
    """The KV of the shared beginning is right, so computing begins there."""
    ledger = Ledger().adopt(agreed(10, restart=2)).started().forward(received=(10, 11, 12))
    assert started(ledger.start()) == [(1, (10, 11, 12), 2)]


def test_a_claim_with_a_wrong_token_is_a_log_conflict() -> None:
    """The log stays for its true client, and is forgotten when none comes."""
    ledger = Ledger().adopt(agreed(10)).started().forward(1.0, received=(99,))
    assert [message.code for _, message in ledger.sent()] == ["log_conflict"]
    ledger.log.look(10.0)
    assert ledger.orders() == [e.CancelRequest(request_id=1)]


def test_a_log_may_end_in_the_middle_of_its_prompt() -> None:
    """It waits for the claim, which brings the rest; a prompt that begins otherwise is refused."""
    part = agreed(prompt=(7, 8), prompt_tokens=4, restart=2)
    ledger = Ledger().adopt(part).started()
    for prompt in ((7, 9, 1, 2), (7, 8, 1)):
        [(_, ended)] = ledger.forward(prompt_ids=prompt).sent()
        assert ended.code == "log_conflict"
    orders = ledger.forward(prompt_ids=(7, 8, 1, 2)).start()
    assert [(o.prompt_ids, o.received, o.computed) for o in orders] == [((7, 8, 1, 2), (), 1)]
    ledger = Ledger().forward(prompt_ids=(7, 8, 1, 2)).adopt(part)
    assert [(o.prompt_ids, o.computed) for o in ledger.start()] == [((7, 8, 1, 2), 2)]


def test_an_unclaimed_log_grows_with_the_next_plan() -> None:
    """A member that was out of reach may have a longer one."""
    ledger = Ledger().adopt(agreed(prompt=(7,))).adopt(agreed(10, restart=2))
    assert started(ledger.started().forward().start()) == [(1, (10,), 2)]


# --- interruptions --------------------------------------------------------------------------------


def told(ledger: Ledger) -> list[tuple[int, tuple[str, ...], str, float, bool]]:
    """Interruptions in the messages sent."""
    return [
        (
            i.failover.position,
            i.failover.lost,
            i.failover.rung,
            i.failover.detect_s,
            i.failover.exact,
        )
        for _, message in ledger.sent()
        if isinstance(message, m.Drawn)
        for i in message.interruptions
    ]


def test_an_interruption_goes_with_the_first_token_after_it() -> None:
    """To the clients of requests that were running; one more is told of those lost since."""
    ledger = Ledger().forward().started().committed(0, 10).forward(request_id=2)
    ledger.adopt(agreed(10), lost=("n2", "n2")).started()
    assert told(ledger.forward()) == []
    assert told(ledger.committed(1, 11)) == [(3, ("n2",), "replay", 0.5, True)]
    assert told(ledger.committed(2, 12).committed(0, 5, request_id=2)) == []
    ledger.adopt(agreed(10, 11, 12, restart=4), lost=("n3",), exact=False).started()
    assert told(ledger.committed(3, 13)) == [(5, ("n3",), "none", 0.5, False)]


def test_an_interruption_tells_how_the_kv_came_back() -> None:
    """As it was agreed on, but where nothing of the KV is of use everything is computed again."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.adopt(agreed(10, restart=2, rung="replica"), lost=("n2",)).started()
    assert [rung for _, _, rung, *_ in told(ledger.committed(1, 11))] == ["replica"]
    other = agreed(10, 11, restart=2, rung="replica", params=SamplingParams(seed=1))
    ledger.adopt(other, lost=("n3",)).started()
    assert [rung for _, _, rung, *_ in told(ledger.committed(2, 12))] == ["replay"]


def test_a_lost_message_takes_no_interruption_with_it() -> None:
    """It goes again with the token that it belongs to, and not to a node that has that token."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.adopt(agreed(10), lost=("n2",)).started().committed(1, 11).take()
    assert [position for position, *_ in told(ledger.forward(received=(10,)))] == [3]
    assert told(ledger.forward(received=(10, 11))) == []


def test_only_lost_members_are_told() -> None:
    """A change of plan for another reason is no interruption that a client need know of."""
    ledger = Ledger().forward().started().adopt(agreed()).started()
    assert told(ledger.committed(0, 10)) == []


def test_two_interruptions_without_a_token_between_are_one() -> None:
    """The client sees one pause; all that were lost in it are named, up to MAX_NODES."""
    ledger = Ledger().forward().started().adopt(agreed(), lost=("n2",), exact=False)
    ledger.adopt(agreed(restart=1), lost=("n3", "n2"), detect_s=0.7).started()
    assert told(ledger.committed(0, 10)) == [(2, ("n2", "n3"), "none", 0.7, False)]
    ledger.adopt(agreed(10), lost=tuple(f"n{n}" for n in range(MAX_NODES + 2))).started()
    [(_, lost, *_)] = told(ledger.committed(1, 11))
    assert len(lost) == MAX_NODES


def test_a_new_leader_learns_from_the_claim_where_a_reply_was_interrupted() -> None:
    """The log may be longer than what the client had."""
    ledger = Ledger().adopt(agreed(10, 11), lost=("n1",)).started().settled()
    ledger.adopt(agreed(10, 11), lost=("n2",)).started().settled().forward(received=(10,))
    assert told(ledger) == [(3, ("n1", "n2"), "replay", 0.5, True)]


def test_remembered_interruptions_are_bounded() -> None:
    """Those that a reply's last message has no room for are forgotten, the oldest first."""
    ledger = Ledger().forward().started()
    for index in range(MAX_FAILOVERS + 1):
        tokens = (9,) * index
        ledger.adopt(agreed(*tokens), lost=("n2",)).started().committed(index, 9)
    ledger.take()
    assert len(told(ledger.forward())) == MAX_FAILOVERS
