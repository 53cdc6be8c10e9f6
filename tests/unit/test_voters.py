"""Who votes by the next plan, and among whom it needs a quorum besides."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.core.voters import change_of_votes, listed_as, next_voters
from p2pinfer.types import Fence, Member, Plan, Stage
from tests.model_specs import NO_MODEL


def member(letter: str, boot: int = 1, memory: int = 1, **changes: bool) -> Member:
    """Node `letter` (a to f), in its boot and with its memory of those numbers."""
    return Member(
        node_id=letter * 16,
        boot_id=f"{boot:016x}",
        name=letter,
        address="tcp://host:7720",
        memory=f"{memory:016x}",
        **changes,
    )


def ids(letters: str) -> tuple[str, ...]:
    """Node ids."""
    return tuple(letter * 16 for letter in letters)


def plan(voters: str, old: str = "", members: str = "") -> Plan:
    """A plan led by `a`."""
    names = sorted(set(voters + members + "a"))
    return Plan(
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader=names.index("a"),
        members=tuple(member(name) for name in names),
        voters=tuple(names.index(name) for name in voters),
        old_voters=ids(old),
        model=NO_MODEL,
        stages=(Stage(start=0, end=1, head_owners=(0,), mlp_owners=(0,), vocab_owners=(0,)),),
    )


def voters(
    base: Plan | None,
    living: list[Member],
    *,
    lost: str = "",
    ready: str = "",
    leaving: str = "",
    active: bool = True,
) -> tuple[str, str]:
    """Letters of the next plan's voters and old voters, under leader `a`."""
    chosen = next_voters(
        base,
        base_active=active,
        first=not active,
        leader_id="a" * 16,
        living=living,
        lost=frozenset(ids(lost)),
        ready=frozenset(ids(ready)),
        leaving=frozenset(ids(leaving)),
    )
    return "".join(i[0] for i in chosen[0]), "".join(i[0] for i in chosen[1])


def all_of(letters: str) -> list[Member]:
    """Members in the boots that the plans list."""
    return [member(letter) for letter in letters]


def test_nothing_changes_while_nobody_comes_or_goes() -> None:
    """Voters that live go on voting, whoever else is there."""
    assert voters(plan("abc"), all_of("abcd")) == ("abc", "abc")


def test_a_founder_takes_its_first_voter_in() -> None:
    """Before the first plan the founder alone votes; one more may vote by that plan."""
    assert voters(None, all_of("abc"), ready="bc", active=False) == ("ab", "a")
    assert voters(None, all_of("abc"), active=False) == ("a", "a")


def test_one_voter_is_added_at_a_time() -> None:
    """Of several learners the first by name, those with their state before others."""
    assert voters(plan("ab"), all_of("abcd"), ready="abcd") == ("abc", "ab")
    blank = [*all_of("ab"), member("c", blank=True), member("d")]
    assert voters(plan("ab"), blank, ready="cd") == ("abd", "ab")
    assert voters(plan("ab"), blank[:3], ready="cd") == ("abc", "ab")


def test_lost_voters_are_removed_at_once() -> None:
    """All that died or left lose their votes, and another may be added in the same plan."""
    assert voters(plan("abcd"), all_of("ab"), lost="cd") == ("ab", "abcd")
    assert voters(plan("abcd"), all_of("abe"), lost="cd", ready="e") == ("abe", "abcd")


def test_a_voter_that_is_only_unheard_keeps_its_vote() -> None:
    """Neither living nor known to be lost: it is not removed, though it is not here."""
    assert voters(plan("abc"), all_of("ab")) == ("abc", "abc")


def test_a_voter_that_came_back_is_not_lost() -> None:
    """A restarted voter with its state votes on, though its former boot is known to be dead."""
    assert voters(plan("abc"), [*all_of("ab"), member("c", 2)], lost="c") == ("abc", "abc")


