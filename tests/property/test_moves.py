"""Whatever happens to the members: every plan is a step, and the steps end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core.holdings import owners_of, standbys_of, validate
from p2pinfer.core.moves import Standing, progress, staged
from p2pinfer.core.replan import next_plan
from p2pinfer.types import Fence, Member, Plan
from tests.plan_series import MODEL, member

MOST_PLANS = 8
"""From the last change to the goal: to name standbys, to promote members, to give up replicas."""


class Cluster:
    """Members that come, go, rest and leave; the leader is the first, and stays."""

    def __init__(self, count: int, replicas: int) -> None:
        self.replicas = replicas
        self.members = {i: member(i, numeric_class="n") for i in range(count)}
        self.resting: set[int] = set()
        self.leaving: set[int] = set()
        self.boots = 1
        self.plan = self._goal(None, frozenset(), rebalance=True)
        self.moving = False

    def _goal(self, previous: Plan | None, ready: frozenset[str], *, rebalance: bool) -> Plan:
        there: list[Member] = list(self.members.values())
        idle = self.resting | self.leaving
        return next_plan(
            previous=previous,
            members=there,
            able={m.node_id for i, m in self.members.items() if i not in idle},
            model=MODEL,
            layout="heads",
            fence=Fence(1, previous.fence.epoch + 1 if previous else 1),
            cluster_id="c" * 16,
            leader_id=there[0].node_id,
            voters=[there[0].node_id],
            replicas=self.replicas,
            rebalance=rebalance,
            ready=ready,
        )

    def next(self, ready: set[int], *, rebalance: bool = True) -> tuple[Plan, bool]:
        """What would be proposed; checked to be no more than a step."""
        known = frozenset(self.members[i].node_id for i in ready & self.members.keys())
        goal = self._goal(self.plan, known, rebalance=rebalance or self.moving)
        found = staged(
            self.plan,
            goal,
            Standing(
                here=frozenset(m.node_id for m in self.members.values()),
                resting=frozenset(self.members[i].node_id for i in self.resting),
                ready=known,
            ),
        )
        validate(found.plan)
        self._check(found.plan, known)
        return found.plan, found.moving

    def _check(self, after: Plan, ready: frozenset[str]) -> None:
        """Who takes a unit over from an owner that lives has kept it, and is ready."""
        here = {(m.node_id, m.boot_id) for m in self.members.values()}
        for old, new in zip(self.plan.stages, after.stages, strict=True):
            for kind, owners in enumerate(owners_of(old)):
                copies = standbys_of(old)[kind]
                for unit, owner in enumerate(owners):
                    had = self.plan.members[owner]
                    has = after.members[owners_of(new)[kind][unit]]
                    if has.node_id == had.node_id or (had.node_id, had.boot_id) not in here:
                        continue
                    kept = {self.plan.members[i].node_id for i in (copies[unit] if copies else ())}
                    assert has.node_id in kept & ready

    def adopt(self, found: tuple[Plan, bool]) -> None:
        """A plan is in force."""
        self.plan, self.moving = found

    def settle(self) -> int:
        """All get ready, and the leader goes on as it does; how many plans that takes."""
        for plans in range(2 * MOST_PLANS):
            everybody = set(self.members)
            found = self.next(everybody)
            if not self.moving or not progress(self.plan, found[0]):
                return plans
            self.adopt(found)
        raise AssertionError("it proposes for ever")


EVENTS = st.sampled_from(["join", "die", "restart", "rest", "return", "leave"])


@given(
    count=st.integers(2, 5),
    replicas=st.integers(0, 2),
    events=st.lists(st.tuples(EVENTS, st.integers(1, 7), st.sets(st.integers(0, 7))), max_size=12),
)
def test_any_series_of_changes_ends_in_the_goal(
    count: int, replicas: int, events: list[tuple[str, int, set[int]]]
) -> None:
    """In a bounded number of plans; nobody that rests or leaves owns anything then, and who leaves
    keeps nothing."""
    cluster = Cluster(count, replicas)
    for event, who, ready in events:
        there = who in cluster.members
        if event == "join" and not there:
            cluster.members[who] = member(who, numeric_class="n")
        elif event == "die" and there:
            del cluster.members[who]
        elif event == "restart" and there:
            cluster.boots += 1
            cluster.members[who] = member(who, cluster.boots, numeric_class="n")
        elif event == "rest" and there:
            cluster.resting.add(who)
        elif event == "return":
            cluster.resting.discard(who)
        elif event == "leave" and there:
            cluster.leaving.add(who)
        else:
            continue
        cluster.resting &= cluster.members.keys() - cluster.leaving
        cluster.leaving &= cluster.members.keys()
        cluster.adopt(cluster.next(ready, rebalance=event in ("join", "return", "restart")))
    assert cluster.settle() <= MOST_PLANS
    for stage in cluster.plan.stages:
        for owners, copies in zip(owners_of(stage), standbys_of(stage), strict=True):
            numbers = [int(m.node_id, 16) for m in cluster.plan.members]
            assert not {numbers[i] for i in owners} & (cluster.resting | cluster.leaving)
            kept = {numbers[i] for each in copies for i in each}
            assert not kept & cluster.leaving
