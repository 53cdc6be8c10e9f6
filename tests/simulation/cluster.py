"""Several true nodes in one process: time, network, workers and clients are simulated, from a seed.

Messages go through the true codec. A link keeps the order of what it carries and loses what it
holds when it breaks, as a ZeroMQ connection does; delays, loading times and the order of events
that happen at once come from the seed. The worker "loads" a plan by waiting, and draws token i of
a reply by `toy_token`, so any correct cluster draws the same tokens.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.types import DType, Fence, Member, ModelSpec, Plan, SamplingParams
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import ControlMessage, DrawnToken, Failed

MODEL = ModelSpec(
    name="toy",
    model_id="ab" * 32,
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    intermediate_size=1024,
    vocab_size=512,
    max_positions=128,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
)
STEP_S = 0.02
STEP_TIMEOUT_S = 0.5
EOS = 0


def carried(frame: bytes) -> ControlMessage:
    """The message that a frame carries."""
    message = decode(frame)
    assert isinstance(message, ControlMessage)
    return message


def toy_token(prompt_ids: tuple[int, ...], index: int) -> int:
    """Token `index` of the reply to a prompt; sometimes the end of the text (0)."""
    return hash((prompt_ids, index)) % 37


def toy_reply(prompt_ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """The whole reply to a prompt."""
    tokens: list[int] = []
    while len(tokens) < max_tokens and EOS not in tokens:
        tokens.append(toy_token(prompt_ids, len(tokens)))
    return tuple(tokens)


@dataclass
class Client:
    """One submission: what it got, and how it ended (each end is noted, there must be one)."""

    host: Host
    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    ends: list[e.Conclude | Failed] = field(default_factory=list)
    accepted: int = 0


class ToyWorker:
    """A worker at the seam of orders and reports."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.loaded: Plan | None = None
        self.active: Plan | None = None
        self.requests: dict[int, tuple[tuple[int, ...], list[int], SamplingParams]] = {}
        self.load_error = ""
        self.held_up_since: float | None = None
        host.cluster.later(host.cluster.random.uniform(0, 0.5), host, self.begin)

    def begin(self) -> None:
        self.say(e.WorkerReady(numeric_class="toy", device="cpu", threads=1, memory_bytes=0))
        self.host.cluster.later(STEP_S, self.host, self.step)

    def say(self, report: e.AnyReport) -> None:
        self.host.take(e.WorkerSaid(report=report))

    def obey(self, order: e.AnyOrder) -> None:
        match order:
            case e.LoadPlan():
                self.loaded = self.active = None
                delay = self.host.cluster.random.uniform(0.01, 0.6)
                self.host.cluster.later(delay, self.host, partial(self.load, order))
            case e.ActivatePlan():
                assert self.loaded is not None and self.loaded.fence == order.fence
                self.active, self.held_up_since = self.loaded, None
            case e.StartRequest():
                assert order.request_id not in self.requests
                self.requests[order.request_id] = (
                    order.prompt_ids,
                    list(order.received),
                    order.params,
                )
            case e.CancelRequest():
                self.requests.pop(order.request_id, None)

    def load(self, order: e.LoadPlan) -> None:
        newest = self.host.last_load
        if newest is order:
            self.loaded = None if self.load_error else order.plan
            self.say(e.PlanLoaded(fence=order.plan.fence, error=self.load_error))

    def step(self) -> None:
        """One token of every request, if every member computes its part."""
        self.host.cluster.later(STEP_S, self.host, self.step)
        plan = self.active
        if plan is None or plan.members[plan.leader].node_id != self.host.node_id:
            return
        if not self.requests:
            return
        absent = [m.node_id for m in plan.members if not self.computes(m, plan.fence)]
        if absent:
            now = self.host.cluster.now
            if self.held_up_since is None:
                self.held_up_since = now
            elif now - self.held_up_since > STEP_TIMEOUT_S:
                self.active = None
                self.say(
                    e.StepFailed(fence=plan.fence, step=1, node_id=absent[0], reason="overdue")
                )
            return
        self.held_up_since = None
        self.draw()

    def computes(self, member: Member, fence: Fence) -> bool:
        host = self.host.cluster.host_at(member.address)
        if host is None or host.boot_id != member.boot_id:
            return False
        plan = host.worker.active
        return plan is not None and plan.fence == fence

    def draw(self) -> None:
        drawn, ended = [], []
        for request_id, (prompt_ids, tokens, params) in list(self.requests.items()):
            full = toy_reply(prompt_ids, params.max_tokens)
            if len(tokens) < len(full):
                token = full[len(tokens)]
                drawn.append(DrawnToken(request_id=request_id, index=len(tokens), token=token))
                tokens.append(token)
            if len(tokens) == len(full):
                del self.requests[request_id]
                reason = "stop" if tokens[-1] == EOS else "length"
                ended.append(
                    e.RequestEnded(request_id=request_id, reason=reason, total_tokens=len(tokens))
                )
        if drawn:
            self.say(e.TokensDrawn(tokens=tuple(drawn)))
        for report in ended:
            self.say(report)


