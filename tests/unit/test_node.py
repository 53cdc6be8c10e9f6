"""A node as a whole: how it begins, whom it follows, what its worker and its disk mean, its end."""

from __future__ import annotations

from math import inf

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence
from p2pinfer.wire import messages as m
from tests.node_bench import CLUSTER, MODEL, Bench, heartbeat, hello, member, plan_of

ONE, TWO = member(1), member(2)
FIRST = Fence(1, 1)


def stored(*numbers: int, active: bool = True, blank: bool = False) -> e.StoredState:
    """What node 5 wrote down of a plan of those members, of whom the first led, and itself."""
    plan = plan_of(*map(member, numbers), member(5))
    return e.StoredState(cluster_id=CLUSTER, term=1, plan=plan, active=active, blank=blank)


# --- beginning ------------------------------------------------------------------------------------


def test_a_node_wants_the_time_at_once() -> None:
    """Before its first input a node's deadline has passed."""
    node = Node(e.NodeConfig(member=ONE, model=MODEL, cluster_id=CLUSTER), lambda: 0.0)
    assert node.deadline == -inf


def test_without_join_a_node_founds_a_cluster_and_leads_it() -> None:
    """A founder is the leader of term 1 and the only member, and is not blank."""
    bench = Bench()
    assert bench.told(e.LeaderElected) == [
        e.LeaderElected(name="node5", node_id=bench.me.node_id, term=1)
    ]
    state = bench.stored
    assert state is not None
    assert (state.cluster_id, state.term, state.voted_for) == (CLUSTER, 1, bench.me.node_id)
    assert (state.plan, state.blank) == (None, False)
    status = bench.node.status(bench.now)
    assert (status["cluster_id"], status["leader"], status["term"]) == (CLUSTER, "node5", 1)
    assert bench.node.waiting == "this node's worker to start"
    bench.meet(TWO)
    assert not [w for w in bench.replied(m.Welcome) if w.member.blank]


def test_a_founder_leads_when_its_disk_knows() -> None:
    """Nobody leads before the founding is written."""
    bench = Bench(slow_disk=True)
    assert not bench.told(e.LeaderElected)
    assert bench.node.waiting == "this node's worker to start"
    bench.worker_ready()
    assert bench.node.waiting == "the election of a leader"
    bench.take(e.Persisted(number=1))
    assert bench.told(e.LeaderElected)


def test_a_witness_cannot_found() -> None:
    """A witness without --join ends with a usage error, and wants no time any more."""
    bench = Bench(model=None)
    ended = bench.ended()
    assert ended is not None
    assert ended[1] == 2
    assert "--join" in ended[0]
    assert bench.node.deadline == inf
    assert bench.take(e.Ticked()) == []


def test_a_node_without_state_says_that_it_is_blank() -> None:
    """A joiner's HELLO tells that it has forgotten whatever it promised before."""
    bench = Bench(join=(1,))
    bench.take(e.LinkUp(address=ONE.address))
    [(_, greeting)] = bench.sent(m.Hello)
    assert greeting.member.blank


@pytest.mark.parametrize("blank", [False, True])
def test_a_node_with_state_comes_back_whatever_join_says(blank: bool) -> None:
    """It greets the members of its plan and the --join addresses, in its cluster, and waits."""
    bench = Bench(join=(9,), stored=stored(1, 2, blank=blank))
    opened = {o.address for o in bench.told(e.OpenLink)}
    assert opened == {member(n).address for n in (1, 2, 9)}
    bench.take(e.LinkUp(address=ONE.address))
    [(_, greeting)] = bench.sent(m.Hello)
    assert (greeting.cluster_id, greeting.member.blank) == (CLUSTER, blank)
    bench.run(60.0)
    assert bench.ended() is None
    assert not bench.told(e.JoinWaiting)
    assert bench.node.status(bench.now)["epoch"] == 0
    bench.worker_ready()
    assert "missing: node1, node2" in bench.node.waiting
    assert not bench.sent(m.PreVoteRequest)


