"""Replies on the serving node, and the leader's log of requests."""

from __future__ import annotations

from math import inf
from typing import Any, TypeVar

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.request_log import (
    MAX_KEPT_REPLIES,
    MOVED_S,
    REPLY_KEPT_S,
    RequestLog,
)
from p2pinfer.core.requests import Serving
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS
from p2pinfer.types import Member, SamplingParams
from p2pinfer.wire import messages as m
from tests.simulation.cluster import MODEL

T = TypeVar("T")
ME = Member(node_id="1" * 16, boot_id="2" * 16, name="me", address="tcp://me:7720")
LEADER, OTHER = "3" * 16, "4" * 16


class Desk:
    """A serving node's replies, whose leader is another node."""

    def __init__(self, leader: str = LEADER, **settings: Any) -> None:
        values = {"member": ME, "model": MODEL, "cluster_id": "5" * 16, **settings}
        self.box = Outbox(ME.node_id, lambda node_id: f"to {node_id}")
        self.serving = Serving(e.NodeConfig(**values), self.box)
        if leader:
            self.serving.leader_found(leader)
        self.outputs: list[e.Output] = []

    def submit(self, now: float = 0.0, *, waiting: str = "", route: bytes = b"a", **values: Any):
        fields: dict[str, Any] = {
            "request_id": 1,
            "prompt_ids": (7, 8),
            "received": (),
            "params": SamplingParams(),
            **values,
        }
        self.serving.submit(e.ClientSubmitted(route=route, **fields), waiting, now)
        return self.look(now, ready=not waiting)

    def look(self, now: float, *, ready: bool = True) -> Desk:
        self.serving.look(ready=ready, waiting="" if ready else "2 more", now=now)
        self.outputs += self.box.take()
        return self

    def drawn(self, start: int, *tokens: int, now: float = 0.0, request_id: int = 1) -> Desk:
        found = tuple(
            m.DrawnToken(request_id=request_id, index=start + i, token=token)
            for i, token in enumerate(tokens)
        )
        self.serving.drawn(m.Drawn(tokens=found), now)
        return self.look(now)

    def ended(self, total: int, *, now: float = 0.0, **values: Any) -> Desk:
        fields = {"request_id": 1, "reason": "stop", **values}
        self.serving.ended(m.Ended(total_tokens=total, **fields), now)
        return self.look(now)

    def told(self, kind: type[T]) -> list[T]:
        found = [o for o in self.outputs if isinstance(o, kind)]
        self.outputs = [o for o in self.outputs if not isinstance(o, kind)]
        return found

    def messages(self, kind: type[T]) -> list[T]:
        found = [o for o in self.outputs if isinstance(getattr(o, "message", None), kind)]
        self.outputs = [o for o in self.outputs if o not in found]
        return [o.message for o in found]  # type: ignore[attr-defined]


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
    desk.drawn(0, 99)
    assert "not 99" in desk.told(e.FrameDropped)[0].reason
    assert desk.told(e.Deliver) == []


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
    desk.serving.leader_found(LEADER)
    desk.look(0.0, ready=False)
    assert desk.messages(m.Forward)


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


def test_a_request_that_has_begun_outlives_a_change_of_plan() -> None:
    """Once the cluster was ready for it a request no longer ends for want of nodes."""
    desk = Desk(wait_for_nodes=10.0).submit(waiting="2 more").look(5.0)
    desk.look(50.0, ready=False)
    assert desk.told(e.Conclude) == []


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


def test_a_finished_reply_can_be_asked_for_again() -> None:
    """For a minute a finished reply is delivered and concluded again."""
    desk = Desk().submit().drawn(0, 10, 11).ended(2, ttft_s=0.5)
    desk.outputs.clear()
    desk.submit(5.0, route=b"b", received=(10,))
    assert [d.tokens for d in desk.told(e.Deliver)] == [(11,)]
    [end] = desk.told(e.Conclude)
    assert (end.route, end.reason, end.total_tokens, end.ttft_s) == (b"b", "stop", 2, 0.5)
    assert desk.told(e.RequestFinished) == []
    desk.look(REPLY_KEPT_S)
    assert desk.serving.deadline == inf
    assert desk.submit(REPLY_KEPT_S).messages(m.Forward)


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


def test_tokens_that_nobody_waits_for_are_cancelled() -> None:
    """The leader is told to stop a reply that this node does not know or has concluded."""
    desk = Desk().drawn(0, 10, request_id=6)
    assert [c.request_id for c in desk.messages(m.Cancel)] == [6]


def test_a_lost_leader_ends_open_replies_only() -> None:
    """leader_lost, retryable, for what is open; what was finished stays so."""
    desk = Desk().submit().submit(request_id=2).ended(0)
    desk.outputs.clear()
    desk.serving.leader_lost("the leader x was lost", 1.0)
    desk.look(1.0)
    assert [(end.request_id, end.code) for end in desk.told(e.Conclude)] == [(2, "leader_lost")]


