"""Whom a node follows, and when a leader is lost, steps down or resigns."""

from __future__ import annotations

from math import inf

from p2pinfer.core.events import LeaderElected, LeaderLost
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence
from p2pinfer.wire.messages import PreVoteReply, VoteReply, VoteRequest
from tests.election_bench import CLUSTER, A, B, C, D, Voter, member, plan_of, stored

# --- following ------------------------------------------------------------------------------------


def test_the_leaders_heartbeat_is_followed_and_a_rumour_is_not() -> None:
    """Only the sender can say that it leads; a higher term is learnt from everybody."""
    voter = Voter()
    voter.beats(C, 5, leader=A)
    assert voter.election.leader_id == "" and voter.election.term == 5
    voter.beats(A, 4, leader=A)
    assert voter.election.leader_id == ""
    voter.beats(A, 5, leader=A)
    voter.beats(A, 5, leader=A)
    assert voter.election.leader_id == A and voter.election.deadline == inf
    assert voter.said(LeaderElected) == [LeaderElected(name="A", node_id=A, term=5)]


def test_a_proposal_shows_who_leads_and_an_old_one_does_not() -> None:
    """The answer says whether that leader leads still; a new term of the same leader is told."""
    voter = Voter()
    assert voter.election.follow(A, 4, 0.0)
    assert not voter.election.follow(C, 3, 0.0)
    assert voter.election.leader_id == A
    assert voter.election.follow(A, 6, 0.0)
    voter.look()
    assert [fact.term for fact in voter.said(LeaderElected)] == [4, 6]
    assert not voter.said(LeaderLost)


def test_a_node_follows_itself_only_where_it_leads() -> None:
    """A proposal of its own is its leader's; what others remember of a former life is not."""
    voter = Voter()
    assert not voter.election.follow(B, 3, 0.0)
    term = voter.lead()
    assert voter.election.follow(B, term, 0.0)
    assert not voter.election.follow(B, term - 1, 0.0)


def test_the_leaders_death_starts_an_election_at_once() -> None:
    """The first attempt comes within a fraction of the usual wait; other deaths start none."""
    voter = Voter()
    voter.beats(A, 3, leader=A)
    voter.election.lost(C, "connection refused", voter.now)
    assert voter.election.leader_id == A
    voter.election.lost(A, "connection refused", voter.now)
    voter.look()
    lost = LeaderLost(name="A", node_id=A, term=3, reason="connection refused")
    assert voter.said(LeaderLost) == [lost]
    assert voter.election.deadline <= voter.now + LAN.election_first


def test_a_leader_that_says_that_it_leads_no_longer_is_lost() -> None:
    """Its heartbeat without itself as leader ends its term here, and no older one does."""
    voter = Voter()
    voter.beats(A, 5, leader=A)
    voter.beats(A, 4)
    assert voter.election.leader_id == A
    voter.beats(A, 5)
    assert voter.election.leader_id == ""
    assert voter.election.deadline <= voter.now + LAN.election_first
    voter.beats(A, 5, leader=A)
    voter.beats(A, 7, leader=C)
    assert voter.election.leader_id == "" and voter.election.term == 7


def test_a_leader_that_is_no_member_here_is_lost() -> None:
    """A proposal may come from who was taken for dead in the same moment."""
    voter = Voter()
    voter.here = [member(B), member(C)]
    assert voter.election.follow(A, 4, 0.0)
    voter.look()
    assert voter.election.leader_id == ""


def test_a_higher_term_of_a_third_node_ends_the_leadership() -> None:
    """Whoever is in a higher term obeys no leader of a lower: an election brings all together."""
    voter = Voter()
    voter.beats(A, 3, leader=A)
    voter.beats(C, 6)
    assert voter.election.leader_id == "" and voter.election.term == 6
    assert voter.election.deadline <= voter.now + LAN.election_max


# --- leading --------------------------------------------------------------------------------------


