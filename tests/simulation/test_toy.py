"""The toy model and its workers by themselves, under a control plane that only gives orders."""

from __future__ import annotations

from math import inf

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.planner import make_plan
from p2pinfer.core.standbys import name_standbys
from p2pinfer.types import Fence, Member, Plan, SamplingParams
from p2pinfer.wire.messages import Plane
from tests.simulation import toy_model as toy
from tests.simulation.cluster import Cluster, Setting
from tests.simulation.machine import Machine
from tests.simulation.toy_bulk import narrow
from tests.simulation.world import Violation, World


class Chief:
    """Orders all workers what to do and hears their reports: no protocol, no faults of its own."""

    def __init__(self, count: int, seed: int = 1) -> None:
        self.world = World(seed)
        self.reports: list[tuple[str, e.AnyReport]] = []
        self.cluster = Cluster(self.world, Setting(nodes=count), toy.Reference(), self.make_node)
        for _ in range(count):
            self.cluster.boot(self.cluster.add_machine())

    def make_node(self, config: e.NodeConfig, _draw: object) -> Listener:
        return Listener(self, config.member)

    def members(self) -> list[Member]:
        return [process.config.member for process in self.cluster.living()]

    def machine(self, number: int) -> Machine:
        return self.cluster.machines[number - 1]

    def plan(self, epoch: int, layout: str = "heads", *without: int, replicas: int = 0) -> Plan:
        """A plan of all machines but some, led by the first one left."""
        members = [m for m in self.members() if m.pid and int(m.node_id, 16) not in without]
        plan = make_plan(
            members=members,
            model=toy.MODEL,
            layout=layout,
            fence=Fence(1, epoch),
            cluster_id="ab" * 8,
            leader_id=members[0].node_id,
        )
        able = {member.node_id for member in members}
        return name_standbys(plan, able=able, replicas=replicas)

    def run(self, seconds: float = 5.0) -> None:
        self.world.run_until(self.world.now + seconds)

    def said(self, kind: type[e.AnyReport]) -> list[e.AnyReport]:
        return [report for _, report in self.reports if isinstance(report, kind)]

    def order(self, plan: Plan, make: object) -> None:
        """Give each member of a plan the order that `make` makes for its index."""
        assert callable(make)
        for index, member in enumerate(plan.members):
            process = self.cluster.by_boot(member.boot_id)
            assert process is not None
            process.worker.order(make(index))

    def adopt(self, plan: Plan, logs: tuple[e.TokenLog, ...] = ()) -> dict[str, e.PlanLoaded]:
        """All members load a plan and then obey it; what they said in between, by node id."""
        self.order(plan, lambda index: e.LoadPlan(plan=plan, me=index))
        self.run(1.0)
        loaded = {
            node_id: report
            for node_id, report in self.reports
            if isinstance(report, e.PlanLoaded) and report.fence == plan.fence
        }
        assert len(loaded) == len(plan.members)
        assert not any(report.error for report in loaded.values())
        self.cluster.judge.activated = lambda *_: None
        listeners = tuple(range(len(plan.members)))
        activate = e.ActivatePlan(fence=plan.fence, logs=logs, listeners=listeners)
        self.order(plan, lambda _: activate)
        return loaded

    def start(self, plan: Plan, prompt: tuple[int, ...], count: int, **more: object) -> int:
        """Enter a request at the leader; returns its id."""
        client = self.cluster.clients.add(prompt, count, 1)
        leader = self.cluster.by_boot(plan.members[plan.leader].boot_id)
        assert leader is not None
        order = e.StartRequest(
            request_id=client.request_id,
            prompt_ids=prompt,
            received=(),
            params=SamplingParams(max_tokens=count),
        )
        leader.worker.order(replace(order, **more))
        return client.request_id

    def reply(self, request_id: int) -> tuple[int, ...]:
        """The tokens that are committed of a request, in order."""
        tokens: dict[int, int] = {}
        for report in self.said(e.TokensCommitted):
            for token in report.tokens:
                if token.request_id == request_id:
                    assert token.index == len(tokens)
                    tokens[token.index] = token.token
        return tuple(tokens.values())


class Listener:
    """Writes down what a worker reports."""

    ready = False
    deadline = inf

    def __init__(self, chief: Chief, member: Member) -> None:
        self.chief = chief
        self.node_id = member.node_id

    def handle(self, event: e.Input, _now: float) -> list[e.Output]:
        if isinstance(event, e.WorkerSaid):
            self.chief.reports.append((self.node_id, event.report))
        return []


