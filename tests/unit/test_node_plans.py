"""A whole node and its plans: made by the leader, obeyed by the others, mended when steps fail."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.agreement import digest
from p2pinfer.core.timing import LAN
from p2pinfer.errors import ClusterError
from p2pinfer.types import Fence, Plan
from p2pinfer.wire import messages as m
from tests.node_bench import MODEL, Bench, hello, member, plan_of
from tests.plan_bench import log

ONE, TWO, THREE = member(1), member(2), member(3)
FIRST, SECOND = Fence(1, 1), Fence(1, 2)


def failed(bench: Bench, about: str = "", **values: Any) -> e.StepFailed:
    """A step of the plan in force failed on this node's worker."""
    status = bench.node.status(bench.now)
    fields: dict[str, Any] = {
        "fence": Fence(status["term"], status["epoch"]),
        "step": 7,
        "node_id": about,
        "reason": "overdue",
        **values,
    }
    return e.StepFailed(**fields)


def entry_of(tokens: e.TokenLog, fence: Fence) -> m.LogEntry:
    """A whole log as a message."""
    return m.LogEntry(
        fence=fence,
        request_id=tokens.request_id,
        term=tokens.term,
        prompt_tokens=tokens.prompt_tokens,
        params=tokens.params,
        tokens=tokens.tokens,
    )


# --- on the leader --------------------------------------------------------------------------------


def test_the_worker_comes_first() -> None:
    """No plan before the leader's own worker is ready; then one, and it is in force when loaded."""
    bench = Bench()
    bench.run(2.0)
    assert bench.told(e.PlanProposed) == []
    bench.worker_ready()
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node5",)]
    assert bench.node.waiting == "node5 to load the weights"
    bench.load()
    assert bench.node.ready
    assert [fact.leader for fact in bench.told(e.PlanAdopted)] == ["node5"]
    assert bench.node.waiting == ""


def test_members_are_waited_for_at_first() -> None:
    """min_nodes must be there; later ones must be quiet for a while; the rest goes on alone."""
    bench = Bench(min_nodes=2)
    bench.worker_ready()
    bench.run(1.0)
    assert bench.node.waiting == "1 of 2 nodes"
    bench.meet(TWO)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node2", "node5")]
    bench.load_all(TWO)
    assert [fact.why for fact in bench.told(e.PlanProposed)] == ["node2 to vote"]
    bench.meet(THREE)
    bench.run(LAN.settle - 0.1, TWO, THREE)
    assert bench.told(e.PlanProposed) == []
    assert bench.node.waiting == ""
    bench.run(0.2, TWO, THREE)
    assert len(bench.told(e.PlanProposed)) == 1
    bench.load_all(TWO, THREE)
    bench.outputs.clear()
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node3", "node5")]


def test_a_plan_is_in_force_when_all_owners_say_so() -> None:
    """The leader obeys it first, and is ready when the heartbeats of the others tell."""
    bench = Bench(min_nodes=2)
    bench.worker_ready()
    bench.meet(TWO)
    bench.run(0.4, TWO)
    bench.load(TWO)
    bench.ordered(e.ActivatePlan)
    bench.run(0.1, TWO)
    fence = bench.ordered(e.LoadPlan)[-1].plan.fence
    bench.worker(e.PlanLoaded(fence=fence))
    assert bench.node.waiting == "node2 to load the weights"
    bench.hear(TWO, m.Ack(fence=fence, node_id=TWO.node_id))
    [order] = bench.ordered(e.ActivatePlan)
    assert (order.fence, order.listeners) == (fence, (0, 1))
    assert not bench.node.ready
    assert bench.node.waiting == "all nodes to take up the plan"
    bench.beat(TWO, fence=fence)
    assert bench.node.ready


def test_a_member_that_is_not_reached_is_not_planned_with() -> None:
    """It greeted us, but does not answer."""
    bench = Bench()
    bench.worker_ready()
    bench.load()
    bench.hear(TWO, hello(TWO))
    bench.run(1.0, TWO)
    assert bench.node.status(bench.now)["epoch"] == 1


def test_a_suspect_is_waited_for() -> None:
    """While a member is in doubt no plan is proposed: the doubt is short."""
    bench = Bench.leader(TWO, THREE)
    bench.take(e.LinkDown(address=THREE.address))
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    assert bench.told(e.PlanProposed) == []
    assert bench.node.waiting == "a word from node3"
    bench.beat(THREE)
    assert [fact.why for fact in bench.told(e.PlanProposed)] == ["node2 gone"]


