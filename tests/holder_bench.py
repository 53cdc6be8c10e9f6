"""Nodes that hold units by plans, compute in lockstep, and send each other KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from p2pinfer.core.holdings import Copies
from p2pinfer.core.inputs import input_spans
from p2pinfer.core.orders import Recompute
from p2pinfer.core.planner import make_plan
from p2pinfer.core.recompute import recompute
from p2pinfer.core.replan import next_plan
from p2pinfer.core.replication import computed_units, fed_units
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import topology
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.runner import StageRunner
from p2pinfer.types import DType, Fence, Member, Plan, SamplingParams, Stage
from p2pinfer.unit_holder import UnitHolder
from p2pinfer.wire.messages import Slot
from tests.lockstep import Lockstep, members

CPU = torch.device("cpu")
DEADLINE_S = 60.0
PROMPT = tuple(range(5, 75))


def plan(folder: Path, nodes: int = 2) -> Plan:
    """The members hold the model, without standbys."""
    return make_plan(
        members=members(nodes),
        model=model_spec(load_config(folder), name="t", model_id="0" * 64),
        layout="heads",
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id="0" * 16,
    )


def placed(base: Plan, heads: str, mlp: str = "01", vocab: str = "01010", **copies: Copies) -> Plan:
    """The plan with these owners by unit, and standbys by kind."""
    owners = [tuple(map(int, each)) for each in (heads, mlp, vocab)]
    stage = Stage(
        start=0,
        end=2,
        head_owners=owners[0],
        mlp_owners=owners[1],
        vocab_owners=owners[2],
        **copies,
    )
    return msgspec.structs.replace(base, stages=(stage,))


def copies(*standbys: Sequence[int]) -> Copies:
    """Standbys by unit."""
    return tuple(map(tuple, standbys))


class Node:
    """One member's holder and logs, as a worker has them."""

    def __init__(
        self,
        folder: Path | None,
        standby: str = "hot",
        available: Callable[[torch.device], int] = lambda _: 0,
    ) -> None:
        self.logs = TokenLogs()
        self.told: list[tuple[int, int]] = []
        self.said = 0
        """How often anything was said."""
        self.units = UnitHolder(
            folder, CPU, self.logs, self._progress, standby=standby, available=available
        )

    def _progress(self, done: int, total: int) -> None:
        self.said += 1
        if total:  # what is copied may take a moment too
            self.told.append((done, total))

    def load(self, plan: Plan, me: int = 0) -> None:
        """As a worker does when a plan comes; `told` is what was said of loading meanwhile."""
        self.told.clear()
        self.units.hold(topology(plan, me))
        self.logs.coverage.hold(computed_units(plan, me).keys(), fed_units(plan, me).keys())
        self.logs.inputs.hold(input_spans(plan, me))

    def write(self, request_id: int, positions: int, me: int = 0) -> None:
        """KV of a request that is open, all 1.0: as if steps and frames had brought it."""
        slot = Slot(
            request_id=request_id,
            start=0,
            tokens=PROMPT[:positions],
            params=SamplingParams(),
            prompt_tokens=positions,
        )
        self.logs.write(Fence(1, 1), slot)
        self.logs.finish((slot,))
        for unit in self.logs.coverage.fed:
            self.logs.coverage.join(request_id, unit, 0, positions)

    @property
    def runner(self) -> StageRunner:
        """What computes."""
        assert self.units.runner is not None
        return self.units.runner


class Fleet:
    """Members under plans with standbys: their runners in lockstep, and their delta KV."""

    def __init__(
        self,
        folder: Path,
        nodes: int,
        dtype: DType,
        *,
        keep_inputs: bool = False,
        standby: str = "hot",
    ) -> None:
        self.folder = folder
        self.lockstep = Lockstep(folder, nodes=1, dtype=dtype)
        self.whole = Lockstep(folder, nodes=1, dtype=dtype)
        self.members = [
            msgspec.structs.replace(member, keeps_inputs=keep_inputs) for member in members(nodes)
        ]
        self.nodes = {member.node_id: Node(folder, standby) for member in self.members}
        self.epoch = 0
        self.plan: Plan | None = None
        self.restarts: list[int] = []
        """By epoch, from where a request's KV was there in all units."""

    def adopt(self, alive: Sequence[Member], *, replicas: int = 1) -> None:
        """The plan that follows, of those that are alive."""
        self.epoch += 1
        self.plan = next_plan(
            previous=self.plan,
            members=alive,
            able={member.node_id for member in alive},
            model=self.lockstep.model,
            layout="heads",
            fence=Fence(1, self.epoch),
            cluster_id="0" * 16,
            leader_id=alive[0].node_id,
            voters=[member.node_id for member in alive],
            replicas=replicas,
        )
        least = []
        runners = {}
        for me, member in enumerate(self.plan.members):
            node = self.nodes[member.node_id]
            node.load(self.plan, me)
            if node.units.runner is not None:
                runners[me] = node.units.runner
            if node.logs.coverage.computed:
                least.append(node.logs.coverage.least(1))
        self.restarts.append(min(least))
        self.lockstep.under(self.plan, runners)

    def recompute(self, position: int) -> None:
        """All members make the KV of request 1 before a position of their inputs."""
        assert self.plan is not None
        order = Recompute(request_id=1, position=position, rows=position)
        for member in self.plan.members:
            node = self.nodes[member.node_id]
            for _ in recompute(node.units, node.logs, (order,)):
                pass

    def ready(self) -> None:
        """Standbys load what they keep."""
        for member in self.members:
            units = self.nodes[member.node_id].units
            units.start_standbys()
            ready, wanted = units.await_standbys(DEADLINE_S)
            assert ready == wanted

    def step(self, slot: Slot) -> np.ndarray:
        """Logits [vocab] of a slot; they are those of the unsplit model."""
        assert self.plan is not None
        for node in self.nodes.values():
            node.logs.write(self.plan.fence, slot)
        logits = self.lockstep.step((slot,))
        for node in self.nodes.values():
            node.logs.finish((slot,))
        self.feed(slot.request_id)
        assert np.array_equal(logits, self.whole.step((slot,)))
        return logits[0]

    def feed(self, request_id: int) -> None:
        """Owners send their standbys what these lack."""
        assert self.plan is not None
        for me, member in enumerate(self.plan.members):
            mine = self.nodes[member.node_id]
            for unit, owner in fed_units(self.plan, me).items():
                its = self.nodes[self.plan.members[owner].node_id]
                start = mine.logs.coverage.of(request_id, unit)
                end = its.logs.coverage.of(request_id, unit)
                rows = its.units.read_kv(unit, request_id, start, end)
                assert mine.units.write_kv(unit, request_id, start, rows)
                mine.logs.coverage.join(request_id, unit, start, end)


def slots(start: int, *pieces: int, capacity: int = 128) -> Iterator[Slot]:
    """Slots of request 1 from a position on, each of so many tokens of the prompt."""
    for number, count in enumerate(pieces):
        first = not number
        yield Slot(
            request_id=1,
            start=start,
            tokens=PROMPT[start : start + count],
            sample=True,
            capacity=capacity if first else 0,
            params=SamplingParams() if first else None,
            prompt_tokens=len(PROMPT) if first else 0,
        )
        start += count
