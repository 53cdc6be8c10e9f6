"""A node's decisions one by one: inputs in, outputs out."""

from __future__ import annotations

from math import inf
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.core.planner import make_plan
from p2pinfer.types import Fence, Member, ModelSpec, Plan, SamplingParams
from p2pinfer.wire import messages as m
from tests.simulation.cluster import MODEL

T = TypeVar("T")
CLUSTER = "c" * 16
ME = 5
FIRST = Fence(1, 1)


def member(number: int, *, boot: int = 0, **values: Any) -> Member:
    """Member `number`, in one of its lives."""
    fields = {
        "node_id": f"{number:016x}",
        "boot_id": f"{number * 100 + boot:016x}",
        "name": f"node{number}",
        "address": f"tcp://h{number}:7720",
        "numeric_class": "n",
        **values,
    }
    return Member(**fields)


def hello(who: Member, **values: Any) -> m.Hello:
    """A HELLO that fits this model."""
    fields = {
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
    fields = {"incarnation": 0, "term": 1, "fence": Fence(), **values}
    return m.Heartbeat(node_id=who.node_id, boot_id=who.boot_id, **fields)


class Bench:
    """One node under test, its clock, and what it wanted done since the last look."""

    def __init__(self, *, join: tuple[int, ...] = (), number: int = ME, **settings: Any) -> None:
        values = {
            "member": member(number),
            "model": MODEL,
            "cluster_id": CLUSTER,
            "join": tuple(member(n).address for n in join),
            **settings,
        }
        self.me = values["member"]
        self.node = Node(e.NodeConfig(**values))
        self.now = 100.0
        self.outputs: list[e.Output] = []
        self.tick()

    def take(self, event: e.Input) -> list[e.Output]:
        found = self.node.handle(event, self.now)
        self.outputs += found
        return found

    def tick(self, wait: float = 0.0) -> list[e.Output]:
        self.now += wait
        return self.take(e.Ticked())

    def hear(self, sender: Member, message: m.ControlMessage) -> list[e.Output]:
        return self.take(e.Received(message=message, route=sender.name.encode()))

    def answer(self, sender: Member, message: m.ControlMessage) -> list[e.Output]:
        return self.take(e.Received(message=message, link=sender.address))

    def beat(self, *members: Member) -> None:
        """A heartbeat of each of those members."""
        for who in members:
            self.hear(who, heartbeat(who))

    def worker(self, report: e.AnyReport) -> list[e.Output]:
        return self.take(e.WorkerSaid(report=report))

    def worker_ready(self, memory_bytes: int = 0) -> list[e.Output]:
        return self.worker(
            e.WorkerReady(numeric_class="n", device="cpu", threads=2, memory_bytes=memory_bytes)
        )

    def meet(self, *members: Member) -> None:
        """Those nodes greet this one and are greeted back."""
        for who in members:
            self.hear(who, hello(who))
            self.take(e.LinkUp(address=who.address))
            self.answer(who, self.welcome(who))

    def welcome(self, who: Member, *others: Member, leader: Member | None = None) -> m.Welcome:
        return m.Welcome(
            version=1,
            member=who,
            cluster_id=CLUSTER,
            leader_id=(leader or self.me).node_id,
            members=others,
        )

    def joined(self, leader: Member, *others: Member) -> None:
        """Enter the cluster of that leader."""
        self.take(e.LinkUp(address=leader.address))
        self.answer(leader, self.welcome(leader, *others, leader=leader))
        self.hear(leader, hello(leader, cluster_id=CLUSTER))

    def told(self, kind: type[T]) -> list[T]:
        """Outputs of a kind since the last call of this."""
        found = [o for o in self.outputs if isinstance(o, kind)]
        self.outputs = [o for o in self.outputs if not isinstance(o, kind)]
        return found

    def sent(self, kind: type[T]) -> list[tuple[str, T]]:
        """Messages of a kind that it sent on its links since the last call of this."""
        found = [
            (o.address, o.message)
            for o in self.outputs
            if isinstance(o, e.Send) and isinstance(o.message, kind)
        ]
        self.outputs = [
            o for o in self.outputs if not (isinstance(o, e.Send) and isinstance(o.message, kind))
        ]
        return found

    def replied(self, kind: type[T]) -> list[T]:
        """Messages of a kind that it sent back since the last call of this."""
        return [r.message for r in self.told(e.ReplyTo) if isinstance(r.message, kind)]

    def ordered(self, kind: type[T]) -> list[T]:
        """Orders of a kind to the worker since the last call of this."""
        orders = [t.order for t in self.told(e.TellWorker)]
        return [order for order in orders if isinstance(order, kind)]

    def submit(self, request_id: int = 1, **values: Any) -> list[e.Output]:
        fields = {"prompt_ids": (1, 2), "received": (), "params": SamplingParams(), **values}
        return self.take(e.ClientSubmitted(route=b"client", request_id=request_id, **fields))

    def load(self, *members: Member) -> Fence:
        """This leader's newest plan is loaded by all, and in force."""
        fence = self.ordered(e.LoadPlan)[-1].plan.fence
        self.worker(e.PlanLoaded(fence=fence))
        for who in members:
            self.hear(who, m.Ack(fence=fence, node_id=who.node_id))
        for who in members:
            self.hear(who, heartbeat(who, fence=fence))
        return fence


def leader(*members: Member, **settings: Any) -> Bench:
    """A founder with those followers under one plan in force."""
    bench = Bench(min_nodes=len(members) + 1, **settings)
    bench.worker_ready()
    bench.meet(*members)
    bench.tick(0.3)
    bench.load(*members)
    assert bench.node.ready
    bench.outputs.clear()
    return bench


def follower(**settings: Any) -> Bench:
    """Node 5, led by node 1; node 2 is a member too."""
    bench = Bench(join=(1,), **settings)
    bench.joined(member(1), member(2))
    bench.take(e.LinkUp(address=member(2).address))
    bench.answer(member(2), bench.welcome(member(2), member(1), leader=member(1)))
    bench.outputs.clear()
    return bench


def plan_of(*members: Member, fence: Fence = FIRST, **values: Any) -> Plan:
    """The plan of a leader, the first of the members."""
    fields: dict[str, Any] = {"model": MODEL, "cluster_id": CLUSTER, **values}
    return make_plan(
        members=members, layout="heads", fence=fence, leader_id=members[0].node_id, **fields
    )


def adopted(**settings: Any) -> Bench:
    """A follower under a plan in force."""
    bench = follower(**settings)
    bench.worker_ready()
    bench.hear(member(1), m.Propose(plan=plan_of(member(1), member(2), bench.me)))
    bench.worker(e.PlanLoaded(fence=Fence(1, 1)))
    bench.hear(member(1), m.Activate(fence=Fence(1, 1)))
    for number in (1, 2):
        bench.hear(member(number), hello(member(number), cluster_id=CLUSTER))
        bench.hear(member(number), heartbeat(member(number), fence=Fence(1, 1)))
    bench.outputs.clear()
    return bench


# --- founding and joining -------------------------------------------------------------------------


def test_a_node_wants_the_time_at_once() -> None:
    """Before its first input a node's deadline has passed."""
    node = Node(e.NodeConfig(member=member(1), model=MODEL, cluster_id=CLUSTER))
    assert node.deadline == -inf


def test_without_join_a_node_founds_a_cluster() -> None:
    """A founder is the leader of term 1 and the only member."""
    bench = Bench()
    assert bench.told(e.LeaderElected) == [
        e.LeaderElected(name="node5", node_id=member(5).node_id, term=1)
    ]
    status = bench.node.status(bench.now)
    assert (status["cluster_id"], status["leader"], status["term"]) == (CLUSTER, "node5", 1)
    assert status["waiting"] == "this node's worker to start"
    assert not status["ready"]


def test_a_witness_cannot_found() -> None:
    """A witness without --join ends with a usage error."""
    bench = Bench(model=None)
    [end] = bench.told(e.Exit)
    assert end.exit_code == 2
    assert "--join" in end.error
    assert bench.node.deadline == inf
    assert bench.tick() == []


def test_a_joiner_greets_again_while_unanswered() -> None:
    """HELLO goes out when the link is up and every second until it is answered."""
    bench = Bench(join=(1,))
    assert bench.told(e.OpenLink) == [e.OpenLink(address="tcp://h1:7720")]
    assert bench.sent(m.Hello) == []
    bench.take(e.LinkUp(address="tcp://h1:7720"))
    bench.tick(0.9)
    bench.tick(0.2)
    assert len(bench.sent(m.Hello)) == 2
    bench.joined(member(1))
    bench.sent(m.Hello)
    bench.tick(1.1)
    assert bench.sent(m.Hello) == []


def test_a_joiner_opens_links_to_all_it_is_told_of() -> None:
    """WELCOME lists the members: the joiner opens a link to each, and follows the leader."""
    bench = Bench(join=(1,))
    bench.joined(member(2), member(1), bench.me)
    bench.take(e.LinkUp(address="tcp://h1:7720"))
    bench.answer(member(1), bench.welcome(member(1), member(2), member(3), leader=member(2)))
    opened = {o.address for o in bench.told(e.OpenLink)}
    assert opened == {f"tcp://h{n}:7720" for n in (1, 2, 3)}
    assert [fact.name for fact in bench.told(e.LeaderElected)] == ["node2"]


def test_a_link_through_another_address_gives_way_to_the_peers_own() -> None:
    """A --join address serves until the member's own address answers, and is closed then."""
    bench = Bench(join=(9,))
    alias, own = member(9), member(1)
    bench.take(e.LinkUp(address=alias.address))
    bench.answer(alias, bench.welcome(own, leader=own))
    assert e.OpenLink(address=own.address) in bench.told(e.OpenLink)
    bench.tick(0.1)
    assert [address for address, _ in bench.sent(m.Heartbeat)] == [alias.address]
    bench.take(e.LinkUp(address=own.address))
    bench.answer(own, bench.welcome(own, leader=own))
    assert bench.told(e.CloseLink) == [e.CloseLink(address=alias.address)]
    bench.tick(0.1)
    assert [address for address, _ in bench.sent(m.Heartbeat)] == [own.address]


def test_a_second_alias_is_closed_at_once() -> None:
    """An alias that answers after the member's own link did is closed."""
    bench = Bench(join=(1, 9))
    bench.joined(member(1))
    bench.take(e.LinkUp(address=member(9).address))
    bench.answer(member(9), bench.welcome(member(1), leader=member(1)))
    assert bench.told(e.CloseLink) == [e.CloseLink(address=member(9).address)]


def test_joining_gives_up_with_the_last_answer() -> None:
    """After join_timeout the node ends, saying whom it asked and what it last heard."""
    bench = Bench(join=(1,), join_timeout=7.0)
    bench.take(e.LinkUp(address=member(1).address))
    bench.answer(member(1), m.Refused(code="not_ready", message="still looking", retryable=True))
    assert bench.told(e.PeerRefused) == []
    assert bench.node.deadline == 101.0
    bench.tick(5.1)
    assert [fact.waited_s for fact in bench.told(e.JoinWaiting)] == [pytest.approx(5.1)]
    bench.tick(2)
    [end] = bench.told(e.Exit)
    assert end.exit_code == 1
    assert "tcp://h1:7720" in end.error
    assert "still looking" in end.error
    assert bench.ordered(e.StopWorker)


def test_a_refusal_for_good_ends_a_joiner() -> None:
    """A joiner that is refused for good says so and ends with that message."""
    bench = Bench(join=(1,))
    bench.take(e.LinkUp(address=member(1).address))
    bench.answer(member(1), m.Refused(code="wrong_model", message="another model"))
    [fact] = bench.told(e.PeerRefused)
    assert (fact.code, fact.by_us) == ("wrong_model", False)
    assert bench.told(e.Exit) == [e.Exit(error="another model", exit_code=1)]


def test_a_node_that_joins_itself_says_so() -> None:
    """When every --join address leads to the node itself it ends with a usage error."""
    bench = Bench(join=(9,))
    bench.take(e.LinkUp(address=member(9).address))
    bench.take(e.Received(message=hello(bench.me), route=b"self"))
    [refused] = bench.replied(m.Refused)
    assert refused.code == "identity_taken"
    bench.answer(member(9), refused)
    [end] = bench.told(e.Exit)
    assert end.exit_code == 2
    assert "itself" in end.error


def test_one_address_of_several_may_be_the_nodes_own() -> None:
    """A link to itself is closed, and the other addresses are still asked."""
    bench = Bench(join=(5, 8, 9))
    assert e.OpenLink(address=bench.me.address) not in bench.told(e.OpenLink)
    bench.take(e.LinkUp(address=member(9).address))
    bench.take(e.Received(message=hello(bench.me), route=b"self"))
    bench.answer(member(9), bench.replied(m.Refused)[0])
    assert bench.told(e.CloseLink) == [e.CloseLink(address=member(9).address)]
    assert bench.told(e.Exit) == []


def test_a_welcome_without_a_leader_is_no_cluster() -> None:
    """A WELCOME whose leader is not among its members, or is the joiner, is dropped."""
    bench = Bench(join=(1,))
    bench.take(e.LinkUp(address=member(1).address))
    bench.answer(member(1), bench.welcome(member(1), leader=member(2)))
    bench.answer(member(1), bench.welcome(member(1), bench.me, leader=bench.me))
    bench.answer(member(7), bench.welcome(member(7), leader=member(7)))
    assert len(bench.told(e.FrameDropped)) == 3
    assert bench.node.status(bench.now)["cluster_id"] == ""


def test_a_joiner_refuses_for_a_time() -> None:
    """A node that is still joining cannot welcome others: not_ready, retryable, and no fact."""
    bench = Bench(join=(1,))
    bench.hear(member(3), hello(member(3)))
    [refused] = bench.replied(m.Refused)
    assert (refused.code, refused.retryable) == ("not_ready", True)
    assert bench.told(e.PeerRefused) == []


# --- being greeted --------------------------------------------------------------------------------

OTHER_MODEL = "cd" * 32


@pytest.mark.parametrize(
    ("greeting", "code", "says"),
    [
        (hello(member(2), versions=(7, 9)), "wrong_version", ("1", "7, 9")),
        (hello(member(2), model_id=OTHER_MODEL), "wrong_model", ("abababababab", "cdcdcdcdcdcd")),
        (hello(member(2), model_id=""), "wrong_model", ("abababababab", "none")),
        (hello(member(2), dtype="bfloat16"), "wrong_settings", ("float32", "bfloat16")),
        (hello(member(2), quant="int8"), "wrong_settings", ("none", "int8")),
        (hello(member(2), cluster_id="d" * 16), "wrong_cluster", (CLUSTER, "d" * 16)),
        (hello(member(2, name="node5")), "name_taken", ("node5", "--name")),
        (hello(member(2, name="node3")), "name_taken", (member(3).node_id,)),
        (hello(member(5, boot=1, name="x")), "identity_taken", (member(5).node_id,)),
    ],
)
def test_who_does_not_fit_is_refused(greeting: m.Hello, code: str, says: tuple[str, ...]) -> None:
    """A refusal names what both sides have, and is a fact here too."""
    bench = Bench()
    bench.meet(member(3))
    bench.outputs.clear()
    bench.hear(member(2), greeting)
    [refused] = bench.replied(m.Refused)
    assert (refused.code, refused.retryable) == (code, False)
    assert all(text in refused.message for text in says)
    [fact] = bench.told(e.PeerRefused)
    assert (fact.code, fact.by_us) == (code, True)
    assert bench.told(e.PeerJoined) == []


def test_a_full_cluster_refuses_until_somebody_leaves() -> None:
    """The seventeenth node is refused, retryable; a member that greets again is not."""
    bench = Bench()
    numbers = [n for n in range(1, 17) if n != ME]
    bench.meet(*map(member, numbers))
    bench.outputs.clear()
    bench.hear(member(17), hello(member(17)))
    [refused] = bench.replied(m.Refused)
    assert (refused.code, refused.retryable) == ("cluster_full", True)
    bench.hear(member(1), hello(member(1)))
    assert bench.replied(m.Welcome)


def test_a_witness_needs_no_model() -> None:
    """A witness without a model is welcome, and a witness does not judge others' models."""
    bench = Bench()
    bench.hear(member(2), hello(member(2, witness=True), model_id="", dtype="", quant=""))
    assert bench.replied(m.Welcome)
    witness = Bench(join=(1,), model=None, member=member(5, witness=True))
    witness.joined(member(1))
    [greeting, *_] = [message for _, message in witness.sent(m.Hello)]
    assert greeting.model_id == ""
    assert witness.replied(m.Welcome)


def test_greeting_twice_is_greeting_once() -> None:
    """The same life of a node greets again: it is welcomed again, and has not joined again."""
    bench = Bench()
    bench.meet(member(2))
    bench.hear(member(2), hello(replace(member(2), numeric_class="new")))
    assert len(bench.told(e.PeerJoined)) == 1
    assert len(bench.replied(m.Welcome)) == 2
    assert bench.node.status(bench.now)["members"][0]["numeric_class"] == "new"


def test_a_welcome_lists_the_living_members() -> None:
    """WELCOME names everybody but the greeter."""
    bench = Bench()
    bench.meet(member(2), member(3))
    bench.replied(m.Welcome)
    bench.hear(member(2), hello(member(2)))
    [welcome] = bench.replied(m.Welcome)
    assert welcome.members == (member(3),)
    assert welcome.member == bench.me


def test_a_new_life_of_a_member_ends_the_old_one() -> None:
    """A known node id with a new boot id: the old life is dead, the new one joins."""
    bench = leader(member(2))
    bench.hear(member(2), hello(member(2, boot=1)))
    assert [fact.reason for fact in bench.told(e.PeerDead)] == ["it started again"]
    assert [fact.member for fact in bench.told(e.PeerJoined)] == [member(2, boot=1)]


def test_a_member_that_forgot_the_cluster_is_a_new_one() -> None:
    """A member that greets without a cluster after it acknowledged a plan has lost that plan."""
    bench = leader(member(2))
    bench.hear(member(2), hello(member(2)))
    assert len(bench.told(e.PeerDead)) == 1
    assert len(bench.told(e.PeerJoined)) == 1
    assert bench.told(e.PlanProposed)


def test_the_leaders_new_life_greets_a_follower_without_a_cluster() -> None:
    """When the leader itself started again the cluster is over: not_ready."""
    bench = follower()
    bench.hear(member(1), hello(member(1, boot=1)))
    assert [r.code for r in bench.replied(m.Refused)] == ["not_ready"]
    assert bench.told(e.PeerDead)
    assert bench.node.waiting == "a cluster to join"


def test_a_member_at_the_link_with_another_boot_id_is_a_new_life() -> None:
    """WELCOME by another boot id than the known one: the known one is dead."""
    bench = leader(member(2))
    bench.answer(member(2), bench.welcome(member(2, boot=1)))
    assert [fact.reason for fact in bench.told(e.PeerDead)] == ["it started again"]
    assert bench.told(e.CloseLink) == [e.CloseLink(address=member(2).address)]


def test_a_welcome_of_another_cluster_is_dropped() -> None:
    """A member takes no WELCOME of a cluster that is not its own."""
    bench = follower()
    bench.answer(member(2), replace(bench.welcome(member(2)), cluster_id="e" * 16))
    assert len(bench.told(e.FrameDropped)) == 1


@pytest.mark.parametrize(
    ("sender", "code", "ends"),
    [(1, "wrong_cluster", False), (1, "name_taken", True), (2, "wrong_settings", False)],
)
def test_a_member_refused_by_another(sender: int, code: str, ends: bool) -> None:
    """The leader's refusal ends the node, or the cluster when that is another; a peer's none."""
    bench = follower()
    bench.answer(member(sender), m.Refused(code=code, message="no"))
    assert bool(bench.told(e.Exit)) == ends
    assert bool(bench.told(e.PeerDead)) == (code == "wrong_cluster")
    bench.answer(member(9), m.Refused(code=code, message="from nowhere"))
    bench.sent(m.Hello)
    bench.tick(0.5)
    assert [a for a, _ in bench.sent(m.Hello) if a == member(2).address] == []


def test_a_peer_that_does_not_know_us_is_greeted_again() -> None:
    """A stranger's heartbeat is answered not_a_member, and that answer makes one greet again."""
    bench = Bench()
    bench.hear(member(2), heartbeat(member(2)))
    [refused] = bench.replied(m.Refused)
    assert (refused.code, refused.retryable) == ("not_a_member", True)
    bench.take(e.Received(message=m.StatusRequest(request_id=1), route=b"x"))
    assert bench.replied(m.Refused) == []
    other = follower()
    other.answer(member(1), refused)
    assert [address for address, _ in other.sent(m.Hello)] == [member(1).address]


def test_a_peer_that_was_not_ready_is_greeted_again_when_it_is() -> None:
    """A joiner refused our greeting for a time; its first heartbeat shows that it has joined."""
    bench = Bench()
    bench.hear(member(2), hello(member(2)))
    bench.take(e.LinkUp(address=member(2).address))
    bench.answer(member(2), m.Refused(code="not_ready", message="joining", retryable=True))
    bench.sent(m.Hello)
    bench.tick(0.1)
    assert bench.sent(m.Hello) == []
    bench.hear(member(2), heartbeat(member(2)))
    assert len(bench.sent(m.Hello)) == 1


# --- who is there ---------------------------------------------------------------------------------


def test_heartbeats_go_to_every_living_member() -> None:
    """Each period a heartbeat goes to each member, with what the worker says of its health."""
    bench = leader(member(2), member(3))
    bench.worker(
        e.WorkerStats(steps=4, tokens_per_s=2.5, hears_steps=(member(2).node_id, "f" * 16))
    )
    bench.tick(0.1)
    found = bench.sent(m.Heartbeat)
    assert [address for address, _ in found] == [member(2).address, member(3).address]
    assert (found[0][1].steps, found[0][1].hears_steps) == (4, (member(2).node_id,))
    assert bench.node.deadline == pytest.approx(bench.now + 0.1)


def test_the_round_trip_is_measured_whatever_the_period() -> None:
    """The echo of a clock is aged by the time it waited, so its difference is the round trip."""
    bench = Bench()
    bench.meet(member(2))
    bench.hear(member(2), heartbeat(member(2), sent_at_ms=5000))
    bench.sent(m.Heartbeat)
    bench.tick(0.1)
    [(_, beat)] = bench.sent(m.Heartbeat)
    assert beat.echo_ms == 5100
    bench.hear(member(2), heartbeat(member(2), echo_ms=round(bench.now * 1000) - 12))
    rtts = [row["rtt_ms"] for row in bench.node.status(bench.now)["members"]]
    assert rtts == [12.0, None]


def test_a_broken_connection_is_looked_into() -> None:
    """LinkDown: suspect and probed; a heartbeat clears it, a refused probe makes it dead."""
    bench = leader(member(2))
    bench.take(e.LinkDown(address=member(2).address))
    assert len(bench.told(e.PeerSuspected)) == 1
    assert bench.told(e.Probe) == [e.Probe(address=member(2).address)]
    assert bench.node.status(bench.now)["members"][0]["state"] == "suspect"
    bench.hear(member(2), heartbeat(member(2)))
    bench.take(e.ProbeAnswered(address=member(2).address, refused=True))
    assert bench.told(e.PeerDead) == []
    bench.worker(e.LinkLost(node_id=member(2).node_id))
    bench.take(e.ProbeAnswered(address=member(2).address, refused=False))
    assert bench.told(e.PeerDead) == []
    bench.worker(e.LinkLost(node_id=member(2).node_id))
    bench.worker(e.LinkLost(node_id="f" * 16))
    bench.take(e.ProbeAnswered(address=member(2).address, refused=True))
    assert [fact.reason for fact in bench.told(e.PeerDead)] == ["it refuses connections"]
    bench.take(e.LinkDown(address=member(2).address))
    bench.take(e.LinkUp(address=member(2).address))
    bench.worker(e.LinkLost(node_id=member(2).node_id))
    assert bench.told(e.Probe) == [e.Probe(address=member(2).address)] * 2


def test_silence_is_death() -> None:
    """A member unheard for dead_after is dead; nothing sooner."""
    bench = leader(member(2))
    bench.tick(1.1)
    assert bench.told(e.PeerDead) == []
    bench.tick(0.2)
    [fact] = bench.told(e.PeerDead)
    assert fact.silence_s == pytest.approx(1.3)
    assert bench.told(e.CloseLink) == [e.CloseLink(address=member(2).address)]
    assert [row["state"] for row in bench.node.status(bench.now)["members"]] == ["dead", "alive"]


def test_a_member_known_by_name_only_has_longer() -> None:
    """A member that never spoke to us dies after a few seconds, not after dead_after."""
    bench = follower()
    bench.tick(1.0)
    bench.hear(member(1), heartbeat(member(1)))
    bench.tick(1.0)
    bench.hear(member(1), heartbeat(member(1)))
    assert bench.told(e.PeerDead) == []


def test_everybody_silent_is_the_loss_of_the_leader() -> None:
    """When leader and members fall silent at once the cluster is over, once."""
    bench = adopted()
    bench.tick(3)
    assert [fact.name for fact in bench.told(e.PeerDead)] == ["node1"]
    assert bench.node.waiting == "a cluster to join"


def test_connections_are_remembered_in_bounded_number() -> None:
    """A member that greets over ever new connections is known by its latest ones."""
    bench = leader(member(2))
    for number in range(100):
        bench.take(e.Received(message=hello(member(2), cluster_id=CLUSTER), route=b"%d" % number))
    beat = heartbeat(member(2))
    bench.take(e.Received(message=beat, route=b"0"))
    assert len(bench.told(e.FrameDropped)) == 1
    bench.take(e.Received(message=beat, route=b"99"))
    assert bench.told(e.FrameDropped) == []


def test_an_old_lifes_heartbeat_is_dropped() -> None:
    """A heartbeat with a boot id that is not the known one says nothing."""
    bench = leader(member(2))
    bench.hear(member(2), heartbeat(member(2, boot=9)))
    assert len(bench.told(e.FrameDropped)) == 1


def test_rumours_make_a_node_look_for_itself() -> None:
    """Unknown and alive: ask the teller; lost by others: probe; dead here, alive there: open."""

    def rumour(who: Member, state: m.MemberState) -> m.Rumour:
        return m.Rumour(node_id=who.node_id, boot_id=who.boot_id, state=state, incarnation=0)

    def tell(teller: Member, *rumours: m.Rumour) -> None:
        bench.hear(teller, heartbeat(teller, rumours=rumours))

    alive, dead = m.MemberState.ALIVE, m.MemberState.DEAD
    bench = follower()
    bench.hear(member(2), hello(member(2), cluster_id=CLUSTER))
    tell(member(1), rumour(member(3), alive), rumour(member(4), dead))
    assert bench.sent(m.Hello) == []
    bench.tick(1.05)
    tell(member(1), rumour(member(3), alive), rumour(bench.me, dead))
    assert [address for address, _ in bench.sent(m.Hello)] == [member(1).address]
    bench.answer(member(1), bench.welcome(member(1), leader=member(1)))
    tell(member(1), rumour(member(2), dead))
    assert [fact.reason for fact in bench.told(e.PeerSuspected)] == ["node1 has lost it"]
    [beat, *_] = [b for _, b in bench.sent(m.Heartbeat)][-1:]
    assert beat.incarnation in (0, 1)
    bench.tick(0.2)
    tell(member(1), rumour(member(2), alive))
    assert bench.told(e.PeerDead)
    assert bench.told(e.OpenLink) == [e.OpenLink(address=member(2).address)]
    tell(member(1), rumour(member(2), dead))
    assert bench.told(e.CloseLink) == [e.CloseLink(address=member(2).address)] * 2


def test_leaving_is_told_and_believed() -> None:
    """LEAVE makes a member `left` at once; one of an older life does not."""
    bench = leader(member(2))
    bench.hear(member(2), m.Leave(node_id=member(2).node_id, boot_id="0" * 16))
    assert bench.told(e.PeerLeft) == []
    bench.hear(member(2), m.Leave(node_id=member(2).node_id, boot_id=member(2).boot_id))
    assert len(bench.told(e.PeerLeft)) == 1
    assert bench.told(e.PlanProposed)[0].why == "node2 gone"


def test_a_stopped_node_says_goodbye() -> None:
    """ShutdownAsked: LEAVE to all, own clients are told, the worker stops, exit code 0."""
    bench = leader(member(2))
    bench.submit()
    bench.take(e.ShutdownAsked())
    assert len(bench.sent(m.Leave)) == 1
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("leaving", True)
    assert bench.ordered(e.StopWorker)
    assert bench.told(e.Exit) == [e.Exit()]
    assert bench.take(e.ShutdownAsked()) == []


@pytest.mark.parametrize(
    ("event", "code", "says"),
    [
        (e.WorkerDied(detail="signal 9"), 1, "signal 9"),
        (e.WorkerSaid(report=e.WorkerFailed(message="no GPU", usage=True)), 2, "no GPU"),
        (e.WorkerSaid(report=e.WorkerFailed(message="broken")), 1, "broken"),
    ],
)
def test_without_its_worker_a_node_ends(event: e.Input, code: int, says: str) -> None:
    """A worker that died or failed ends the node, which tells the others why."""
    bench = leader(member(2))
    bench.take(event)
    [end] = bench.told(e.Exit)
    assert end.exit_code == code
    assert says in end.error
    assert says in bench.sent(m.Leave)[0][1].reason


# --- the leader's plans ---------------------------------------------------------------------------


def test_the_worker_comes_first() -> None:
    """No plan before the leader's own worker is ready, then after the time to settle."""
    bench = Bench()
    bench.tick(5)
    assert bench.told(e.PlanProposed) == []
    bench.worker_ready()
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node5",)]
    assert bench.node.waiting == "node5 to load the weights"
    bench.load()
    assert bench.node.ready
    assert bench.told(e.PlanAdopted)
    assert bench.node.waiting == ""
    bench.worker(e.LoadProgress(done_bytes=1, total_bytes=2))


def test_min_nodes_are_waited_for_only_at_first() -> None:
    """Before the first plan min_nodes must be there; after it the rest goes on alone."""
    bench = Bench(min_nodes=2)
    bench.worker_ready()
    bench.tick(1)
    assert bench.node.waiting == "1 of 2 nodes"
    bench.meet(member(2))
    bench.tick(0.2)
    assert bench.told(e.PlanProposed) == []
    assert bench.node.waiting == "the members to settle"
    bench.tick(0.1)
    assert len(bench.told(e.PlanProposed)) == 1
    bench.load(member(2))
    bench.outputs.clear()
    bench.hear(member(2), m.Leave(node_id=member(2).node_id, boot_id=member(2).boot_id))
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node5",)]


def test_a_member_that_cannot_be_reached_is_not_planned_for() -> None:
    """A member whose own address does not answer gets no units."""
    bench = Bench()
    bench.worker_ready()
    bench.hear(member(2), hello(member(2)))
    bench.tick(0.4)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node5",)]


def test_a_suspect_is_waited_for() -> None:
    """While a member is suspect no plan is proposed: the doubt is short."""
    bench = leader(member(2), member(3))
    bench.take(e.LinkDown(address=member(3).address))
    bench.hear(member(2), m.Leave(node_id=member(2).node_id, boot_id=member(2).boot_id))
    assert bench.told(e.PlanProposed) == []
    assert bench.node.waiting == "a word from node3"
    bench.hear(member(3), heartbeat(member(3)))
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node3", "node5")]


def test_a_member_that_dies_while_loading_is_left_out() -> None:
    """A new proposal with a higher epoch, without it; a late ACK of the old one is nothing."""
    bench = leader(member(2))
    bench.meet(member(3))
    bench.tick(0.3)
    old = bench.told(e.PlanProposed)[0].fence
    bench.hear(member(3), m.Leave(node_id=member(3).node_id, boot_id=member(3).boot_id))
    new = bench.told(e.PlanProposed)[0]
    assert new.fence > old
    assert new.members == ("node2", "node5")
    bench.hear(member(2), m.Ack(fence=old, node_id=member(2).node_id))
    assert bench.node.waiting == "node2, node5 to load the weights"


def test_what_may_be_lost_is_sent_again() -> None:
    """PROPOSE goes again to who has not answered, ACTIVATE to who does not obey, each second."""
    bench = Bench(min_nodes=2)
    bench.worker_ready()
    bench.meet(member(2))
    bench.tick(0.3)
    fence = bench.told(e.PlanProposed)[0].fence
    for _ in range(2):
        bench.beat(member(2))
        bench.tick(1.0)
    bench.beat(member(2))
    assert len(bench.sent(m.Propose)) == 3
    bench.worker(e.PlanLoaded(fence=fence))
    bench.hear(member(2), m.Ack(fence=fence, node_id=member(2).node_id))
    bench.tick(1.0)
    assert not bench.node.ready
    assert bench.node.waiting == "all nodes to take up the plan"
    bench.hear(member(2), heartbeat(member(2), fence=fence))
    bench.tick(1.0)
    assert len(bench.sent(m.Activate)) == 2
    assert bench.node.ready


def test_who_cannot_hold_its_part_is_left_out() -> None:
    """A NACK: the plan failed, and the next one does without that node until it starts again."""
    bench = Bench(min_nodes=2)
    bench.worker_ready()
    bench.meet(member(2), member(3))
    bench.tick(0.3)
    fence = bench.told(e.PlanProposed)[0].fence

    def nack(who: Member, fence: Fence) -> m.Nack:
        return m.Nack(fence=fence, node_id=who.node_id, code="internal", message="no memory")

    bench.hear(member(2), nack(member(2), Fence(1, 99)))
    assert bench.told(e.PlanFailed) == []
    bench.hear(member(2), nack(member(2), fence))
    assert [fact.reason for fact in bench.told(e.PlanFailed)] == ["node2: no memory"]
    [proposed] = bench.told(e.PlanProposed)
    assert proposed.members == ("node3", "node5")
    bench.hear(member(2), nack(member(2), proposed.fence))
    assert bench.told(e.PlanFailed) == []
    bench.tick(0.8)
    assert bench.told(e.PlanProposed) == []
    bench.hear(member(3), m.Leave(node_id=member(3).node_id, boot_id=member(3).boot_id))
    assert bench.node.waiting == "1 of 2 nodes; node2: no memory"
    bench.hear(member(2), hello(member(2, boot=1)))
    bench.take(e.LinkUp(address=member(2).address))
    bench.answer(member(2), bench.welcome(member(2, boot=1)))
    bench.tick(0.3)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node2", "node5")]


def test_who_could_not_hold_its_part_is_asked_again_later() -> None:
    """A blocked port may be opened: after 10 s, then 20, 40 ... the node is planned with again."""
    bench = Bench()
    bench.worker_ready()
    bench.meet(member(2))
    bench.tick(0.3)

    def refuse() -> None:
        fence = bench.told(e.PlanProposed)[-1].fence
        message = m.Nack(fence=fence, node_id=member(2).node_id, code="internal", message="no link")
        bench.hear(member(2), message)
        assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node5",)]

    def quiet(seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            bench.beat(member(2))
            bench.tick(0.5)

    refuse()
    quiet(9.5)
    assert bench.told(e.PlanProposed) == []
    quiet(1.0)
    refuse()
    quiet(19.0)
    assert bench.told(e.PlanProposed) == []
    quiet(1.5)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node2", "node5")]


def test_a_member_whose_worker_has_not_started_is_not_planned_with() -> None:
    """It holds nothing until it says how it computes; the leader says what it waits for."""
    bench = Bench(min_nodes=2)
    bench.worker_ready()
    bench.meet(member(2, numeric_class=""))
    bench.tick(0.3)
    assert bench.told(e.PlanProposed) == []
    assert bench.node.waiting == "1 of 2 nodes; node2's worker to start"
    bench.hear(member(2), hello(member(2)))
    bench.tick(0.3)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node2", "node5")]


def test_a_leader_that_cannot_hold_its_part_waits_for_others() -> None:
    """The leader's own failure ends no process: other members would lessen its share."""
    bench = Bench()
    bench.worker_ready()
    bench.tick(0.3)
    bench.worker(e.PlanLoaded(fence=Fence(1, 1), error="no memory"))
    assert any("no memory" in fact.reason for fact in bench.told(e.PlanFailed))
    bench.tick(5)
    assert bench.node.waiting == "node5: no memory"
    bench.told(e.PlanProposed)
    bench.tick(5.1)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node5",)]
    bench.worker(e.PlanLoaded(fence=Fence(1, 2), error="no memory"))
    bench.told(e.PlanProposed)
    bench.meet(member(2))
    bench.tick(0.3)
    assert [fact.members for fact in bench.told(e.PlanProposed)] == [("node2", "node5")]


def test_members_that_cannot_hold_the_model_wait_for_more() -> None:
    """When the planner finds no room the reason is told once, until other members come."""
    bench = Bench(member=member(5))
    bench.worker_ready(memory_bytes=10)
    bench.tick(0.3)
    [fact] = bench.told(e.PlanFailed)
    assert "does not fit" in fact.reason
    assert bench.node.waiting == fact.reason
    bench.tick(1)
    assert bench.told(e.PlanFailed) == []
    bench.meet(member(2))
    bench.tick(0.3)
    assert bench.told(e.PlanProposed)


def test_a_failed_step_begins_a_new_epoch() -> None:
    """The same owners again under a higher fence; a stale report changes nothing."""
    bench = leader(member(2))
    first = bench.node.status(bench.now)["epoch"]
    failed = e.StepFailed(fence=Fence(1, 99), step=7, node_id=member(2).node_id, reason="overdue")
    bench.worker(failed)
    assert bench.told(e.PlanProposed) == []
    bench.worker(replace(failed, fence=Fence(1, first)))
    assert bench.told(e.Probe)
    bench.hear(member(2), heartbeat(member(2)))
    [proposed] = bench.told(e.PlanProposed)
    assert proposed.members == ("node2", "node5")
    assert proposed.why == "step 7 failed (node2): overdue"
    bench.load(member(2))
    again = m.Nack(fence=proposed.fence, node_id=member(2).node_id, code="internal", message="gap")
    bench.hear(member(2), again)
    assert [fact.why for fact in bench.told(e.PlanProposed)] == ["gap"]


def test_steps_that_fail_for_ever_end_the_requests() -> None:
    """After three failed steps without a token the requests end as internal."""
    bench = leader()
    bench.submit()
    for _ in range(3):
        fence = Fence(1, bench.node.status(bench.now)["epoch"])
        bench.worker(e.StepFailed(fence=fence, step=1, node_id="", reason="not finite"))
        bench.load()
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("internal", True)
    assert "not finite" in end.message


# --- a follower's plans ---------------------------------------------------------------------------


def test_a_follower_loads_acknowledges_and_activates() -> None:
    """PROPOSE waits for the worker, LoadPlan, PlanLoaded, ACK, ACTIVATE: in force."""
    bench = follower()
    plan = plan_of(member(1), bench.me)
    bench.hear(member(1), m.Propose(plan=plan))
    assert bench.ordered(e.LoadPlan) == []
    assert bench.node.waiting == "this node's worker to start"
    bench.worker_ready()
    assert bench.ordered(e.LoadPlan) == [e.LoadPlan(plan=plan, me=1)]
    assert bench.node.waiting == "the weights to load"
    bench.hear(member(1), m.Activate(fence=plan.fence))
    assert bench.told(e.FrameDropped)
    bench.hear(member(1), m.Propose(plan=plan))
    bench.worker(e.PlanLoaded(fence=Fence(9, 9)))
    assert bench.sent(m.Ack) == []
    bench.worker(e.PlanLoaded(fence=plan.fence))
    bench.hear(member(1), m.Propose(plan=plan))
    assert len(bench.sent(m.Ack)) == 2
    bench.hear(member(1), m.Activate(fence=plan.fence))
    bench.hear(member(1), m.Activate(fence=plan.fence))
    assert bench.ordered(e.ActivatePlan) == [e.ActivatePlan(fence=plan.fence)]
    assert bench.told(e.PlanAdopted) == [
        e.PlanAdopted(fence=plan.fence, members=("node1", "node5"))
    ]
    assert bench.told(e.FrameDropped) == []


def test_a_worker_ready_between_hello_and_its_answer_is_told_too() -> None:
    """The first HELLO named no numeric class; a second one follows on the same link."""
    bench = Bench(member=member(5, numeric_class=""), join=(1,))
    bench.take(e.LinkUp(address=member(1).address))
    bench.worker_ready()
    classes = [message.member.numeric_class for _, message in bench.sent(m.Hello)]
    assert classes == ["", "n"]


def test_what_a_follower_says_when_the_worker_is_ready() -> None:
    """Its numeric class goes out in a HELLO to all; then it waits for the leader."""
    bench = follower()
    bench.worker_ready()
    greetings = bench.sent(m.Hello)
    assert {message.member.numeric_class for _, message in greetings} == {"n"}
    assert len(greetings) == 2
    assert bench.node.waiting == "the leader's plan"
    bench.worker_ready()
    assert bench.sent(m.Hello) == []


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of(member(1), member(5), fence=Fence(0, 0)), "not above"),
        (plan_of(member(1), member(5), cluster_id="e" * 16), "cluster"),
        (plan_of(member(2), member(5)), "leader"),
        (plan_of(member(1), member(2)), "no place"),
        (plan_of(member(1), member(5, boot=3)), "no place"),
    ],
)
def test_a_plan_that_is_not_for_us_is_dropped(plan: Plan, says: str) -> None:
    """Old fence, other cluster, other leader, no place for this life of this node."""
    bench = follower()
    bench.worker_ready()
    bench.hear(member(1), m.Propose(plan=plan))
    assert bench.ordered(e.LoadPlan) == []
    assert says in bench.told(e.FrameDropped)[0].reason


