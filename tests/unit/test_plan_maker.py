"""The leader's plans: when it makes one, who is in it, who votes, and what failures mean."""

from __future__ import annotations

from math import inf

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.timing import LAN
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Plan
from p2pinfer.wire import messages as m
from tests.plan_bench import CLUSTER, MODEL, Office, log, member, renamed


def serving(count: int = 3, **settings: object) -> Office:
    """A leader whose plan is in force on `count` members, all of them voters."""
    bench = Office(count, **settings)
    bench.served()
    bench.proposed()
    bench.told(e.PlanFailed)
    return bench


def plan_of(count: int) -> Plan:
    """The plan of term 1 with which a cluster of `count` nodes settled."""
    return serving(count).plan


# --- the first plan -------------------------------------------------------------------------------


def test_a_founder_proposes_at_once() -> None:
    """It names all that are there, and one more voter than itself, under its own old vote."""
    bench = Office(3)
    assert bench.maker.deadline == -inf
    bench.quiet_since = bench.now
    bench.look()
    assert bench.proposed() == ["a new leader"]
    assert bench.plan.fence == Fence(1, 1)
    assert bench.plan.cluster_id == CLUSTER
    assert bench.owners() == {1, 2, 3}
    assert bench.voters() == {1, 2}
    assert bench.plan.old_voters == (member(1).node_id,)


def test_a_founder_that_was_restarted_keeps_its_cluster() -> None:
    """What is stored names the cluster, not what the new process drew."""
    stored = e.StoredState(cluster_id="d" * 16, term=2)
    bench = Office(1, stored=stored)
    bench.look()
    assert bench.plan.cluster_id == "d" * 16


def test_all_become_voters_one_by_one() -> None:
    """Each plan adds at most one voter; promptly, once the plan before is in force."""
    bench = Office(4)
    bench.look()
    bench.adopt(1, 2, 3, 4)
    bench.look()
    assert bench.proposed()[1:] == ["node3 to vote"]
    assert bench.voters() == {1, 2, 3}
    bench.adopt(1, 2, 3, 4)
    bench.look()
    assert bench.voters() == {1, 2, 3, 4}
    bench.adopt(1, 2, 3, 4)
    bench.look()
    assert bench.proposed() == ["node4 to vote"]
    assert bench.plan.fence == Fence(1, 3)


@pytest.mark.parametrize(
    ("sees", "waiting"),
    [
        ({"worker_ready": False}, "this node's worker to start"),
        ({"suspects": ("node2",)}, "a word from node2"),
        ({"hung": {1, 2}}, "0 of 1 nodes"),
    ],
)
def test_what_a_first_plan_waits_for_is_told(sees: dict[str, object], waiting: str) -> None:
    """No plan is made with a doubt, without a worker, or for nobody."""
    bench = Office(2)
    bench.look(**sees)
    assert (bench.proposed(), bench.maker.waiting) == ([], waiting)
    assert bench.maker.target is None


def test_enough_nodes_are_waited_for() -> None:
    """Members whose worker has not started are not there yet, and neither are unreached ones."""
    bench = Office(2, min_nodes=3)
    bench.members[3] = member(3, numeric_class="")
    bench.look()
    assert bench.maker.waiting == "2 of 3 nodes; node3's worker to start"
    bench.members[3] = member(3)
    bench.look(reached={1, 2})
    assert bench.proposed() == []
    bench.look(reached={1, 2, 3})
    assert bench.proposed() == ["a new leader"]


def test_a_model_that_does_not_fit_waits_for_other_members() -> None:
    """The reason is told once, and it is tried again when the members are others."""
    bench = Office(1)
    bench.members[1] = member(1, memory_bytes=1)
    bench.look()
    bench.look(1.0)
    (fact,) = bench.told(e.PlanFailed)
    assert "does not fit" in fact.reason
    assert bench.maker.waiting == fact.reason
    bench.join(2)
    bench.look(1.0)
    assert bench.proposed() == ["a new leader"]


# --- a new leader ---------------------------------------------------------------------------------


