"""Who leads: votes, terms, the leader's loss and resignation, and what must never happen."""

from __future__ import annotations

from math import inf

from msgspec.structs import replace

from p2pinfer.core.durable import Durable
from p2pinfer.core.election import MAX_BACKOFF, Election, ElectionView
from p2pinfer.core.events import (
    ElectionStarted,
    Fact,
    FrameDropped,
    LeaderElected,
    LeaderLost,
    Persist,
    Send,
    StoredState,
)
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.timing import LAN
from p2pinfer.types import DType, Fence, Member, ModelSpec, Plan, Stage
from p2pinfer.wire.messages import (
    ControlMessage,
    Heartbeat,
    PreVoteReply,
    PreVoteRequest,
    VoteReply,
    VoteRequest,
)

A, B, C, D = ("a" * 16, "b" * 16, "c" * 16, "d" * 16)
CLUSTER = "e" * 16
MODEL = ModelSpec(
    name="none",
    model_id="",
    num_layers=1,
    hidden_size=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
    intermediate_size=1,
    vocab_size=1,
    max_positions=1,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
)


def member(node_id: str, boot: str = "1", *, memory: str = "1", blank: bool = False) -> Member:
    """A node in its life number `boot`, with its memory of that number."""
    return Member(
        node_id=node_id,
        boot_id=boot * 16,
        name=node_id[0].upper(),
        address="tcp://h:1",
        blank=blank,
        memory=memory * 16,
    )


NEWEST = Fence(3, 7)


def plan_of(
    *voters: str,
    fence: Fence = NEWEST,
    old: tuple[str, ...] | None = None,
    listed: tuple[Member, ...] = (),
    rule: str = "majority",
) -> Plan:
    """A plan led by its first member; `old` are the voters before it (None: the same)."""
    members = listed or tuple(member(node_id) for node_id in voters)
    ids = [each.node_id for each in members]
    return Plan(
        fence=fence,
        cluster_id=CLUSTER,
        leader=0,
        members=members,
        voters=tuple(ids.index(node_id) for node_id in voters),
        old_voters=voters if old is None else old,
        quorum=rule,
        model=MODEL,
        stages=(Stage(start=0, end=1, head_owners=(0,), mlp_owners=(0,)),),
    )


def stored(plan: Plan | None, *, term: int = 3, active: bool = True) -> StoredState:
    """What a member of the cluster had on its disk."""
    return StoredState(cluster_id=CLUSTER, term=term, voted_for=A, plan=plan, active=active)


IN_THREE = stored(plan_of(A, B, C))


class Voter:
    """Node B, with time, disk and membership in the test's hands."""

    def __init__(self, state: StoredState | None = IN_THREE, me: Member | None = None) -> None:
        self.me = me or member(B)
        self.now = 0.0
        self.drawn = 0.5
        self.box = Outbox(self.me.node_id, lambda node_id: node_id)
        self.durable = Durable(state, self.me.boot_id, self.box)
        self.election = Election(self.me, self.durable, LAN, self.box, lambda: self.drawn)
        self.here = [self.me, *(member(each) for each in (A, B, C) if each != self.me.node_id)]
        self.lost: frozenset[str] = frozenset()
        self.gone: tuple[Member, ...] = ()
        self.able = True
        self.facts: list[Fact] = []
        self.sent: list[tuple[str, ControlMessage]] = []
        self.unwritten = 0

    def look(self, after: float = 0.0) -> None:
        """Time goes on, and the node looks at everything."""
        self.now += after
        view = ElectionView(
            members=tuple(self.here), lost=self.lost, gone=self.gone, able=self.able
        )
        self.election.look(view, self.now)
        self._collect()

    def _collect(self) -> None:
        for output in self.box.take():
            if isinstance(output, Fact):
                self.facts.append(output)
            elif isinstance(output, Send):
                self.sent.append((output.address, output.message))
            elif isinstance(output, Persist):
                self.unwritten = output.number

    def write(self) -> None:
        """The disk has everything."""
        self._collect()
        self.durable.persisted(self.unwritten, self.now)
        self.look()

    def says(self, message: PreVoteRequest | PreVoteReply | VoteRequest | VoteReply) -> None:
        """A message of the election comes from whom it names."""
        asks = isinstance(message, PreVoteRequest | VoteRequest)
        sender = message.candidate_id if asks else message.voter_id
        self.election.handle(message, sender, self.now)
        self.look()

    def beats(self, sender: str, term: int, leader: str = "", fence: Fence = NEWEST) -> None:
        """A heartbeat comes."""
        self.election.heard(
            Heartbeat(
                node_id=sender,
                boot_id="1" * 16,
                incarnation=0,
                term=term,
                fence=fence,
                leader_id=leader,
            ),
            self.now,
        )
        self.look()

    def taken(self) -> list[tuple[str, ControlMessage]]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent

    def said(self, kind: type[Fact]) -> list[Fact]:
        """The facts of one kind, so far."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def ask(self) -> None:
        """Bring the node to its next attempt."""
        self.look()
        self.look(self.election.deadline - self.now)

    def stand(self) -> int:
        """Bring the node to stand for election; the term."""
        self.ask()
        term = self.election.term + 1
        self.says(PreVoteReply(term=term, voter_id=C, granted=True))
        assert self.election.term == term
        return term

    def lead(self) -> int:
        """Bring the node to lead; the term."""
        term = self.stand()
        self.write()
        self.says(VoteReply(term=term, voter_id=C, granted=True))
        assert self.election.leads
        self.taken()
        return term


# --- being elected --------------------------------------------------------------------------------


def test_a_founder_leads_once_the_disk_has_its_cluster() -> None:
    """It leads in term 1, with itself as the only voter, and does not need a worker for that."""
    voter = Voter(None)
    voter.able = False
    voter.election.found(CLUSTER, 0.0)
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
    voter.election.found(CLUSTER, 0.0)
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


# --- voting ---------------------------------------------------------------------------------------


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
