"""Leaving in good order, in every state that a node may be in; and who is told what of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.departure import ELECTIONS
from p2pinfer.core.timing import LAN
from p2pinfer.core.wishes import GRACE_S, MAX_WISHES
from p2pinfer.types import Fence, Member, Plan
from p2pinfer.wire import messages as m
from tests.node_bench import CLUSTER, Bench, answers, member, plan_of

ONE, TWO = member(1), member(2)
DRAIN_S = 30.0
LEFT = ("", 0)


def stop(bench: Bench) -> None:
    """The process is told to end."""
    bench.take(e.ShutdownAsked())


def drain(bench: Bench, name: str, request_id: int = 1) -> None:
    """A client of this node asks for a member to leave."""
    bench.client(m.Drain(request_id=request_id, name=name))


def without(bench: Bench, *, votes: bool = False) -> Plan:
    """The next plan of node 1's, in which node 5 owns nothing."""
    voters = (0, 1, 2) if votes else (0, 1)
    stages = plan_of(ONE, TWO).stages
    return plan_of(ONE, TWO, bench.me, fence=Fence(1, 2), stages=stages, voters=voters)


# --- told by a signal -----------------------------------------------------------------------------


def test_a_joiner_may_go_at_once() -> None:
    """It holds nothing and knows nobody."""
    bench = Bench(join=(1,))
    stop(bench)
    assert bench.ended() == LEFT
    assert bench.ordered(e.StopWorker)


def test_a_starting_node_may_go_at_once() -> None:
    """A founder, before its worker is ready; a follower, before any plan."""
    bench = Bench()
    stop(bench)
    assert bench.ended() == LEFT
    other = Bench.joined(ONE, TWO)
    other.worker_ready()
    stop(other)
    assert other.ended() == LEFT
    assert len(other.sent(m.Leave)) == 2


def test_a_node_whose_worker_has_not_started_again_may_go_at_once() -> None:
    """Nothing of its plan is loaded yet, so there is nothing to hand over."""
    plan = plan_of(ONE, TWO, member(5))
    bench = Bench(stored=e.StoredState(cluster_id=CLUSTER, term=1, plan=plan, active=True))
    bench.meet(ONE, TWO)
    bench.beat(ONE, leader_id=ONE.node_id)
    stop(bench)
    assert bench.ended() == LEFT


def test_the_only_node_goes_at_once() -> None:
    """Nobody is there to take anything over; its clients are told, its state stays."""
    bench = Bench.leader()
    bench.submit()
    stop(bench)
    assert [end.code for end in bench.told(e.Conclude)] == ["leaving"]
    assert bench.ended() == LEFT
    assert bench.stored is not None
    assert bench.take(e.ShutdownAsked()) == []


def hand_over(bench: Bench) -> None:
    """A plan without the node comes into force, as it hears from all."""
    plan = without(bench)
    bench.take_up(plan)
    for who in (ONE, TWO):
        bench.beat(who, fence=plan.fence)


def test_a_follower_goes_when_a_plan_without_it_is_in_force() -> None:
    """It says that it drains, loads the plan that gives it nothing, and says goodbye."""
    bench = Bench.follower(ONE, TWO)
    stop(bench)
    assert bench.ended() is None
    assert {word.draining for _, word in bench.sent(m.Heartbeat)} == {True}
    plan = without(bench)
    bench.hear(ONE, m.Propose(plan=plan))
    bench.worker(e.PlanLoaded(fence=plan.fence))
    assert bench.ended() is None
    bench.hear(ONE, m.Activate(fence=plan.fence))
    assert bench.ended() is None
    for who in (ONE, TWO):
        # Only now does it know that the others do without it.
        bench.beat(who, fence=plan.fence)
    assert bench.ended() == LEFT
    assert {address for address, _ in bench.sent(m.Leave)} == {ONE.address, TWO.address}


