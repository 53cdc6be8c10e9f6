"""True worker processes over TCP, with the test in the place of the control plane."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from p2pinfer.cluster import free_base_port
from p2pinfer.core.events import (
    ActivatePlan,
    AnyReport,
    LoadPlan,
    PlanLoaded,
    RequestEnded,
    StartRequest,
    TokensDrawn,
    WorkerReady,
    WorkerStats,
)
from p2pinfer.core.planner import make_plan
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.pipe import WorkerConfig
from p2pinfer.types import DType, Fence, Member, Plan, SamplingParams
from p2pinfer.worker_process import WorkerProcess

DEADLINE_S = 60.0


class Fleet:
    """`nodes` workers holding the model in `folder` by one plan."""

    def __init__(
        self,
        folder: Path,
        nodes: int,
        layout: str = "heads",
        dtype: DType | None = None,
        weights: Sequence[float] = (),
    ) -> None:
        config = load_config(folder)
        self.model = model_spec(
            config, name="t", model_id="0" * 64, dtype=dtype or config.dtype, quant="none"
        )
        base = free_base_port(nodes)
        self.members = [
            Member(
                node_id=f"{i:016x}",
                boot_id=f"{i:016x}",
                name=f"node{i + 1}",
                address=f"tcp://127.0.0.1:{base + 10 * i}",
                weight=weights[i] if weights else 1.0,
            )
            for i in range(nodes)
        ]
        self.layout = layout
        self.reports: list[list[AnyReport]] = [[] for _ in range(nodes)]
        self.workers = [WorkerProcess(1) for _ in range(nodes)]
        for i, worker in enumerate(self.workers):
            worker.pipe.send(
                WorkerConfig(
                    node_id=f"{i:016x}",
                    boot_id=f"{i:016x}",
                    name=f"node{i + 1}",
                    model_folder=str(folder),
                    model=self.model,
                    listen_host="127.0.0.1",
                    step_port=base + 10 * i + 1,
                    bulk_port=base + 10 * i + 2,
                    device="cpu",
                    threads=1,
                )
            )

    def __enter__(self) -> Fleet:
        try:
            for i in range(len(self.workers)):
                self.await_report(i, lambda r: isinstance(r, WorkerReady))
            self.adopt(self.plan(Fence(1, 1)))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.stop()

    def plan(self, fence: Fence) -> Plan:
        """The planner's plan for all members."""
        return make_plan(
            members=self.members,
            model=self.model,
            layout=self.layout,
            fence=fence,
            cluster_id="0" * 16,
            leader_id="0" * 16,
        )

    def adopt(self, plan: Plan) -> None:
        """Load and activate a plan everywhere."""
        for i, worker in enumerate(self.workers):
            worker.pipe.send(LoadPlan(plan=plan, me=i))
        for i in range(len(self.workers)):
            loaded = self.await_report(
                i, lambda r: isinstance(r, PlanLoaded) and r.fence == plan.fence
            )
            assert isinstance(loaded, PlanLoaded)
            assert loaded.error == ""
        for worker in self.workers:
            worker.pipe.send(ActivatePlan(fence=plan.fence))

    def start(self, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        """Enter a request at the leader."""
        self.workers[0].pipe.send(
            StartRequest(
                request_id=request_id, prompt_ids=tuple(prompt), received=(), params=params
            )
        )

    def reply(self, request_id: int) -> list[int]:
        """Wait for the end of a request and return its tokens."""
        ended = self.await_report(
            0, lambda r: isinstance(r, RequestEnded) and r.request_id == request_id
        )
        assert isinstance(ended, RequestEnded)
        assert ended.code == "", ended.message
        return [
            token.token
            for report in self.reports[0]
            if isinstance(report, TokensDrawn)
            for token in report.tokens
            if token.request_id == request_id
        ]

    def stats(self, node: int, steps: int) -> WorkerStats:
        """A worker's counters once it has done `steps` steps."""
        self.reports[node] = [r for r in self.reports[node] if not isinstance(r, WorkerStats)]
        found = self.await_report(node, lambda r: isinstance(r, WorkerStats) and r.steps >= steps)
        assert isinstance(found, WorkerStats)
        return found

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
