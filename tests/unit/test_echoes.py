"""Echoes: who may have a link measured, and which round trips count."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.echoes import ECHO_S, GRACE_S, RUN_S, Echoes
from p2pinfer.core.orders import EchoesMeasured, MeasureEchoes
from p2pinfer.limits import MAX_ECHO_BYTES
from p2pinfer.types import Fence
from p2pinfer.wire import messages as m
from tests.node_bench import Bench, answers, member

ONE, TWO = member(1), member(2)


def ask(bench: Bench, name: str = "node2", **values: Any) -> None:
    """A client of this node wants a link measured."""
    fields = {"request_id": 7, "there": 100, "back": 10, "count": 3, **values}
    bench.client(m.MeasureLink(name=name, **fields))


def report(run: int = 7) -> EchoesMeasured:
    """The worker's."""
    return EchoesMeasured(run=run, round_trips_s=(0.001, 0.0021), disturbed=1, lost=0)


# --- the control plane's side ---------------------------------------------------------------------


def test_the_worker_measures_and_the_client_is_told() -> None:
    """Under the plan's numbers for members, in milliseconds."""
    bench = Bench.follower(ONE, TWO)
    ask(bench)
    order = MeasureEchoes(run=7, member=1, there=100, back=10, count=3)
    assert bench.ordered(MeasureEchoes) == [order]
    bench.worker(report())
    (reply,) = bench.replied(m.StatusReply)
    assert reply.request_id == 7
    assert json.loads(reply.body) == {
        "from": "node5",
        "to": "node2",
        "there_bytes": 100,
        "back_bytes": 10,
        "asked": 3,
        "round_trips_ms": [1.0, 2.1],
        "disturbed": 1,
        "lost": 0,
    }
    bench.worker(report())
    assert not bench.replied(m.StatusReply)


def test_without_a_plan_in_force_there_are_no_links() -> None:
    """Before the first plan, and while the next one loads."""
    bench = Bench.joined(ONE, TWO)
    ask(bench)
    assert answers(bench) == ["not_ready"]
    bench = Bench.follower(ONE, TWO)
    plan = bench.node._holder.active
    assert plan is not None
    bench.hear(ONE, m.Propose(plan=replace(plan, fence=Fence(1, 2))))
    ask(bench)
    assert answers(bench) == ["not_ready"]


@pytest.mark.parametrize("name", ["node5", "node9"])
def test_only_links_to_other_members_are_measured(name: str) -> None:
    """Those that there are, are named."""
    bench = Bench.follower(ONE, TWO)
    ask(bench, name)
    (failed,) = bench.replied(m.Failed)
    assert failed.code == "invalid_request"
    assert "it has to: node1, node2" in failed.message


def test_a_link_to_a_dead_member_is_not_measured() -> None:
    """The plan in force still names it."""
    bench = Bench.leader(ONE, TWO)
    bench.run(2.0, TWO)
    bench.run(0.1, TWO)
    ask(bench, "node1")
    assert len(answers(bench)) == 1
    assert not bench.ordered(MeasureEchoes)


def test_a_run_has_a_limit_of_bytes() -> None:
    """32 MiB, there and back."""
    bench = Bench.follower(ONE, TWO)
    ask(bench, there=MAX_ECHO_BYTES, back=0, count=33)
    assert answers(bench) == ["invalid_request"]
    ask(bench, there=MAX_ECHO_BYTES, back=0, count=32)
    assert bench.ordered(MeasureEchoes)


def test_runs_are_one_at_a_time_with_pauses() -> None:
    """After a run as long a time must pass as it took; a worker that says nothing is not waited
    for."""
    bench = Bench.follower(ONE, TWO)
    ask(bench)
    bench.run(0.5, ONE, TWO)
    ask(bench, request_id=8)
    assert answers(bench) == ["overloaded"]
    bench.worker(report(8))
    assert not bench.replied(m.StatusReply)
    bench.worker(report())
    ask(bench, request_id=9)
    assert answers(bench) == ["overloaded"]
    bench.run(0.6, ONE, TWO)
    ask(bench, request_id=10)
    assert [order.run for order in bench.ordered(MeasureEchoes)] == [7, 10]
    bench.run(RUN_S + GRACE_S, ONE, TWO)
    ask(bench, request_id=11)
    assert bench.ordered(MeasureEchoes)


