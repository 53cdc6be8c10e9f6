"""How a node votes: for whom, for whom not, and what it learns from being asked and answered."""

from __future__ import annotations

from math import inf

from msgspec.structs import replace

from p2pinfer.core.events import FrameDropped
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence
from p2pinfer.wire.messages import PreVoteReply, PreVoteRequest, VoteReply, VoteRequest
from tests.election_bench import A, B, C, Voter, plan_of


def test_a_pre_vote_is_granted_without_a_leader_and_changes_nothing() -> None:
    """The answer needs no disk, and the voter's term stays."""
    voter = Voter()
    voter.says(PreVoteRequest(term=4, candidate_id=C, plan_fence=Fence(3, 7)))
    assert voter.taken() == [(C, PreVoteReply(term=4, voter_id=B, granted=True))]
    assert voter.election.term == 3


def test_a_pre_vote_is_denied_while_a_leader_is_heard() -> None:
    """A node that alone does not hear the leader cannot depose it."""
    voter = Voter()
    voter.beats(A, 3, leader=A)
    voter.says(PreVoteRequest(term=4, candidate_id=C, plan_fence=Fence(3, 7)))
    assert voter.taken() == [(C, PreVoteReply(term=3, voter_id=B, granted=False))]
    leader = Voter()
    term = leader.lead()
    leader.says(PreVoteRequest(term=term + 1, candidate_id=C, plan_fence=Fence(3, 7)))
    assert leader.taken() == [(C, PreVoteReply(term=term, voter_id=B, granted=False))]


def test_an_older_plan_gets_neither_pre_vote_nor_vote() -> None:
    """The term of such a candidate is entered all the same, so that it can be led again."""
    voter = Voter()
    voter.says(PreVoteRequest(term=9, candidate_id=C, plan_fence=Fence(3, 6)))
    denied = PreVoteReply(term=3, voter_id=B, granted=False, plan=voter.durable.plan)
    assert voter.taken() == [(C, denied)]
    voter.says(VoteRequest(term=9, candidate_id=C, plan_fence=Fence(2, 9)))
    assert voter.taken() == [(C, VoteReply(term=9, voter_id=B, granted=False))]
    assert voter.election.term == 9


def test_a_candidate_takes_over_the_newer_plan_of_a_voter_and_asks_again() -> None:
    """The only other voter that has it may be a witness, which never stands itself."""
    voter = Voter()
    voter.election.resume(0.0)
    voter.look()
    voter.ask()
    voter.taken()
    newer = plan_of(A, B, C, fence=Fence(3, 8))
    voter.says(PreVoteReply(term=3, voter_id=C, granted=False, plan=newer))
    assert voter.durable.plan == newer and not voter.durable.state.active
    voter.look(LAN.election_first)
    asked = PreVoteRequest(term=4, candidate_id=B, plan_fence=Fence(3, 8))
    assert voter.taken() == [(A, asked), (C, asked)]
    later = plan_of(A, B, C, fence=Fence(5, 9))
    voter.says(PreVoteReply(term=5, voter_id=C, granted=False, plan=later))
    assert (voter.durable.plan, voter.election.term) == (later, 5)


def test_a_plan_of_another_cluster_or_an_older_one_is_not_taken_over() -> None:
    """Nor one while somebody leads, who proposes what is to be accepted."""
    voter = Voter()
    ours = voter.durable.plan
    assert ours is not None
    voter.says(PreVoteReply(term=3, voter_id=C, granted=False, plan=ours))
    foreign = replace(ours, fence=Fence(3, 9), cluster_id="f" * 16)
    voter.says(PreVoteReply(term=3, voter_id=C, granted=False, plan=foreign))
    voter.beats(A, 3, leader=A)
    newer = plan_of(A, B, C, fence=Fence(3, 9))
    voter.says(PreVoteReply(term=3, voter_id=C, granted=False, plan=newer))
    assert voter.durable.plan == ours


def test_a_vote_is_told_when_written_and_given_once_per_term() -> None:
    """The same candidate is answered again, another of that term or one of an older is denied."""
    voter = Voter()
    request = VoteRequest(term=4, candidate_id=C, plan_fence=Fence(3, 7))
    granted = VoteReply(term=4, voter_id=B, granted=True)
    voter.says(request)
    assert voter.taken() == []
    voter.write()
    assert voter.taken() == [(C, granted)]
    voter.says(request)
    voter.write()
    assert voter.taken() == [(C, granted)]
    voter.says(VoteRequest(term=4, candidate_id=A, plan_fence=Fence(3, 9)))
    voter.says(VoteRequest(term=3, candidate_id=A, plan_fence=Fence(3, 9)))
    denied = VoteReply(term=4, voter_id=B, granted=False)
    assert voter.taken() == [(A, denied), (A, denied)]


def test_a_voter_gives_its_candidate_time() -> None:
    """The next attempt of its own comes a whole wait after its vote."""
    voter = Voter()
    voter.election.resume(0.0)
    voter.look(0.2)
    voter.says(VoteRequest(term=4, candidate_id=C, plan_fence=Fence(3, 7)))
    assert voter.election.deadline >= voter.now + LAN.election_min


def test_a_candidate_that_votes_for_another_stands_no_longer() -> None:
    """In a higher term its own votes are over; what it wrote for itself counts nowhere."""
    voter = Voter()
    term = voter.stand()
    voter.says(VoteRequest(term=term + 1, candidate_id=C, plan_fence=Fence(3, 7)))
    voter.write()
    voter.says(VoteReply(term=term, voter_id=A, granted=True))
    assert not voter.election.leads and not voter.election.campaigning


def test_a_denial_from_a_higher_term_is_learnt_from() -> None:
    """The candidate enters that term and asks again at once for the one after it."""
    voter = Voter()
    voter.ask()
    voter.says(PreVoteReply(term=8, voter_id=C, granted=False))
    assert voter.election.term == 8
    assert voter.election.deadline <= voter.now + LAN.election_first
    voter.taken()
    voter.look(LAN.election_first)
    asked = PreVoteRequest(term=9, candidate_id=B, plan_fence=Fence(3, 7))
    assert voter.taken() == [(A, asked), (C, asked)]
    voter.says(PreVoteReply(term=8, voter_id=A, granted=False))
    assert voter.election.term == 8


def test_a_denial_reaches_who_has_found_a_leader_of_a_higher_term_already() -> None:
    """A late denial of an older term does not end the leadership of a newer one."""
    voter = Voter()
    voter.ask()
    voter.beats(A, 9, leader=A)
    voter.says(PreVoteReply(term=8, voter_id=C, granted=False))
    assert voter.election.leader_id == A
    voter.says(VoteRequest(term=9, candidate_id=A, plan_fence=Fence(3, 7)))
    assert voter.election.leader_id == A and voter.election.deadline == inf


def test_nobody_votes_for_another() -> None:
    """A message that speaks for another node than its sender is dropped."""
    voter = Voter()
    for message in (
        PreVoteRequest(term=4, candidate_id=C, plan_fence=Fence(3, 7)),
        PreVoteReply(term=4, voter_id=C, granted=True),
        VoteRequest(term=4, candidate_id=C, plan_fence=Fence(3, 7)),
        VoteReply(term=4, voter_id=C, granted=True),
    ):
        voter.election.handle(message, A, voter.now)
        voter.look()
    assert len(voter.said(FrameDropped)) == 4
    assert voter.election.term == 3 and not voter.taken()