# --- the leader's log -----------------------------------------------------------------------------


class Ledger:
    """A leader's log, whose own node is the leader."""

    def __init__(self) -> None:
        self.box = Outbox(LEADER, lambda node_id: node_id)
        self.log = RequestLog(self.box)

    def forward(self, now: float = 0.0, serving: str = OTHER, **values: Any) -> Ledger:
        fields: dict[str, Any] = {
            "request_id": 1,
            "prompt_ids": (7, 8),
            "params": SamplingParams(),
            **values,
        }
        self.log.forward(m.Forward(serving_id=serving, **fields), now)
        return self

    def drawn(self, start: int, *tokens: int, request_id: int = 1) -> Ledger:
        self.log.drawn(
            m.DrawnToken(request_id=request_id, index=start + i, token=token)
            for i, token in enumerate(tokens)
        )
        return self

    def ended(self, total: int, *, now: float = 0.0, **values: Any) -> Ledger:
        fields = {"request_id": 1, "reason": "stop", **values}
        self.log.ended(e.RequestEnded(total_tokens=total, **fields), now)
        return self

    def started(self) -> Ledger:
        self.log.start_all()
        self.box.take()
        return self

    def take(self) -> tuple[list[Any], list[tuple[str, Any]]]:
        """Orders to the worker, and messages with their receivers."""
        outputs = self.box.take()
        orders = [o.order for o in outputs if isinstance(o, e.TellWorker)]
        sent = [(o.address, o.message) for o in outputs if isinstance(o, e.Send)]
        return orders, sent


def test_a_request_starts_once() -> None:
    """What was received goes to the worker with it; forwarding again does not start it again."""
    ledger = Ledger().forward(received=(5,))
    ledger.log.start_all()
    orders, sent = ledger.take()
    assert [(o.prompt_ids, o.received) for o in orders] == [((7, 8), (5,))]
    assert sent == []
    ledger.forward(received=(5,)).log.start_all()
    assert ledger.take() == ([], [])


def test_drawn_tokens_go_to_their_serving_nodes() -> None:
    """Each node gets its tokens; those of unknown or ended requests go nowhere."""
    ledger = Ledger().forward().forward(request_id=2, serving=ME.node_id).started()
    ledger.log.drawn(
        [
            m.DrawnToken(request_id=1, index=0, token=10),
            m.DrawnToken(request_id=2, index=0, token=20),
            m.DrawnToken(request_id=3, index=0, token=30),
            m.DrawnToken(request_id=1, index=5, token=40),
        ]
    )
    _, sent = ledger.take()
    assert [(to, [t.token for t in drawn.tokens]) for to, drawn in sent] == [
        (OTHER, [10]),
        (ME.node_id, [20]),
    ]
    assert ledger.log.running == 2


def test_forwarding_again_brings_the_rest() -> None:
    """The tail of the log is sent, in messages of bounded size, and the end when it has ended."""
    ledger = Ledger().forward().started().drawn(0, *range(100))
    ledger.take()
    ledger.forward(received=tuple(range(10)))
    _, sent = ledger.take()
    assert [len(message.tokens) for _, message in sent] == [MAX_STEP_SLOTS, 26]
    assert sent[0][1].tokens[0].index == 10
    ledger.ended(100).take()
    _, sent = ledger.forward(received=tuple(range(100))).take()
    assert [type(message) for _, message in sent] == [m.Ended]


def test_a_moved_request_stays_moved() -> None:
    """The old node is told, gets no more tokens, and its late messages move nothing back."""
    ledger = Ledger().forward().started().drawn(0, 10)
    ledger.take()
    _, sent = ledger.forward(1.0, serving=ME.node_id).take()
    assert [(to, type(message)) for to, message in sent] == [
        (OTHER, m.Ended),
        (ME.node_id, m.Drawn),
    ]
    assert sent[0][1].code == "cancelled"
    ledger.forward(1.0 + MOVED_S / 2)
    ledger.log.cancel(m.Cancel(request_id=1), OTHER)
    ledger.drawn(1, 11)
    _, sent = ledger.take()
    assert [to for to, _ in sent] == [ME.node_id]
    ledger.ended(2).take()
    _, sent = ledger.forward(5.0).take()
    assert [(to, type(message)) for to, message in sent] == [(OTHER, m.Drawn), (OTHER, m.Ended)]


