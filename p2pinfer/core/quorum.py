"""Which sets of voters may decide: elect a leader, put a plan in force, commit a token.

An election, and a new leader's first plan, take a strict majority of the voters. The sitting
leader's later plans, and its commits, take half of them if the leader is among them: any strict
majority meets any such half, since the two together are more than all. While a plan is not known to
be in force, all this holds among its own voters and among those before it (joint consensus): the
first plan of a cluster names its founder as the voter before it.

A member that is blank (`Member.blank`: its state began anew) may have promised something else
before. Its word counts where the plan names its very memory a voter: a plan does so only for a new
voter, or for one that a plan in force has named before (then listed as not blank). Among the voters
before the plan the word of who is listed as blank does not count at all.

`last-man` counts only voters that are not lost: it trades safety under partition for going on
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from p2pinfer.types import Member, Plan

Voters = frozenset[str]
"""Node ids."""


def voter_ids(plan: Plan) -> Voters:
    """The voters of a plan."""
    return frozenset(plan.members[index].node_id for index in plan.voters)


def electorate(plan: Plan, *, active: bool) -> tuple[Voters, ...]:
    """The sets of voters each of which must agree, for who has `plan` as its newest.

    `active`: the plan is known to be in force.
    """
    ours, before = voter_ids(plan), frozenset(plan.old_voters)
    return (ours,) if active or not before or before == ours else (ours, before)


def credible(plan: Plan, members: Iterable[Member]) -> Voters:
    """Those of `members`, as they describe themselves now, whose word counts under `plan`."""
    named = frozenset(plan.members[index].memory for index in plan.voters) - {""}
    return frozenset(m.node_id for m in members if not m.blank or m.memory in named)


def elects(
    plan: Plan, granted: AbstractSet[str], *, active: bool, lost: AbstractSet[str] = frozenset()
) -> bool:
    """Whether these votes, all of the `credible`, make a candidate with that newest plan leader."""
    return all(
        _agree(plan, voters, granted if active else _said(plan, voters, granted), lost)
        for voters in electorate(plan, active=active)
    )


def adopts(
    plan: Plan,
    acked: AbstractSet[str],
    *,
    first: bool,
    lost: AbstractSet[str] = frozenset(),
) -> bool:
    """Whether these acknowledgements put a plan in force. `first`: the first one of its leader.

    `acked` are members in the boots that the plan lists; those that it lists as blank are not heard
    among the voters before.
    """
    leader = "" if first else plan.members[plan.leader].node_id
    yes = acked & credible(plan, plan.members)
    return all(
        _agree(plan, voters, _said(plan, voters, yes), lost, leader)
        for voters in electorate(plan, active=False)
    )


def commits(plan: Plan, acked: AbstractSet[str], lost: AbstractSet[str] = frozenset()) -> bool:
    """Whether these acknowledgements commit tokens under a plan in force."""
    leader = plan.members[plan.leader].node_id
    return _agree(plan, voter_ids(plan), acked, lost, leader)


def leads_on(plan: Plan, heard: AbstractSet[str], lost: AbstractSet[str] = frozenset()) -> bool:
    """Whether the leader of a plan in force still hears enough voters to decide anything."""
    return commits(plan, heard, lost)


def tolerates(
    plan: Plan, living: AbstractSet[str], fits: Callable[[str], bool] = lambda _: True
) -> tuple[str, ...]:
    """Names of the members whose death, one at a time, the cluster survives.

    `living` are the node ids that are there; `fits` says whether the others could hold the model.
    """
    leader = plan.members[plan.leader].node_id
    voters = voter_ids(plan)
    names = []
    for member in plan.members:
        if member.node_id not in living:
            continue
        rest = frozenset(living) - {member.node_id}
        lost = voters - rest
        if member.node_id == leader:
            able = any(
                m.node_id in rest and not m.witness and m.node_id in voters for m in plan.members
            )
            goes_on = able and elects(plan, rest, active=True, lost=lost)
        else:
            goes_on = commits(plan, rest, lost)
        if goes_on and fits(member.node_id):
            names.append(member.name)
    return tuple(names)


def _said(plan: Plan, voters: Voters, yes: AbstractSet[str]) -> AbstractSet[str]:
    """Whose yes counts among `voters`, of the electorate of a plan not known to be in force."""
    if voters != frozenset(plan.old_voters):
        return yes
    return yes - {member.node_id for member in plan.members if member.blank}


def _agree(
    plan: Plan, voters: Voters, yes: AbstractSet[str], lost: AbstractSet[str], leader: str = ""
) -> bool:
    """Whether enough of `voters` say yes: most of them, or half where `leader` is of that half."""
    if plan.quorum == "last-man":
        voters = voters - lost
        if not voters:
            return True
    agreed = voters & yes
    needed = len(voters) if leader in agreed else len(voters) + 1
    return 2 * len(agreed) >= needed