def test_a_hung_member_loses_its_units_and_gets_them_back() -> None:
    """It says so itself, and that it moves again."""
    bench = Bench.leader(TWO)
    bench.beat(TWO, hung=True)
    [proposed] = bench.told(e.PlanProposed)
    assert proposed.why == "node2 to own nothing"
    bench.load_all(TWO)
    bench.run(0.5, TWO, hung=False)
    assert [fact.why for fact in bench.told(e.PlanProposed)][-1] == "node2 fit again"


def test_who_cannot_hold_its_part_is_left_out() -> None:
    """A NACK of the newest plan: the next one does without that member."""
    bench = Bench.leader(TWO)
    bench.worker(failed(bench))
    fence = bench.ordered(e.LoadPlan)[-1].plan.fence
    nack = m.Nack(fence=fence, node_id=TWO.node_id, code="internal", message="no memory")
    bench.hear(TWO, nack)
    assert [fact.reason for fact in bench.told(e.PlanFailed)] == ["node2: no memory"]
    plan = bench.ordered(e.LoadPlan)[-1].plan
    assert {plan.members[i].name for i in plan.stages[0].head_owners} == {"node5"}


def test_logs_that_the_leader_lacks_are_asked_for() -> None:
    """LOG_REQUEST, LOG_ENTRY, and only then ACTIVATE, with what each lacks before it."""
    bench = Bench.leader(TWO)
    bench.worker(failed(bench))
    fence = bench.ordered(e.LoadPlan)[-1].plan.fence
    mine, theirs = log("ab", term=1), log("abcd", term=1)
    bench.worker(e.PlanLoaded(fence=fence, logs=(mine,)))
    summary = m.LogDigest(request_id=1, term=1, length=4, digest=digest(theirs.tokens))
    bench.outputs.clear()
    bench.hear(TWO, m.Ack(fence=fence, node_id=TWO.node_id, logs=(summary,)))
    # Of its own term the leader's log is the truth.
    assert not bench.sent(m.LogRequest)
    assert bench.sent(m.Activate)
    older = Bench.leader(TWO)
    older.worker(failed(older))
    fence = older.ordered(e.LoadPlan)[-1].plan.fence
    older.worker(e.PlanLoaded(fence=fence))
    older.hear(TWO, m.Ack(fence=fence, node_id=TWO.node_id, logs=(summary,)))
    [(address, request)] = older.sent(m.LogRequest)
    assert (address, request.request_ids) == (TWO.address, (1,))
    assert not older.ordered(e.ActivatePlan)
    older.hear(TWO, entry_of(theirs, fence))
    [order] = older.ordered(e.ActivatePlan)
    assert [tokens.tokens for tokens in order.logs] == [theirs.tokens]


def test_a_failed_step_begins_a_new_epoch() -> None:
    """The same owners again; whom it waited for is in doubt; a stale report changes nothing."""
    bench = Bench.leader(TWO)
    bench.worker(failed(bench, fence=Fence(1, 99)))
    assert bench.told(e.PlanProposed) == []
    bench.worker(failed(bench, TWO.node_id))
    assert bench.told(e.Probe) == [e.Probe(address=TWO.address)]
    bench.beat(TWO)
    [proposed] = bench.told(e.PlanProposed)
    assert proposed.why == "step 7 failed (node2): overdue"
    bench.load_all(TWO)
    fence = bench.said[TWO]["fence"]
    nack = m.Nack(fence=fence, node_id=TWO.node_id, code="internal", message="gap")
    bench.hear(TWO, nack)
    bench.hear(TWO, nack)
    assert [fact.why for fact in bench.told(e.PlanProposed)] == ["gap"]


def test_two_reports_of_one_failed_step_are_one_failure() -> None:
    """What a second member says of it does not begin another epoch; who blames whom is noted."""
    bench = Bench.leader(TWO, THREE)
    bench.take(e.LinkDown(address=THREE.address))
    fence = bench.said[TWO]["fence"]
    for who, about in ((TWO, THREE), (THREE, TWO)):
        nack = m.Nack(
            fence=fence, node_id=who.node_id, code="internal", message="gap", about=about.node_id
        )
        bench.hear(who, nack)
    bench.beat(THREE)
    assert [fact.why for fact in bench.told(e.PlanProposed)] == ["gap"]