def test_a_vote_is_handed_over_too() -> None:
    """The others could elect nobody if it went with a vote that they need."""
    bench = Bench.follower(ONE, TWO)
    stop(bench)
    bench.take_up(without(bench, votes=True))
    assert bench.ended() is None


def test_a_leader_hands_over_its_own_part() -> None:
    """When the others say that they have it ready; when the plan is in force by which it keeps
    nothing any more, it leaves."""
    bench = Bench.leader(ONE, TWO)
    stop(bench)
    reasons = []
    for last in (False, False, True):
        reasons += [fact.why for fact in bench.told(e.PlanProposed)]
        [plan] = [order.plan for order in bench.ordered(e.LoadPlan)]
        bench.worker(e.PlanLoaded(fence=plan.fence))
        for who in (ONE, TWO):
            bench.hear(who, m.Ack(fence=plan.fence, node_id=who.node_id))
        for who in (ONE, TWO):
            assert bench.ended() is None
            bench.said[who] = {"fence": plan.fence, "standby_fence": plan.fence}
            bench.beat(who)
        if not last:
            bench.run(0.5, ONE, TWO)
    found = ["node5 to own nothing", "node1, node2 ready to take over", "replicas are complete"]
    assert reasons == found
    assert {plan.members[i].name for i in plan.stages[0].head_owners} == {"node1", "node2"}
    assert bench.ended() == LEFT
    kinds = [type(o.message) for o in bench.told(e.Send)]
    assert kinds.index(m.Activate) < kinds.index(m.Leave)


def test_a_signal_waits_for_no_plan_longer_than_the_time_to_drain() -> None:
    """It leaves then, whatever came of it."""
    bench = Bench.follower(ONE, TWO)
    stop(bench)
    bench.run(DRAIN_S - 0.2, ONE, TWO)
    assert bench.ended() is None
    bench.run(0.3, ONE, TWO)
    assert bench.ended() == LEFT


def test_when_all_go_nobody_waits() -> None:
    """Members that drain themselves, and witnesses, take nothing over."""
    witness = member(2, witness=True)
    bench = Bench.follower(ONE, witness)
    stop(bench)
    bench.beat(ONE)
    assert bench.ended() is None
    bench.beat(ONE, draining=True)
    assert bench.ended() == LEFT


def test_without_a_leader_a_new_one_is_waited_for() -> None:
    """What it holds is worth the next leader's plan; but only for a few elections."""
    bench = Bench.follower(ONE, TWO)
    stop(bench)
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    wait = ELECTIONS * LAN.election_max
    bench.run(wait - 0.1, TWO, leader_id="")
    assert bench.ended() is None
    assert not bench.sent(m.PreVoteRequest)
    bench.run(0.2, TWO, leader_id="")
    assert bench.ended() == LEFT


