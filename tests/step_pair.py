"""Step links of two nodes in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count

import msgspec
import zmq

from p2pinfer.cluster import free_base_port
from p2pinfer.core.topology import topology
from p2pinfer.limits import MAX_STEP_BYTES
from p2pinfer.step_links import STEP_PORT_OFFSET, StepLinks
from p2pinfer.transport import PairLimits, SocketPair
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.messages import Slot, Step, StepAck
from tests.step_plans import plan_of

DEADLINE_S = 20.0
LIMITS = PairLimits(MAX_STEP_BYTES, 64, 64)
BOOTS = count(1)


class Pair:
    """Two nodes of a plan, the first of which leads; in one thread."""

    def __init__(
        self, *, local: tuple[bool, bool] = (True, True), plan: Plan | None = None
    ) -> None:
        plan, base = plan or plan_of(2), free_base_port(2)
        members = [
            msgspec.structs.replace(
                member,
                address=f"tcp://127.0.0.1:{base + 10 * i}",
                boot_id=f"{os.getpid():08x}{next(BOOTS):08x}",
            )
            for i, member in enumerate(plan.members)
        ]
        self.plan = msgspec.structs.replace(plan, members=tuple(members))
        self.context = zmq.Context()
        self.silence, self.order = os.pipe()
        self.interrupted = 0
        self.nodes = [self._node(index, on=on) for index, on in enumerate(local)]

    def _node(self, index: int, *, on: bool) -> StepLinks:
        member = self.plan.members[index]
        pair = SocketPair(self.context, limits=LIMITS)
        port = int(member.address.rsplit(":", 1)[1])
        links = StepLinks(
            pair,
            (member.node_id, member.boot_id),
            pipe_fd=self.silence,
            interrupt=self._interrupt,
            on_pause=lambda: None,
        )
        links.bind("127.0.0.1", port + STEP_PORT_OFFSET, local=on)
        return links

    def _interrupt(self) -> None:
        self.interrupted += 1

    def adopt(self, epoch: int) -> Plan:
        """Put the plan in force on both, under this epoch."""
        plan = msgspec.structs.replace(self.plan, fence=Fence(1, epoch))
        for links, mine in ((links, topology(plan, i)) for i, links in enumerate(self.nodes)):
            links.reach(mine)
            links.open(mine)
        for index, links in enumerate(self.nodes):
            links.activate(topology(plan, index))
            links.begin(1, DEADLINE_S)
        return plan

    def step(self, plan: Plan) -> None:
        """The leader announces a step, the other one acknowledges it: both come."""
        leader, follower = self.nodes
        acked: list[tuple[int, int]] = []
        leader.on_ack = lambda *ack: acked.append(ack)
        slot = Slot(request_id=1, start=0, tokens=(1,))
        number = leader.next_sequence(1)
        leader.send(1, Step(fence=plan.fence, step=1, link_seq=number, slots=(slot,)))
        self.until(lambda: bool(follower.inbox.steps), follower)
        follower.inbox.steps.clear()
        number = follower.next_sequence(0)
        follower.send(0, StepAck(fence=plan.fence, step=1, link_seq=number))
        self.until(lambda: acked == [(1, 1)], leader)

    def until(self, wanted: Callable[[], bool], *nodes: StepLinks) -> None:
        """Let these nodes wait for frames until it is so."""
        deadline = time.monotonic() + DEADLINE_S
        while not wanted():
            assert time.monotonic() < deadline
            for each in nodes:
                each.idle(0.01)

    @property
    def local_messages(self) -> list[int]:
        """How many frames each has sent over its local link."""
        return [each.traffic.local_messages for each in self.nodes]

    def close(self) -> None:
        """Close all sockets."""
        for each in self.nodes:
            each.shutdown()
        self.context.term()
        os.close(self.silence)
        os.close(self.order)
