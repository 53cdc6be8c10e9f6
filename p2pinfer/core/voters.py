"""Whose vote counts by the next plan, and among whom it needs a quorum besides.

At most one voter is added against the plan before (as in Raft's change of single servers, section
4.1 of Ongaro's thesis); voters that are gone are removed at once. Both are safe because a plan not
known to be in force needs a quorum among the voters before it as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from msgspec.structs import replace

from p2pinfer.core.quorum import voter_ids
from p2pinfer.types import Member, Plan

NodeIds = tuple[str, ...]
"""In ascending order."""


def next_voters(
    base: Plan | None,
    *,
    base_active: bool,
    first: bool,
    leader_id: str,
    living: Iterable[Member],
    lost: AbstractSet[str],
    ready: AbstractSet[str],
    leaving: AbstractSet[str] = frozenset(),
) -> tuple[NodeIds, NodeIds]:
    """Node ids of the next plan's voters, and of its old voters.

    `base` is the last plan that the leader activated or, before its `first` one, the newest that it
    has accepted; None before the cluster's first plan, when the founder is its only voter.
    `base_active` says that `base` is known to be in force. `lost` are the node ids of members known
    to be dead or to have left; a voter that is neither living nor lost keeps its vote. `ready` are
    those that may become voters: they have acknowledged a plan in force. Those that are `leaving`
    vote no more, where another one that may lead still does.
    """
    assert base_active or first, "the sitting leader's base is a plan that it activated"
    if base is not None and not base_active:
        # Perhaps it is in force by those that we do not know of: its quorums must be met as it is.
        return tuple(sorted(voter_ids(base))), tuple(sorted(base.old_voters))
    before = voter_ids(base) if base is not None else frozenset((leader_id,))
    here = {member.node_id: member for member in living}
    lives = _voting_lives(base)
    stay = {
        node_id
        for node_id in before
        if (_keeps_its_vote(here[node_id], lives) if node_id in here else node_id not in lost)
    }
    if any(not here[node_id].witness for node_id in stay - leaving if node_id in here):
        stay -= leaving
    learners = sorted(
        (member for member in here.values() if member.node_id in ready - stay),
        key=lambda member: (member.blank, member.name, member.node_id),
    )
    voters = stay | {member.node_id for member in learners[:1]}
    return tuple(sorted(voters)), tuple(sorted(before))


def _voting_lives(base: Plan | None) -> frozenset[tuple[str, str]]:
    """Node ids of the voters of a plan, with their memories."""
    members = (base.members[index] for index in base.voters) if base is not None else ()
    return frozenset((member.node_id, member.memory) for member in members)


def _keeps_its_vote(member: Member, lives: AbstractSet[tuple[str, str]]) -> bool:
    """A voter that forgot what it promised is a voter no more, but a learner like others."""
    return not member.blank or (member.node_id, member.memory) in lives


def dead_votes(plan: Plan, voters: NodeIds, lost: AbstractSet[str]) -> tuple[str, ...]:
    """Names of voters of a plan that are lost and need not be voters any more: as long as they
    are, a further death may leave too few to elect anybody."""
    gone = (voter_ids(plan) - frozenset(voters)) & lost
    return tuple(m.name for m in plan.members if m.node_id in gone)


def change_of_votes(plan: Plan, voters: NodeIds, living: Iterable[Member]) -> str:
    """Who is to become a voter, or to be one no more, as text; empty: all stays as it is.

    A voter that lives with another memory than the plan names is to become one: it has no say yet.
    """
    here = {member.node_id: member for member in living}
    names = {m.node_id: m.name for m in (*plan.members, *here.values())}
    now, then = voter_ids(plan), frozenset(voters)
    forgot = {i for i, memory in _voting_lives(plan) if i in here and here[i].memory != memory}
    more = (f"{names[node_id]} to vote" for node_id in sorted(then - (now - forgot)))
    less = (f"{names[node_id]} to vote no more" for node_id in sorted(now - then))
    return ", ".join((*more, *less))


def listed_as(member: Member | None, before: Member | None, *, keep: bool) -> Member:
    """How the next plan lists a member that lives (None: it does not), and that the base listed.

    A plan that follows one not known to be in force cannot give a voter that forgot what it
    promised for that plan a new vote: with `keep` it lists the memory that promised, and so nobody
    has a say there.
    """
    if member is None:
        assert before is not None
        return before
    if before is not None and member.blank and keep:
        return replace(member, memory=before.memory)
    return member


def recorded(members: Iterable[Member], base: Plan | None, *, active: bool) -> tuple[Member, ...]:
    """How a plan after `base` (`active`: known to be in force) lists members: as blank only while
    that life has not had a vote in force."""
    if base is None:
        return tuple(members)
    voted = voter_ids(base) if active else frozenset()
    blanks = {m.memory: m.blank and m.node_id not in voted for m in base.members}
    return tuple(replace(m, blank=blanks.get(m.memory, m.blank)) for m in members)