def test_only_the_leader_may_propose() -> None:
    """PROPOSE, ACTIVATE, DRAWN and ENDED of another member are dropped; votes too."""
    bench = follower()
    bench.hear(member(2), hello(member(2), cluster_id=CLUSTER))
    ended = m.Ended(request_id=1, reason="stop", total_tokens=0)
    vote = m.VoteRequest(term=2, candidate_id=member(2).node_id, plan_fence=Fence())
    ack = m.Ack(fence=Fence(1, 1), node_id=member(2).node_id)
    messages = (
        m.Propose(plan=plan_of(member(1), bench.me)),
        m.Activate(fence=Fence(1, 1)),
        m.Drawn(tokens=()),
        ended,
        vote,
        ack,
    )
    for message in messages:
        bench.hear(member(2), message)
    assert len(bench.told(e.FrameDropped)) == len(messages)
    boss = leader(member(2), member(3))
    boss.hear(member(2), replace(ack, node_id=member(3).node_id))
    assert len(boss.told(e.FrameDropped)) == 1


def other_model(**values: Any) -> ModelSpec:
    return replace(MODEL, **values)


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(member(1), member(5), model=other_model(model_id=OTHER_MODEL)),
        replace(plan_of(member(1), member(5)), stages=plan_of(member(1), member(5)).stages * 2),
    ],
)
def test_a_plan_that_cannot_be_obeyed_is_answered_nack(plan: Plan) -> None:
    """A broken plan or one for another model: NACK with the reason, and a fact."""
    bench = follower()
    bench.worker_ready()
    bench.hear(member(1), m.Propose(plan=plan))
    [(_, nack)] = bench.sent(m.Nack)
    assert nack.fence == plan.fence
    assert [fact.reason for fact in bench.told(e.PlanFailed)] == [nack.message]
    assert bench.ordered(e.LoadPlan) == []