def log_of(chief: Chief, request_id: int, prompt: tuple[int, ...], reply: tuple[int, ...]):
    params = chief.cluster.clients.all[request_id - 1].params
    return e.TokenLog(
        request_id=request_id,
        term=1,
        prompt_tokens=len(prompt),
        params=params,
        tokens=prompt + reply,
    )


@pytest.mark.parametrize(
    ("count", "layout"), [(1, "heads"), (3, "heads"), (2, "layers"), (4, "2x2")]
)
def test_workers_together_compute_the_reference(count: int, layout: str) -> None:
    """Whatever the layout, the tokens committed are those of the model in one piece."""
    chief = Chief(count)
    chief.run(0.5)
    plan = chief.plan(1, layout)
    chief.adopt(plan)
    prompts = [(5, 6, 7), tuple(range(1, 20)), (9,)]
    ids = [chief.start(plan, prompt, 12) for prompt in prompts]
    chief.run()
    reference = toy.Reference()
    assert [chief.reply(i) for i in ids] == [reference.reply(p, 12) for p in prompts]
    assert [r.request_id for r in chief.said(e.RequestEnded)] and not chief.said(e.StepFailed)
    assert all(len(process.worker.logs) == 0 for process in chief.cluster.living())


def test_a_new_plan_goes_on_from_coverage() -> None:
    """Owners that stay the same go on from the KV they have, with the log that was agreed on."""
    chief = Chief(3)
    chief.run(0.5)
    first = chief.plan(1)
    chief.adopt(first)
    prompt = (3, 1, 4, 1, 5)
    request_id = chief.start(first, prompt, 40)
    chief.run(1.0)
    second = replace(first, fence=Fence(1, 2))
    begun = chief.reply(request_id)
    loaded = {}
    chief.order(second, lambda index: e.LoadPlan(plan=second, me=index))
    chief.run(0.5)
    loaded = [r for r in chief.said(e.PlanLoaded) if r.fence == second.fence]
    covered = min(c.positions for report in loaded for c in report.coverage)
    [longest] = {max((log.tokens for log in r.logs), key=len) for r in loaded[:1]}
    assert covered > len(prompt)
    assert longest[: len(prompt) + len(begun)] == prompt + begun
    agreed = log_of(chief, request_id, prompt, longest[len(prompt) :])
    chief.cluster.judge.activated = lambda *_: None
    activate = e.ActivatePlan(fence=second.fence, logs=(agreed,), listeners=(0, 1, 2))
    chief.order(second, lambda _: activate)
    leader = chief.machine(1).process
    assert leader is not None
    leader.worker.order(
        e.StartRequest(
            request_id=request_id,
            prompt_ids=prompt,
            received=agreed.tokens[len(prompt) :],
            params=agreed.params,
            computed=min(covered, len(agreed.tokens) - 1),
        )
    )
    chief.run(3.0)
    whole = toy.Reference().reply(prompt, 40)
    told = [t.token for r in chief.said(e.TokensCommitted) for t in r.tokens]
    assert told[: len(begun)] == list(whole[: len(begun)])
    assert told[-1] == whole[-1]
    assert not chief.said(e.StepFailed)


def test_kv_that_is_not_there_is_seen() -> None:
    """Reading a position that nobody computed here is a violation, not a wrong token."""
    chief = Chief(2)
    chief.run(0.5)
    plan = chief.plan(1)
    chief.adopt(plan)
    request_id = chief.start(plan, (1, 2, 3), 30)
    chief.run(0.5)
    worker = chief.machine(2).process.worker
    worker.units.cache.forget((request_id,))
    with pytest.raises(Violation, match="KV of request"):
        chief.run()


def test_a_broken_link_breaks_the_step() -> None:
    """A step link that is reset in the middle of a reply is reported, and nothing is committed."""
    chief = Chief(3)
    chief.run(0.5)
    plan = chief.plan(1)
    chief.adopt(plan)
    chief.start(plan, (1, 2, 3), 60)
    chief.run(0.5)
    steps = [c for c in chief.cluster.network.connections(1, 2) if c.plane is Plane.STEPS]
    chief.cluster.network.break_connection(steps[0])
    chief.run(1.0)
    committed = len(chief.said(e.TokensCommitted))
    assert chief.said(e.StepFailed)
    chief.run(1.0)
    assert len(chief.said(e.TokensCommitted)) == committed


def test_a_lost_worker_stops_commits_and_is_overdue() -> None:
    """When an owner hangs no token leaves any more, and the leader names it after a while."""
    chief = Chief(3)
    chief.run(0.5)
    plan = chief.plan(1)
    chief.adopt(plan)
    request_id = chief.start(plan, (1, 2, 3), 60)
    chief.run(0.6)
    chief.machine(2).process.worker.hang()
    before = chief.reply(request_id)
    chief.run(3.0)
    assert len(chief.reply(request_id)) <= len(before) + 2
    failed = chief.said(e.StepFailed)
    assert failed
    assert chief.machine(2).node_id in {report.node_id for report in failed}


