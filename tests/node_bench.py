"""One whole node under test: its clock, its disk, and the members that it hears."""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.core.planner import make_plan
from p2pinfer.types import Fence, Member, Plan, SamplingParams
from p2pinfer.wire import messages as m
from tests.plan_bench import CLUSTER, MODEL, member

__all__ = ["CLUSTER", "MODEL", "Bench", "heartbeat", "hello", "member", "plan_of"]

T = TypeVar("T")
ME = 5
FIRST = Fence(1, 1)
PERIOD = 0.1
"""The heartbeat period of the preset that these nodes run with."""


def hello(who: Member, **values: Any) -> m.Hello:
    """A HELLO that fits this model."""
    fields: dict[str, Any] = {
        "versions": (1,),
        "member": who,
        "model_id": MODEL.model_id,
        "dtype": "float32",
        "quant": "none",
        **values,
    }
    return m.Hello(**fields)


def heartbeat(who: Member, **values: Any) -> m.Heartbeat:
    """A heartbeat of an idle member."""
    fields: dict[str, Any] = {"incarnation": 0, "term": 1, "fence": Fence(), **values}
    return m.Heartbeat(node_id=who.node_id, boot_id=who.boot_id, **fields)


def plan_of(*members: Member, fence: Fence = FIRST, **values: Any) -> Plan:
    """The plan of a leader, the first of the members, who all vote; `values` replace fields."""
    plan = make_plan(
        members=members,
        model=MODEL,
        layout="heads",
        fence=fence,
        cluster_id=CLUSTER,
        leader_id=members[0].node_id,
    )
    return replace(plan, **values)


def is_load(output: e.TellWorker) -> bool:
    """Whether this is an order to load a plan."""
    return isinstance(output.order, e.LoadPlan)