def test_a_founder_that_comes_back_before_any_plan_elects_itself() -> None:
    """Of a cluster without a plan the founder is the only voter, in a new term."""
    state = e.StoredState(cluster_id=CLUSTER, term=1, voted_for=member(5).node_id)
    bench = Bench(stored=state)
    bench.run(1.0)
    assert not bench.told(e.LeaderElected)
    bench.worker_ready()
    bench.run(1.0)
    [elected] = bench.told(e.LeaderElected)
    assert (elected.name, elected.term) == ("node5", 2)


def test_a_cluster_of_one_comes_back_with_its_plan() -> None:
    """After a power cut the only voter elects itself, and makes the plan anew."""
    bench = Bench(stored=stored())
    bench.worker_ready()
    bench.run(1.0)
    assert bench.node.status(bench.now)["term"] == 2
    fence = bench.load()
    assert fence == Fence(2, 2)
    assert bench.node.ready


def test_voters_elect_after_all_came_back() -> None:
    """Two of three voters with their state are enough: one asks, the other grants."""
    bench = Bench(stored=stored(1, 2))
    bench.worker_ready()
    bench.meet(ONE)
    bench.run(0.4, ONE)
    asked = bench.sent(m.PreVoteRequest)
    assert {address for address, _ in asked} == {ONE.address}
    bench.hear(ONE, m.PreVoteReply(term=2, voter_id=ONE.node_id, granted=True))
    [(_, vote)] = bench.sent(m.VoteRequest)
    assert (vote.term, vote.plan_fence) == (2, FIRST)
    bench.hear(ONE, m.VoteReply(term=2, voter_id=ONE.node_id, granted=True))
    assert [fact.name for fact in bench.told(e.LeaderElected)] == ["node5"]
    assert bench.sent(m.Heartbeat)[-1][1].leader_id == bench.me.node_id
    bench.run(0.1, ONE, term=2)
    [proposed] = bench.told(e.PlanProposed)
    assert (proposed.fence, proposed.why) == (Fence(2, 2), "a new leader")


# --- following ------------------------------------------------------------------------------------


def test_a_follower_takes_the_leader_from_its_heartbeats() -> None:
    """WELCOME makes nobody a leader; a heartbeat that names its sender does."""
    bench = Bench.joined(ONE, TWO)
    assert bench.node.status(bench.now)["leader"] == "node1"
    assert bench.node.waiting == "this node's worker to start"
    bench.worker_ready()
    assert bench.node.waiting == "the leader's plan"


def test_a_lost_leader_is_followed_by_an_election() -> None:
    """The plan halts, the members stay, and a voter asks for votes."""
    bench = Bench.follower(ONE, TWO)
    bench.take(e.LinkDown(address=ONE.address))
    bench.take(e.ProbeAnswered(address=ONE.address, refused=True))
    assert [fact.reason for fact in bench.told(e.LeaderLost)] == ["it refuses connections"]
    assert bench.ordered(e.Halt)
    assert not bench.node.ready
    assert bench.node.waiting == "the election of a leader"
    bench.run(0.2, TWO, leader_id="")
    assert [a for a, _ in bench.sent(m.PreVoteRequest)] == [TWO.address]
    assert bench.states() == {"node1": "dead", "node2": "alive"}


def test_the_next_leader_says_who_was_lost_just_before() -> None:
    """Whose loss made it the leader was an owner: the first plan goes without it."""
    bench = Bench.follower(ONE, TWO)
    bench.take(e.LinkDown(address=ONE.address))
    bench.take(e.ProbeAnswered(address=ONE.address, refused=True))
    bench.run(0.1, TWO, leader_id="")
    bench.hear(TWO, m.PreVoteReply(term=2, voter_id=TWO.node_id, granted=True))
    bench.hear(TWO, m.VoteReply(term=2, voter_id=TWO.node_id, granted=True))
    [plan] = [order.plan for order in bench.ordered(e.LoadPlan)]
    assert plan.fence == Fence(2, 2)
    owners = {plan.members[i].name for i in plan.stages[0].head_owners}
    assert owners == {"node2", "node5"}


