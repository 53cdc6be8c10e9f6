"""True worker processes over TCP, with the test in the place of the control plane."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from p2pinfer.cluster import StartStop, free_base_port
from p2pinfer.core.events import (
    ActivatePlan,
    AnyReport,
    LoadPlan,
    PlanLoaded,
    Recompute,
    RequestEnded,
    StartRequest,
    StepFailed,
    TokenLog,
    TokensCommitted,
    WorkerReady,
    WorkerStats,
)
from p2pinfer.core.planner import make_plan
from p2pinfer.core.replan import next_plan
from p2pinfer.core.standbys import name_standbys
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.pipe import WorkerConfig
from p2pinfer.types import DType, Fence, Member, Plan, SamplingParams
from p2pinfer.worker_process import WorkerProcess

DEADLINE_S = 60.0

NEAR = 16
"""Tokens that a standby may be behind: those of the last steps, which its owner did not send."""


def boot_id(index: int) -> str:
    """Of the worker of that number. No other on this machine has it, those of a test run beside
    included: local links go by it."""
    return f"{os.getpid() & 0xFFFFFFFF:08x}{index:08x}"


class Fleet(StartStop):
    """`nodes` workers holding the model in `folder` by one plan; the last `witnesses` of them
    hold nothing, and of each unit `replicas` others keep a replica; all may keep inputs.
    `least_step_s` is long: the machine may be busy with other tests."""

    def __init__(
        self,
        folder: Path,
        nodes: int,
        layout: str = "heads",
        dtype: DType | None = None,
        weights: Sequence[float] = (),
        *,
        witnesses: int = 0,
        replicas: int = 0,
        keep_inputs: bool = False,
        least_step_s: float = 20.0,
        local_links: bool = True,
    ) -> None:
        config = load_config(folder)
        self.model = model_spec(
            config, name="t", model_id="0" * 64, dtype=dtype or config.dtype, quant="none"
        )
        base = free_base_port(nodes)
        self.members = [
            Member(
                node_id=f"{i:016x}",
                boot_id=boot_id(i),
                name=f"node{i + 1}",
                address=f"tcp://127.0.0.1:{base + 10 * i}",
                weight=weights[i] if weights else 1.0,
                witness=i >= nodes - witnesses,
                keeps_inputs=keep_inputs,
            )
            for i in range(nodes)
        ]
        self.layout = layout
        self.replicas = replicas
        self.reports: list[list[AnyReport]] = [[] for _ in range(nodes)]
        self.started: dict[int, StartRequest] = {}
        """What was started, and has not ended."""
        self.workers = [WorkerProcess(1) for _ in range(nodes)]
        for i, worker in enumerate(self.workers):
            worker.pipe.send(
                WorkerConfig(
                    node_id=f"{i:016x}",
                    boot_id=boot_id(i),
                    name=f"node{i + 1}",
                    model_folder="" if self.members[i].witness else str(folder),
                    model=None if self.members[i].witness else self.model,
                    listen_host="127.0.0.1",
                    step_port=base + 10 * i + 1,
                    bulk_port=base + 10 * i + 2,
                    device="cpu",
                    threads=1,
                    least_step_s=least_step_s,
                    local_links=local_links,
                )
            )

    def start(self) -> None:
        """Wait for the workers, and put the first plan in force."""
        for i in range(len(self.workers)):
            self.await_report(i, lambda r: isinstance(r, WorkerReady))
        self.adopt(self.plan(Fence(1, 1)))

    def stop(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.stop()

    def plan(self, fence: Fence) -> Plan:
        """The planner's plan for all members."""
        plan = make_plan(
            members=self.members,
            model=self.model,
            layout=self.layout,
            fence=fence,
            cluster_id="0" * 16,
            leader_id="0" * 16,
        )
        able = {member.node_id for member in self.members}
        return name_standbys(plan, able=able, replicas=self.replicas)

    def plan_without(self, previous: Plan, fence: Fence, *lost: int) -> Plan:
        """The plan that follows another when these workers are gone."""
        members = [member for i, member in enumerate(self.members) if i not in lost]
        ids = [member.node_id for member in members]
        return next_plan(
            previous=previous,
            members=members,
            able=frozenset(ids),
            model=self.model,
            layout=self.layout,
            fence=fence,
            cluster_id="0" * 16,
            leader_id="0" * 16,
            voters=ids,
            replicas=self.replicas,
        )

    def adopt(self, plan: Plan) -> list[PlanLoaded]:
        """Put a plan in force everywhere, and start again what was running.

        The leader's logs are agreed on, and computing goes on where every owner of heads has KV,
        or can make it of inputs.
        """
        answers = self.load(plan)
        logs = answers[plan.leader].logs
        recomputes = []
        for log in logs:
            last = len(log.tokens) - 1
            position = min(restart(log, answers, plan, inputs=True), last)
            rows = position - min(restart(log, answers, plan), last)
            if rows:
                recomputes.append(
                    Recompute(request_id=log.request_id, position=position, rows=rows)
                )
        self.activate(plan, logs, recomputes)
        for log in logs:
            reply = log.tokens[log.prompt_tokens :]
            self.started[log.request_id] = StartRequest(
                request_id=log.request_id,
                prompt_ids=self.started[log.request_id].prompt_ids,
                received=reply,
                params=log.params,
                computed=min(restart(log, answers, plan, inputs=True), len(log.tokens) - 1),
            )
        for order in self.started.values():
            self.workers[plan.leader].pipe.send(order)
        return answers

    def load(self, plan: Plan) -> list[PlanLoaded]:
        """Load a plan everywhere; returns what the workers answer, in the order of its members."""
        nodes = self._nodes(plan)
        for index, node in enumerate(nodes):
            self.workers[node].pipe.send(LoadPlan(plan=plan, me=index))
        answers = []
        for node in nodes:
            loaded = self.await_report(
                node, lambda r: isinstance(r, PlanLoaded) and r.fence == plan.fence
            )
            assert isinstance(loaded, PlanLoaded)
            assert loaded.error == ""
            answers.append(loaded)
        return answers

    def activate(
        self,
        plan: Plan,
        logs: tuple[TokenLog, ...] = (),
        recomputes: Sequence[Recompute] = (),
    ) -> None:
        """Put a plan that is loaded everywhere in force."""
        nodes = self._nodes(plan)
        everybody = tuple(range(len(nodes)))
        for node in nodes:
            self.workers[node].pipe.send(
                ActivatePlan(
                    fence=plan.fence,
                    logs=logs,
                    recomputes=tuple(recomputes),
                    listeners=everybody,
                )
            )

    def _nodes(self, plan: Plan) -> list[int]:
        """The worker of each member of a plan."""
        by_id = {member.node_id: node for node, member in enumerate(self.members)}
        return [by_id[member.node_id] for member in plan.members]

    def submit(self, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        """Enter a request at the leader."""
        self.started[request_id] = StartRequest(
            request_id=request_id, prompt_ids=tuple(prompt), received=(), params=params
        )
        self.workers[0].pipe.send(self.started[request_id])

    def reply(self, request_id: int) -> list[int]:
        """Wait for the end of a request and return its tokens, each known to be committed."""
        ended = self.await_report(
            0, lambda r: isinstance(r, RequestEnded) and r.request_id == request_id
        )
        assert isinstance(ended, RequestEnded)
        assert ended.code == "", ended.message
        del self.started[request_id]
        tokens = self._told(request_id)
        assert sorted(tokens) == list(range(ended.total_tokens))
        return [tokens[index] for index in sorted(tokens)]

    def some_of(self, request_id: int, count: int) -> list[int]:
        """Wait for that many tokens of a reply that goes on, and return them."""
        self.await_report(0, lambda _: len(self._told(request_id)) >= count)
        tokens = self._told(request_id)
        return [tokens[index] for index in range(count)]

    def _told(self, request_id: int) -> dict[int, int]:
        """The tokens of a reply by index, as far as the leader has told of them."""
        tokens: dict[int, int] = {}
        for report in self.reports[0]:
            logs = report.logs if isinstance(report, PlanLoaded) else ()
            for log in logs:
                if log.request_id == request_id:
                    tokens |= dict(enumerate(log.tokens[log.prompt_tokens :]))
            for token in report.tokens if isinstance(report, TokensCommitted) else ():
                if token.request_id == request_id:
                    assert tokens.setdefault(token.index, token.token) == token.token
        return tokens

    def failure(self, node: int) -> StepFailed:
        """Wait until a worker says that a step failed."""
        found = self.await_report(node, lambda r: isinstance(r, StepFailed))
        assert isinstance(found, StepFailed)
        return found

    def stats(self, node: int, steps: int) -> WorkerStats:
        """A worker's counters once it has done `steps` steps."""
        self.reports[node] = [r for r in self.reports[node] if not isinstance(r, WorkerStats)]
        found = self.await_report(node, lambda r: isinstance(r, WorkerStats) and r.steps >= steps)
        assert isinstance(found, WorkerStats)
        return found

    def deltas(self, node: int) -> WorkerStats:
        """A worker's counters once nothing of delta KV is under way: twice the same."""
        before = self.stats(node, 0)
        while (after := self.stats(node, 0)).delta_bytes_sent != before.delta_bytes_sent or (
            after.delta_bytes_received != before.delta_bytes_received
        ):
            before = after
        return after

    def await_standbys(self, plan: Plan) -> None:
        """Wait until all that keep replicas by a plan have their weights, and all but the last
        `NEAR` positions of the KV."""
        for node in self._nodes(plan):
            self.reports[node] = [r for r in self.reports[node] if not isinstance(r, WorkerStats)]
            self.await_report(
                node,
                lambda r: (
                    isinstance(r, WorkerStats)
                    and r.standby_units_ready == r.standby_units_wanted
                    and r.standby_lacks <= NEAR * r.standby_units_wanted
                ),
            )

    def await_report(self, node: int, wanted: Callable[[AnyReport], bool]) -> AnyReport:
        """The first report that `wanted` accepts, among those read and to come."""
        seen = 0
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for report in self.reports[node][seen:]:
                if wanted(report):
                    return report
            seen = len(self.reports[node])
            left = deadline - time.monotonic()
            assert left > 0, f"node{node + 1} never reported it; last: {self.reports[node][-3:]}"
            pipe = self.workers[node].pipe
            select.select((pipe,), (), (), left)
            while (report := pipe.receive()) is not None:
                self.reports[node].append(report)


def restart(log: TokenLog, answers: list[PlanLoaded], plan: Plan, *, inputs: bool = False) -> int:
    """Leading positions of a request whose KV the owner of every head unit has, or with `inputs`
    can make."""
    return min(
        max(
            covered(answers[owner], number, unit, log.request_id),
            kept_inputs(answers[owner], number, log.request_id) if inputs else 0,
        )
        for number, stage in enumerate(plan.stages)
        for unit, owner in enumerate(stage.head_owners)
    )


def kept_inputs(answer: PlanLoaded, stage: int, request_id: int = 1) -> int:
    """Leading positions of a request whose inputs a worker keeps."""
    return max(
        (
            run.positions
            for run in answer.inputs
            if (run.request_id, run.stage) == (request_id, stage)
        ),
        default=0,
    )


def covered(answer: PlanLoaded, stage: int, unit: int, request_id: int = 1) -> int:
    """Leading positions of a request whose KV a worker has of one head unit."""
    return max(
        (
            run.positions
            for run in answer.coverage
            if (run.request_id, run.stage) == (request_id, stage) and unit in run.units
        ),
        default=0,
    )