def test_a_longer_log_of_the_client_is_forced() -> None:
    """The worker begins again with the tokens that the client has; old news is ignored."""
    ledger = Ledger().forward().started().drawn(0, 10)
    ledger.take()
    orders, _ = ledger.forward(received=(10, 11, 12)).take()
    assert orders == [e.CancelRequest(request_id=1)]
    ledger.drawn(1, 11)
    ledger.log.start_all()
    orders, sent = ledger.take()
    assert [o.received for o in orders] == [(10, 11, 12)]
    assert sent == []
    ledger.ended(4)
    assert ledger.take() == ([], [])
    waiting = Ledger().forward().forward(received=(4,))
    assert waiting.take() == ([], [])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt_ids": (1,)}, "another prompt"),
        ({"received": (10, 99)}, "token 1 that you have is 99, the log has 11"),
        ({"received": (10, 11, 12)}, "ended with 2"),
    ],
)
def test_a_forwarded_contradiction_is_a_log_conflict(values: dict[str, Any], says: str) -> None:
    """What contradicts the log is ended with log_conflict at the node that forwarded it."""
    ledger = Ledger().forward().started().drawn(0, 10, 11).ended(2)
    ledger.take()
    _, [(to, ended)] = ledger.forward(serving=ME.node_id, **values).take()
    assert (to, ended.code, ended.retryable) == (ME.node_id, "log_conflict", False)
    assert says in ended.message


def test_more_tokens_than_a_reply_can_have_are_a_log_conflict() -> None:
    """A client that sends tokens beyond the end of the reply is told so."""
    ledger = Ledger().forward(received=(10, 11, 12)).started().ended(2)
    _, [(_, ended)] = ledger.take()
    assert (ended.reason, ended.code) == ("error", "log_conflict")
    assert "ends after 2" in ended.message


def test_a_full_log_refuses() -> None:
    """The request after MAX_REQUESTS is ended as overloaded, retryable."""
    ledger = Ledger()
    for number in range(MAX_REQUESTS):
        ledger.forward(request_id=number)
    _, [(_, ended)] = ledger.forward(request_id=9999).take()
    assert (ended.code, ended.retryable) == ("overloaded", True)


def test_an_error_of_the_worker_is_passed_on_and_forgotten() -> None:
    """RequestEnded with a code: ENDED with it, and the same id is a new request afterwards."""
    ledger = Ledger().forward().started().ended(0, reason="error", code="prompt_too_long")
    _, [(_, ended)] = ledger.take()
    assert (ended.reason, ended.code, ended.retryable) == ("error", "prompt_too_long", False)
    assert ledger.log.running == 0
    ledger.ended(0)
    assert ledger.take() == ([], [])
    ledger.forward().log.start_all()
    assert ledger.take()[0]


def test_cancelling_frees_the_slot() -> None:
    """A cancelled request leaves the worker if it had begun, and the log in any case."""
    ledger = Ledger().forward()
    ledger.log.cancel(m.Cancel(request_id=1), OTHER)
    assert ledger.take() == ([], [])
    ledger.forward().started()
    ledger.log.cancel(m.Cancel(request_id=1), OTHER)
    assert ledger.take()[0] == [e.CancelRequest(request_id=1)]
    ledger.forward().started().ended(0)
    ledger.log.cancel(m.Cancel(request_id=1), OTHER)
    ledger.log.cancel(m.Cancel(request_id=5), OTHER)
    assert ledger.take()[0] == []


def test_finished_replies_are_forgotten_in_time() -> None:
    """A finished reply is kept for a minute, and not more than a bounded number of them."""
    ledger = Ledger()
    for number in range(MAX_KEPT_REPLIES + 2):
        ledger.forward(request_id=number).started().ended(0, request_id=number, now=float(number))
    ledger.log.forget_old(0.0)
    assert ledger.log.deadline == 2 + REPLY_KEPT_S
    ledger.log.forget_old(1e6)
    assert ledger.log.deadline == inf


def test_failing_spares_what_has_not_begun() -> None:
    """fail_started ends what the worker has; requests that still wait go on waiting."""
    ledger = Ledger().forward().started().forward(request_id=2)
    ledger.log.fail_started("node_lost", "gone")
    orders, [(_, ended)] = ledger.take()
    assert orders == [e.CancelRequest(request_id=1)]
    assert (ended.request_id, ended.code, ended.retryable) == (1, "node_lost", True)
    assert ledger.log.running == 1


def test_progress_forgives_failed_steps() -> None:
    """Only failures in a row count, so a token between two of them begins the count anew."""
    ledger = Ledger().forward().started()
    for index in range(4):
        ledger.log.step_failed("gap")
        ledger.log.step_failed("gap")
        ledger.drawn(index, 9)
    assert ledger.log.running == 1
    for _ in range(3):
        ledger.log.step_failed("gap")
    assert ledger.log.running == 0


def test_a_lost_serving_node_takes_its_requests_along() -> None:
    """The requests of a lost node are cancelled, those of others are not."""
    ledger = Ledger().forward().forward(request_id=2, serving=ME.node_id).started()
    ledger.log.serving_lost(OTHER)
    assert ledger.take()[0] == [e.CancelRequest(request_id=1)]
    assert ledger.log.running == 1