def test_members_do_not_ask() -> None:
    """It is for clients."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.MeasureLink(request_id=7, name="node2", there=0, back=0, count=1))
    assert not bench.ordered(MeasureEchoes)
    assert bench.told(e.FrameDropped)


# --- the worker's side ----------------------------------------------------------------------------


def order(count: int = 2, back: int = 4) -> MeasureEchoes:
    """A run of echoes to member 1."""
    return MeasureEchoes(run=7, member=1, there=3, back=back, count=count)


def began(count: int = 2) -> Echoes:
    """A run in hand since time 0."""
    echoes = Echoes()
    echoes.begin(order(count), 0.0)
    return echoes


def send(echoes: Echoes, now: float) -> m.EchoRequest:
    """The next echo leaves."""
    following = echoes.next()
    assert following is not None
    member, request = following
    assert member == 1
    echoes.sent(True, now)
    return request


def answer(request: m.EchoRequest, **values: Any) -> m.EchoReply:
    """What a member says to it."""
    fields = {"number": request.number, "late": False, "filler": bytes(request.back), **values}
    return m.EchoReply(**fields)


def test_one_echo_is_on_its_way_at_a_time() -> None:
    """The next one leaves when its answer is there; when all are, they are reported once."""
    echoes = began()
    request = send(echoes, 1.0)
    assert (len(request.filler), request.back) == (3, 4)
    assert echoes.next() is None
    assert echoes.replied(1, answer(request), 1.25)
    second = send(echoes, 2.0)
    assert second.number != request.number
    assert echoes.done(2.1) is None
    assert echoes.replied(1, answer(second), 2.5)
    assert echoes.next() is None
    assert echoes.done(2.5) == EchoesMeasured(run=7, round_trips_s=(0.25, 0.5), disturbed=0, lost=0)
    assert echoes.done(2.6) is None


def test_nothing_is_sent_without_an_order() -> None:
    """And no answer is expected."""
    echoes = Echoes()
    assert echoes.next() is None
    assert echoes.done(1.0) is None
    assert not echoes.replied(1, m.EchoReply(number=1, late=False, filler=b""), 1.0)
    echoes.disturb()
    echoes.close(1.0)


def test_foreign_answers_do_not_count() -> None:
    """Of another member, another number, another size; or when none is due."""
    echoes = began()
    request = send(echoes, 1.0)
    assert not echoes.replied(2, answer(request), 1.1)
    assert not echoes.replied(1, answer(request, number=request.number + 1), 1.1)
    assert not echoes.replied(1, answer(request, filler=b""), 1.1)
    assert echoes.replied(1, answer(request), 1.2)
    assert not echoes.replied(1, answer(request), 1.3)


def test_what_met_a_step_does_not_count() -> None:
    """On either side; a step before it left does not matter."""
    echoes = began(3)
    echoes.replied(1, answer(send(echoes, 1.0), late=True), 1.1)
    request = send(echoes, 2.0)
    echoes.disturb()
    echoes.replied(1, answer(request), 2.1)
    echoes.disturb()
    echoes.replied(1, answer(send(echoes, 3.0)), 3.5)
    found = echoes.done(4.0)
    assert found is not None
    assert (found.round_trips_s, found.disturbed) == ((0.5,), 2)


def test_lost_echoes_are_counted() -> None:
    """One that is not back in time, and one that the link did not take."""
    echoes = began()
    request = send(echoes, 1.0)
    assert echoes.done(1.0 + ECHO_S) is None
    assert not echoes.replied(1, answer(request), 3.1)
    assert echoes.next() is not None
    echoes.sent(False, 3.2)
    found = echoes.done(3.3)
    assert found is not None
    assert (found.round_trips_s, found.lost) == ((), 2)


def test_a_run_ends_after_its_time() -> None:
    """With what it has: the node may never be without a step."""
    echoes = began()
    assert echoes.done(RUN_S - 0.1) is None
    assert echoes.done(RUN_S) == EchoesMeasured(run=7, round_trips_s=(), disturbed=0, lost=0)


def test_a_run_ends_with_its_plan() -> None:
    """Members have other numbers in the next one; nobody is answered either."""
    echoes = began()
    request = send(echoes, 1.0)
    echoes.asked(0, m.EchoRequest(number=1, back=2, filler=b""), late=False)
    echoes.close(1.5)
    assert echoes.due() == []
    assert not echoes.replied(1, answer(request), 1.6)
    found = echoes.done(1.6)
    assert found is not None
    assert (found.round_trips_s, found.lost) == ((), 0)


def test_questions_are_answered_with_so_many_bytes() -> None:
    """Once each; of one member only the last."""
    echoes = Echoes()
    echoes.asked(0, m.EchoRequest(number=1, back=2, filler=b""), late=False)
    echoes.asked(2, m.EchoRequest(number=5, back=0, filler=b"abc"), late=True)
    echoes.asked(0, m.EchoRequest(number=2, back=3, filler=b""), late=False)
    assert echoes.due() == [
        (0, m.EchoReply(number=2, late=False, filler=bytes(3))),
        (2, m.EchoReply(number=5, late=True, filler=b"")),
    ]
    assert echoes.due() == []