def test_a_new_leader_begins_with_an_epoch_change() -> None:
    """Same owners, same voters, its own term, the next epoch."""
    base = plan_of(3)
    bench = Office(3, base=base, term=7)
    bench.look()
    assert bench.plan.fence == Fence(7, base.fence.epoch + 1)
    assert bench.plan.stages == base.stages
    assert bench.voters() == {1, 2, 3}
    assert len(bench.plan.old_voters) == 3


def test_a_new_leader_leaves_out_the_dead() -> None:
    """Where the accepted plan is in force, a dead voter goes at once, and its units to others."""
    bench = Office(2, base=plan_of(3), term=7)
    bench.maker.lost(member(3), 0.9)
    bench.look(lost={3})
    assert (bench.voters(), bench.owners(), len(bench.plan.members)) == ({1, 2}, {1, 2}, 2)
    bench.adopt(1, 2)
    assert bench.requests.adopted[-1][1:3] == (("node3",), 0.9)


def test_a_plan_not_known_to_be_in_force_keeps_its_voters() -> None:
    """Dead voters stay listed, without units, until a plan is in force; then they go."""
    bench = Office(2, base=plan_of(3), base_active=False, term=7)
    bench.look(lost={3})
    assert bench.voters() == {1, 2, 3}
    assert bench.owners() == {1, 2}
    assert bench.plan.members[2] == member(3)
    bench.look(1.0)
    assert len(bench.proposed()) == 1
    bench.adopt(1, 2)
    bench.look()
    assert bench.proposed() == ["node3 to vote no more"]
    assert (bench.voters(), len(bench.plan.members)) == ({1, 2}, 2)


def test_a_voter_that_comes_back_in_time_gets_its_part() -> None:
    """Listed for its vote only, it is sent the proposal when it turns up, and units later."""
    bench = Office(2, base=plan_of(3), base_active=False, term=7)
    bench.look(lost={3})
    bench.sent(m.Propose)
    bench.join(3)
    bench.look(0.1)
    bench.look(1.0)
    assert 3 in [number for number, _ in bench.sent(m.Propose)]
    bench.adopt(1, 2, 3)
    bench.look()
    assert bench.proposed()[1:] == ["node3 fit again"]
    assert bench.owners() == {1, 2, 3}


def test_another_life_of_a_voter_is_listed_as_it_is_now() -> None:
    """A voter that was restarted with its state votes on; it is blank only if it forgot."""
    base = plan_of(3)
    bench = Office(2, base=base, term=7)
    bench.join(3, boot=1)
    bench.look()
    assert bench.plan.members[2] == member(3, boot=1)
    assert bench.voters() == {1, 2, 3}


def test_layout_and_quorum_of_a_cluster_are_those_of_its_plan() -> None:
    """The first plan takes them from its leader's settings; no later leader changes them."""
    bench = Office(3, layout="layers", quorum="last-man")
    plan = bench.served()
    assert (plan.layout, plan.quorum) == ("layers", "last-man")
    bench.lose(3)
    bench.look()
    assert (bench.plan.layout, bench.plan.quorum) == ("layers", "last-man")
    later = Office(3, base=plan, term=7)
    later.look()
    assert (later.plan.layout, later.plan.quorum) == ("layers", "last-man")


def test_a_voter_without_its_state_takes_part_without_a_say() -> None:
    """Under a plan that may be in force already it has units, and its former memory the vote."""
    bench = Office(2, base=plan_of(3), base_active=False, term=7)
    bench.join(3, boot=1, memory="f" * 16, blank=True)
    bench.look()
    assert bench.plan.members[2] == member(3, boot=1)
    assert (bench.owners(), bench.voters()) == ({1, 2, 3}, {1, 2, 3})
    bench.ack(1, 3)
    assert not bench.maker.activated
    bench.ack(2)
    assert bench.maker.activated


