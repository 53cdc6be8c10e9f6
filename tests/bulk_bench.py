"""Members that exchange delta KV over true links on the loopback: for tests of those links."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np
import zmq

from p2pinfer.bulk_links import BULK_HWM, Arrival, BulkLinks
from p2pinfer.cluster import free_base_port
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.planner import make_plan
from p2pinfer.core.replication import computed_units, fed_units
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import topology
from p2pinfer.core.units import Slice
from p2pinfer.errors import UsageError
from p2pinfer.limits import MAX_BULK_BYTES
from p2pinfer.replicator import Replicator, partners
from p2pinfer.transport import PairLimits, SocketPair
from p2pinfer.types import Fence, Plan, SamplingParams
from p2pinfer.wire.messages import Slot, Step
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.lockstep import members
from tests.plan_bench import MODEL

DEADLINE_S = 20.0
SPAN = Slice(0, MODEL.num_layers)
CAPACITY = 128


def plan_of(count: int, standbys: tuple[tuple[int, ...], ...], epoch: int = 1) -> Plan:
    """Members own the model's four head units in turn; `standbys` are those of each."""
    base = free_base_port(count)
    made = make_plan(
        members=[
            msgspec.structs.replace(m, address=f"tcp://127.0.0.1:{base + 10 * i}")
            for i, m in enumerate(members(count))
        ],
        model=MODEL,
        layout="heads",
        fence=Fence(1, epoch),
        cluster_id="0" * 16,
        leader_id="0" * 16,
    )
    owners = tuple(unit * count // 4 for unit in range(4))
    stage = msgspec.structs.replace(made.stages[0], head_owners=owners, head_standbys=standbys)
    return msgspec.structs.replace(made, stages=(stage,))


class Rows:
    """KV as numbers that say whose, of which request and of which position they are."""

    def __init__(self) -> None:
        self.kept: dict[tuple[KvUnit, int], np.ndarray] = {}
        self.closed: set[int] = set()
        """Requests that are not open here."""

    def of(self, unit: KvUnit, request_id: int) -> np.ndarray:
        """[layers, 2, capacity, head_dim]."""
        shape = (MODEL.num_layers, 2, CAPACITY, MODEL.head_dim)
        return self.kept.setdefault((unit, request_id), np.zeros(shape, np.float32))

    def compute(self, unit: KvUnit, slot: Slot) -> None:
        """What the step of `slot` writes."""
        rows = self.of(unit, slot.request_id)
        for position, token in enumerate(slot.tokens, slot.start):
            rows[:, :, position] = slot.request_id * 1000 + unit.unit * 100 + position + token / 7

    def read_kv(self, unit: KvUnit, request_id: int, start: int, end: int) -> Tensor:
        """As `replicator.KvStore`."""
        rows = np.ascontiguousarray(self.of(unit, request_id)[:, :, start:end])
        return Tensor(WireDType.FLOAT32, rows.shape, rows.data.cast("B"))

    def write_kv(self, unit: KvUnit, request_id: int, start: int, tensor: Tensor) -> bool:
        """As `replicator.KvStore`."""
        if request_id in self.closed:
            return False
        rows = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
        self.of(unit, request_id)[:, :, start : start + tensor.shape[2]] = rows
        return True


class Bench:
    """Makes members of plans, and closes all their sockets at the end."""

    def __init__(self, hwm: int = BULK_HWM) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._limits = PairLimits(MAX_BULK_BYTES, hwm, hwm)
        self._pairs: list[SocketPair] = []

    def pair(self) -> SocketPair:
        """Sockets of nobody yet."""
        self._pairs.append(SocketPair(self._context, limits=self._limits))
        return self._pairs[-1]

    def node(self, plan: Plan, me: int) -> Node:
        """A member that has loaded a plan."""
        node = Node(self.pair(), plan, me)
        node.load(plan)
        return node

    def nodes(self, plan: Plan) -> list[Node]:
        """All members of a plan, which have loaded it."""
        return [self.node(plan, me) for me in range(len(plan.members))]

    def close(self) -> None:
        """Close everything."""
        for pair in self._pairs:
            pair.shutdown()
        self._context.destroy(linger=0)


class CountedLinks(BulkLinks):
    """Counts what is taken off the socket; `endless`: there is always more, of no use."""

    taken = 0
    endless = False

    def receive(self) -> Arrival | None:
        """As `BulkLinks`."""
        arrival = super().receive()
        if arrival is None and self.endless:
            return Arrival(1)
        self.taken += arrival is not None
        return arrival


class Node:
    """One member, with its links, its logs and its KV."""

    def __init__(self, pair: SocketPair, plan: Plan, me: int) -> None:
        self.me = me
        member = plan.members[me]
        self.logs = TokenLogs()
        self.rows = Rows()
        self._port = int(member.address.rpartition(":")[2]) + 2
        bind(pair, self._port)
        self.pair = pair
        self.links = CountedLinks(pair, (member.node_id, member.boot_id))
        self.number = 0

    @property
    def taken(self) -> int:
        """Frames that were taken off the socket."""
        return self.links.taken

    @property
    def readable(self) -> bool:
        """Whether there is one to be taken."""
        return bool(self.pair.router.getsockopt(zmq.EVENTS) & zmq.POLLIN)  # type: ignore[operator]

    def reconnect(self, pair: SocketPair) -> None:
        """New sockets in the middle of a plan; KV, logs and what is known of the plan stay."""
        self.pair.shutdown()
        bind(pair, self._port)
        self.pair = self.links.pair = pair
        self.links.load(self.mine, partners(self.plan, self.me))
        self.links.activate()

    def load(self, plan: Plan) -> None:
        """Make ready for a plan."""
        self.plan = plan
        self.mine = topology(plan, self.me)
        self.links.load(self.mine, partners(plan, self.me))
        computed, fed = computed_units(plan, self.me).keys(), fed_units(plan, self.me).keys()
        self.logs.coverage.hold(computed, fed)

    def activate(self) -> None:
        """The plan is in force."""
        self.links.activate()
        self.replicator = Replicator(self.mine, self.rows, self.links, self.logs, {})

    def begin(self, *slots: Slot, ended: tuple[int, ...] = ()) -> Step:
        """Write a step's tokens down."""
        self.number += 1
        step = Step(fence=self.plan.fence, step=self.number, link_seq=0, slots=slots, ended=ended)
        self.logs.take(step)
        self.replicator.stepped(step)
        return step

    def finish(self, step: Step) -> None:
        """Compute a step."""
        for slot in step.slots:
            for unit in computed_units(self.plan, self.me):
                self.rows.compute(unit, slot)
        self.logs.finish(step.slots)
        self.replicator.finished(step)

    def covers(self, unit: int, request_id: int = 1) -> int:
        """Leading positions of a unit here."""
        return self.logs.coverage.of(request_id, KvUnit(SPAN, unit))


def bind(pair: SocketPair, port: int) -> None:
    """Listen, once libzmq has let go of a port that was listened on before."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return pair.bind("127.0.0.1", port)
        except UsageError:
            assert time.monotonic() < deadline
            zmq.Poller().poll(5)


def slot(start: int, count: int, request_id: int = 1) -> Slot:
    """A run of a request's positions."""
    return Slot(
        request_id=request_id,
        start=start,
        tokens=tuple(range(start, start + count)),
        capacity=CAPACITY if not start else 0,
        params=SamplingParams() if not start else None,
        prompt_tokens=1,
    )


def until(holds: Callable[[], object], *nodes: Node, turn: bool = True) -> None:
    """Wait until something is so; nodes look after their links meanwhile and take their turns."""
    deadline = time.monotonic() + DEADLINE_S
    poller = zmq.Poller()
    for node in nodes:
        poller.register(node.pair.router, zmq.POLLIN)
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        poller.poll(5)
        for node in nodes:
            node.links.look()
            if turn:
                node.replicator.turn()


def run(nodes: list[Node], *slots: Slot, ended: tuple[int, ...] = ()) -> None:
    """One step on all nodes, each of which takes its turn after it."""
    steps = [node.begin(*slots, ended=ended) for node in nodes]
    for node, step in zip(nodes, steps, strict=True):
        node.finish(step)
        node.replicator.turn()