def test_a_voter_without_its_state_is_a_learner() -> None:
    """It is no voter by its name alone; when it is ready it may be the one that is added."""
    here = [*all_of("ab"), member("c", 2, 2, blank=True)]
    assert voters(plan("abc"), here) == ("ab", "abc")
    assert voters(plan("abc"), here, ready="c") == ("abc", "abc")
    assert voters(plan("abc"), [*here, member("d")], ready="cd") == ("abd", "abc")


def test_a_blank_member_votes_once_a_plan_named_its_memory() -> None:
    """It may not know yet that it is blank no more, in this boot or the next; the plan does."""
    for boot in (1, 2):
        here = [*all_of("ab"), member("c", boot, blank=True)]
        assert voters(plan("abc"), here) == ("abc", "abc")


def test_who_leaves_votes_no_more() -> None:
    """Its vote goes with its units, so that those who stay can decide without it."""
    assert voters(plan("abc"), all_of("abc"), leaving="b") == ("ac", "abc")
    assert voters(plan("abc"), all_of("abcd"), leaving="bc", ready="d") == ("ad", "abc")
    assert voters(plan("abc"), all_of("abc"), leaving="a") == ("bc", "abc")


def test_somebody_who_may_lead_keeps_its_vote() -> None:
    """Where all leave, or nobody stays but witnesses and those who are not here, all vote on."""
    assert voters(plan("ab"), all_of("ab"), leaving="ab") == ("ab", "ab")
    witnesses = [member("a"), *(member(name, witness=True) for name in "bc")]
    assert voters(plan("abc"), witnesses, leaving="a") == ("abc", "abc")
    assert voters(plan("ab"), all_of("a"), leaving="a") == ("ab", "ab")


def test_a_plan_that_may_be_in_force_keeps_the_votes_of_those_who_leave() -> None:
    """They lose them by the plan after."""
    assert voters(plan("abc"), all_of("abc"), leaving="b", active=False) == ("abc", "")


def test_a_change_of_votes_is_told_by_names() -> None:
    """Who is to vote, then who no more; a voter that is gone is named by the plan."""
    told = change_of_votes(plan("abc"), ids("ad"), all_of("ad"))
    assert told == "d to vote, b to vote no more, c to vote no more"
    assert change_of_votes(plan("abc"), ids("abc"), all_of("abc")) == ""


def test_a_plan_that_may_be_in_force_keeps_its_quorums() -> None:
    """A new leader that does not know changes no voter, whoever died or is ready."""
    base = plan("abd", old="abc")
    assert voters(base, all_of("abe"), lost="d", ready="e", active=False) == ("abd", "abc")
    assert voters(plan("ab"), all_of("ab"), active=False) == ("ab", "")


def test_witnesses_vote_like_others() -> None:
    """A witness that is ready becomes a voter."""
    assert voters(plan("ab"), [*all_of("ab"), member("c", witness=True)], ready="c")[0] == "abc"


def test_a_sitting_leader_knows_its_plan() -> None:
    """It counts from the plan that it activated: anything else is a defect."""
    with pytest.raises(AssertionError):
        next_voters(
            msgspec.structs.replace(plan("ab")),
            base_active=False,
            first=False,
            leader_id="a" * 16,
            living=[],
            lost=frozenset(),
            ready=frozenset(),
        )


def test_a_voter_that_forgot_is_listed_by_its_former_memory_until_the_base_is_in_force() -> None:
    """It takes part as it is now, but nobody is counted for what the former memory promised."""
    before = member("b")
    reborn = member("b", 2, 2, blank=True)
    whole = member("b", 2)
    assert listed_as(reborn, before, keep=True) == member("b", 2, 1, blank=True)
    assert listed_as(reborn, before, keep=False) is reborn
    assert listed_as(whole, before, keep=True) is whole
    assert listed_as(None, before, keep=False) is before
    assert listed_as(reborn, None, keep=True) is reborn