class Bench:
    """One node, number 5, and what it wanted done since the last look.

    Its disk writes at once, unless `slow_disk`.
    """

    def __init__(
        self, *, join: tuple[int, ...] = (), slow_disk: bool = False, **settings: Any
    ) -> None:
        values: dict[str, Any] = {
            "member": member(ME),
            "model": MODEL,
            "cluster_id": CLUSTER,
            "join": tuple(member(n).address for n in join),
            **settings,
        }
        self.me: Member = values["member"]
        """As it last described itself to others."""
        self.node = Node(e.NodeConfig(**values), lambda: 0.5)
        self.now = 100.0
        self.outputs: list[e.Output] = []
        self.slow_disk = slow_disk
        self.stats: e.WorkerStats | None = None
        """What its worker says every now and then; None: it has not started, or says nothing."""
        self.said: dict[Member, dict[str, Any]] = {}
        """What each member says in the heartbeats that `run` gives."""
        self.stored: e.StoredState | None = values.get("stored")
        self.take(e.Ticked())

    # --- inputs -----------------------------------------------------------------------------------

    def take(self, event: e.Input) -> list[e.Output]:
        """Give one input, and what the disk says of it; returns all outputs."""
        found = self.node.handle(event, self.now)
        self.outputs += found
        for output in found:
            message = output.message if isinstance(output, e.Send | e.ReplyTo) else None
            if isinstance(message, m.Hello | m.Welcome):
                self.me = message.member
        writes = [o for o in found if isinstance(o, e.Persist)]
        if writes:
            self.stored = writes[-1].state
        if writes and not self.slow_disk:
            found += self.take(e.Persisted(number=writes[-1].number))
        return found

    def run(self, seconds: float, *speakers: Member, **values: Any) -> None:
        """Time passes; the node runs when it wants to, its worker speaks, and so do the speakers,
        who send heartbeats.
        """
        end = self.now + seconds
        beat_at = self.now
        while self.now < end:
            if self.now >= beat_at:
                beat_at += PERIOD
                if self.stats is not None:
                    self.worker(self.stats)
                for who in speakers:
                    self.beat(who, **values)
            wanted = max(self.node.deadline, self.now + 0.001)
            self.now = min(wanted, beat_at, end)
            self.take(e.Ticked())

    def hear(self, sender: Member, message: m.ControlMessage) -> list[e.Output]:
        """A message that a member sent on its own link to this node."""
        return self.take(e.Received(message=message, route=sender.name.encode()))

    def answer(self, sender: Member, message: m.ControlMessage) -> list[e.Output]:
        """A message that came back on this node's link to a member."""
        return self.take(e.Received(message=message, link=sender.address))

    def beat(self, who: Member, **values: Any) -> None:
        """A heartbeat of a member, which hears everybody, but for `values` as it said last."""
        said = {
            "sent_at_ms": round(self.now * 1000),
            "hears_control": tuple(f"{n:016x}" for n in range(1, 17) if member(n) != who),
            **self.said.get(who, {}),
        }
        self.hear(who, heartbeat(who, **{**said, **values}))

    def worker(self, report: e.AnyReport) -> list[e.Output]:
        """The worker says something."""
        return self.take(e.WorkerSaid(report=report))

    def worker_ready(self, memory_bytes: int = 0) -> list[e.Output]:
        """The worker has started."""
        self.stats = self.stats or e.WorkerStats()
        return self.worker(
            e.WorkerReady(numeric_class="n", device="cpu", threads=2, memory_bytes=memory_bytes)
        )

    def client(self, message: m.ControlMessage, route: bytes = b"client") -> list[e.Output]:
        """A message of a client."""
        return self.take(e.Received(message=message, route=route))

    def submit(self, request_id: int = 1, **values: Any) -> list[e.Output]:
        """A client of this node submits a request."""
        fields: dict[str, Any] = {
            "prompt_ids": (1, 2),
            "received": (),
            "params": SamplingParams(),
            **values,
        }
        return self.take(e.ClientSubmitted(route=b"client", request_id=request_id, **fields))

    # --- a cluster --------------------------------------------------------------------------------

    def welcome(self, who: Member, *others: Member, cluster: str = CLUSTER) -> m.Welcome:
        """That member's answer to this node's greeting."""
        return m.Welcome(version=1, member=who, cluster_id=cluster, leader_id="", members=others)

    def meet(self, *members: Member, cluster: str = CLUSTER) -> None:
        """Those nodes greet this one and answer its greeting."""
        for who in members:
            self.hear(who, hello(who))
            self.take(e.LinkUp(address=who.address))
            self.answer(who, self.welcome(who, cluster=cluster))

    def load_all(self, *members: Member) -> None:
        """All plans of this leader are loaded by all, until it wants nothing more."""
        while any(isinstance(o, e.TellWorker) and is_load(o) for o in self.outputs):
            self.load(*members)
            self.run(0.15, *members)

    def load(self, *members: Member, logs: tuple[e.TokenLog, ...] = ()) -> Fence:
        """The newest plan of this leader is loaded by all, and in force."""
        fence = self.ordered(e.LoadPlan)[-1].plan.fence
        self.worker(e.PlanLoaded(fence=fence, logs=logs))
        for who in members:
            self.hear(who, m.Ack(fence=fence, node_id=who.node_id))
            self.said[who] = {"fence": fence}
            self.beat(who)
        return fence

    # --- outputs ----------------------------------------------------------------------------------

    def told(self, kind: type[T]) -> list[T]:
        """Outputs of a kind since the last call of this."""
        found = [o for o in self.outputs if isinstance(o, kind)]
        self.outputs = [o for o in self.outputs if not isinstance(o, kind)]
        return found

    def sent(self, kind: type[T]) -> list[tuple[str, T]]:
        """Messages of a kind that it sent on its links since the last call of this."""
        pairs = [(o, o.message) for o in self.outputs if isinstance(o, e.Send)]
        found = [(o, message) for o, message in pairs if isinstance(message, kind)]
        gone = {id(o) for o, _ in found}
        self.outputs = [o for o in self.outputs if id(o) not in gone]
        return [(o.address, message) for o, message in found]

    def replied(self, kind: type[T]) -> list[T]:
        """Messages of a kind that it sent back since the last call of this."""
        pairs = [(o, o.message) for o in self.outputs if isinstance(o, e.ReplyTo)]
        found = [(o, message) for o, message in pairs if isinstance(message, kind)]
        gone = {id(o) for o, _ in found}
        self.outputs = [o for o in self.outputs if id(o) not in gone]
        return [message for _, message in found]

    def ordered(self, kind: type[T]) -> list[T]:
        """Orders of a kind to the worker since the last call of this."""
        pairs = [(o, o.order) for o in self.outputs if isinstance(o, e.TellWorker)]
        found = [(o, order) for o, order in pairs if isinstance(order, kind)]
        gone = {id(o) for o, _ in found}
        self.outputs = [o for o in self.outputs if id(o) not in gone]
        return [order for _, order in found]

    def ended(self) -> tuple[str, int] | None:
        """Error and exit code of the process, if it ended."""
        found = self.told(e.Exit)
        assert len(found) <= 1
        return (found[0].error, found[0].exit_code) if found else None

    def states(self) -> dict[str, str]:
        """What it believes of each other member."""
        rows = self.node.status(self.now)["members"]
        return {row["name"]: row["state"] for row in rows if row["name"] != self.me.name}

    # --- situations -------------------------------------------------------------------------------

    @classmethod
    def leader(cls, *members: Member, **settings: Any) -> Bench:
        """A founder with those followers under one plan in force, in term 1."""
        bench = cls(**{"min_nodes": len(members) + 1, **settings})
        bench.worker_ready()
        bench.meet(*members)
        bench.run(0.35, *members)
        bench.load_all(*members)
        assert bench.node.ready
        bench.outputs.clear()
        return bench

    @classmethod
    def joined(cls, *members: Member, **settings: Any) -> Bench:
        """A node without state that joined those members, and follows the first, in term 1."""
        numbers = tuple(int(who.node_id, 16) for who in members)
        bench = cls(**{"join": numbers, **settings})
        for who in members:
            bench.take(e.LinkUp(address=who.address))
            bench.answer(who, bench.welcome(who, *(o for o in members if o is not who)))
            bench.hear(who, hello(who, cluster_id=CLUSTER))
        bench.said[members[0]] = {"leader_id": members[0].node_id}
        bench.run(0.15, *members)
        bench.outputs.clear()
        return bench

    @classmethod
    def follower(cls, *members: Member, **settings: Any) -> Bench:
        """A node under a plan in force of those members, of whom the first leads, and itself."""
        bench = cls.joined(*members, **settings)
        bench.worker_ready()
        plan = plan_of(*members, bench.me)
        bench.take_up(plan)
        for who in members:
            bench.said.setdefault(who, {})["fence"] = plan.fence
        bench.run(0.15, *members)
        assert bench.node.ready
        bench.outputs.clear()
        return bench

    def take_up(self, plan: Plan, logs: tuple[e.TokenLog, ...] = ()) -> None:
        """The leader of a plan proposes it and puts it in force."""
        leader = plan.members[plan.leader]
        self.hear(leader, m.Propose(plan=plan))
        self.worker(e.PlanLoaded(fence=plan.fence, logs=logs))
        self.hear(leader, m.Activate(fence=plan.fence))


def answers(bench: Bench) -> list[str]:
    """How its clients' wishes were answered: `done`, or the code of the failure."""
    messages = [reply.message for reply in bench.told(e.ReplyTo)]
    return [
        "done" if isinstance(message, m.Done) else message.code
        for message in messages
        if isinstance(message, m.Done | m.Failed)
    ]