def test_who_computes_no_numbers_owns_nothing() -> None:
    """A broken partial is not a matter of the network."""
    bench = Bench.leader(TWO)
    bench.worker(failed(bench, TWO.node_id, reason="not finite", broken=True))
    bench.beat(TWO)
    plan = bench.ordered(e.LoadPlan)[-1].plan
    assert {plan.members[i].name for i in plan.stages[0].head_owners} == {"node5"}


def test_a_broken_pair_is_told_once() -> None:
    """Of two members that do not hear each other one is to own nothing."""
    bench = Bench.leader(TWO, THREE)
    me = bench.me.node_id
    hears = {TWO: (me, THREE.node_id), THREE: (me, TWO.node_id)}
    for turn in range(15):
        for who in (TWO, THREE):
            heard = hears[who] if turn < 3 else (me,)
            bench.beat(who, hears_control=heard)
        bench.run(0.1)
    assert [(f.names, f.loses) for f in bench.told(e.PairBroken)] == [(("node2", "node3"), "node3")]
    assert "node3 to own nothing" in [fact.why for fact in bench.told(e.PlanProposed)]


def test_a_slow_member_is_told_once_and_owns_nothing() -> None:
    """Four times slower than the others for ten seconds."""
    bench = Bench.leader(TWO, THREE)
    for turn in range(120):
        bench.stats = e.WorkerStats(steps=turn, compute_ms=10.0)
        bench.beat(TWO, steps=turn, compute_ms=10.0)
        bench.beat(THREE, steps=turn, compute_ms=60.0)
        bench.run(0.1)
    [slow] = bench.told(e.MemberSlow)
    assert slow.name == "node3"
    assert slow.factor >= LAN.slow_factor
    assert "node3 to own nothing" in [fact.why for fact in bench.told(e.PlanProposed)]


# --- on the others --------------------------------------------------------------------------------


def test_a_follower_loads_acknowledges_and_activates() -> None:
    """PROPOSE waits for the worker; an ACK follows when the plan is loaded and written."""
    bench = Bench.joined(ONE)
    plan = plan_of(ONE, bench.me)
    bench.hear(ONE, m.Propose(plan=plan))
    assert bench.node.waiting == "this node's worker to start"
    bench.worker_ready()
    assert [order.me for order in bench.ordered(e.LoadPlan)] == [1]
    assert bench.node.waiting == "the weights to load"
    bench.hear(ONE, m.Activate(fence=FIRST))
    assert bench.told(e.FrameDropped)
    bench.worker(e.PlanLoaded(fence=FIRST))
    assert [address for address, _ in bench.sent(m.Ack)] == [ONE.address]
    bench.hear(ONE, m.Activate(fence=FIRST))
    assert [fact.members for fact in bench.told(e.PlanAdopted)] == [("node1", "node5")]
    bench.beat(ONE, fence=FIRST)
    assert bench.node.ready


def test_a_slow_disk_delays_the_acknowledgement() -> None:
    """What is not written is not promised."""
    bench = Bench.joined(ONE, slow_disk=True)
    bench.worker_ready()
    bench.hear(ONE, m.Propose(plan=plan_of(ONE, bench.me)))
    bench.worker(e.PlanLoaded(fence=FIRST))
    assert not bench.sent(m.Ack)
    numbers = [o.number for o in bench.told(e.Persist)]
    bench.take(e.Persisted(number=max(numbers)))
    assert bench.sent(m.Ack)