@dataclass
class Wire:
    """One link of a host: to whom it is connected, and when its last message arrives."""

    address: str
    to: Host | None = None
    connection: int = 0
    arrives: float = 0.0
    back: float = 0.0


class Host:
    """A running process: a node, its worker and its links. A restart makes a new one."""

    def __init__(self, cluster: Cluster, config: e.NodeConfig) -> None:
        self.cluster = cluster
        self.config = config
        self.name = config.member.name
        self.node_id = config.member.node_id
        self.boot_id = config.member.boot_id
        self.address = config.member.address
        self.alive = True
        self.exit: e.Exit | None = None
        self.node = Node(config)
        self.wires: dict[str, Wire] = {}
        self.facts: list[e.Fact] = []
        self.last_load: e.LoadPlan | None = None
        self.worker = ToyWorker(self)
        self._alarm = 0
        self.take(e.Ticked())

    def take(self, event: e.Input) -> None:
        if not self.alive:
            return
        for output in self.node.handle(event, self.cluster.now):
            self.do(output)
        self.set_alarm(self.node.deadline)

    def set_alarm(self, deadline: float) -> None:
        self._alarm += 1
        if self.alive and deadline != float("inf"):
            wait = max(0.0, deadline - self.cluster.now)
            self.cluster.later(wait, self, partial(self.tick, self._alarm))

    def tick(self, alarm: int) -> None:
        if alarm == self._alarm:
            self.take(e.Ticked())

    def do(self, output: e.Output) -> None:
        match output:
            case e.Send():
                self.cluster.send(self, output.address, output.message)
            case e.ReplyTo():
                self.cluster.reply(self, output.route, output.message)
            case e.OpenLink():
                assert output.address not in self.wires
                wire = self.wires[output.address] = Wire(output.address)
                self.cluster.later(0.005, self, partial(self.connect, wire))
            case e.CloseLink():
                del self.wires[output.address]
            case e.Probe():
                answer = partial(self.probe, output.address)
                self.cluster.later(0.01, self, answer)
            case e.TellWorker():
                if isinstance(output.order, e.LoadPlan):
                    self.last_load = output.order
                self.worker.obey(output.order)
            case e.Deliver():
                self.cluster.deliver(output)
            case e.Conclude():
                self.cluster.clients[output.route].ends.append(output)
            case e.Exit():
                self.exit = output
                self.cluster.kill(self)
            case e.Fact():
                self.facts.append(output)

    def probe(self, address: str) -> None:
        refused = self.cluster.host_at(address) is None
        self.take(e.ProbeAnswered(address=address, refused=refused))

    def connect(self, wire: Wire) -> None:
        """Try to connect, again and again, as ZeroMQ does."""
        if self.wires.get(wire.address) is not wire or wire.to is not None:
            return
        target = self.cluster.host_at(wire.address)
        if target is None or not self.cluster.reaches(self, target):
            self.cluster.later(0.1, self, partial(self.connect, wire))
            return
        wire.to, wire.connection = target, wire.connection + 1
        self.take(e.LinkUp(address=wire.address))

    def disconnect(self, wire: Wire) -> None:
        wire.to = None
        if self.wires.get(wire.address) is wire:
            self.take(e.LinkDown(address=wire.address))
            self.cluster.later(0.1, self, partial(self.connect, wire))

    def told(self, kind: type[e.Fact]) -> list[e.Fact]:
        return [fact for fact in self.facts if isinstance(fact, kind)]


