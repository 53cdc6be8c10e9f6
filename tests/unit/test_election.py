"""Who becomes the leader: pre-votes, votes, terms and attempts in vain."""

from __future__ import annotations

from math import inf

from p2pinfer.core.election import MAX_BACKOFF
from p2pinfer.core.events import ElectionStarted, LeaderElected, StoredState
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence
from p2pinfer.wire.messages import PreVoteReply, PreVoteRequest, VoteReply, VoteRequest
from tests.election_bench import CLUSTER, A, B, C, D, Voter, member, plan_of, stored


def test_a_founder_leads_once_the_disk_has_its_cluster() -> None:
    """It leads in term 1, with itself as the only voter, and does not need a worker for that."""
    voter = Voter(None)
    voter.able = False
    voter.election.found(CLUSTER)
    voter.look()
    assert not voter.election.leads
    voter.write()
    assert voter.election.leads and voter.election.term == 1
    assert voter.said(LeaderElected) == [LeaderElected(name="B", node_id=B, term=1)]
    voter.look(9.0)
    assert voter.election.leads and voter.election.deadline == inf


def test_a_founder_that_has_seen_a_higher_term_does_not_lead_in_the_first() -> None:
    """What comes back from the disk too late changes nothing."""
    voter = Voter(None)
    voter.election.found(CLUSTER)
    voter.beats(A, 2)
    voter.able = False
    voter.write()
    assert not voter.election.leads


def test_a_founder_restarted_before_its_first_plan_elects_itself() -> None:
    """It is the only voter that its cluster has ever had; the term is a new one."""
    voter = Voter(StoredState(cluster_id=CLUSTER, term=1, voted_for=B))
    voter.election.resume(0.0)
    voter.ask()
    assert voter.election.waiting == "the election of a leader"
    voter.write()
    assert voter.election.leads and voter.election.term == 2
    assert not voter.taken()


def test_an_election_goes_by_pre_vote_vote_and_disk() -> None:
    """The term begins after a majority's pre-vote; the own vote counts once it is written."""
    voter = Voter()
    voter.election.resume(0.0)
    voter.look()
    assert not voter.election.campaigning
    assert LAN.election_min <= voter.election.deadline <= LAN.election_max
    voter.ask()
    asked = PreVoteRequest(term=4, candidate_id=B, plan_fence=Fence(3, 7))
    assert voter.taken() == [(A, asked), (C, asked)]
    assert voter.election.term == 3 and voter.election.campaigning
    voter.says(PreVoteReply(term=4, voter_id=C, granted=True))
    request = VoteRequest(term=4, candidate_id=B, plan_fence=Fence(3, 7))
    assert voter.taken() == [(A, request), (C, request)]
    assert voter.said(ElectionStarted) == [ElectionStarted(term=4)]
    voter.says(VoteReply(term=4, voter_id=C, granted=True))
    assert not voter.election.leads
    voter.write()
    assert voter.election.leads and not voter.election.campaigning
    assert voter.election.waiting == ""


def test_answers_of_another_term_elect_nobody() -> None:
    """Neither a pre-vote nor a vote counts for a term that it was not asked for."""
    voter = Voter()
    voter.ask()
    voter.says(PreVoteReply(term=3, voter_id=C, granted=True))
    assert voter.election.term == 3
    voter.stand()
    voter.write()
    voter.says(VoteReply(term=3, voter_id=C, granted=True))
    assert not voter.election.leads


def test_votes_granted_late_still_elect_in_their_term() -> None:
    """While it asks for the next term, a candidate can still win the one it stands in."""
    voter = Voter()
    term = voter.stand()
    voter.write()
    voter.ask()
    assert voter.election.term == term and voter.election.campaigning
    voter.says(VoteReply(term=term, voter_id=A, granted=True))
    assert voter.election.leads and voter.election.term == term


def test_a_restarted_candidate_does_not_win_the_term_of_its_former_life() -> None:
    """As leader of it, it may have made plans that it has forgotten."""
    state = StoredState(cluster_id=CLUSTER, term=5, voted_for=B, plan=plan_of(A, B, C), active=True)
    voter = Voter(state, member(B, "2"))
    voter.election.resume(0.0)
    voter.says(VoteReply(term=5, voter_id=A, granted=True))
    voter.says(VoteReply(term=5, voter_id=C, granted=True))
    assert not voter.election.leads


def test_a_candidate_waits_for_its_disk_before_it_tries_again() -> None:
    """A disk slower than an attempt would otherwise never see an election end."""
    voter = Voter()
    term = voter.stand()
    voter.taken()
    for _ in range(3):
        voter.ask()
    assert voter.taken() == [] and voter.election.term == term
    voter.write()
    voter.ask()
    assert {type(message) for _, message in voter.taken()} == {PreVoteRequest}


