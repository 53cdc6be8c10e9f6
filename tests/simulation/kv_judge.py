"""What must hold of KV, looked at from outside.

What a worker says is there is truly there, and requests go on from it as far as they can, and no
farther.

Raises `Violation` at the first thing that may not be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from p2pinfer.core import events as e
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.units import Slice
from p2pinfer.types import Fence, Plan
from tests.simulation import toy_model as toy
from tests.simulation.world import check

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.machine import Process

CLOSE = 2
"""A standby that lacks no more positions than that is as close behind as it can be asked to be."""

Boot = str
Has = dict[tuple[int, KvUnit], int]
"""Leading positions that a worker has of a request and a head unit."""


class Head(NamedTuple):
    """A head unit in a plan: the boot ids of its owner and of its standbys."""

    owner: Boot
    standbys: tuple[Boot, ...]


def heads(plan: Plan) -> Iterator[tuple[KvUnit, Head]]:
    """All head units of a plan."""
    boots = [member.boot_id for member in plan.members]
    for stage in plan.stages:
        span = Slice(stage.start, stage.end)
        for unit, owner in enumerate(stage.head_owners):
            copies = stage.head_standbys[unit] if stage.head_standbys else ()
            yield KvUnit(span, unit), Head(boots[owner], tuple(boots[i] for i in copies))


def promoted(before: Plan, after: Plan) -> set[KvUnit]:
    """Head units that a plan gives to one of their standbys by the plan before."""
    was = dict(heads(before))
    return {unit for unit, head in heads(after) if unit in was and head.owner in was[unit].standbys}


def _owners(plan: Plan) -> set[tuple[int, int, str]]:
    """(layer, head unit, node id of its owner)."""
    return {
        (layer, unit, plan.members[owner].node_id)
        for stage in plan.stages
        for unit, owner in enumerate(stage.head_owners)
        for layer in range(stage.start, stage.end)
    }


class Death(NamedTuple):
    """The first process that died, under a plan that all obeyed, and what the others had then."""

    boot: Boot
    plan: Plan
    has: dict[Boot, Has]


class KvJudge:
    """Knows what each worker reported to have, and compares it with its cache and the truth."""

    def __init__(self, cluster: Cluster, reference: toy.Reference) -> None:
        self._world = cluster.world
        self._cluster = cluster
        self._reference = reference
        self._reported: dict[tuple[Fence, Boot], Has] = {}
        self._kept: dict[tuple[Fence, Boot], dict[tuple[int, Slice], int]] = {}
        """Leading positions whose inputs a worker reported to have, by request and span."""
        self._death: Death | None = None

    # --- what is there ----------------------------------------------------------------------------

    def loaded(self, process: Process, report: e.PlanLoaded, plan: Plan) -> None:
        """A worker tells what it has: all of it is in its cache, for its log, and right."""
        tokens = {log.request_id: log.tokens for log in report.logs}
        has: Has = {}
        for covered in report.coverage:
            stage = plan.stages[covered.stage]
            for number in covered.units:
                unit = KvUnit(Slice(stage.start, stage.end), number)
                has[covered.request_id, unit] = covered.positions
                log = tokens.get(covered.request_id, ())
                self._look(process, covered.request_id, unit, log[: covered.positions])
                check(
                    len(log) >= covered.positions,
                    f"node{process.number} has KV of {covered.positions} positions of request "
                    f"{covered.request_id}, and {len(log)} tokens",
                )
        self._reported[plan.fence, process.boot_id] = has
        kept = self._kept[plan.fence, process.boot_id] = {}
        for each in report.inputs:
            stage = plan.stages[each.stage]
            span = Slice(stage.start, stage.end)
            kept[each.request_id, span] = each.positions
            log = tokens.get(each.request_id, ())
            check(len(log) >= each.positions, f"node{process.number} has inputs beyond its log")
            self._look_at_inputs(process, each.request_id, span, log[: each.positions])

    def _look_at_inputs(
        self, process: Process, request_id: int, span: Slice, tokens: tuple[int, ...]
    ) -> None:
        inputs = process.worker.units.inputs.get(span)
        for layer in range(*span):
            rows = inputs.rows(request_id, layer) if inputs is not None else []
            for position, name in enumerate(toy.tags(tokens)):
                truth = self._reference.known(name)
                there = rows[position] if position < len(rows) else None
                right = truth is not None and there == (name, truth.residuals[2 * layer])
                check(
                    right,
                    f"node{process.number} says that it has inputs of request {request_id} up to "
                    f"{len(tokens)}; at {position} of layer {layer} it has not",
                )

    def _look(
        self, process: Process, request_id: int, unit: KvUnit, tokens: tuple[int, ...]
    ) -> None:
        names = toy.tags(tokens)
        for layer in range(*unit.span):
            rows = process.worker.units.cache.rows(unit, request_id, layer)
            for position, name in enumerate(names):
                kept = rows[position] if position < len(rows) else None
                truth = self._reference.known(name)
                right = (
                    kept is not None
                    and truth is not None
                    and kept == (name, truth.attended[layer][unit.unit])
                )
                check(
                    right,
                    f"node{process.number} says that it has KV of request {request_id}, unit "
                    f"{unit.unit} up to {len(names)}; at {position} it has not",
                )

    # --- what is made of it -----------------------------------------------------------------------

    def restored(
        self, fact: e.RequestRestored, before: Plan | None, plan: Plan, *, knows: bool
    ) -> None:
        """A leader goes on with a request: every owner has said that it has what comes before.

        `before` was in force; the leader `knows` that it was.
        """
        least: dict[KvUnit, int] = {}
        for unit, head in heads(plan):
            has = self._reported.get((plan.fence, head.owner), {})
            least[unit] = has.get((fact.request_id, unit), 0)
            kept = self._kept.get((plan.fence, head.owner), {})
            possible = max(least[unit], kept.get((fact.request_id, unit.span), 0))
            check(
                fact.restart <= possible,
                f"request {fact.request_id} goes on at {fact.restart}; the owner of unit "
                f"{unit.unit} has {least[unit]} positions, and can make {possible}",
            )
        made = fact.restart > min(least.values())
        check((fact.rung == "recompute") == made, f"rung {fact.rung} at {fact.restart}")
        if made:
            self._world.count("a request went on from KV made of inputs")
        check((fact.rung == "replay") == (fact.restart == 0), f"rung {fact.rung} at {fact.restart}")
        taken = promoted(before, plan) if before is not None else set()
        moved = before is not None and _owners(before) != _owners(plan)
        if not made and (fact.rung == "replica") != (moved and fact.restart > 0):
            # Otherwise it goes by a plan that it has accepted and that never was in force.
            check(not knows, f"rung {fact.rung} at {fact.restart}; units moved: {moved}")
            self._world.count("a rung goes by a plan that never was in force")
        if taken and fact.restart and not made:
            self._count_restored(fact, taken, least)
        if self._death is not None:
            self._as_far_as_it_can(self._death, fact, plan)

    def _count_restored(
        self, fact: e.RequestRestored, taken: set[KvUnit], least: dict[KvUnit, int]
    ) -> None:
        count = self._world.count
        count("a request went on from a replica")
        most = min([fact.length - 1, *(n for unit, n in least.items() if unit not in taken)])
        behind = most - min(least[unit] for unit in taken)
        if behind > 0:
            count("a request went on from a replica that was behind")
        if behind > CLOSE:
            count(f"a request went on from a replica more than {CLOSE} positions behind")

    # --- one death --------------------------------------------------------------------------------

    def dies(self, process: Process) -> None:
        """A process is about to be killed: the first, and nothing else has gone wrong yet?"""
        self._death = None
        cluster, mine = self._cluster, process.worker.active
        if cluster.deaths > 1 or cluster.struck > 1 or mine is None or not cluster.agreed():
            return
        others = [p for p in cluster.living() if p is not process]
        has = {p.boot_id: self._has(p, mine.plan) for p in others}
        self._death = Death(process.boot_id, mine.plan, has)

    def _has(self, process: Process, plan: Plan) -> Has:
        logs = process.worker.logs
        return {
            (log.request_id, unit): logs.coverage.of(log.request_id, unit)
            for log in logs.snapshot()
            for unit, _ in heads(plan)
        }

    def _as_far_as_it_can(self, death: Death, fact: e.RequestRestored, plan: Plan) -> None:
        """After one death and nothing else: the standbys take over, from what they had then."""
        cluster, now_obeyed = self._cluster, self._cluster.judge.in_force
        next_one = now_obeyed is not None and now_obeyed.fence == death.plan.fence
        if cluster.deaths > 1 or cluster.struck > 1 or not next_one:
            self._death = None
            return
        known = {member.boot_id for member in death.plan.members}
        now, least = dict(heads(plan)), fact.length - 1
        for unit, head in heads(death.plan):
            living = [boot for boot in (head.owner, *head.standbys) if boot in death.has]
            if not living or unit not in now:
                return
            if unit not in now:  # The stages were made anew.
                return
            owner = now[unit].owner
            if owner not in known:
                self._world.count("units given to a newcomer after one death")
                return
            check(owner in living, f"unit {unit.unit} is not given to one of its standbys")
            least = min(least, death.has[owner].get((fact.request_id, unit), 0))
        check(
            fact.restart >= least,
            f"request {fact.request_id} goes on at {fact.restart}; its owners had {least} "
            f"positions when {death.boot} died, and nothing else was wrong",
        )
        self._world.count("a request went on after one death")
        if least > 0:
            self._world.count("a request went on after one death, from what was there")