def test_a_failed_load_is_answered_nack() -> None:
    """PlanLoaded with an error: NACK, and no plan is obeyed."""
    bench = adopted()
    plan = plan_of(member(1), bench.me, fence=Fence(1, 2))
    bench.hear(member(1), m.Propose(plan=plan))
    bench.worker(e.PlanLoaded(fence=plan.fence, error="file damaged"))
    [(_, nack)] = bench.sent(m.Nack)
    assert nack.message == "file damaged"
    assert not bench.node.ready


def test_a_node_without_a_place_drops_its_plan() -> None:
    """A newer plan without this node ends the one it obeyed."""
    bench = adopted()
    assert bench.node.ready
    bench.hear(member(1), m.Propose(plan=plan_of(member(1), fence=Fence(1, 2))))
    assert not bench.node.ready
    assert bench.node.status(bench.now)["epoch"] == 0


def test_a_witness_acknowledges_at_once() -> None:
    """A witness holds nothing, so it has nothing to load and no worker to tell."""
    me = member(5, witness=True)
    bench = follower(model=None, member=me)
    plan = plan_of(member(1), me)
    bench.hear(member(1), m.Propose(plan=plan))
    assert len(bench.sent(m.Ack)) == 1
    bench.hear(member(1), m.Activate(fence=plan.fence))
    assert bench.told(e.PlanAdopted)
    assert bench.told(e.TellWorker) == []
    own = next(r for r in bench.node.status(bench.now)["members"] if r["name"] == "node5")
    assert own["owned"] == []