def test_a_voter_without_its_state_is_healed_by_the_plan_after() -> None:
    """Its new memory gets a vote when the plan that named the former one is in force."""
    bench = Office(2, base=plan_of(3), base_active=False, term=7)
    bench.join(3, boot=1, memory="f" * 16, blank=True)
    bench.look()
    bench.adopt(1, 2, 3)
    bench.look()
    assert bench.proposed()[1:] == ["node3 to vote"]
    assert bench.plan.members[2] == member(3, boot=1, memory="f" * 16, blank=True)
    bench.adopt(1, 2, 3)
    bench.look(1.0)
    assert bench.proposed() == []


def test_a_blank_voter_may_restart_before_it_is_told() -> None:
    """Its memory is kept: the plan in force that named it made it whole, in whichever boot."""
    base = plan_of(3)
    bench = Office(2, base=base, term=7)
    bench.join(3, boot=1, blank=True)
    bench.look()
    assert bench.plan.members[2] == member(3, boot=1)
    assert bench.voters() == {1, 2, 3}


def test_a_vote_in_force_makes_a_blank_member_whole() -> None:
    """Members that joined without state are listed as blank until a plan with their vote is
    in force: then they are voters like others, also for the next leader."""
    bench = Office(1)
    for number in (2, 3):
        bench.members[number] = member(number, blank=True)
    bench.look()
    assert [each.blank for each in bench.plan.members] == [False, True, True]
    bench.adopt(1, 2, 3)
    bench.look()
    assert [each.blank for each in bench.plan.members] == [False, False, True]
    later = Office(1, base=bench.plan, base_active=False, term=2)
    for number in (2, 3):
        later.members[number] = member(number, blank=True)
    later.look()
    assert [each.blank for each in later.plan.members] == [False, False, True]
    later.ack(1, 2, 3)
    assert later.maker.activated


def test_a_plan_lists_no_more_members_than_there_may_be() -> None:
    """Voters go first; who finds no place waits, and is not proposed again and again."""
    base = plan_of(3)
    bench = Office(1, base=base, base_active=False, term=2)
    for number in range(4, MAX_NODES + 4):
        bench.members[number] = member(number)
    bench.look(lost={2, 3})
    assert len(bench.plan.members) == MAX_NODES
    assert bench.voters() == {1, 2, 3}
    bench.look(1.0)
    assert len(bench.proposed()) == 1


# --- changes --------------------------------------------------------------------------------------


def test_a_lost_member_is_left_out_at_once() -> None:
    """Its units move, its vote goes, and the requests learn who was lost."""
    bench = serving()
    bench.requests.adopted.clear()
    bench.lose(2, silence_s=0.7)
    assert not bench.maker.in_force(bench.members.values())
    bench.look()
    assert bench.proposed() == ["node2 gone"]
    assert (bench.owners(), bench.voters()) == ({1, 3}, {1, 3})
    bench.adopt(1, 3)
    assert bench.requests.adopted == [((), ("node2",), 0.7, True)]


def test_a_member_that_came_back_at_once_is_proposed_anew() -> None:
    """It knows nothing of the plan any more, even if the leader never saw it away."""
    bench = serving()
    bench.maker.lost(bench.members[2], 0.0)
    bench.look()
    assert bench.proposed() == ["node2 gone"]
    assert bench.owners() == {1, 2, 3}


def test_a_suspect_is_waited_for() -> None:
    """A doubt is short: nothing is proposed until it is over."""
    bench = serving()
    bench.lose(3)
    bench.look(suspects=("node2",))
    assert (bench.proposed(), bench.maker.waiting) == ([], "a word from node2")
    bench.look(suspects=())
    assert bench.proposed() == ["node3 gone"]


def test_newcomers_join_together() -> None:
    """They get units when the membership has been quiet, and votes one by one."""
    bench = serving(2)
    bench.join(3)
    bench.look()
    assert bench.maker.waiting == "the members to settle"
    assert bench.maker.deadline == pytest.approx(bench.now + LAN.settle)
    bench.join(4)
    bench.look(LAN.settle - 0.1)
    bench.look(0.2)
    assert bench.proposed() == ["node3, node4 joined"]
    assert bench.owners() == {1, 2, 3, 4}
    assert bench.voters() == {1, 2}
    bench.served()
    assert bench.voters() == {1, 2, 3, 4}