def test_a_plan_ends_with_its_leaders_office() -> None:
    """Where the next leader is known at once the old leader's plan is not obeyed until its first:
    nobody would collect what is drawn by it."""
    bench = Bench.follower(ONE, TWO)
    bench.beat(TWO, term=2, leader_id=TWO.node_id)
    assert bench.ordered(e.Halt)
    assert not bench.node.ready
    assert bench.node.waiting == "the leader's plan"


def test_a_leader_that_hears_of_another_lays_its_office_down() -> None:
    """Its worker stops, and what its own requests lack it asks of the new leader."""
    bench = Bench.leader(ONE, TWO)
    bench.submit(3)
    assert bench.ordered(e.StartRequest)
    bench.beat(TWO, term=7, leader_id=TWO.node_id)
    assert bench.ordered(e.Halt)
    assert [fact.term for fact in bench.told(e.LeaderElected)] == [7]
    assert [a for a, _ in bench.sent(m.Forward)] == [TWO.address]
    token = m.DrawnToken(request_id=3, index=0, token=9)
    bench.worker(e.TokensCommitted(fence=FIRST, tokens=(token,)))
    assert not bench.told(e.Deliver)


def test_a_leader_without_its_voters_resigns() -> None:
    """Alone of three it can decide nothing; requests wait and end as no_quorum."""
    bench = Bench.leader(ONE, TWO, wait_for_nodes=5.0)
    assert bench.node.status(bench.now)["voters"] == ["node1", "node2", "node5"]
    bench.submit(3)
    bench.run(3.0)
    assert [fact.reason for fact in bench.told(e.LeaderLost)] == ["it hears 1 of 3 voters"]
    bench.run(4.0)
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("no_quorum", True)
    assert "node1, node2" in end.message


# --- the worker and the disk ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "code", "says"),
    [
        (e.WorkerDied(detail="signal 9"), 1, "signal 9"),
        (e.WorkerSaid(report=e.WorkerFailed(message="no GPU", usage=True)), 2, "no GPU"),
        (e.WorkerSaid(report=e.WorkerFailed(message="broken")), 1, "broken"),
        (e.PersistFailed(reason="disk full"), 1, "disk full"),
    ],
)
def test_without_worker_or_disk_a_node_ends(event: e.Input, code: int, says: str) -> None:
    """Its clients and the others are told why, the worker is stopped, and its state stays."""
    bench = Bench.leader(TWO)
    bench.submit()
    bench.take(event)
    ended = bench.ended()
    assert ended is not None
    assert ended[1] == code
    assert says in ended[0]
    assert says in bench.sent(m.Leave)[0][1].reason
    [end] = bench.told(e.Conclude)
    assert (end.code, end.retryable) == ("leaving", True)
    assert bench.ordered(e.StopWorker)
    assert bench.stored is not None
    assert bench.take(e.Ticked()) == []


def test_how_a_node_computes_is_told_to_all_it_greeted() -> None:
    """The first HELLO names no numeric class; another follows on every link, once."""
    bench = Bench.joined(ONE, TWO, member=member(5, numeric_class=""))
    bench.worker_ready()
    greetings = bench.sent(m.Hello)
    assert [greeting.member.numeric_class for _, greeting in greetings] == ["n", "n"]
    bench.worker_ready()
    assert bench.sent(m.Hello) == []


