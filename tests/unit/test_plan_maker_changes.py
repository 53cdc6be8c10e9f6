"""The leader's plans when members come, go, drain, or can no longer do their part."""

from __future__ import annotations

import pytest

from p2pinfer.core.timing import LAN
from tests.plan_bench import Office, member, serving


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
    assert bench.owners() == bench.voters() == {1, 2}
    bench.served()
    assert bench.owners() == bench.voters() == {1, 2, 3, 4}


def test_a_newcomer_overtakes_a_plan_that_is_being_loaded() -> None:
    """The one that is lacking for a quorum may be among them."""
    bench = Office(2)
    bench.look()
    bench.join(3)
    bench.look(1.0)
    assert bench.proposed() == ["a new leader", "node3 joined"]


def test_a_draining_member_loses_its_units_and_its_vote() -> None:
    """Its vote at once, its units when others are ready; it is told to no client."""
    bench = serving()
    bench.look(draining={2})
    assert bench.proposed()[0].startswith("node2 to own nothing")
    assert (bench.owners(), bench.voters(), len(bench.plan.members)) == ({1, 2, 3}, {1, 3}, 3)
    bench.adopt(1, 2, 3)
    bench.look(1.0, unready={1, 3})
    assert bench.proposed() == []
    bench.look(unready=())
    assert bench.proposed() == ["node1, node3 ready to take over"]
    assert (bench.owners(), bench.voters(), len(bench.plan.members)) == ({1, 3}, {1, 3}, 3)
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ()
    bench.look(1.0)
    assert bench.proposed() == ["replicas are complete"]
    bench.adopt(1, 2, 3)
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


@pytest.mark.parametrize("sense", ["hung", "outcasts"])
def test_an_unfit_owner_loses_its_units(sense: str) -> None:
    """It stays a member and a voter, and only the failure of a member is told to clients."""
    bench = serving()
    bench.look(**{sense: {2}})
    assert bench.proposed()[0].startswith("node2 to own nothing")
    assert (bench.owners(), bench.voters()) == ({1, 3}, {1, 2, 3})
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ("node2",)


@pytest.mark.parametrize("sense", ["slow", "paused"])
def test_a_member_that_rests_hands_over_its_units(sense: str) -> None:
    """When others are ready: until then it computes. Its vote stays, and no client is told."""
    bench = serving()
    bench.look(**{sense: {2}})
    assert bench.proposed() == ["node2 to own nothing"]
    assert (bench.owners(), bench.voters()) == ({1, 2, 3}, {1, 2, 3})
    bench.adopt(1, 2, 3)
    bench.look(1.0)
    assert bench.proposed() == ["node1, node3 ready to take over"]
    assert (bench.owners(), bench.voters()) == ({1, 3}, {1, 2, 3})
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ()
    copies = bench.plan.stages[0].head_standbys
    assert any(1 in each for each in copies)


def test_the_last_member_that_may_own_does_not_rest() -> None:
    """Better one that should rest than nobody: also where the others have not the memory."""
    bench = serving(2)
    bench.lose(2)
    bench.look(paused={1})
    assert bench.owners() == {1}
    small = Office(2)
    small.members[2] = member(2, memory_bytes=1)
    small.served()
    small.proposed()
    small.look(paused={1})
    assert small.proposed() == ["node1 to own nothing"]
    assert small.owners() == {1}


def test_what_cannot_be_placed_is_no_step() -> None:
    """Units were about to move; then there is no room for all of them any more."""
    bench = serving()
    bench.look(paused={2})
    bench.adopt(1, 2, 3)
    bench.proposed()
    for number in (1, 2, 3):
        bench.members[number] = member(number, memory_bytes=1)
    bench.look(1.0)
    assert bench.proposed() == []


def test_who_is_relieved_no_more_keeps_its_units() -> None:
    """Nothing had moved yet; what was prepared is given up."""
    bench = serving()
    bench.look(paused={2})
    bench.adopt(1, 2, 3)
    bench.proposed()
    bench.look(1.0, paused=())
    assert bench.proposed() == ["replicas are complete"]
    assert bench.owners() == {1, 2, 3}
    bench.adopt(1, 2, 3)
    bench.look(1.0)
    assert bench.proposed() == []
    bench.look(paused={2})
    assert bench.proposed() == ["node2 to own nothing"]


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
    bench.served()
    assert bench.owners() == {1, 2, 3}


def test_a_slow_member_rests_for_a_while() -> None:
    """Without units nobody sees how fast it is, so it is tried again after a while only."""
    bench = serving()
    bench.look(slow={2})
    bench.adopt(1, 2, 3)
    bench.look(1.0, slow=())
    assert len(bench.proposed()) == 2
    bench.adopt(1, 2, 3)
    bench.look(1.0)
    assert bench.proposed() == []
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["node2 fit again"]


def test_a_leader_may_own_nothing() -> None:
    """A leader that drains hands its units over, and leads until it is gone."""
    bench = serving(2)
    bench.look(draining={1})
    bench.adopt(1, 2)
    bench.look(1.0)
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


def test_who_could_not_begin_may_be_enough_to_go_on() -> None:
    """Three nodes cannot begin a plan of two stages of two; when one of four is lost, they go on
    with it."""
    bench = Office(3, layout="2x2", replicas=1)
    bench.look(1.0)
    assert "needs 4 nodes" in bench.maker.waiting
    bench.join(4)
    bench.look(1.0)
    bench.served()
    bench.lose(4)
    bench.look()
    assert bench.proposed()[-1] == "node4 gone"