def test_a_followers_failed_step_is_told_to_the_leader() -> None:
    """StepFailed of the plan in force becomes a NACK of it; a stale one does not."""
    bench = adopted()
    failed = e.StepFailed(fence=Fence(1, 1), step=3, node_id=member(2).node_id, reason="gap")
    bench.worker(replace(failed, fence=Fence(1, 0)))
    assert bench.sent(m.Nack) == []
    bench.worker(failed)
    assert [n.message for _, n in bench.sent(m.Nack)] == ["step 3 failed (node2): gap"]


# --- losses ---------------------------------------------------------------------------------------


def test_a_lost_leader_is_the_end_of_the_cluster() -> None:
    """Replies end as leader_lost; the node asks all addresses it knows, and never gives up."""
    bench = adopted()
    bench.submit()
    bench.take(e.LinkDown(address=member(1).address))
    bench.take(e.ProbeAnswered(address=member(1).address, refused=True))
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("leader_lost", True)
    assert "node1" in end.message
    assert e.OpenLink(address=member(1).address) in bench.told(e.OpenLink)
    assert [address for address, _ in bench.sent(m.Hello)] == [member(2).address]
    for _ in range(20):
        bench.tick(5)
    assert bench.told(e.Exit) == []
    assert len(bench.told(e.JoinWaiting)) == 20
    # A follower that has not missed the leader yet has no cluster to offer.
    bench.answer(member(2), bench.welcome(member(2), member(1), leader=member(1)))
    assert bench.node.waiting == "a cluster to join"
    bench.take(e.LinkUp(address=member(1).address))
    reborn = member(1, boot=1)
    bench.answer(reborn, replace(bench.welcome(reborn, leader=reborn), cluster_id="e" * 16))
    assert bench.node.status(bench.now)["cluster_id"] == "e" * 16
    bench.hear(reborn, hello(reborn))
    plan = plan_of(reborn, bench.me, cluster_id="e" * 16)
    bench.hear(reborn, m.Propose(plan=plan))
    assert bench.ordered(e.LoadPlan)


