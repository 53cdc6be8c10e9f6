"""Which sets of voters may decide: elect a leader, put a plan in force, commit a token.

An election, and a new leader's first plan, take a strict majority of the voters. The sitting
leader's later plans, and its commits, take half of them if the leader is among them: any strict
majority meets any such half, since the two together are more than all. While a plan is not known to
be in force, all this holds among its own voters and among those before it.

`last-man` counts only voters that are not lost: it trades safety under partition for going on
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from p2pinfer.types import Plan

Voters = frozenset[str]
"""Node ids."""


def voter_ids(plan: Plan) -> Voters:
    """The voters of a plan."""
    return frozenset(plan.members[index].node_id for index in plan.voters)


def electorate(plan: Plan, *, active: bool) -> tuple[Voters, ...]:
    """The sets of voters each of which must agree, for who has `plan` as its newest."""
    ours = voter_ids(plan)
    if active or not plan.old_voters or frozenset(plan.old_voters) == ours:
        return (ours,)
    return (ours, frozenset(plan.old_voters))


def elects(
    plan: Plan, granted: AbstractSet[str], *, active: bool, lost: AbstractSet[str] = frozenset()
) -> bool:
    """Whether these votes make a candidate with that newest plan the leader."""
    return all(
        _most(_counted(plan, voters, lost), granted) for voters in electorate(plan, active=active)
    )


def adopts(
    plan: Plan,
    acked: AbstractSet[str],
    *,
    first: bool,
    forgot: AbstractSet[str] = frozenset(),
    lost: AbstractSet[str] = frozenset(),
) -> bool:
    """Whether these acknowledgements put a plan in force. `first`: the first one of its leader.

    `forgot` are members that were voters before, in another boot whose state they lost: what they
    say counts among the plan's own voters only.
    """
    leader = plan.members[plan.leader].node_id
    ours = voter_ids(plan)
    for voters in electorate(plan, active=False):
        counted = _counted(plan, voters, lost)
        yes = acked if voters == ours and voters != frozenset(plan.old_voters) else acked - forgot
        if not (_most(counted, yes) if first else _half(counted, yes, leader)):
            return False
    return True


def commits(plan: Plan, acked: AbstractSet[str], lost: AbstractSet[str] = frozenset()) -> bool:
    """Whether these acknowledgements commit tokens under a plan in force."""
    leader = plan.members[plan.leader].node_id
    return _half(_counted(plan, voter_ids(plan), lost), acked, leader)


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
    names = []
    for member in plan.members:
        if member.node_id not in living:
            continue
        rest = frozenset(living) - {member.node_id}
        if member.node_id == leader:
            able = any(
                m.node_id in rest and not m.witness and m.node_id in voter_ids(plan)
                for m in plan.members
            )
            goes_on = able and elects(plan, rest, active=True, lost={member.node_id})
        else:
            goes_on = commits(plan, rest, {member.node_id})
        if goes_on and fits(member.node_id):
            names.append(member.name)
    return tuple(names)


def _counted(plan: Plan, voters: Voters, lost: AbstractSet[str]) -> Voters:
    return voters - lost if plan.quorum == "last-man" else voters


def _most(voters: Voters, yes: Iterable[str]) -> bool:
    return 2 * len(voters.intersection(yes)) > len(voters)


def _half(voters: Voters, yes: Iterable[str], leader: str) -> bool:
    agreed = voters.intersection(yes)
    return (2 * len(agreed) >= len(voters) and leader in agreed) or 2 * len(agreed) > len(voters)