def test_a_newcomer_overtakes_a_plan_that_is_being_loaded() -> None:
    """The one that is lacking for a quorum may be among them."""
    bench = Office(2)
    bench.look()
    bench.join(3)
    bench.look(1.0)
    assert bench.proposed() == ["a new leader", "node3 joined"]


def test_a_draining_member_loses_its_units_and_its_vote() -> None:
    """In one plan, so that it may leave when that is in force; it is told to no client."""
    bench = serving()
    bench.look(draining={2})
    assert bench.proposed()[0].startswith("node2 to own nothing")
    assert (bench.owners(), bench.voters(), len(bench.plan.members)) == ({1, 3}, {1, 3}, 3)
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ()
    bench.look(1.0)
    assert bench.proposed() == []


def test_a_draining_voter_that_owns_nothing_loses_its_vote() -> None:
    """Nothing moves by that plan; a voter that goes must not be missed by the others."""
    bench = Office(2)
    bench.members[3] = member(3, weight=0.0)
    bench.served()
    bench.proposed()
    bench.look(draining={3})
    assert bench.proposed() == ["node3 to vote no more"]
    assert bench.voters() == {1, 2}


@pytest.mark.parametrize("sense", ["hung", "outcasts", "slow"])
def test_an_unfit_owner_loses_its_units(sense: str) -> None:
    """It stays a member and a voter, and only the failure of a member is told to clients."""
    bench = serving()
    bench.look(**{sense: {2}})
    assert bench.proposed()[0].startswith("node2 to own nothing")
    assert (bench.owners(), bench.voters()) == ({1, 3}, {1, 2, 3})
    bench.adopt(1, 2, 3)
    told = ("node2",) if sense in ("hung", "outcasts") else ()
    assert bench.requests.adopted[-1][1] == told


def test_a_member_that_moves_again_gets_units_again() -> None:
    """When all has been quiet for a while."""
    bench = serving()
    bench.look(hung={2})
    bench.adopt(1, 2, 3)
    bench.quiet_since = bench.now
    bench.look(hung=())
    assert len(bench.proposed()) == 1
    bench.look(LAN.settle)
    assert bench.proposed() == ["node2 fit again"]
    assert bench.owners() == {1, 2, 3}


def test_a_slow_member_rests_for_a_while() -> None:
    """Without units nobody sees how fast it is, so it is tried again after a while only."""
    bench = serving()
    bench.look(slow={2})
    bench.adopt(1, 2, 3)
    bench.look(1.0, slow=())
    assert len(bench.proposed()) == 1
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["node2 fit again"]


def test_a_leader_may_own_nothing() -> None:
    """A leader that drains hands its units over, and leads until it is gone."""
    bench = serving(2)
    bench.look(draining={1})
    assert bench.owners() == {2}
    assert bench.plan.members[bench.plan.leader] == member(1)


def test_a_learner_that_drains_gets_no_vote() -> None:
    """It is about to leave."""
    bench = serving(2)
    bench.join(3)
    bench.look(1.0)
    bench.adopt(1, 2, 3)
    bench.look(draining={3})
    assert bench.voters() == {1, 2}


# --- refusals -------------------------------------------------------------------------------------


def test_a_member_that_refuses_is_left_without_units_for_a_while() -> None:
    """Each time for twice as long, but never for good."""
    bench = serving()
    for times in (1, 2, 4):
        bench.maker.step_failed(bench.plan.fence, "a step failed", now=bench.now)
        bench.look()
        bench.proposed()
        assert bench.nack(2)
        (fact,) = bench.told(e.PlanFailed)
        assert fact.reason == "node2: no memory"
        bench.look()
        assert bench.proposed() == ["node2 to own nothing; node2: no memory"]
        assert bench.owners() == {1, 3}
        bench.adopt(1, 2, 3)
        bench.look(LAN.unable_for * times - 0.1)
        assert bench.proposed() == []
        bench.look(0.2)
        assert bench.proposed() == ["node2 fit again"]
        bench.adopt(1, 2, 3)