def test_a_dead_owner_ends_what_runs() -> None:
    """Running requests end as node_lost naming the node; one that waits for a plan does not."""
    bench = leader(member(2))
    bench.submit(1)
    bench.outputs.clear()
    bench.tick(1.3)
    [end] = bench.told(e.Conclude)
    assert (end.request_id, end.code, end.retryable) == (1, "node_lost", True)
    assert "node2" in end.message
    orders = bench.told(e.TellWorker)
    assert e.CancelRequest(request_id=1) in [t.order for t in orders]
    bench.submit(2)
    bench.outputs += orders
    bench.load()
    assert bench.told(e.Conclude) == []
    assert [o.request_id for o in bench.ordered(e.StartRequest)] == [2]


def test_a_dead_serving_node_frees_its_requests() -> None:
    """Requests that a dead or leaving node served are cancelled."""
    bench = leader(member(2), member(3, weight=0.0))
    forward = m.Forward(
        request_id=4, serving_id=member(3).node_id, prompt_ids=(1,), params=SamplingParams()
    )
    bench.hear(member(3), forward)
    bench.hear(member(2), heartbeat(member(2), fence=Fence(1, 1)))
    assert bench.ordered(e.StartRequest)
    bench.take(e.LinkDown(address=member(3).address))
    bench.take(e.ProbeAnswered(address=member(3).address, refused=True))
    assert bench.ordered(e.CancelRequest) == [e.CancelRequest(request_id=4)]


