"""The leader's first plan, and a new leader's: when it is made, who is in it, who votes."""

from __future__ import annotations

from math import inf

import pytest

from p2pinfer.core import events as e
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence
from p2pinfer.wire import messages as m
from tests.plan_bench import CLUSTER, Office, member, plan_of

# --- the first plan -------------------------------------------------------------------------------


def test_a_founder_proposes_at_once() -> None:
    """It names all that are there; the only vote, old and new, is its own."""
    bench = Office(3)
    assert bench.maker.deadline == -inf
    bench.quiet_since = bench.now
    bench.look()
    assert bench.proposed() == ["a new leader"]
    assert bench.plan.fence == Fence(1, 1)
    assert bench.plan.cluster_id == CLUSTER
    assert bench.owners() == {1, 2, 3}
    assert bench.voters() == {1}
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
    assert bench.proposed()[1:] == ["node2 to vote"]
    assert bench.voters() == {1, 2}
    for voters in ({1, 2, 3}, {1, 2, 3, 4}):
        bench.adopt(1, 2, 3, 4)
        bench.look()
        assert bench.voters() == voters
    bench.adopt(1, 2, 3, 4)
    bench.look()
    assert bench.proposed() == ["node3 to vote", "node4 to vote"]
    assert bench.plan.fence == Fence(1, 4)


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
    bench.adopt(1, 2, 3)
    bench.look(1.0)
    assert bench.proposed() == ["node3 ready to take over"]
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
    for _ in ("the founder's plan", "node2 to vote"):
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