def test_a_leader_that_hears_of_a_higher_term_steps_down() -> None:
    """By heartbeat, by a candidate, by a denial and by the next leader's plan."""
    for how in ("heartbeat", "candidate", "denial", "leader"):
        voter = Voter()
        term = voter.lead()
        if how == "heartbeat":
            voter.beats(C, term + 1)
        elif how == "candidate":
            voter.says(VoteRequest(term=term + 1, candidate_id=C, plan_fence=Fence(3, 7)))
        elif how == "denial":
            voter.says(VoteReply(term=term + 1, voter_id=C, granted=False))
        else:
            assert voter.election.follow(C, term + 1, voter.now)
            voter.look()
        assert not voter.election.leads and voter.election.term == term + 1
        (lost,) = voter.said(LeaderLost)
        assert isinstance(lost, LeaderLost) and lost.node_id == B


def test_two_leaders_of_one_term_both_step_down() -> None:
    """Under last-man two halves may each elect their own; when they meet, they begin anew."""
    voter = Voter(stored(plan_of(A, B, C, rule="last-man")))
    term = voter.lead()
    voter.beats(A, term, leader=A)
    assert voter.election.leader_id == "" and voter.election.term == term + 1


def test_a_leader_resigns_when_asked_and_others_cannot() -> None:
    """Resigning is for who leads; its next attempt waits as long as any."""
    voter = Voter()
    voter.election.resign("its worker hangs", voter.now)
    assert not voter.said(LeaderLost)
    term = voter.lead()
    voter.election.resign("its worker hangs", voter.now)
    voter.look()
    lost = LeaderLost(name="B", node_id=B, term=term, reason="its worker hangs")
    assert voter.said(LeaderLost) == [lost]
    assert voter.election.deadline >= voter.now + LAN.election_min
    voter.says(VoteReply(term=term, voter_id=A, granted=True))
    assert not voter.election.leads


def test_a_new_leader_resigns_below_a_majority() -> None:
    """Before its first plan is in force, half of the voters is not enough to decide anything."""
    voter = Voter(stored(plan_of(A, B, C, D)))
    voter.here.append(member(D))
    voter.ask()
    voter.says(PreVoteReply(term=4, voter_id=C, granted=True))
    voter.says(PreVoteReply(term=4, voter_id=D, granted=True))
    voter.write()
    voter.says(VoteReply(term=4, voter_id=C, granted=True))
    voter.says(VoteReply(term=4, voter_id=D, granted=True))
    assert voter.election.leads
    voter.here = [member(B), member(C)]
    voter.look()
    (lost,) = voter.said(LeaderLost)
    assert isinstance(lost, LeaderLost) and lost.reason == "it hears 2 of 4 voters"


def test_a_sitting_leader_goes_on_with_half() -> None:
    """Once a plan of its own is in force, half with itself is enough; less is not."""
    voter = Voter()
    term = voter.lead()
    plan = plan_of(B, C, D, A, fence=Fence(term, 8), old=(A, B, C))
    voter.durable.accept(plan, CLUSTER, lambda _: None)
    voter.durable.activated(plan.fence)
    voter.here = [member(B), member(C)]
    voter.look()
    assert voter.election.leads
    pending = plan_of(B, C, fence=Fence(term, 9), old=(A, B, C, D))
    voter.durable.accept(pending, CLUSTER, lambda _: None)
    voter.look()
    assert voter.election.leads
    voter.here = [member(B)]
    voter.look()
    assert not voter.election.leads


def test_last_man_leads_on_alone() -> None:
    """Voters that are known to be lost are not missed."""
    voter = Voter(stored(plan_of(A, B, C, rule="last-man")))
    voter.here, voter.lost = [member(B)], frozenset((A, C))
    voter.ask()
    voter.write()
    assert voter.election.leads
    voter.look(1.0)
    assert voter.election.leads


def test_a_node_that_nobody_has_named_is_told_by_its_id() -> None:
    """A leader may be known before anything else of it is."""
    voter = Voter()
    assert voter.election.follow(D, 4, 0.0)
    voter.look()
    assert voter.said(LeaderElected) == [LeaderElected(name=D, node_id=D, term=4)]