def test_a_plan_shows_who_leads() -> None:
    """A PROPOSE of a higher term comes from its leader; one of a lower term is of nobody."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(TWO, m.Propose(plan=plan_of(TWO, ONE, bench.me, fence=Fence(3, 2))))
    assert [fact.name for fact in bench.told(e.LeaderElected)] == ["node2"]
    assert bench.ordered(e.LoadPlan)
    bench.hear(ONE, m.Propose(plan=plan_of(ONE, TWO, bench.me, fence=Fence(2, 9))))
    assert not bench.ordered(e.LoadPlan)
    assert bench.node.status(bench.now)["leader"] == "node2"


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of(ONE, member(5), fence=Fence(1, 0)), "not above"),
        (plan_of(ONE, member(5), fence=SECOND, cluster_id="e" * 16), "cluster"),
        (plan_of(ONE, TWO, fence=SECOND), "no place"),
        (plan_of(ONE, member(5, boot=3), fence=SECOND), "no place"),
    ],
)
def test_a_plan_that_is_not_for_us_is_dropped(plan: Plan, says: str) -> None:
    """Old fence, other cluster, no place for this life of this node: the one in force goes on."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.Propose(plan=plan))
    assert not bench.ordered(e.LoadPlan)
    assert says in bench.told(e.FrameDropped)[0].reason
    assert bench.node.ready


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(ONE, member(5), fence=SECOND, model=replace(MODEL, model_id="cd" * 32)),
        plan_of(ONE, member(5), fence=SECOND, stages=plan_of(ONE, member(5)).stages * 2),
    ],
)
def test_a_plan_that_cannot_be_obeyed_is_answered_nack(plan: Plan) -> None:
    """A broken plan or one for another model: NACK with the reason, and a fact."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.Propose(plan=plan))
    [(_, nack)] = bench.sent(m.Nack)
    assert [fact.reason for fact in bench.told(e.PlanFailed)] == [nack.message]
    assert not bench.ordered(e.LoadPlan)


def test_the_leader_is_told_of_a_failed_step() -> None:
    """A NACK of the plan in force, which names whom the step waited for; that one is probed."""
    bench = Bench.follower(ONE, TWO)
    bench.worker(failed(bench, fence=Fence(1, 0)))
    assert not bench.sent(m.Nack)
    bench.worker(failed(bench, TWO.node_id))
    [(address, nack)] = bench.sent(m.Nack)
    assert (address, nack.about) == (ONE.address, TWO.node_id)
    assert nack.message == "step 7 failed (node2): overdue"
    assert bench.told(e.Probe) == [e.Probe(address=TWO.address)]


def test_logs_go_to_the_leader_and_come_from_it() -> None:
    """LOG_REQUEST is answered with this node's log; a tail that it lacks comes before ACTIVATE."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.Propose(plan=plan_of(ONE, TWO, bench.me, fence=SECOND)))
    bench.worker(e.PlanLoaded(fence=SECOND, logs=(log("ab", term=1),)))
    bench.hear(ONE, m.LogRequest(fence=SECOND, request_ids=(1,)))
    assert [entry.tokens for _, entry in bench.sent(m.LogEntry)] == [log("ab").tokens]
    whole = log("abcd")
    tail = replace(entry_of(whole, SECOND), start=2, tokens=whole.tokens[2:])
    bench.hear(TWO, tail)
    agreed = m.AgreedLog(request_id=1, length=4, digest=digest(whole.tokens), restart=0)
    bench.hear(ONE, m.Activate(fence=SECOND, logs=(agreed,)))
    assert not bench.ordered(e.ActivatePlan)
    bench.hear(ONE, tail)
    bench.hear(ONE, m.Activate(fence=SECOND, logs=(agreed,)))
    [order] = bench.ordered(e.ActivatePlan)
    assert [each.tokens for each in order.logs] == [whole.tokens]


def test_a_witness_takes_part_and_owns_nothing() -> None:
    """Its worker writes logs; it never campaigns."""
    bench = Bench.joined(ONE, TWO, member=member(5, witness=True, numeric_class=""), model=None)
    bench.worker_ready()
    bench.take_up(plan_of(ONE, TWO, bench.me))
    for who in (ONE, TWO):
        bench.said.setdefault(who, {})["fence"] = FIRST
    bench.run(0.15, ONE, TWO)
    assert bench.node.ready
    row = next(r for r in bench.node.status(bench.now)["members"] if r["name"] == "node5")
    assert (row["owned"], row["witness"]) == ([], True)
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.run(2.0, TWO, leader_id="")
    assert not bench.sent(m.PreVoteRequest)


# --- what a node says of plans --------------------------------------------------------------------


def test_the_plan_can_be_asked_for() -> None:
    """As it is, and as it would be without a member; without a plan the answer is not_ready."""
    bench = Bench.leader(TWO)
    assert bench.node.plan_object()["leader"] == "node5"
    assert bench.node.plan_object("node2")["survives"]
    with pytest.raises(ClusterError, match="no member is called node9"):
        bench.node.plan_object("node9")
    with pytest.raises(ClusterError, match="no plan is in force"):
        Bench().node.plan_object()
