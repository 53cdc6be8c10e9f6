"""Which members are much slower than their share of the model predicts, and which get no steps.

Decoding reads every weight once per token, so bytes of weights per millisecond of computing is the
speed of a member, whatever its share. A plan gives shares by `weight`, so speed is compared per
weight: a member whose owner called it four times slower than the others is not slow for being so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from statistics import median

from p2pinfer.core.planner import holdings
from p2pinfer.core.timing import Timing
from p2pinfer.core.topology import weight_bytes
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.messages import Heartbeat

IDLE_S = 5.0
"""A member whose step counter stood still for so long is idle: what it showed before is old."""

DEAF_S = 2.0
"""Heartbeats tell of steps several times a second."""

NOISE_MS = 2.0
"""A step that is computed in less says more of the system's noise than of the member's speed."""


@dataclass(slots=True)
class _Runner:
    """What is known of one life of a member."""

    boot_id: str
    fence: Fence | None = None
    steps: int = 0
    """How many it has finished under that plan."""
    seen_at: float = -inf
    """When it last finished a step, or was first heard of."""
    busy_since: float = inf
    """Since then it has finished a step again and again, without a pause of `DEAF_S`."""
    compute_ms: float = 0.0
    slow_since: float = inf
    fine_since: float = inf
    out_until: float = -inf
    times: int = 0
    factor: float = 1.0


class Pace:
    """The leader's judgement of who is slow. Times in seconds."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._runners: dict[str, _Runner] = {}
        self._costs: tuple[Fence, list[float]] = (Fence(), [])
        """Of a plan's members: reckoned once, for this is asked at every turn."""

    def heard(self, heartbeat: Heartbeat, now: float) -> None:
        """A member tells how many steps it has finished and how long it computes for one."""
        runner = self._runners.get(heartbeat.node_id)
        if runner is None or runner.boot_id != heartbeat.boot_id:
            runner = _Runner(heartbeat.boot_id, steps=heartbeat.steps, seen_at=now)
            self._runners[heartbeat.node_id] = runner
        runner.fence = heartbeat.fence
        if heartbeat.steps != runner.steps:
            runner.steps = heartbeat.steps
            if now - runner.seen_at > DEAF_S or runner.busy_since == inf:
                runner.busy_since = now
            runner.seen_at = now
            runner.compute_ms = heartbeat.compute_ms

    def deaf(self, leader_id: str, now: float) -> frozenset[str]:
        """Node ids of those that steps do not reach any more: they have finished none for `DEAF_S`
        while the leader did, or, when it is idle since then, fewer than the leader by this plan.
        What has ended they take to be under way."""
        leader = self._runners.get(leader_id)
        if leader is None:
            return frozenset()
        idle = now - leader.seen_at > DEAF_S
        return frozenset(
            node_id
            for node_id, runner in self._runners.items()
            if (
                runner.fence == leader.fence and runner.steps < leader.steps
                if idle
                else leader.seen_at - max(runner.seen_at, leader.busy_since) > DEAF_S
            )
        )

    def slow(self, plan: Plan, own: Heartbeat, now: float) -> Mapping[str, float]:
        """Node ids of those that are to own nothing for a while, and how many times too slow they
        were. `plan` is the one in force, `own` this node's heartbeat.

        A member is slow that has been `slow_factor` times slower than the median of the others for
        `slow_after`, while steps went on, and that holds the others up: one that computes less
        long than they do does no harm, whatever its speed. It is tried again after `unable_for`,
        twice as long each further time.
        """
        self.heard(own, now)
        running = self._running(plan, now)
        for node_id in running:
            others = [it for other, it in running.items() if other != node_id]
            runner = self._runners[node_id]
            runner.factor = _factor(running[node_id], others)
            self._judge(runner, now)
        planned = {member.node_id for member in plan.members}
        for node_id, runner in list(self._runners.items()):
            if node_id not in running:
                runner.slow_since = runner.fine_since = inf
            if node_id not in planned and runner.out_until <= now:
                del self._runners[node_id]
        return {
            node_id: runner.factor
            for node_id, runner in sorted(self._runners.items())
            if runner.out_until > now
        }

    def _running(self, plan: Plan, now: float) -> dict[str, tuple[float, float]]:
        """Predicted cost (bytes over weight) and milliseconds of the owners that compute."""
        running = {}
        if self._costs[0] != plan.fence:
            self._costs = (plan.fence, _costs(plan))
        for member, cost in zip(plan.members, self._costs[1], strict=True):
            runner = self._runners.get(member.node_id)
            if (
                cost
                and runner is not None
                and runner.boot_id == member.boot_id
                and runner.compute_ms > 0
                and runner.seen_at + IDLE_S > now
            ):
                running[member.node_id] = (cost, runner.compute_ms)
        return running

    def _judge(self, runner: _Runner, now: float) -> None:
        timing = self._timing
        if runner.factor < timing.slow_factor:
            runner.slow_since = inf
            runner.fine_since = min(runner.fine_since, now)
            if now - runner.fine_since >= timing.slow_after:
                runner.times = 0
            return
        runner.fine_since = inf
        runner.slow_since = min(runner.slow_since, runner.seen_at)
        if runner.seen_at - runner.slow_since >= timing.slow_after:
            rest = min(timing.unable_for * 2**runner.times, timing.unable_max)
            runner.out_until, runner.times = now + rest, runner.times + 1
            runner.slow_since, runner.compute_ms = inf, 0.0


def _costs(plan: Plan) -> list[float]:
    """What each member is predicted to take for a step, in an arbitrary unit; 0: it owns none."""
    costs = []
    for index, member in enumerate(plan.members):
        held = sum(weight_bytes(plan.model, each) for each in holdings(plan, index))
        costs.append(held / member.weight if held else 0.0)
    return costs


def _factor(mine: tuple[float, float], others: list[tuple[float, float]]) -> float:
    """How many times slower a member is than the median of the others; 1 where it harms nobody."""
    cost, took_ms = mine
    if not others or took_ms < max(NOISE_MS, median(ms for _, ms in others)):
        return 1.0
    return median(theirs / ms for theirs, ms in others) * took_ms / cost