# --- requests -------------------------------------------------------------------------------------


def test_a_request_runs_on_a_single_node() -> None:
    """Submit, start, tokens, end: delivered and concluded by one node alone."""
    bench = leader()
    bench.submit(3, prompt_ids=(7, 8))
    [accepted] = bench.replied(m.Accepted)
    assert (accepted.served_by, accepted.prompt_ids, accepted.waiting) == ("node5", (7, 8), "")
    [start] = bench.ordered(e.StartRequest)
    assert (start.prompt_ids, start.received) == ((7, 8), ())
    token = m.DrawnToken(request_id=3, index=0, token=9)
    bench.worker(e.TokensDrawn(tokens=(token,)))
    assert bench.told(e.Deliver) == [e.Deliver(route=b"client", request_id=3, start=0, tokens=(9,))]
    bench.worker(e.RequestEnded(request_id=3, reason="length", total_tokens=1, ttft_s=0.5))
    [end] = bench.told(e.Conclude)
    assert (end.reason, end.total_tokens, end.code, end.ttft_s) == ("length", 1, "", 0.5)
    assert [fact.reply_tokens for fact in bench.told(e.RequestFinished)] == [1]


def test_a_client_cancels() -> None:
    """ClientCancelled ends the reply and takes it from the worker."""
    bench = leader()
    bench.submit(3)
    bench.take(e.ClientCancelled(request_id=3))
    assert bench.ordered(e.CancelRequest) == [e.CancelRequest(request_id=3)]
    [end] = bench.told(e.Conclude)
    assert (end.reason, end.code) == ("cancelled", "cancelled")