class Cluster:
    """The world: a clock, a queue of what will happen, the hosts and their clients."""

    def __init__(self, seed: int, *, delay: float = 0.002) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.delay = delay
        self.hosts: list[Host] = []
        self.clients: dict[bytes, Client] = {}
        self.cut: set[frozenset[str]] = set()
        self.losing: dict[type[ControlMessage], int] = {}
        """How many of the next messages of each kind are lost."""

        self._queue: list[tuple[float, float, int, Host | None, Callable[[], None]]] = []
        self._numbers = count()

    # --- time -------------------------------------------------------------------------------------

    def later(self, wait: float, host: Host | None, what: Callable[[], None]) -> None:
        entry = (self.now + wait, self.random.random(), next(self._numbers), host, what)
        heapq.heappush(self._queue, entry)

    def run(self, seconds: float) -> None:
        """Let that much time pass."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until the condition holds, at most so long; whether it does."""
        end = self.now + seconds
        while not condition():
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return condition()
            self.now, _, _, host, what = heapq.heappop(self._queue)
            if host is None or host.alive:
                what()
        return True

    # --- hosts ------------------------------------------------------------------------------------

    def start(
        self, number: int, *, join: tuple[int, ...] = (), boot: int = 0, **settings: object
    ) -> Host:
        """Start node `number`; `join` are the numbers of nodes to ask."""
        member = Member(
            node_id=f"{number:016x}",
            boot_id=f"{number * 1000 + boot:016x}",
            name=f"node{number}",
            address=address_of(number),
        )
        values: dict[str, object] = {
            "member": member,
            "model": MODEL,
            "cluster_id": f"{number * 100 + boot:016x}",
            "join": tuple(address_of(other) for other in join),
            **settings,
        }
        host = Host(self, e.NodeConfig(**values))  # type: ignore[arg-type]
        self.hosts.append(host)
        return host

    def flap(self, host: Host) -> None:
        """One of a host's connections breaks, and loses what it holds."""
        connected = [wire for wire in host.wires.values() if wire.to is not None]
        if connected:
            host.disconnect(self.random.choice(connected))

    def kill(self, host: Host) -> None:
        """The process is gone: its links break, at both ends."""
        host.alive = False
        for other in self.hosts:
            for wire in list(other.wires.values()):
                if other.alive and wire.to is host:
                    self.later(self.delay, other, partial(other.disconnect, wire))

    def host_at(self, address: str) -> Host | None:
        return next((h for h in self.hosts if h.alive and h.address == address), None)

    def living(self) -> list[Host]:
        return [host for host in self.hosts if host.alive]

    def reaches(self, one: Host, other: Host) -> bool:
        return frozenset((one.name, other.name)) not in self.cut

    def part(self, one: Host, other: Host) -> None:
        """Nothing passes between two hosts any more, and nobody is told."""
        self.cut.add(frozenset((one.name, other.name)))

    def heal(self, one: Host, other: Host) -> None:
        """The path works again; what it held is lost, so its connections begin anew."""
        self.cut.discard(frozenset((one.name, other.name)))
        for a, b in ((one, other), (other, one)):
            for wire in list(a.wires.values()):
                if wire.to is b:
                    a.disconnect(wire)

    def agreed(self) -> bool:
        """Whether all living hosts are ready, under one plan of exactly themselves."""
        hosts = self.living()
        boots = {host.boot_id for host in hosts}
        plans = [host.worker.active for host in hosts]
        fences = {plan.fence for plan in plans if plan}
        return len(fences) == 1 and all(
            host.node.ready and plan is not None and {m.boot_id for m in plan.members} == boots
            for host, plan in zip(hosts, plans, strict=True)
        )

    # --- messages ---------------------------------------------------------------------------------

    def send(self, host: Host, address: str, message: ControlMessage) -> None:
        wire = host.wires[address]
        target, frame = wire.to, encode(message)
        if target is None or self.loses(message):
            return
        route = f"{host.boot_id}>{address}".encode()

        connection = wire.connection

        def arrive() -> None:
            held = wire.to is target and wire.connection == connection
            if held and self.reaches(host, target):
                target.take(e.Received(message=carried(frame), route=route))

        wire.arrives = max(wire.arrives, self.now + self.random.uniform(0, 2 * self.delay))
        self.later_in_order(wire.arrives, target, arrive)

    def reply(self, host: Host, route: bytes, message: ControlMessage) -> None:
        if route in self.clients:
            client = self.clients[route]
            if isinstance(message, Failed):
                client.ends.append(message)
            else:
                client.accepted += 1
            return
        boot_id, address = route.decode().split(">")
        target = next(h for h in self.hosts if h.boot_id == boot_id)
        wire, frame = target.wires.get(address), encode(message)
        if wire is None or wire.to is not host or self.loses(message):
            return
        connection = wire.connection

        def arrive() -> None:
            held = target.wires.get(address) is wire and wire.connection == connection
            if held and wire.to is host and self.reaches(host, target):
                target.take(e.Received(message=carried(frame), link=address))

        wire.back = max(wire.back, self.now + self.random.uniform(0, 2 * self.delay))
        self.later_in_order(wire.back, target, arrive)

    def loses(self, message: ControlMessage) -> bool:
        left = self.losing.get(type(message), 0)
        self.losing[type(message)] = max(0, left - 1)
        return left > 0

    def later_in_order(self, at: float, host: Host, what: Callable[[], None]) -> None:
        """As `later`, but what was queued first for the same moment happens first."""
        heapq.heappush(self._queue, (at, -1.0, next(self._numbers), host, what))

    # --- clients ----------------------------------------------------------------------------------

    def submit(
        self,
        host: Host,
        request_id: int,
        prompt_ids: tuple[int, ...] = (1, 2, 3),
        *,
        max_tokens: int = 8,
        received: tuple[int, ...] = (),
    ) -> Client:
        """A new connection submits; returns what it gets."""
        params = SamplingParams(max_tokens=max_tokens)
        client = Client(host, request_id, prompt_ids, params, list(received))
        route = f"client {len(self.clients)}".encode()
        self.clients[route] = client
        host.take(
            e.ClientSubmitted(
                route=route,
                request_id=request_id,
                prompt_ids=prompt_ids,
                received=received,
                params=params,
            )
        )
        return client

    def deliver(self, output: e.Deliver) -> None:
        client = self.clients[output.route]
        assert not client.ends, "tokens after the end"
        assert output.start == len(client.tokens), "a gap or a repetition"
        client.tokens += output.tokens


def address_of(number: int) -> str:
    return f"tcp://10.0.0.{number}:7720"
