"""What a node must not forget: what is written, who waits for it, and who is blank."""

from __future__ import annotations

import pytest

from p2pinfer.core.durable import MAX_ADDRESSES, Durable
from p2pinfer.core.events import Persist, StoredState
from p2pinfer.core.outbox import Outbox
from p2pinfer.types import Fence, Member, Plan, Stage
from tests.model_specs import NO_MODEL

ME, OTHER, CLUSTER = "a" * 16, "b" * 16, "c" * 16
BOOT = "1" * 16


def member(node_id: str, memory: str, address: str = "tcp://h:1") -> Member:
    """A member of a plan."""
    return Member(
        node_id=node_id, boot_id="9" * 16, name=node_id[0], address=address, memory=memory
    )


def plan_of(
    term: int,
    epoch: int,
    *,
    voters: tuple[int, ...] = (0, 1),
    memory: str = BOOT,
    addresses: tuple[str, str] = ("tcp://h:1", "tcp://h:1"),
) -> Plan:
    """A plan of this node (member 0, with that memory) and another."""
    return Plan(
        fence=Fence(term, epoch),
        cluster_id=CLUSTER,
        leader=1,
        members=(
            member(ME, memory, addresses[0]),
            member(OTHER, "2" * 16, addresses[1]),
        ),
        voters=voters,
        model=NO_MODEL,
        stages=(Stage(start=0, end=1, head_owners=(0,), mlp_owners=(1,)),),
    )


class Story:
    """A node's durable state, and what it wanted written."""

    def __init__(self, stored: StoredState | None = None) -> None:
        self.box = Outbox(ME, lambda _: "")
        self.durable = Durable(stored, BOOT, self.box)
        self.told: list[str] = []

    def say(self, what: str) -> None:
        """For a continuation: note that it ran."""
        self.told.append(what)

    def writes(self) -> list[Persist]:
        """What is to be written since the last call."""
        return [each for each in self.box.take() if isinstance(each, Persist)]


MEMBER = StoredState(cluster_id=CLUSTER, term=3, voted_for=OTHER, plan=plan_of(3, 2), active=True)


def test_a_vote_is_told_when_it_is_on_the_disk() -> None:
    """The continuation of a vote runs at Persisted, not before."""
    story = Story(MEMBER)
    story.durable.vote(4, OTHER, lambda now: story.say(f"voted at {now:g}"))
    (write,) = story.writes()
    assert write.state is not None
    assert (write.state.term, write.state.voted_for) == (4, OTHER)
    assert write.state.plan == MEMBER.plan and write.state.active
    assert not story.told
    story.durable.persisted(write.number, 7.0)
    assert story.told == ["voted at 7"]


def test_the_newest_write_stands_for_those_before() -> None:
    """What waited for older writes runs too, in order, and nothing runs twice."""
    story = Story(MEMBER)
    story.durable.vote(4, OTHER, lambda _: story.say("vote"))
    story.durable.accept(plan_of(4, 3), CLUSTER, lambda _: story.say("plan"))
    story.durable.vote(5, ME, lambda _: story.say("later"))
    first, second, _ = story.writes()
    story.durable.persisted(second.number, 1.0)
    assert story.told == ["vote", "plan"]
    story.durable.persisted(first.number, 1.0)
    assert story.told == ["vote", "plan"]


def test_a_second_vote_in_a_term_is_a_defect() -> None:
    """Neither another candidate of the term nor an older term can be voted for."""
    durable = Story(MEMBER).durable
    for term, candidate in ((3, ME), (2, OTHER)):
        with pytest.raises(AssertionError, match="one vote per term"):
            durable.vote(term, candidate, lambda _: None)
    durable.vote(3, OTHER, lambda _: None)
    assert durable.state.voted_for == OTHER


def test_a_higher_term_ends_the_vote_of_the_one_before() -> None:
    """A higher term is entered and written; a lower one changes nothing."""
    story = Story(MEMBER)
    story.durable.enter_term(9)
    assert (story.durable.state.term, story.durable.state.voted_for) == (9, "")
    story.durable.enter_term(8)
    assert story.durable.state.term == 9
    assert len(story.writes()) == 1


def test_accepting_a_plan_of_a_newer_term_enters_the_term() -> None:
    """The vote is kept within its term and over in a newer one; the plan is not known active."""
    story = Story(MEMBER)
    assert story.durable.fence == Fence(3, 2)
    story.durable.accept(plan_of(3, 3), CLUSTER, lambda _: None)
    assert (story.durable.state.voted_for, story.durable.state.active) == (OTHER, False)
    story.durable.accept(plan_of(5, 3), CLUSTER, lambda _: None)
    assert (story.durable.state.term, story.durable.state.voted_for) == (5, "")
    assert story.durable.fence == Fence(5, 3)


def test_accepting_an_older_plan_is_a_defect() -> None:
    """Neither an older fence nor an older term is ever taken."""
    durable = Story(MEMBER).durable
    durable.enter_term(6)
    for plan in (plan_of(3, 2), plan_of(5, 9)):
        with pytest.raises(AssertionError, match="only grow"):
            durable.accept(plan, CLUSTER, lambda _: None)


