"""A machine, with its disk and its clock, and the node's process that runs on it, or does not.

A process is a true `Node` between simulated sockets, a disk and a toy worker. It is driven as the
daemon drives it: news of the worker first, then links, then messages, then timers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Protocol

from p2pinfer.core import events as e
from p2pinfer.types import Member
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    Ack,
    Activate,
    ControlMessage,
    Drain,
    Forward,
    LogEntry,
    Nack,
    Plane,
    PreVoteRequest,
    Propose,
    VoteReply,
    VoteRequest,
)
from tests.simulation.disk import Disk
from tests.simulation.toy_worker import ToyWorker
from tests.simulation.world import Violation

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

PIPE_S = (0.0001, 0.001)


class ControlPlane(Protocol):
    """What of `Node` a process uses."""

    def handle(self, event: e.Input, now: float) -> list[e.Output]:
        """Take one input."""

    @property
    def deadline(self) -> float:
        """When it wants a tick."""

    @property
    def ready(self) -> bool:
        """Whether it serves."""


MakeNode = Callable[[e.NodeConfig, Callable[[], float]], ControlPlane]

TICK_S = 0.001
"""A wait ends a little after its deadline, as a poll in milliseconds does."""

MOMENTS = (
    Ack,
    Activate,
    Drain,
    Forward,
    LogEntry,
    Nack,
    PreVoteRequest,
    Propose,
    VoteReply,
    VoteRequest,
)
"""Messages whose sending is a moment that faults may wait for, by their names."""


class Machine:
    """One computer. `kind` is its numeric class, `rate` that of its clock, `pace` of computing."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.number = number
        self.node_id = f"{number:016x}"
        self.name = f"node{number}"
        self.address = f"tcp://10.0.0.{number}:7720"
        self.steps_address = f"tcp://10.0.0.{number}:7721"
        self.bulk_address = f"tcp://10.0.0.{number}:7722"
        self.disk = Disk(cluster.world, number)
        self.kind = 0
        self.weight = 1.0
        self.witness = False
        self.keeps_inputs = False
        self.join: tuple[str, ...] = ()
        self.rate = 1.0
        self.jumped = 0.0
        self.pace = 1.0
        self.boots = 0
        self.process: Process | None = None
        self.returns = False
        """It is told to leave only to be started again."""
        self.gone = False
        """It has left the cluster on purpose and does not come back."""

    def seconds(self) -> float:
        """What its clock shows."""
        return 1_000.0 * self.number + self.world.now * self.rate + self.jumped

    def monotonic(self) -> float:
        """The same, for what no jump of the clock concerns."""
        return self.world.now * self.rate

    def member(self, *, blank: bool) -> Member:
        """The member that its next process is."""
        return Member(
            node_id=self.node_id,
            boot_id=f"{self.number:02x}{self.boots:014x}",
            name=self.name,
            address=self.address,
            pid=self.boots,
            weight=self.weight,
            witness=self.witness,
            keeps_inputs=self.keeps_inputs,
            blank=blank,
        )

    @property
    def running(self) -> bool:
        """Whether a process of it lives."""
        return self.process is not None and self.process.alive


