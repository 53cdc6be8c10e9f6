"""Which sets of voters decide, and that any two that must know of each other share a member."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from msgspec.structs import replace

from p2pinfer.core import quorum
from p2pinfer.types import Fence, Member, Plan, Stage
from tests.model_specs import NO_MODEL

NONE: frozenset[str] = frozenset()


def plan_of(
    voters: str,
    old: str = "",
    *,
    leader: str = "A",
    others: str = "",
    rule: str = "majority",
    blank: str = "",
    witness: str = "",
) -> Plan:
    """A plan whose members have one letter each; `old` are the voters before it."""
    names = sorted({*voters, *others, leader})
    return Plan(
        fence=Fence(2, 5),
        cluster_id="c" * 16,
        leader=names.index(leader),
        members=tuple(
            Member(
                node_id=name,
                boot_id=f"boot {name}",
                name=f"node {name}",
                address="tcp://h:1",
                memory=f"memory {name}",
                blank=name in blank,
                witness=name in witness,
            )
            for name in names
        ),
        voters=tuple(names.index(name) for name in voters),
        old_voters=tuple(old),
        quorum=rule,
        model=NO_MODEL,
        stages=(Stage(start=0, end=1, head_owners=(0,), mlp_owners=(0,)),),
    )


def subsets(names: str) -> Iterator[frozenset[str]]:
    """Every set of some of these."""
    for size in range(len(names) + 1):
        yield from map(frozenset, combinations(names, size))


def ids(names: str) -> frozenset[str]:
    """Node ids of one letter each."""
    return frozenset(names)


def test_the_electorate_is_joint_until_the_plan_is_in_force() -> None:
    """The voters before count too, unless they are the same, none, or the plan is in force."""
    plan = plan_of("AB", "ABC")
    assert quorum.electorate(plan, active=False) == (ids("AB"), ids("ABC"))
    assert quorum.electorate(plan, active=True) == (ids("AB"),)
    assert quorum.electorate(plan_of("AB", "BA"), active=False) == (ids("AB"),)
    assert quorum.electorate(plan_of("AB"), active=False) == (ids("AB"),)


def test_an_election_takes_a_strict_majority_of_each_set() -> None:
    """Half is not enough, be it among the voters or among those before."""
    plan = plan_of("ABCD", "ABC", leader="A")
    assert quorum.elects(plan, ids("BCD"), active=False)
    assert not quorum.elects(plan, ids("BC"), active=False)
    assert not quorum.elects(plan, ids("CD"), active=False)
    assert not quorum.elects(plan_of("ABC", "ABCDE"), ids("AB"), active=False)
    assert quorum.elects(plan_of("ABC", "ABCDE"), ids("AB"), active=True)


def test_half_with_the_leader_adopts_a_later_plan() -> None:
    """A new leader's first plan needs more, and half without the leader is never enough."""
    plan = plan_of("ABCD", "ABCD")
    assert quorum.adopts(plan, ids("AB"), first=False)
    assert not quorum.adopts(plan, ids("AB"), first=True)
    assert not quorum.adopts(plan, ids("BC"), first=False)
    assert quorum.adopts(plan, ids("BCD"), first=True)
    assert not quorum.adopts(plan_of("AB", "ABCDE"), ids("AB"), first=False)
    assert quorum.adopts(plan_of("ABC", "ABCDE"), ids("ABC"), first=False)


def test_two_voters_survive_the_death_of_the_follower_only() -> None:
    """The leader is half of two; the follower alone is not a majority."""
    plan = plan_of("AB", "AB")
    assert quorum.adopts(plan, ids("A"), first=False)
    assert quorum.commits(plan, ids("A")) and quorum.leads_on(plan, ids("A"))
    assert not quorum.elects(plan, ids("B"), active=True)


def test_any_election_meets_whatever_was_adopted_or_committed_before() -> None:
    """Every electing majority shares a voter with every adopting and every committing set."""
    for voters in ("A", "AB", "ABC", "ABCD", "ABCDE"):
        plan = plan_of(voters, voters)
        electing = [s for s in subsets(voters) if quorum.elects(plan, s, active=True)]
        first = [s for s in subsets(voters) if quorum.adopts(plan, s, first=True)]
        deciding = [
            s
            for s in subsets(voters)
            if quorum.adopts(plan, s, first=False) or quorum.commits(plan, s)
        ]
        assert electing and first and deciding
        assert all(a & b for a in electing for b in (*electing, *deciding))
        # A new leader learns in its first plan what the one before it has committed.
        assert all(a & b for a in first for b in deciding)


