"""Members, logs and the parts of a cluster that make plans: for tests of those parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.agreement import Agreed
from p2pinfer.core.durable import Durable
from p2pinfer.core.orders import KeptInputs
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_holder import PlanHolder
from p2pinfer.core.plan_maker import PlanMaker
from p2pinfer.core.plan_rules import View
from p2pinfer.types import Fence, Member, Plan, SamplingParams
from p2pinfer.wire import messages as m
from tests.model_specs import TWO_LAYERS

T = TypeVar("T")
CLUSTER = "c" * 16
MODEL = TWO_LAYERS


def member(number: int, *, boot: int = 0, **values: Any) -> Member:
    """Member `number`, in one of its lives; its memory is kept over them, unless said otherwise."""
    fields = {
        "node_id": f"{number:016x}",
        "boot_id": f"{number * 256 + boot:016x}",
        "name": f"node{number}",
        "address": f"tcp://h{number}:7720",
        "numeric_class": "n",
        "memory": f"{number * 256:016x}",
        **values,
    }
    return Member(**fields)


def log(tokens: str, *, term: int = 4, request_id: int = 1) -> e.TokenLog:
    """A log whose tokens are letters."""
    return e.TokenLog(
        request_id=request_id,
        term=term,
        prompt_tokens=1,
        params=SamplingParams(),
        tokens=tuple(map(ord, tokens)),
    )


class Requests:
    """Stands for the request log: what it was told, and which logs it does not want."""

    def __init__(self) -> None:
        self.unwanted: set[int] = set()
        self.largest = 0
        self.running = 0
        self.adopted: list[tuple[tuple[Agreed, ...], tuple[str, ...], float, bool]] = []

    def wants(self, request_id: int) -> bool:
        return request_id not in self.unwanted

    def adopt(
        self,
        agreed: tuple[Agreed, ...],
        lost: tuple[str, ...],
        detect_s: float,
        exact: bool,
        now: float,
    ) -> None:
        self.adopted.append((agreed, lost, detect_s, exact))


class Desk:
    """What both kinds of bench share: outputs taken out of an outbox, by kind."""

    def __init__(self, me: Member) -> None:
        self.me = me
        self.now = 100.0
        self.box = Outbox(me.node_id, lambda node_id: node_id)
        self._outputs: list[e.Output] = []

    def told(self, kind: type[T]) -> list[T]:
        """Outputs of a kind since the last call of this."""
        self._outputs += self.box.take()
        found = [o for o in self._outputs if isinstance(o, kind)]
        self._outputs = [o for o in self._outputs if not isinstance(o, kind)]
        return found

    def ordered(self, kind: type[T]) -> list[T]:
        """Orders of a kind since the last call of this or of `told(TellWorker)`."""
        self._outputs += self.box.take()
        found = [o for o in self._outputs if isinstance(o, e.TellWorker)]
        self._outputs = [
            o
            for o in self._outputs
            if not (isinstance(o, e.TellWorker) and isinstance(o.order, kind))
        ]
        return [o.order for o in found if isinstance(o.order, kind)]

    def sent(self, kind: type[T]) -> list[tuple[int, T]]:
        """Messages of a kind, with the numbers of their receivers, since the last call of this."""
        mine = [s for s in self.box.to_self if isinstance(s, kind)]
        for message in mine:
            self.box.to_self.remove(message)  # type: ignore[arg-type]
        self._outputs += self.box.take()
        found = [o for o in self._outputs if isinstance(o, e.Send) and isinstance(o.message, kind)]
        self._outputs = [o for o in self._outputs if o not in found]
        number = int(self.me.node_id, 16)
        out = [(int(o.address, 16), o.message) for o in found if isinstance(o.message, kind)]
        return [(number, message) for message in mine] + out


class Holding(Desk):
    """One node's `PlanHolder`, its disk and its worker under the test's control."""

    def __init__(self, number: int, stored: e.StoredState | None = None, **values: Any) -> None:
        super().__init__(member(number, **values))
        self.durable = Durable(stored, self.me.boot_id, self.box)
        model = None if self.me.witness else MODEL
        self.holder = PlanHolder(self.me, model, self.durable, self.box)

    def propose(self, plan: Plan, *, cluster: str = CLUSTER, sender: int = 1) -> None:
        self.holder.propose(m.Propose(plan=plan), cluster, member(sender).node_id, self.now)

    def persist(self) -> None:
        """The disk has written all that it was given."""
        numbers = [o.number for o in self.told(e.Persist)]
        self.durable.persisted(max(numbers, default=0), self.now)

    def load(
        self, plan: Plan, *logs: e.TokenLog, covered: int = 0, inputs: int = 0, error: str = ""
    ) -> None:
        """The worker has loaded a plan; it has these logs, all with so much KV of its units, and
        with so many inputs."""
        coverage = tuple(
            e.Covered(request_id=o.request_id, stage=number, units=units, positions=covered)
            for o in logs
            for number, units in self._head_units(plan)
            if covered
        )
        kept = tuple(
            KeptInputs(request_id=o.request_id, stage=0, positions=inputs) for o in logs if inputs
        )
        report = e.PlanLoaded(
            fence=plan.fence, logs=logs, coverage=coverage, inputs=kept, error=error
        )
        self.holder.loaded(report)

    def _head_units(self, plan: Plan) -> Iterator[tuple[int, tuple[int, ...]]]:
        """By stage, the head units that this node owns or keeps by a plan."""
        lives = [(each.node_id, each.boot_id) for each in plan.members]
        me = lives.index((self.me.node_id, self.me.boot_id))
        for number, stage in enumerate(plan.stages):
            kept = stage.head_standbys or ((),) * len(stage.head_owners)
            named = zip(stage.head_owners, kept, strict=True)
            units = tuple(u for u, (owner, more) in enumerate(named) if me in (owner, *more))
            if units:
                yield number, units

    def ready(self, plan: Plan, *logs: e.TokenLog, covered: int = 0, inputs: int = 0) -> None:
        """Take a plan and acknowledge it."""
        if not self.holder.worker_ready:
            self.holder.worker_started()
        self.propose(plan)
        self.persist()
        self.load(plan, *logs, covered=covered, inputs=inputs)

    def activate(self, plan: Plan, *logs: m.AgreedLog, listeners: tuple[int, ...] = ()) -> None:
        self.holder.activate(m.Activate(fence=plan.fence, logs=logs), self.now, listeners)

    def dropped(self) -> list[str]:
        return [fact.reason for fact in self.told(e.FrameDropped)]


class Office(Desk):
    """The `PlanMaker` of node 1; the test plays the members, and says how they look."""

    def __init__(
        self,
        count: int = 3,
        *,
        base: Plan | None = None,
        base_active: bool = True,
        term: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(member(1))
        self.members = {n + 1: member(n + 1) for n in range(count)}
        values = {"member": self.me, "model": MODEL, "cluster_id": CLUSTER, **settings}
        self.config = e.NodeConfig(**values)
        self.requests = Requests()
        self.maker = PlanMaker(
            self.config,
            MODEL,
            term,
            base,
            base_active,
            self.box,
            self.requests,  # type: ignore[arg-type]
        )
        self.sees: dict[str, Any] = {}
        self.quiet_since = 0.0

    @property
    def plan(self) -> Plan:
        """The newest plan."""
        assert self.maker.target is not None
        return self.maker.target

    def look(self, wait: float = 0.0, **sees: Any) -> None:
        """The leader looks around, `wait` seconds later; what it sees stays until said anew."""
        self.now += wait
        self.sees.update(sees)
        living = tuple(self.members.values())
        values: dict[str, Any] = {
            "living": living,
            "reached": frozenset(each.node_id for each in living),
            "suspects": (),
            "worker_ready": True,
            "quiet_since": self.quiet_since,
            **{
                name: frozenset()
                for name in ("lost", "hung", "outcasts", "slow", "draining", "paused")
            },
            **self.sees,
        }
        unready = {member(n).node_id for n in values.pop("unready", ())}
        if self.maker.target is not None:
            values["standbys_ready"] = {
                each.node_id: self.maker.target.fence
                for each in living
                if each.node_id not in unready
            }
        for name in ("reached", "lost", "hung", "outcasts", "slow", "draining", "paused"):
            numbers = values[name]
            values[name] = frozenset(
                member(n).node_id if isinstance(n, int) else n for n in numbers
            )
        self.maker.look(View(**values), self.now)

    def lose(self, number: int, silence_s: float = 0.7) -> None:
        """A member dies."""
        gone = self.members.pop(number)
        self.maker.lost(gone, silence_s)
        self.sees["lost"] = {*self.sees.get("lost", ()), number}
        self.quiet_since = self.now

    def join(self, number: int, **values: Any) -> None:
        """A member comes, or comes back."""
        self.members[number] = member(number, **values)
        self.sees["lost"] = set(self.sees.get("lost", ())) - {number}
        self.quiet_since = self.now

    def ack(
        self,
        *numbers: int,
        logs: dict[int, list[e.TokenLog]] | None = None,
        covered: int | None = None,
        inputs: int = 0,
    ) -> None:
        """Members acknowledge the newest plan, with these logs, KV of all of their tokens, unless
        said otherwise, and inputs."""
        for number in numbers:
            its = (logs or {}).get(number, [])
            holding = Holding(number, boot=self.boot_of(number))
            longest = max((len(o.tokens) for o in its), default=0)
            holding.ready(
                self.plan, *its, covered=longest if covered is None else covered, inputs=inputs
            )
            for _, message in holding.sent(m.Ack):
                self.maker.ack(message, self.now)

    def boot_of(self, number: int) -> int:
        """Which life of a member is listed."""
        boots = [o.boot_id for o in self.plan.members if o.node_id == member(number).node_id]
        return int(boots[0], 16) - 256 * number

    def nack(self, number: int, text: str = "no memory", about: str = "") -> bool:
        """A member says that it cannot."""
        node_id = member(number).node_id
        nack = m.Nack(
            fence=self.plan.fence, node_id=node_id, code="internal", message=text, about=about
        )
        return self.maker.nack(nack, self.now)

    def obey(self, *numbers: int) -> None:
        """Heartbeats say that members obey the newest plan."""
        for number in numbers:
            self.maker.obeys(member(number).node_id, self.plan.fence)

    def adopt(self, *numbers: int) -> Plan:
        """The newest plan comes into force on all of those."""
        self.ack(*numbers)
        assert self.maker.activated
        self.obey(*numbers)
        return self.plan

    def served(self) -> Plan:
        """Look until nothing more is to be proposed; the plan that is in force then."""
        for _ in range(20):
            self.look(1.0)
            if self.maker.activated:
                return self.plan
            self.adopt(*self.members)
        raise AssertionError("it proposes for ever")

    def proposed(self) -> list[str]:
        """Why plans were proposed since the last call of this."""
        return [fact.why for fact in self.told(e.PlanProposed)]

    def owners(self) -> set[int]:
        """Numbers of the members that own anything."""
        return {number for number in range(1, 20) if self.units(number)}

    def units(self, number: int) -> int:
        """How many head units a member owns."""
        ids = [each.node_id for each in self.plan.members]
        if member(number).node_id not in ids:
            return 0
        index = ids.index(member(number).node_id)
        return sum(stage.head_owners.count(index) for stage in self.plan.stages)

    def voters(self) -> set[int]:
        """Numbers of the plan's voters."""
        return {int(self.plan.members[index].node_id, 16) for index in self.plan.voters}


def renamed(plan: Plan, fence: Fence, **values: Any) -> Plan:
    """The same plan under another fence."""
    return replace(plan, fence=fence, **values)


def serving(count: int = 3, **settings: object) -> Office:
    """A leader whose plan is in force on `count` members, all of them voters."""
    bench = Office(count, **settings)
    bench.served()
    bench.proposed()
    bench.told(e.PlanFailed)
    return bench


def plan_of(count: int) -> Plan:
    """The plan of term 1 with which a cluster of `count` nodes settled."""
    return serving(count).plan