def test_a_member_that_cannot_even_listen_is_not_waited_for() -> None:
    """Without units or vote it is not listed until a while has passed."""
    bench = Office(2)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.nack(3)
    bench.ack(1, 2)
    assert bench.maker.activated
    bench.proposed()
    bench.maker.step_failed(bench.plan.fence, "a step failed", now=bench.now)
    bench.look()
    assert [each.name for each in bench.plan.members] == ["node1", "node2"]
    bench.adopt(1, 2)
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["a step failed", "node3 joined"]


def test_the_leader_itself_may_refuse_units() -> None:
    """Then others hold all of them."""
    bench = Office(2)
    bench.look()
    bench.nack(1)
    bench.look()
    assert bench.owners() == {2}


def test_no_plan_goes_without_its_leader() -> None:
    """A leader that cannot even listen waits, says why, and tries again."""
    bench = Office(2)
    bench.look(draining={1})
    assert bench.owners() == {2}
    bench.nack(1)
    assert bench.maker.target is None
    bench.look(1.0)
    assert bench.maker.waiting == "node1: no memory"
    assert bench.proposed() == ["a new leader"]
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["a new leader"]
    assert bench.plan.fence == Fence(1, 2)


def test_a_member_alone_that_refuses_waits() -> None:
    """With nobody able there is no plan; its reason is told."""
    bench = Office(1, base=plan_of(1), term=2)
    bench.look()
    bench.nack(1)
    bench.look()
    assert bench.maker.waiting == "a node that can hold the model; node1: no memory"


def test_refusals_of_another_fence_mean_nothing() -> None:
    """They are late, and no failed step either."""
    bench = serving()
    stale = m.Nack(fence=Fence(0, 1), node_id=member(2).node_id, code="internal", message="no")
    assert bench.maker.nack(stale, bench.now)
    fresh = replace(stale, fence=bench.plan.fence, node_id=member(9).node_id)
    assert bench.maker.nack(fresh, bench.now)
    bench.look()
    assert bench.proposed() == []


def test_acks_of_another_fence_or_of_strangers_mean_nothing() -> None:
    """Only members of the newest plan can acknowledge it."""
    bench = Office(2)
    bench.maker.ack(m.Ack(fence=Fence(1, 1), node_id=member(2).node_id), bench.now)
    assert not bench.maker.has_acked(member(2))
    bench.look()
    bench.maker.ack(m.Ack(fence=Fence(0, 9), node_id=member(2).node_id), bench.now)
    bench.maker.ack(m.Ack(fence=bench.plan.fence, node_id=member(9).node_id), bench.now)
    assert not bench.maker.has_acked(member(2))
    assert not bench.maker.has_acked(member(9))
    bench.ack(2)
    assert bench.maker.has_acked(member(2))
    assert not bench.maker.has_acked(member(2, boot=1))


# --- failed steps, strays and stragglers ----------------------------------------------------------


def test_a_failed_step_begins_a_new_epoch() -> None:
    """Same owners, next fence; a second report of it is none, and neither is a late one."""
    bench = serving()
    before = bench.plan
    assert bench.maker.in_force(bench.members.values())
    assert bench.maker.step_failed(before.fence, "a frame lacks", now=bench.now)
    assert not bench.maker.in_force(bench.members.values())
    assert not bench.maker.step_failed(before.fence, "another", now=bench.now)
    bench.look()
    assert bench.proposed() == ["a frame lacks"]
    assert bench.plan.stages == before.stages
    assert not bench.maker.step_failed(before.fence, "late", now=bench.now)
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ()


def test_a_follower_tells_of_a_failed_step_by_nack() -> None:
    """A NACK with the fence in force is no refusal."""
    bench = serving()
    assert not bench.nack(2, "a frame lacks", about=member(3).node_id)


def test_a_late_refusal_is_no_failed_step() -> None:
    """Who takes no part in the plan in force can only refuse it."""
    bench = Office(2)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.ack(1, 2)
    bench.look()
    bench.look(1.0)
    assert bench.maker.activated
    assert bench.nack(3)