def test_a_follower_forwards_and_delivers() -> None:
    """A follower forwards to the leader and delivers what it draws."""
    bench = adopted()
    bench.submit(3)
    [(address, forward)] = bench.sent(m.Forward)
    assert (address, forward.serving_id) == (member(1).address, bench.me.node_id)
    drawn = m.Drawn(tokens=(m.DrawnToken(request_id=3, index=0, token=9),))
    bench.hear(member(1), drawn)
    assert bench.told(e.Deliver)
    bench.hear(member(1), m.Ended(request_id=3, reason="stop", total_tokens=1))
    assert [end.reason for end in bench.told(e.Conclude)] == ["stop"]


def test_status_has_the_contracts_fields() -> None:
    """The status object: cluster, model, members with what they own."""
    bench = leader(member(2))
    bench.worker(e.WorkerStats(kv_used_bytes=3, kv_limit_bytes=9))
    status = bench.node.status(bench.now)
    assert status["model"]["num_units"] == {"head": 8, "mlp": 8, "vocab": 8}
    assert status["voters"] == ["node2", "node5"]
    assert (status["tolerates"], status["epoch"], status["ready"]) == ([], 1, True)
    other, own = status["members"]
    assert own["kv"] == {"used_bytes": 3, "limit_bytes": 9}
    assert other["owned"][0]["span"] == [0, 2]
    assert sorted(other["head_units"] + own["head_units"]) == list(range(8))
    empty = Bench(join=(1,), model=None).node.status(0.0)
    assert (empty["model"], empty["leader"], empty["waiting"]) == (None, "", "a cluster to join")