class Process:
    """A running node: its control plane, its worker and their queues."""

    def __init__(self, machine: Machine, config: e.NodeConfig) -> None:
        self.machine = machine
        self.cluster = machine.cluster
        self.world = machine.world
        self.network = machine.cluster.network
        self.number = machine.number
        self.config = config
        self.boot_id = config.member.boot_id
        self.alive = True
        self.frozen = False
        """The whole process group is stopped."""

        self.stalled = False
        """The control plane does not get to run."""

        self.cluster_id = config.stored.cluster_id if config.stored else ""
        self.leads_in = 0
        """The term in which it says that it leads; 0 when it does not."""

        stream = self.world.stream(f"process/{self.boot_id}")
        self._random = stream
        draw = self.world.stream(f"draw/{self.boot_id}").random
        self.node = self.cluster.make_node(config, draw)
        self._waiting: deque[e.Input] = deque()
        self._alarm_at = inf
        self._order_at = self._report_at = 0.0
        self.worker = ToyWorker(self, config.model)
        for plane, address in self._addresses():
            self.network.listen(self, plane, address)
        self._feed(e.Ticked())

    def _addresses(self) -> tuple[tuple[Plane, str], ...]:
        return (
            (Plane.CONTROL, self.machine.address),
            (Plane.STEPS, self.machine.steps_address),
            (Plane.BULK, self.machine.bulk_address),
        )

    # --- the network ------------------------------------------------------------------------------

    def accepts(self) -> bool:
        """Whether its sockets answer."""
        return not self.frozen

    def reads(self, plane: Plane) -> bool:
        """Whether it takes frames out of its queues."""
        return not self.stalled if plane is Plane.CONTROL else self.worker.reads(plane)

    def link_up(self, plane: Plane, address: str) -> None:
        """Its link is connected."""
        if plane is Plane.CONTROL:
            self.take(e.LinkUp(address=address))
        else:
            self.worker.link_changed(plane, address, up=True)

    def link_down(self, plane: Plane, address: str) -> None:
        """Its link lost its connection."""
        if plane is Plane.CONTROL:
            self.take(e.LinkDown(address=address))
        else:
            self.worker.link_changed(plane, address, up=False)

    def arrived(self, plane: Plane, route: bytes, link: str, frame: bytes) -> None:
        """A frame came; nobody asks for one while this process does not read."""
        if plane is not Plane.CONTROL:
            self.worker.arrived(plane, route, frame)
            return
        message = decode(frame, Plane.CONTROL)
        assert isinstance(message, ControlMessage)
        self.world.trace.note(self.world.now, self.number, "got", frame, message)
        self._handle(e.Received(message=message, route=route, link=link))

    # --- inputs -----------------------------------------------------------------------------------

    def take(self, event: e.Input) -> None:
        """Something happens to the node, now or when it gets to run."""
        if not self.alive:
            return
        if self.stalled:
            self._waiting.append(event)
        else:
            self._feed(event)

    def _feed(self, event: e.Input) -> None:
        self.world.trace.value(self.world.now, self.number, "in", event)
        self._handle(event)

    def _handle(self, event: e.Input) -> None:
        now = self.machine.seconds()
        try:
            outputs = self.node.handle(event, now)
        except Exception as error:  # whatever a node raises is a defect of it
            raise Violation(f"node{self.number}: {error!r} at {type(event).__name__}") from error
        for output in outputs:
            self._do(output)
        self._set_alarm(now)

    def _set_alarm(self, now: float) -> None:
        deadline = self.node.deadline
        if not self.alive or deadline == inf:
            return
        wait = max(0.0, deadline - now)
        when = self.world.now + wait / self.machine.rate + TICK_S
        if when < self._alarm_at:
            self._alarm_at = when
            self.world.at(when, self._alarm, when)

    def _alarm(self, when: float) -> None:
        if when != self._alarm_at or not self.alive:
            return
        self._alarm_at = inf
        if self.stalled:
            return
        now = self.machine.seconds()
        if now >= self.node.deadline:
            self._feed(e.Ticked())
        else:
            self._set_alarm(now)

    # --- standing still ---------------------------------------------------------------------------

    def stall(self, *, frozen: bool) -> None:
        """The control plane stops; `frozen`: so do sockets and worker."""
        self.stalled = True
        if frozen:
            self.frozen = True
            self.worker.hang()

    def go_on(self) -> None:
        """It runs again, and finds in its queues what came meanwhile."""
        if not self.alive:
            return
        self.stalled = False
        if self.frozen:
            self.frozen = False
            self.worker.move()
        while self._waiting and self.alive:
            self._feed(self._waiting.popleft())
        if self.alive:
            self.network.resumed(self, Plane.CONTROL)
        if not self.stalled:
            self.take(e.Ticked())

    def end(self, *, silent: bool, linger_s: float = 0.0) -> None:
        """The process is gone; its last words may still leave for `linger_s`."""
        self.alive = False
        self.worker.ended()
        self.machine.disk.crashed()
        self.network.died(self, silent=silent, linger_s=linger_s)

    # --- outputs ----------------------------------------------------------------------------------

    def _do(self, output: e.Output) -> None:
        if not self.alive:
            return
        match output:
            case e.Send():
                self._send(output)
            case e.Fact():
                self.world.trace.value(self.world.now, self.number, "fact", output)
                self.cluster.judge.fact(self, output)
                self.world.moment(type(output).__name__, self.number)
            case e.TellWorker():
                self._order(output.order)
            case e.ReplyTo():
                self._reply(output)
            case e.Persist():
                self.world.trace.value(self.world.now, self.number, "out", output)
                self.cluster.judge.persist(self, output)
                self.machine.disk.persist(output, self._persisted)
                self.world.moment("Persist", self.number)
            case _:
                self.world.trace.value(self.world.now, self.number, "out", output)
                self._do_more(output)

    def _persisted(self, event: e.Input, state: e.StoredState | None) -> None:
        if state is not None and isinstance(event, e.Persisted):
            self.cluster.judge.stored(self, state)
        self.take(event)

    def _do_more(self, output: e.Output) -> None:
        match output:
            case e.OpenLink():
                self.network.open(self, Plane.CONTROL, output.address)
            case e.CloseLink():
                self.network.close(self, Plane.CONTROL, output.address)
            case e.Probe():
                wait, refused = self.network.probe(self, output.address)
                answer = e.ProbeAnswered(address=output.address, refused=refused)
                self.world.later(wait, self.take, answer)
            case e.Deliver():
                self.cluster.clients.deliver(self, output)
            case e.Conclude():
                self.cluster.clients.conclude(self, output)
            case e.Exit():
                self.cluster.exited(self, output)

    def _send(self, output: e.Send) -> None:
        message = output.message
        frame = encode(message)
        self.world.trace.note(self.world.now, self.number, "send", frame, output)
        if not (self.cluster.losing and self.cluster.loses(message)):
            self.network.send(self, Plane.CONTROL, output.address, frame)
        self.cluster.judge.sent(self, message)
        if isinstance(message, MOMENTS):
            self.world.moment(type(message).__name__, self.number)

    def _reply(self, output: e.ReplyTo) -> None:
        frame = encode(output.message)
        self.world.trace.note(self.world.now, self.number, "reply", frame, output)
        if output.route.startswith(b"c"):
            self.cluster.clients.answer(self, output.route, output.message)
        elif not (self.cluster.losing and self.cluster.loses(output.message)):
            self.network.reply(self, output.route, frame)

    # --- the worker's pipe ------------------------------------------------------------------------

    def _order(self, order: e.AnyOrder) -> None:
        self.world.trace.value(self.world.now, self.number, "order", order)
        self.cluster.judge.order(self, order)
        self._order_at = max(self._order_at, self.world.now + self._random.uniform(*PIPE_S))
        self.world.at(self._order_at, self.worker.order, order)
        self.world.moment(type(order).__name__, self.number)

    def report(self, report: e.AnyReport) -> None:
        """The worker says something."""
        self._report_at = max(self._report_at, self.world.now + self._random.uniform(*PIPE_S))
        self.world.at(self._report_at, self.take, e.WorkerSaid(report=report))
        self.cluster.judge.report(self, report)
        self.world.moment(type(report).__name__, self.number)
