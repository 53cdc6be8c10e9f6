"""Pausing a member, by any node, and who is told what of it."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.wishes import GRACE_S, MAX_WISHES
from p2pinfer.types import Fence, Plan
from p2pinfer.wire import messages as m
from tests.node_bench import Bench, answers, member, plan_of

ONE, TWO = member(1), member(2)
DRAIN_S = 30.0


def pause(bench: Bench, name: str, request_id: int = 1, *, resume: bool = False) -> None:
    """A client of this node asks for a member to be paused, or resumed."""
    bench.client(m.Pause(request_id=request_id, name=name, resume=resume))


def paused(bench: Bench, name: str = "node5") -> Any:
    """Whether a member is paused, as the node's status says."""
    rows = {row["name"]: row for row in bench.node.status(bench.now)["members"]}
    return rows[name]["paused"]


def without(bench: Bench, *but: int) -> Plan:
    """The next plan of node 1's, in which only members 1, 2 and 5 but for some own anything."""
    there = [who for who in (ONE, TWO, bench.me) if int(who.node_id, 16) not in but]
    indices = [[ONE, TWO, bench.me].index(who) for who in there]
    plan = plan_of(ONE, TWO, bench.me, fence=Fence(1, 2))
    [stage] = plan_of(*there).stages
    kinds = {
        f"{kind}_owners": tuple(indices[i] for i in getattr(stage, f"{kind}_owners"))
        for kind in ("head", "mlp", "vocab")
    }
    return replace(plan, stages=(replace(stage, **kinds),))


def hand_over(bench: Bench, *but: int) -> None:
    """That plan comes into force, as the node hears from all."""
    plan = without(bench, *but)
    bench.take_up(plan)
    for who in (ONE, TWO):
        bench.said[who]["fence"] = plan.fence
        bench.beat(who)


def test_a_node_that_is_asked_to_pause_says_so_until_it_is_resumed() -> None:
    """It is done when the plan in force gives it nothing; it stays, and keeps its vote."""
    bench = Bench.follower(ONE, TWO)
    pause(bench, "")
    assert {word.paused for _, word in bench.sent(m.Heartbeat)} == {True}
    assert (answers(bench), paused(bench)) == ([], True)
    hand_over(bench, 5)
    assert answers(bench) == ["done"]
    bench.run(DRAIN_S + 1.0, ONE, TWO)
    assert paused(bench)
    assert [row["paused"] for row in bench.node.plan_object()["members"]] == [False, False, True]
    pause(bench, "node5", 2, resume=True)
    assert (answers(bench), paused(bench)) == (["done"], False)


def test_what_could_not_be_handed_over_stays() -> None:
    """After the time to drain it is paused no more, and its client is told."""
    bench = Bench.follower(ONE, TWO)
    pause(bench, "node5")
    bench.run(DRAIN_S - 0.2, ONE, TWO)
    assert (answers(bench), paused(bench)) == ([], True)
    bench.run(0.4, ONE, TWO)
    assert (answers(bench), paused(bench)) == (["not_ready"], False)


def test_a_wish_about_another_member_is_passed_on() -> None:
    """It is done when that one says so and owns nothing, or may own again."""
    bench = Bench.follower(ONE, TWO)
    pause(bench, "node2", 7)
    [(address, passed)] = bench.sent(m.Pause)
    assert (address, passed) == (TWO.address, m.Pause(request_id=7, name="node2"))
    bench.said[TWO]["paused"] = True
    bench.beat(TWO)
    assert answers(bench) == []
    hand_over(bench, 2)
    assert bench.replied(m.Done) == [m.Done(request_id=7)]
    pause(bench, "node2", 8, resume=True)
    assert bench.replied(m.Done) == []
    bench.said[TWO]["paused"] = False
    bench.beat(TWO)
    assert bench.replied(m.Done) == [m.Done(request_id=8)]


def test_a_wish_that_is_passed_on_is_obeyed_by_whom_it_names() -> None:
    """And by nobody else; the one that leads may be paused too, and twice is as once."""
    bench = Bench.leader(ONE, TWO)
    bench.hear(TWO, m.Pause(request_id=9, name="node1"))
    assert not paused(bench)
    for _ in range(2):
        bench.hear(TWO, m.Pause(request_id=9, name="node5"))
        assert paused(bench)
    bench.hear(TWO, m.Pause(request_id=9, name="node5", resume=True))
    assert not paused(bench)


def test_who_does_not_answer_is_waited_for_a_little_longer() -> None:
    """Its own time ends first; then the wish fails, and says which it was."""
    bench = Bench.leader(ONE, TWO)
    pause(bench, "node2")
    pause(bench, "node1", 2)
    bench.said[ONE]["paused"] = True
    bench.beat(ONE)
    pause(bench, "node1", 3, resume=True)
    bench.run(DRAIN_S + GRACE_S - 0.1, ONE, TWO)
    assert answers(bench) == []
    bench.run(0.2, ONE, TWO)
    failed = bench.replied(m.Failed)
    assert {each.code for each in failed} == {"not_ready"}
    assert "has not answered" in failed[2].message


def test_what_cannot_be_is_told_at_once() -> None:
    """Nobody has the name; nobody else may own anything."""
    bench = Bench.leader(ONE, TWO)
    pause(bench, "node9")
    [failed] = bench.replied(m.Failed)
    assert (failed.code, failed.retryable) == ("invalid_request", False)
    assert "node1, node2, node5" in failed.message
    bench.beat(ONE, paused=True)
    bench.beat(TWO, draining=True)
    pause(bench, "node5")
    [failed] = bench.replied(m.Failed)
    assert (failed.code, failed.retryable) == ("invalid_request", False)
    assert "nobody else may own units" in failed.message
    bench.hear(TWO, m.Pause(request_id=9, name="node5"))
    pause(bench, "node1", 2)
    assert answers(bench) == ["invalid_request"]


def test_who_waits_is_told_of_the_end() -> None:
    """Of the member that it waits for, or of the node that it asked."""
    bench = Bench.leader(ONE, TWO)
    pause(bench, "node1")
    pause(bench, "node2", 2)
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    assert answers(bench) == ["node_lost"]
    bench.take(e.WorkerDied(detail="signal 9"))
    assert answers(bench) == ["leaving"]


def test_of_too_many_wishes_the_oldest_is_turned_away() -> None:
    """It is told; the others wait."""
    bench = Bench.leader(ONE, TWO)
    for number in range(MAX_WISHES + 1):
        pause(bench, "node2", number)
    [failed] = bench.replied(m.Failed)
    assert (failed.request_id, failed.code) == (0, "overloaded")
