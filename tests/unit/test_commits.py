"""When tokens are committed."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from p2pinfer.core.commits import Commits, owners
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Plan
from p2pinfer.wire.messages import DrawnToken
from tests.step_plans import plan_of


def token(index: int, request_id: int = 1) -> DrawnToken:
    """Token `index` of a reply."""
    return DrawnToken(request_id=request_id, index=index, token=index)


def plan(nodes: int, owning: int, *, leader: int = 0, quorum: str = "majority") -> Plan:
    """`nodes` voters, of whom the first `owning` hold the model."""
    small, wide = plan_of(owning), plan_of(nodes)
    return msgspec.structs.replace(wide, stages=small.stages, leader=leader, quorum=quorum)


def commits(nodes: int, owning: int, **changes: str) -> Commits[DrawnToken]:
    """The leader is member 0; all listen."""
    return Commits(plan(nodes, owning, **changes), range(nodes), 0)


def test_owners_are_those_of_any_stage() -> None:
    """Members without units own nothing."""
    assert owners(plan_of(3)) == {0, 1, 2}
    assert owners(plan_of(3, "layers")) == {0, 1, 2}
    assert owners(plan(4, 2)) == {0, 1}


def test_alone_a_token_is_committed_when_written() -> None:
    """A cluster of one waits for nobody."""
    work = commits(1, 1)
    assert work.announced(1, [token(0)]) == [token(0)]
    assert (work.step, work.announced_step) == (1, 1)
    assert work.missing() == 0


def test_every_owner_must_have_it() -> None:
    """A quorum is not enough while an owner has not acknowledged."""
    work = commits(3, 3)
    assert work.announced(1, [token(0)]) == []
    assert work.missing() == 1
    assert work.acked(1, 1) == []
    assert work.missing() == 2
    assert work.acked(2, 1) == [token(0)]
    assert work.step == 1


def test_a_quorum_must_have_it() -> None:
    """Half of the voters with the leader: of five, three."""
    work = commits(5, 2)
    work.announced(1, [token(0)])
    assert work.acked(1, 1) == []
    assert work.missing() == 2
    assert work.acked(4, 1) == [token(0)]


def test_half_is_enough_with_the_leader() -> None:
    """Of four voters, the leader and one more."""
    work = commits(4, 1)
    work.announced(1, [token(0)])
    assert work.acked(3, 1) == [token(0)]


def test_a_leader_without_units_counts() -> None:
    """Its own log is one of the quorum's, although it owns nothing."""
    work: Commits[DrawnToken] = Commits(plan(3, 2, leader=2), range(3), 2)
    work.announced(1, [token(0)])
    assert work.acked(0, 1) == []
    assert work.acked(1, 1) == [token(0)]


def test_an_acknowledgement_is_of_all_steps_before() -> None:
    """What waits comes out in order, and once."""
    work = commits(2, 2)
    work.announced(1, [token(0)])
    work.announced(2, [])
    work.announced(5, [token(1), token(2)])
    assert work.acked(1, 2) == [token(0)]
    assert work.step == 2
    assert work.acked(1, 1) == []
    assert work.acked(1, 5) == [token(1), token(2)]
    assert work.acked(1, 5) == []


def test_each_step_is_committed_by_its_own_quorum() -> None:
    """The newest that enough members have, where they are not equally far."""
    work = commits(5, 1)
    for step in (1, 2, 3):
        work.announced(step, [token(step)])
    assert work.acked(1, 3) == []
    assert work.acked(2, 2) == [token(1), token(2)]
    assert work.acked(3, 1) == []
    assert work.acked(4, 3) == [token(3)]


def test_members_that_do_not_listen_count_for_nothing() -> None:
    """Two of four cannot commit when one of them is not the leader's listener."""
    work: Commits[DrawnToken] = Commits(plan(5, 1), (1,), 0)
    work.announced(1, [token(0)])
    assert work.acked(1, 1) == []
    with pytest.raises(RemoteProtocolError):
        work.acked(2, 1)


def test_last_man_goes_on_without_those_that_do_not_listen() -> None:
    """The leader alone of five is enough where the others are given up."""
    alone: Commits[DrawnToken] = Commits(plan(5, 1, quorum="last-man"), (), 0)
    assert alone.announced(1, [token(0)]) == [token(0)]


def test_a_step_that_was_never_sent_cannot_be_acknowledged() -> None:
    """A lie commits nothing."""
    work = commits(2, 2)
    work.announced(1, [token(0)])
    with pytest.raises(RemoteProtocolError):
        work.acked(1, 2)
    assert work.step == 0


def test_an_owner_that_does_not_listen_holds_all_back() -> None:
    """Such a plan cannot commit; the owner is named."""
    work: Commits[DrawnToken] = Commits(plan(3, 3), (1,), 0)
    work.announced(1, [token(0)])
    assert work.acked(1, 1) == []


def test_a_cancelled_request_is_not_heard_of_again() -> None:
    """What waits of others stays, in order."""
    work = commits(2, 2)
    work.announced(1, [token(0), token(0, 2), token(1)])
    work.announced(2, [token(2)])
    work.forget(1)
    assert work.acked(1, 2) == [token(0, 2)]


def test_every_subset_of_acknowledgements_commits_as_the_rule_says() -> None:
    """All owners, and half of the voters with the leader: checked for all 3-of-5 plans."""
    for members in itertools.chain.from_iterable(
        itertools.combinations(range(1, 5), n) for n in range(5)
    ):
        work = commits(5, 2)
        work.announced(1, [token(0)])
        said = [piece for member in members for piece in work.acked(member, 1)]
        assert bool(said) == (1 in members and len(members) >= 2)