def test_the_next_leader_lets_it_go() -> None:
    """A leader found in time makes the plan without it."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    stop(bench)
    bench.run(0.5, TWO, leader_id="")
    bench.said[TWO] = {"term": 2, "leader_id": TWO.node_id}
    bench.run(2.0, TWO)
    assert bench.ended() is None
    stages = plan_of(TWO).stages
    bench.take_up(plan_of(TWO, bench.me, fence=Fence(2, 2), stages=stages, voters=(0,)))
    bench.beat(TWO, fence=Fence(2, 2))
    assert bench.ended() == LEFT


def test_a_draining_node_does_not_become_the_leader() -> None:
    """It has asked for votes already, and then is told to go: it stands no more."""
    bench = Bench.follower(ONE, TWO)
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.run(0.2, TWO, leader_id="")
    assert bench.sent(m.PreVoteRequest)
    stop(bench)
    bench.hear(TWO, m.PreVoteReply(term=2, voter_id=TWO.node_id, granted=True))
    assert not bench.sent(m.VoteRequest)


# --- told by an operator --------------------------------------------------------------------------


def test_leaving_for_good_forgets_the_cluster() -> None:
    """DRAIN without a name is of the asked node: its client hears that it is done."""
    bench = Bench.follower(ONE, TWO)
    drain(bench, "")
    hand_over(bench)
    assert bench.ended() == LEFT
    assert answers(bench) == ["done"]
    assert bench.stored is None


def test_a_drained_node_keeps_its_state() -> None:
    """DRAIN by its own name, from its client or passed on, is for a while."""
    bench = Bench.follower(ONE, TWO)
    drain(bench, "node5")
    bench.hear(TWO, m.Drain(request_id=9, name="node5"))
    bench.hear(TWO, m.Drain(request_id=9, name="node1"))
    hand_over(bench)
    assert bench.ended() == LEFT
    assert answers(bench) == ["done"]
    assert bench.stored is not None


def test_in_vain_an_operators_node_stays() -> None:
    """After the time to drain it fails, takes part again, and may be asked again."""
    bench = Bench.leader()
    drain(bench, "node5")
    bench.run(DRAIN_S - 0.1)
    assert answers(bench) == []
    bench.run(0.2)
    assert answers(bench) == ["not_ready"]
    assert bench.ended() is None
    assert not bench.node.status(bench.now)["members"][0]["draining"]
    drain(bench, "node5", 2)
    assert bench.node.status(bench.now)["members"][0]["draining"]


def test_a_signal_after_an_operators_wish_ends_the_node() -> None:
    """And the operator's client is told that it is done, once."""
    bench = Bench.follower(ONE, TWO)
    drain(bench, "")
    drain(bench, "node5", 2)
    stop(bench)
    bench.run(DRAIN_S + 0.1, ONE, TWO)
    assert bench.ended() == LEFT
    assert answers(bench) == ["done", "done"]


def test_a_node_that_ends_in_an_error_says_so_to_who_waits() -> None:
    """Its own end is a failure, and another member is for another node to ask about."""
    bench = Bench.follower(ONE, TWO)
    drain(bench, "")
    drain(bench, "node2", 2)
    bench.take(e.WorkerDied(detail="signal 9"))
    assert answers(bench) == ["node_lost", "leaving"]
    assert bench.stored is not None


# --- another member -------------------------------------------------------------------------------


def test_a_wish_about_another_member_is_passed_on() -> None:
    """It is done when that member has left."""
    bench = Bench.leader(ONE, TWO)
    drain(bench, "node2", 7)
    [(address, passed)] = bench.sent(m.Drain)
    assert (address, passed.name) == (TWO.address, "node2")
    assert answers(bench) == []
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    assert bench.replied(m.Done) == [m.Done(request_id=7)]
    bench.run(DRAIN_S + GRACE_S + 0.1, ONE)
    assert answers(bench) == []


def test_a_member_that_dies_has_handed_over_nothing() -> None:
    """The wish fails as node_lost."""
    bench = Bench.leader(ONE, TWO)
    drain(bench, "node2")
    bench.run(1.0, ONE)
    assert answers(bench) == ["node_lost"]


def its_rest(rest: str, me: Member) -> Plan:
    """A plan in which node 2 has nothing, or this much."""
    (stage,) = plan_of(ONE, me).stages
    kinds = ("head_owners", "mlp_owners", "vocab_owners")
    # Members are in the order of their ids, so that this node is the third.
    owners = {kind: tuple(2 * owner for owner in getattr(stage, kind)) for kind in kinds}
    if rest == "a unit":
        owners["mlp_owners"] = (1, *owners["mlp_owners"][1:])
    stage = replace(stage, **owners)
    if rest == "a replica":
        stage = replace(stage, head_standbys=((1,), *((0,) for _ in stage.head_owners[1:])))
    voters = (0, 1, 2) if rest == "a vote" else (0, 2)
    return plan_of(ONE, TWO, me, fence=Fence(1, 2), stages=(stage,), voters=voters)