def test_a_change_of_voters_meets_the_elections_of_before_and_after() -> None:
    """What adopts a plan meets each election under the voters before it, and under its own."""
    for before in ("A", "AB", "ABC", "ABCD"):
        base = plan_of(before, before)
        for after in (before, before + "E", before[:1] + "E", before[:2]):
            plan = plan_of("".join(dict.fromkeys(after)), before)
            names = "ABCDE"
            adopting = [s for s in subsets(names) if quorum.adopts(plan, s, first=False)]
            for electing in (
                [s for s in subsets(names) if quorum.elects(base, s, active=True)],
                [s for s in subsets(names) if quorum.elects(plan, s, active=False)],
                [s for s in subsets(names) if quorum.elects(plan, s, active=True)],
            ):
                assert all(a & b for a in adopting for b in electing)


def test_the_word_of_a_blank_member_counts_where_its_memory_is_named() -> None:
    """It counts among the plan's own voters, by the memory that the plan names, and not before."""
    plan = plan_of("ABD", "AB", others="E", blank="DE")
    by_id = {member.node_id: member for member in plan.members}
    assert quorum.credible(plan, plan.members) == ids("ABD")
    again = replace(by_id["D"], boot_id="later")
    assert quorum.credible(plan, (by_id["A"], again)) == ids("AD")
    assert quorum.credible(plan, (by_id["A"], replace(again, memory="new"))) == ids("A")
    assert quorum.credible(plan, (replace(by_id["A"], memory="new"),)) == ids("A")
    assert quorum.elects(plan, ids("ABD"), active=False)
    assert quorum.adopts(plan, ids("AD"), first=False)
    # Among the same voters as before, a forgotten word is no word.
    same = plan_of("ABD", "ABD", blank="D")
    assert not quorum.elects(same, ids("AD"), active=False)
    assert quorum.elects(same, ids("AD"), active=True)
    assert not quorum.adopts(same, ids("AD"), first=False)
    # Nor is that of who has no vote by the plan, though it had one before.
    assert not quorum.adopts(plan_of("A", "ABD", others="D", blank="D"), ids("AD"), first=False)


def test_last_man_counts_only_who_is_not_lost() -> None:
    """The last of three goes on alone; without the option it does not."""
    for rule, on in (("last-man", True), ("majority", False)):
        plan = plan_of("ABC", "ABC", rule=rule)
        assert quorum.elects(plan, ids("C"), active=True, lost=ids("AB")) is on
        assert quorum.adopts(plan, ids("C"), first=True, lost=ids("AB")) is on
        assert quorum.commits(plan, ids("C"), ids("AB")) is on
        assert not quorum.elects(plan, ids("C"), active=True, lost=ids("A"))


def test_last_man_goes_on_where_all_voters_before_are_lost() -> None:
    """A set of voters of which nobody is left has nothing to say."""
    plan = plan_of("AB", "A", rule="last-man")
    assert quorum.elects(plan, ids("B"), active=False, lost=ids("A"))
    assert not quorum.elects(plan_of("AB", "A"), ids("B"), active=False, lost=ids("A"))


def test_the_tolerated_deaths_are_told() -> None:
    """Two nodes survive the follower's death, three any, four likewise, each on its own."""
    assert quorum.tolerates(plan_of("AB"), ids("AB")) == ("node B",)
    assert quorum.tolerates(plan_of("ABC"), ids("ABC")) == ("node A", "node B", "node C")
    assert quorum.tolerates(plan_of("ABC"), ids("AB")) == ()
    assert quorum.tolerates(plan_of("ABCD"), ids("ABC")) == ("node B", "node C")
    assert quorum.tolerates(plan_of("ABC", witness="BC"), ids("ABC")) == ("node B", "node C")
    assert quorum.tolerates(plan_of("ABC", rule="last-man"), ids("AB")) == ("node A", "node B")


def test_a_death_that_leaves_too_little_room_is_not_tolerated() -> None:
    """Quorum is not enough: the others must be able to hold the model."""
    tolerated = quorum.tolerates(plan_of("ABC"), ids("ABC"), lambda node_id: node_id != "B")
    assert tolerated == ("node A", "node C")