def test_a_leader_whose_worker_hangs_resigns() -> None:
    """It says so, leads no more, does not campaign, and ends when the hang goes on."""
    bench = Bench.leader(TWO)
    bench.stats = None
    bench.run(0.8, TWO)
    assert [fact.hung for fact in bench.told(e.WorkerHung)] == [True]
    assert [fact.reason for fact in bench.told(e.LeaderLost)] == ["its own worker hangs"]
    assert bench.sent(m.Heartbeat)[-1][1].hung
    bench.run(LAN.give_up_hung, TWO)
    assert not bench.sent(m.PreVoteRequest)
    ended = bench.ended()
    assert ended is not None
    assert "hanging" in ended[0]
    assert not bench.outputs or not isinstance(bench.outputs[-1], e.Send)


def test_a_worker_that_moves_again_is_no_reason_to_end() -> None:
    """The lone leader elects itself again, and makes a new plan."""
    bench = Bench.leader()
    bench.stats = None
    bench.run(1.0)
    assert not bench.told(e.LeaderElected)
    bench.stats = e.WorkerStats()
    bench.worker(bench.stats)
    assert [fact.hung for fact in bench.told(e.WorkerHung)] == [True, False]
    bench.run(0.5)
    assert [fact.term for fact in bench.told(e.LeaderElected)] == [2]
    assert bench.told(e.PlanProposed)


def test_a_node_that_gives_up_its_worker_says_nothing_after_its_goodbye() -> None:
    """LEAVE is its last message, and there is one end."""
    bench = Bench(join=(1,), join_timeout=LAN.give_up_hung)
    bench.worker(e.WorkerStats())
    bench.run(LAN.give_up_hung + 1.0)
    assert len(bench.told(e.Exit)) == 1


def test_a_broken_step_link_makes_this_node_look() -> None:
    """The member at its other end is suspect and probed; of an unknown one nothing is said."""
    bench = Bench.leader(TWO)
    bench.worker(e.LinkLost(node_id="f" * 16))
    assert not bench.told(e.Probe)
    bench.worker(e.LinkLost(node_id=TWO.node_id))
    assert bench.told(e.Probe) == [e.Probe(address=TWO.address)]
    assert [fact.reason for fact in bench.told(e.PeerSuspected)] == ["its step link broke"]


def test_heartbeats_carry_what_the_worker_says() -> None:
    """Counters, and whom it hears on step links."""
    bench = Bench.leader(TWO)
    heard = (TWO.node_id, "f" * 16)
    bench.stats = e.WorkerStats(steps=4, tokens_per_s=2.5, hears_steps=heard)
    bench.worker(e.LoadProgress(done_bytes=1, total_bytes=2))
    bench.run(0.15, TWO)
    word = bench.sent(m.Heartbeat)[-1][1]
    assert (word.steps, word.tokens_per_s, word.hears_steps) == (4, 2.5, (TWO.node_id,))
    assert word.fence == Fence(1, 2)


# --- members that go, and strangers ---------------------------------------------------------------


def test_a_goodbye_is_believed() -> None:
    """LEAVE makes a member `left` at once; one of an older life does not."""
    bench = Bench.leader(TWO)
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id="0" * 16))
    assert bench.states() == {"node2": "alive"}
    bench.hear(TWO, m.Leave(node_id=TWO.node_id, boot_id=TWO.boot_id))
    assert bench.states() == {"node2": "left"}
    assert bench.told(e.PlanProposed)[0].why == "node2 gone"


def test_heartbeats_of_another_life_change_nothing() -> None:
    """They are dropped, whatever they say of leaders."""
    bench = Bench.leader(TWO)
    bench.hear(TWO, heartbeat(member(2, boot=9), term=9, leader_id=TWO.node_id))
    assert len(bench.told(e.FrameDropped)) == 1
    assert bench.node.status(bench.now)["leader"] == "node5"