def least_fed(chief: Chief, request_id: int) -> int:
    """The least that any standby has of a request's KV."""
    return min(
        process.worker.logs.coverage.of(request_id, unit)
        for process in chief.cluster.living()
        for unit in process.worker.logs.coverage.fed
    )


@pytest.mark.parametrize("window", [0, 8, 24])
@pytest.mark.parametrize("replicas", [1, 2])
def test_standbys_keep_up_with_their_owners(window: int, replicas: int) -> None:
    """While a reply runs every standby is at most a few positions behind, however small windows."""
    chief = Chief(3)
    chief.run(0.5)
    plan = chief.plan(1, replicas=replicas)
    with narrow(window):
        chief.adopt(plan)
        request_id = chief.start(plan, tuple(range(1, 20)), 70)
        chief.run(2.2)
        logs = chief.machine(1).process.worker.logs
        assert len(logs.tokens(request_id)) > 40
        assert least_fed(chief, request_id) >= len(logs.tokens(request_id)) - 3 - window
        chief.run(2.0)
    assert chief.reply(request_id) == toy.Reference().reply(tuple(range(1, 20)), 70)
    assert not chief.said(e.StepFailed)


def test_kv_of_a_standby_is_that_of_its_owner() -> None:
    """What a standby reports when the plan ends is in its cache, for its log, and true."""
    chief = Chief(3)
    chief.run(0.5)
    plan = chief.plan(1, replicas=1)
    chief.adopt(plan)
    request_id = chief.start(plan, (4, 5, 6), 60)
    chief.run(1.0)
    second = replace(chief.plan(2, replicas=1), fence=Fence(1, 2))
    chief.order(second, lambda index: e.LoadPlan(plan=second, me=index))
    chief.run(0.5)
    reports = [r for r in chief.said(e.PlanLoaded) if r.fence == second.fence]
    told = [run for r in reports for run in r.coverage if run.request_id == request_id]
    assert sum(len(run.units) for run in told) == 2 * toy.HEADS
    assert min(run.positions for run in told) > 20
    judge = chief.cluster.judge.kv
    for process, report in zip(chief.cluster.living(), reports, strict=True):
        judge.loaded(process, report, second)


def test_kv_that_a_standby_has_not_is_seen() -> None:
    """Who reports more than its cache has violates."""
    chief = Chief(2)
    chief.run(0.5)
    plan = chief.plan(1, replicas=1)
    chief.adopt(plan)
    request_id = chief.start(plan, (4, 5, 6), 60)
    chief.run(0.6)
    process = chief.machine(2).process
    logs = process.worker.logs
    told = [replace(run, positions=run.positions + 1) for run in logs.covered(plan)]
    report = e.PlanLoaded(fence=plan.fence, logs=logs.snapshot(), coverage=tuple(told))
    with pytest.raises(Violation, match=f"KV of request {request_id}|has KV of"):
        chief.cluster.judge.kv.loaded(process, report, plan)


def test_bulk_links_that_break_hold_up_no_step() -> None:
    """All bulk links break again and again: no step fails, and standbys catch up afterwards."""
    chief = Chief(3)
    chief.run(0.5)
    plan = chief.plan(1, replicas=1)
    chief.adopt(plan)
    request_id = chief.start(plan, (7, 8, 9), 80)
    network = chief.cluster.network
    for _ in range(8):
        chief.run(0.1)
        for connection in network.connections():
            if connection.plane is Plane.BULK:
                network.break_connection(connection)
    chief.run(1.0)
    logs = chief.machine(1).process.worker.logs
    assert least_fed(chief, request_id) >= len(logs.tokens(request_id)) - 3
    chief.run(2.0)
    assert chief.reply(request_id) == toy.Reference().reply((7, 8, 9), 80)
    assert not chief.said(e.StepFailed)


def test_weights_of_standbys_are_read_after_the_plan_is_in_force() -> None:
    """A plan is loaded without the weights of standbys; they are ready a little later."""
    chief = Chief(3)
    chief.run(0.5)
    plan = chief.plan(1, replicas=2)
    chief.order(plan, lambda index: e.LoadPlan(plan=plan, me=index))
    chief.run(0.5)
    assert all(process.worker.units.complete for process in chief.cluster.living())
    assert all(process.worker.units.lacking == 2 for process in chief.cluster.living())
    chief.adopt(plan)
    chief.run(3.0)
    assert not any(process.worker.units.lacking for process in chief.cluster.living())