def test_a_plan_is_noted_as_in_force_once() -> None:
    """Only the newest plan's fence counts, and what is known is not written again."""
    story = Story(MEMBER)
    story.durable.accept(plan_of(3, 3), CLUSTER, lambda _: None)
    story.writes()
    story.durable.activated(Fence(3, 2))
    assert not story.durable.state.active
    story.durable.activated(Fence(3, 3))
    story.durable.activated(Fence(3, 3))
    assert story.durable.state.active
    assert len(story.writes()) == 1
    empty = Story()
    empty.durable.activated(Fence())
    assert not empty.writes()


def test_a_node_without_state_is_blank_until_a_plan_in_force_names_its_memory_a_voter() -> None:
    """Acceptance alone does not heal it, nor does a plan that names a lost memory or no vote."""
    cases = (((0, 1), BOOT, True), ((1,), BOOT, False), ((0, 1), OTHER, False))
    for voters, memory, healed in cases:
        story = Story()
        story.durable.accept(plan_of(1, 1, voters=voters, memory=memory), CLUSTER, lambda _: None)
        assert story.durable.blank
        story.durable.activated(Fence(1, 1))
        assert story.durable.blank is not healed
        assert story.durable.state.active


def test_a_blank_node_is_still_blank_after_a_restart() -> None:
    """What a vote of it wrote says that it is blank, and with which memory it began."""
    story = Story()
    story.durable.vote(4, OTHER, lambda _: None)
    (write,) = story.writes()
    later = Durable(write.state, "8" * 16, Story().box)
    assert later.blank and later.state.memory == BOOT
    assert not Story(MEMBER).durable.blank


def test_a_restart_between_acceptance_and_activation_keeps_the_vote() -> None:
    """The plan names the memory, and that is kept: the later boot is healed by the same plan."""
    story = Story()
    story.durable.accept(plan_of(1, 1), CLUSTER, lambda _: None)
    (write,) = story.writes()
    later = Durable(write.state, "8" * 16, story.box)
    later.activated(Fence(1, 1))
    assert not later.blank and later.state.active


def test_who_lost_its_state_is_another_voter() -> None:
    """It begins another memory, and a plan that names the one before does not heal it."""
    later = Durable(None, "8" * 16, Story().box)
    later.accept(plan_of(1, 1), CLUSTER, lambda _: None)
    later.activated(Fence(1, 1))
    assert later.state.memory == "8" * 16
    assert later.blank and later.state.active


def test_addresses_of_plans_before_are_kept_until_one_is_in_force() -> None:
    """Voters before a plan that may not be in force may be needed for a quorum still."""
    story = Story(MEMBER)
    plans = [plan_of(3, n, addresses=("tcp://h:1", f"tcp://h:{n}")) for n in range(3, 6)]
    for plan in plans:
        story.durable.accept(plan, CLUSTER, lambda _: None)
    assert story.durable.state.addresses == ("tcp://h:1", "tcp://h:4", "tcp://h:3")
    story.durable.activated(plans[-1].fence)
    story.durable.accept(plan_of(3, 6), CLUSTER, lambda _: None)
    assert story.durable.state.addresses == ("tcp://h:1", "tcp://h:5")


def test_kept_addresses_are_bounded() -> None:
    """The newest are kept, however many plans come to nothing."""
    story = Story(MEMBER)
    for n in range(3, 3 * MAX_ADDRESSES):
        plan = plan_of(3, n, addresses=(f"tcp://g:{n}", f"tcp://h:{n}"))
        story.durable.accept(plan, CLUSTER, lambda _: None)
    addresses = story.durable.state.addresses
    assert len(addresses) == MAX_ADDRESSES
    assert addresses[0] == f"tcp://g:{3 * MAX_ADDRESSES - 2}"


def test_a_node_that_is_no_member_yet_does_not_write_terms() -> None:
    """A stranger that only heard of a term leaves no file behind."""
    story = Story()
    story.durable.enter_term(5)
    assert story.durable.state.term == 5
    assert not story.writes()


def test_a_founder_is_not_blank() -> None:
    """It has voted for itself in its first term; what waits runs when that is on the disk."""
    story = Story()
    story.durable.found(CLUSTER, 1, ME, lambda _: story.say("founded"))
    (write,) = story.writes()
    assert write.state == StoredState(cluster_id=CLUSTER, term=1, voted_for=ME, memory=BOOT)
    assert not story.durable.blank and story.durable.fence == Fence()
    story.durable.persisted(write.number, 0.0)
    assert story.told == ["founded"]


def test_a_node_that_has_left_forgets() -> None:
    """Its file is removed, what waited is not done, and it is blank."""
    story = Story(MEMBER)
    story.durable.vote(4, OTHER, lambda _: story.say("voted"))
    story.durable.forget()
    vote, gone = story.writes()
    assert gone.state is None and gone.number > vote.number
    story.durable.persisted(gone.number, 0.0)
    assert not story.told
    assert story.durable.blank and story.durable.plan is None