def test_a_strangers_heartbeat_is_told_to_greet() -> None:
    """Anything else that a stranger says is dropped in silence."""
    bench = Bench()
    bench.hear(TWO, heartbeat(TWO))
    [refused] = bench.replied(m.Refused)
    assert (refused.code, refused.retryable) == ("not_a_member", True)
    bench.hear(TWO, m.Ack(fence=FIRST, node_id=TWO.node_id))
    bench.take(e.Received(message=heartbeat(TWO), link=TWO.address))
    bench.take(e.Received(message=hello(TWO), link=TWO.address))
    bench.take(e.Received(message=m.Drain(request_id=1, name=""), link=TWO.address))
    assert not bench.replied(m.Refused)
    assert len(bench.told(e.FrameDropped)) == 5


def test_members_speak_for_themselves_only() -> None:
    """A heartbeat, a goodbye, a plan or an acknowledgement in another's name is dropped."""
    bench = Bench.leader(ONE, TWO)
    plan = plan_of(ONE, TWO, bench.me, fence=Fence(9, 9))
    messages = (
        heartbeat(ONE, term=9),
        m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id),
        m.Propose(plan=plan),
        m.Ack(fence=FIRST, node_id=ONE.node_id),
        m.Nack(fence=FIRST, node_id=ONE.node_id, code="internal", message="no"),
        m.Activate(fence=FIRST),
        m.LogRequest(fence=FIRST, request_ids=(1,)),
        m.Drawn(tokens=()),
        m.Ended(request_id=1, reason="stop", total_tokens=0),
        m.Done(request_id=1),
    )
    for message in messages:
        bench.hear(TWO, message)
    assert len(bench.told(e.FrameDropped)) == len(messages)
    assert (bench.node.ready, bench.states()) == (True, {"node1": "alive", "node2": "alive"})


def test_status_has_the_contracts_fields() -> None:
    """The status object: cluster, model, members with what they own."""
    bench = Bench.leader(TWO)
    bench.worker(
        e.WorkerStats(kv_used_bytes=1, kv_standby_bytes=2, kv_inputs_bytes=4, kv_limit_bytes=9)
    )
    status = bench.node.status(bench.now)
    assert status["model"]["num_units"] == {"head": 4, "mlp": 2, "vocab": 2}
    assert (status["epoch"], status["ready"], status["waiting"]) == (2, True, None)
    assert status["voters"] == ["node2", "node5"]
    assert status["tolerates"] == ["node2"]
    other, own = status["members"]
    assert own["kv"] == {"used_bytes": 7, "limit_bytes": 9, "inputs_bytes": 4}
    assert other["owned"][0]["span"] == [0, 2]
    assert sorted(other["head_units"] + own["head_units"]) == list(range(4))
    empty = Bench(join=(1,), model=None).node.status(0.0)
    assert (empty["model"], empty["leader"], empty["waiting"]) == (None, "", "a cluster to join")


def test_a_member_that_started_again_owns_nothing_yet() -> None:
    """The plan in force means the life before."""
    bench = Bench.leader(TWO, replicas=1)
    [row] = [r for r in bench.node.status(bench.now)["members"] if r["name"] == "node2"]
    assert row["owned"]
    assert row["standby"]
    bench.hear(TWO, hello(replace(TWO, boot_id="9" * 16)))
    [row] = [r for r in bench.node.status(bench.now)["members"] if r["name"] == "node2"]
    assert (row["owned"], row["standby"]) == ([], [])


def test_a_node_tells_when_it_could_take_over() -> None:
    """The weights that it keeps for others are there, or cannot be loaded: both are facts."""
    bench = Bench.leader(TWO, replicas=1)
    for error in ("", "no memory"):
        report = e.StandbysLoaded(
            fence=Fence(1, 1), units=4, units_warm=3, weight_bytes=9, reason="room", error=error
        )
        bench.worker(report)
        fact = e.StandbysReady(
            fence=Fence(1, 1), units=4, units_warm=3, weight_bytes=9, reason="room", error=error
        )
        assert bench.told(e.StandbysReady)[-1] == fact