def gone(bench: Bench, *, refused: bool = True) -> None:
    """Node 2's connections end, or nothing is heard of it any more; no LEAVE came."""
    if refused:
        bench.take(e.LinkDown(address=TWO.address))
        bench.take(e.ProbeAnswered(address=TWO.address, refused=True))
    else:
        bench.run(5.0, ONE)


@pytest.mark.parametrize("rest", ["nothing", "a unit", "a replica", "a vote"])
@pytest.mark.parametrize("refused", [True, False], ids=["refuses", "silent"])
@pytest.mark.parametrize("draining", [True, False], ids=["draining", "not told yet"])
@pytest.mark.parametrize("obeyed", [True, False], ids=["obeyed", "not obeyed yet"])
def test_a_member_that_has_nothing_left_and_ends_has_left(
    rest: str, refused: bool, draining: bool, obeyed: bool
) -> None:
    """Its links may be seen to end before its LEAVE is heard. Where it may have had anything left,
    or may come back, it is lost."""
    bench = Bench.follower(ONE, TWO)
    drain(bench, "node2")
    plan = its_rest(rest, bench.me)
    bench.take_up(plan)
    bench.said[ONE] |= {"fence": plan.fence} if obeyed else {}
    bench.said[TWO] |= {"fence": plan.fence, "draining": draining}
    for who in (ONE, TWO):
        bench.beat(who)
    assert answers(bench) == []
    gone(bench, refused=refused)
    whole = rest == "nothing" and refused and draining and obeyed
    assert answers(bench) == ["done" if whole else "node_lost"]


def test_who_had_nothing_left_has_left_under_the_next_leader_too() -> None:
    """What it has is not forgotten while nobody leads."""
    bench = Bench.follower(ONE, TWO)
    drain(bench, "node2")
    plan = its_rest("nothing", bench.me)
    bench.take_up(plan)
    for who in (ONE, TWO):
        bench.said[who] |= {"fence": plan.fence, "draining": who is TWO}
        bench.beat(who)
    bench.beat(ONE, term=2, leader_id="", fence=Fence())
    assert not bench.node.ready
    gone(bench)
    assert answers(bench) == ["done"]


def test_a_member_that_stays_is_waited_for_a_little_longer() -> None:
    """Its own time to drain ends first; then the wish fails as not_ready."""
    bench = Bench.leader(ONE, TWO)
    drain(bench, "node2")
    bench.run(DRAIN_S + GRACE_S - 0.1, ONE, TWO)
    assert answers(bench) == []
    bench.run(0.2, ONE, TWO)
    assert answers(bench) == ["not_ready"]


def test_nobody_of_that_name_can_leave() -> None:
    """The names that there are are told."""
    bench = Bench.leader(ONE)
    drain(bench, "node9")
    [failed] = bench.replied(m.Failed)
    assert (failed.code, failed.retryable) == ("invalid_request", False)
    assert "node1, node5" in failed.message


def test_of_too_many_wishes_the_oldest_is_turned_away() -> None:
    """It is told; the others wait."""
    bench = Bench.leader(ONE, TWO)
    for number in range(MAX_WISHES + 1):
        drain(bench, "node2", number)
    [failed] = bench.replied(m.Failed)
    assert (failed.request_id, failed.code) == (0, "overloaded")
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    assert len(bench.replied(m.Done)) == MAX_WISHES


def test_who_is_alone_leaves_for_good_at_once() -> None:
    """Nobody is there to take anything over, and it will not come back."""
    bench = Bench.leader()
    drain(bench, "")
    assert bench.ended() == LEFT
    assert answers(bench) == ["done"]
    assert bench.stored is None


def test_draining_does_not_end_a_node_without_a_plan() -> None:
    """Only a signal does, or leaving for good; the wish fails in the end."""
    bench = Bench(join=(1,), join_timeout=2 * DRAIN_S)
    drain(bench, "node5")
    bench.run(DRAIN_S + 0.1)
    assert answers(bench) == ["not_ready"]
    assert bench.ended() is None