def test_elections_in_vain_are_farther_and_farther_apart() -> None:
    """The wait doubles up to its limit, and begins anew when somebody leads."""
    voter = Voter()
    waits = []
    for _ in range(6):
        voter.stand()
        waits.append(voter.election.deadline - voter.now)
        voter.write()
    ratios = [round(wait / waits[0]) for wait in waits]
    assert ratios == [1, 2, 4, MAX_BACKOFF, MAX_BACKOFF, MAX_BACKOFF]
    voter.beats(A, 20, leader=A)
    voter.election.lost(A, "gone", voter.now)
    voter.stand()
    assert round((voter.election.deadline - voter.now) / waits[0]) == 1


def test_attempts_that_find_no_majority_begin_no_term() -> None:
    """A node cut off from the others comes back with the term that it had."""
    voter = Voter()
    for _ in range(20):
        voter.ask()
    assert voter.election.term == 3
    assert not voter.said(ElectionStarted)


def test_whoever_is_unable_does_not_campaign() -> None:
    """A hung, draining or witness node wants no time, and stops what it has begun."""
    voter = Voter()
    voter.able = False
    voter.election.resume(0.0)
    voter.look(10.0)
    assert voter.election.deadline == inf and not voter.election.campaigning
    voter.able = True
    voter.stand()
    voter.able = False
    voter.look()
    assert not voter.election.campaigning
    voter.write()
    voter.says(VoteReply(term=4, voter_id=C, granted=True))
    assert not voter.election.leads


def test_members_without_a_vote_do_not_campaign() -> None:
    """Neither a learner nor a node that has never had a plan."""
    for state in (stored(plan_of(A, C)), None):
        voter = Voter(state)
        voter.look(10.0)
        assert voter.election.deadline == inf


def test_a_plan_not_known_active_needs_the_voters_before_it_too() -> None:
    """Votes are asked of both sets; the new voters alone elect nobody."""
    voter = Voter(stored(plan_of(B, C, fence=Fence(3, 8), old=(A, B, D)), active=False))
    voter.here.append(member(D))
    voter.ask()
    assert [to for to, _ in voter.taken()] == [A, C, D]
    voter.says(PreVoteReply(term=4, voter_id=C, granted=True))
    assert voter.election.term == 3
    voter.says(PreVoteReply(term=4, voter_id=D, granted=True))
    assert voter.election.term == 4


def test_a_heartbeat_does_not_put_the_newest_plan_in_force() -> None:
    """Only ACTIVATE does: with it come the token logs that the voters before had agreed on."""
    voter = Voter(stored(plan_of(B, C, fence=Fence(3, 8), old=(A, B, D)), active=False))
    voter.beats(C, 3, fence=Fence(3, 8))
    assert not voter.durable.state.active


def test_a_blank_voter_counts_where_the_plan_names_its_memory() -> None:
    """As a new voter of this plan it counts, restarted too; without its state it does not."""
    joined = (member(A), member(B), member(C), member(D, blank=True))
    plan = plan_of(A, B, C, D, fence=Fence(3, 8), old=(A, B, C), listed=joined)
    for boot, memory, elected in (("1", "1", True), ("2", "1", True), ("2", "2", False)):
        voter = Voter(stored(plan, active=False))
        voter.here = [member(B), member(C), member(D, boot, memory=memory, blank=True)]
        voter.ask()
        voter.says(PreVoteReply(term=4, voter_id=C, granted=True))
        voter.says(PreVoteReply(term=4, voter_id=D, granted=True))
        assert (voter.election.term == 4) is elected


def test_who_forgot_has_no_word_among_the_voters_before() -> None:
    """A voter that came back without its state cannot decide before that plan is in force."""
    back = (member(A), member(B), member(C, "2", memory="2", blank=True))
    plan = plan_of(A, B, C, fence=Fence(3, 8), listed=back)
    for active in (False, True):
        voter = Voter(stored(plan, active=active))
        voter.here = list(back)
        voter.ask()
        voter.says(PreVoteReply(term=4, voter_id=C, granted=True))
        assert (voter.election.term == 4) is active


def test_the_vote_of_who_is_gone_by_now_does_not_count() -> None:
    """Whoever has died since cannot hold the promise against anybody."""
    voter = Voter()
    voter.ask()
    voter.here = [member(B)]
    voter.says(PreVoteReply(term=4, voter_id=C, granted=True))
    assert voter.election.term == 3
    assert voter.election.waiting == "more of the cluster's voters; missing: A, C"


def test_who_is_missing_is_named_though_the_newest_plan_lists_it_no_more() -> None:
    """A leader that was cut off while it left others out still says whom it lacks."""
    voter = Voter(stored(plan_of(B, C, old=(A, B, C)), active=False))
    voter.here = [member(B)]
    voter.gone = (member(A), member(C))
    voter.ask()
    assert voter.election.waiting == "more of the cluster's voters; missing: A, C"