def test_a_member_whose_numbers_are_none_rests() -> None:
    """It owns nothing for a while, and its failure is told."""
    bench = serving()
    fence = bench.plan.fence
    for _ in range(2):
        bench.maker.step_failed(
            fence, "not finite", about=member(2).node_id, broken=True, now=bench.now
        )
    bench.look()
    assert bench.owners() == {1, 3}
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ("node2",)
    bench.proposed()
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["node2 fit again"]


def test_a_member_that_stopped_obeying_needs_a_new_plan() -> None:
    """It took its leader for lost; nothing else starts it again."""
    bench = serving()
    bench.maker.obeys(member(2).node_id, Fence())
    bench.look()
    assert bench.proposed() == ["node2 obeyed the plan no more"]


def test_a_member_that_never_obeys_is_asked_anew() -> None:
    """It acknowledged, but ACTIVATE finds nothing to activate there."""
    bench = Office(2)
    bench.look()
    bench.ack(1, 2)
    bench.look(0.5)
    assert len(bench.proposed()) == 1
    bench.look(0.5)
    assert bench.proposed() == ["node2 obeyed the plan no more"]


def test_a_straggler_takes_part_from_the_next_plan_on() -> None:
    """Promptly the first time; if it is late again, after a while."""
    bench = Office(2)
    bench.members[3] = member(3, weight=0.0)
    for wait in (0.0, LAN.unable_for):
        bench.look(wait)
        bench.ack(1, 2)
        bench.look()
        bench.look(LAN.straggle)
        assert bench.maker.activated
        bench.obey(2)
        bench.proposed()
        bench.look(wait / 2)
        assert bench.proposed() == []
        bench.maker.ack(m.Ack(fence=bench.plan.fence, node_id=member(3).node_id), bench.now)
        if wait:
            bench.look(wait / 4)
            assert bench.proposed() == []
        bench.look(wait)
        assert len(bench.proposed()) == 1


def test_tokens_and_their_restart_reach_the_request_log() -> None:
    """The leader's requests go on from the logs agreed on."""
    bench = Office(1)
    bench.look()
    bench.ack(1, logs={1: [log("abc")]})
    whole = log("abc")
    bench.maker.log_entry(
        m.LogEntry(
            fence=bench.plan.fence,
            request_id=1,
            term=whole.term,
            prompt_tokens=1,
            params=whole.params,
            tokens=whole.tokens,
        ),
        member(1).node_id,
        bench.now,
    )
    ((agreed, *_),) = bench.requests.adopted
    assert [(each.request_id, each.restart, each.log.term) for each in agreed] == [(1, 2, 1)]


def test_another_numeric_class_makes_replies_inexact() -> None:
    """Units that move to another kind of machine compute other bits."""
    bench = Office(2)
    bench.members[3] = member(3, numeric_class="o")
    bench.served()
    bench.lose(3)
    bench.look()
    bench.adopt(1, 2)
    assert bench.requests.adopted[-1][1:] == (("node3",), 0.7, False)


def test_what_comes_before_the_first_plan_means_nothing() -> None:
    """Heartbeats, losses, answers and failures find no plan yet."""
    bench = Office(1)
    bench.maker.obeys(member(2).node_id, Fence())
    bench.maker.lost(member(2))
    assert bench.maker.nack(
        m.Nack(fence=Fence(), node_id=member(2).node_id, code="internal", message=""), bench.now
    )
    assert not bench.maker.step_failed(Fence(), "no", now=bench.now)
    assert not bench.maker.in_force(bench.members.values())
    assert bench.maker.listeners == ()
    assert not bench.maker.activated


def test_a_plan_of_another_model_is_no_start() -> None:
    """A cluster that was started again with another model places it anew."""
    base = plan_of(2)
    old = renamed(base, base.fence, model=replace(MODEL, model_id="cd" * 32, num_layers=3))
    bench = Office(2, base=old, term=2)
    bench.look()
    assert bench.plan.model == MODEL
