"""Several nodes together: founding, joining, losses and requests, one story at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.wire.messages import Drain, Plane
from tests.simulation import toy_model as toy
from tests.simulation.clients import Client
from tests.simulation.cluster import Cluster, Setting
from tests.simulation.machine import Machine
from tests.simulation.world import World

SEEDS = range(3)
PROMPT = (11, 12, 13, 14, 21)


class Story:
    """A cluster and short words for what happens to it."""

    def __init__(self, count: int, seed: int = 1, **settings: object) -> None:
        self.world = World(seed)
        setting = Setting(nodes=count, **settings)  # type: ignore[arg-type]
        self.cluster = Cluster(self.world, setting, toy.Reference(), Node)
        self.facts: list[tuple[int, e.Fact]] = []
        judged = self.cluster.judge.fact

        def fact(process: object, told: e.Fact) -> None:
            self.facts.append((process.number, told))  # type: ignore[attr-defined]
            judged(process, told)  # type: ignore[arg-type]

        self.cluster.judge.fact = fact  # type: ignore[method-assign]

    def start(self, number: int, *join: int) -> Machine:
        """Start machine `number`, asking those given; machines are made as they are needed."""
        machines = self.cluster.machines
        while len(machines) < number:
            self.cluster.add_machine()
        machine = machines[number - 1]
        machine.join = tuple(f"tcp://10.0.0.{other}:7720" for other in join)
        self.cluster.boot(machine)
        return machine

    def run(self, seconds: float) -> None:
        self.world.run_until(self.world.now + seconds)

    def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> bool:
        return self.world.run_until(self.world.now + seconds, condition)

    def submit(self, number: int, max_tokens: int = 12, prompt: tuple[int, ...] = PROMPT) -> Client:
        """A client submits through machine `number`, and takes the first end for an answer."""
        client = self.cluster.clients.add(prompt, max_tokens, 1)
        process = self.cluster.machines[number - 1].process
        assert process is not None
        client.attempt = self.cluster.clients.connect(client, process)
        return client

    def settle(self) -> None:
        """Until all living nodes agree, and those that were to take units over have had the time
        to get them ready."""
        assert self.until(self.cluster.agreed, 20)
        self.run(3)
        assert self.cluster.agreed()

    def told(self, kind: type[e.Fact]) -> list[e.Fact]:
        return [fact for _, fact in self.facts if isinstance(fact, kind)]


def formed(count: int, seed: int = 1, **settings: object) -> Story:
    """That many nodes, ready; the first one leads."""
    story = Story(count, seed, **settings)
    story.start(1)
    for number in range(2, count + 1):
        story.start(number, 1)
    assert story.until(story.cluster.agreed, 20)
    return story


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_nodes_started_together_agree(count: int) -> None:
    """Nodes started at once come to one plan of all of them, in which all vote, and stay there."""
    story = formed(count)
    story.settle()
    plans = {repr(p.worker.active.plan.fence) for p in story.cluster.living()}
    assert len(plans) == 1
    plan = story.cluster.living()[0].worker.active.plan
    assert len(plan.voters) == count
    story.facts.clear()
    story.run(3)
    assert not story.told(e.PlanProposed)


def test_a_node_may_join_through_any_other() -> None:
    """The third node asks the second only, before any of them runs, and all know each other."""
    story = Story(3, min_nodes=3)
    story.start(3, 2)
    story.run(0.5)
    story.start(2, 1)
    story.run(0.5)
    story.start(1)
    assert story.until(story.cluster.agreed)


def test_joining_nobody_gives_up() -> None:
    """A node that nobody answers says so every five seconds and ends after join_timeout."""
    story = Story(1, join_timeout=12.0)
    machine = story.start(2, 1)
    story.run(12.5)
    assert not machine.running
    assert story.world.counters["a node ended in an error"] == 1
    assert len(story.told(e.JoinWaiting)) == 2


def test_any_node_takes_a_prompt() -> None:
    """Requests through every node, all at once, each give the tokens of their prompt."""
    story = formed(3)
    clients = [story.submit(1 + n % 3, 10, (n + 1, 5)) for n in range(12)]
    assert story.until(lambda: not story.cluster.clients.waiting)
    assert {client.end for client in clients} == {"complete"}


def test_a_request_before_the_cluster_is_ready_waits() -> None:
    """A prompt to a node that still looks for its cluster is served when the cluster is ready."""
    story = Story(2, min_nodes=2)
    story.start(2, 1)
    client = story.submit(2)
    story.run(2)
    assert not client.end
    story.start(1)
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"


def test_waiting_for_nodes_has_an_end() -> None:
    """A request that waits for nodes longer than wait_for_nodes ends as not_ready."""
    story = Story(1, min_nodes=3)
    story.start(1)
    client = story.submit(1)
    story.run(6)
    assert client.end == "not_ready"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("victim", [1, 3])
def test_a_reply_survives_the_death_of_any_other_node(seed: int, victim: int) -> None:
    """The leader or an owner is killed in the middle: the reply is whole within two seconds."""
    story = formed(3, seed)
    client = story.submit(2, 40)
    assert story.until(lambda: len(client.shown) > 5)
    story.cluster.crash(story.cluster.machines[victim - 1])
    assert story.until(lambda: len(client.shown) > 12, 2)
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"
    assert story.cluster.agreed()


def rungs(story: Story) -> list[str]:
    """How the KV of each request came back after each failover."""
    return [fact.rung for fact in story.told(e.RequestRestored)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("count", "victim"), [(2, 2), (3, 1), (3, 2), (4, 1)])
def test_a_reply_goes_on_from_replicas(seed: int, count: int, victim: int) -> None:
    """An owner dies, the leader or another: its standbys have all but the last positions."""
    story = formed(count, seed, replicas=count // 2)
    story.settle()
    client = story.submit(3 - victim, 60)
    assert story.until(lambda: len(client.shown) > 15)
    story.facts.clear()
    story.cluster.crash(story.cluster.machines[victim - 1])
    assert story.until(lambda: bool(story.told(e.RequestRestored)), 4)
    restored = story.told(e.RequestRestored)[0]
    assert restored.rung == "replica"
    assert restored.restart >= restored.length - 4
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"


@pytest.mark.parametrize("seed", SEEDS)
def test_new_standbys_are_filled_before_the_next_death(seed: int) -> None:
    """One owner dies after the other: each time the reply goes on from replicas."""
    story = formed(4, seed, replicas=1)
    story.settle()
    client = story.submit(4, 90, (5,))
    for victim in (3, 2):
        shown = len(client.shown)
        assert story.until(lambda shown=shown: len(client.shown) > shown + 16)
        story.facts.clear()
        story.cluster.crash(story.cluster.machines[victim - 1])
        assert story.until(lambda: bool(story.told(e.RequestRestored)), 4)
        assert rungs(story) == ["replica"]
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("count", "layout", "victims"),
    [(2, "layers", (2,)), (3, "layers", (2, 3)), (3, "layers", (3, 2)), (4, "2x2", (2, 1))],
)
def test_a_stage_that_loses_everybody_goes_on_from_replicas(
    seed: int, count: int, layout: str, victims: tuple[int, ...]
) -> None:
    """Its standbys own units of two stages then, until other nodes come."""
    story = formed(count, seed, layout=layout, replicas=1)
    story.settle()
    left, found = min({*range(1, count + 1)} - {*victims}), set[str]()
    client = story.submit(left, 90)
    for victim in victims:
        shown = len(client.shown)
        assert story.until(lambda shown=shown: len(client.shown) > shown + 12)
        story.facts.clear()
        story.cluster.crash(story.cluster.machines[victim - 1])
        assert story.until(lambda: bool(story.told(e.RequestRestored)), 4)
        found |= set(rungs(story))
    # Of three nodes one owns nothing.
    assert found - {"none"} == {"replica"}
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"
    for victim in victims:
        story.start(victim, left)
    story.settle()
    plan = story.cluster.living()[0].worker.active.plan
    owners = [set(stage.head_owners) for stage in plan.stages]
    assert len(owners) == 2
    assert not owners[0] & owners[1]


def test_a_standby_that_was_cut_off_makes_the_restart_smaller() -> None:
    """No delta KV comes for a while, and the owner dies: the reply goes on from what there is."""
    story = formed(3, replicas=1)
    client = story.submit(1, 60)
    assert story.until(lambda: len(client.shown) > 10)
    for way in ((a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b):
        story.cluster.network.cut(*way, Plane.BULK)
    assert story.until(lambda: len(client.shown) > 30)
    assert not rungs(story)
    story.cluster.crash(story.cluster.machines[1])
    assert story.until(lambda: bool(story.told(e.RequestRestored)), 4)
    restored = story.told(e.RequestRestored)[0]
    assert restored.rung == "replica"
    assert len(PROMPT) + 9 <= restored.restart <= len(PROMPT) + 16
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"


def test_without_replicas_a_reply_is_replayed() -> None:
    """An owner without a standby dies: all of the reply is computed again."""
    story = formed(3)
    client = story.submit(1, 60)
    assert story.until(lambda: len(client.shown) > 10)
    story.cluster.crash(story.cluster.machines[1])
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"
    assert rungs(story) == ["replay"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_client_goes_on_after_its_own_node(seed: int) -> None:
    """The node that a client talks to is killed: another one goes on where it was."""
    story = formed(3, seed)
    client = story.submit(1, 40)
    assert story.until(lambda: len(client.shown) > 5)
    story.cluster.crash(story.cluster.machines[0])
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("victim", [1, 2])
def test_a_node_that_restarts_at_once_comes_back(seed: int, victim: int) -> None:
    """A node killed and started again at once, with its state, is a member again."""
    story = formed(3, seed)
    client = story.submit(3, 40)
    story.run(0.2)
    story.cluster.crash(story.cluster.machines[victim - 1])
    story.cluster.boot(story.cluster.machines[victim - 1])
    assert story.until(lambda: bool(client.end) and story.cluster.agreed(), 20)
    assert client.end == "complete"


@pytest.mark.parametrize("seed", SEEDS)
def test_after_a_power_cut_all_come_back(seed: int) -> None:
    """All machines lose their power at once, and re-form their cluster whatever their flags say."""
    story = formed(3, seed)
    cluster_id = story.cluster.living()[0].cluster_id
    for machine in story.cluster.machines:
        story.cluster.crash(machine, silent=True)
    story.run(1)
    for number in (3, 1, 2):
        story.cluster.boot(story.cluster.machines[number - 1])
        story.run(0.3)
    assert story.until(story.cluster.agreed, 20)
    assert {process.cluster_id for process in story.cluster.living()} == {cluster_id}


def test_a_node_without_its_state_votes_again_only_by_a_plan() -> None:
    """A node that lost its disk is taken in again, and then votes."""
    story = formed(3)
    victim = story.cluster.machines[2]
    story.cluster.crash(victim, wipe=True)
    story.run(0.5)
    story.cluster.boot(victim)
    assert story.until(story.cluster.agreed, 20)
    story.run(1)
    plan = story.cluster.living()[0].worker.active.plan
    assert len(plan.voters) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_join_interrupts_no_reply(seed: int) -> None:
    """A node joins while a reply runs, and takes its part; the reply is whole."""
    story = formed(2, seed)
    client = story.submit(2, 60)
    story.run(0.3)
    story.start(3, 2)
    assert story.until(lambda: story.cluster.agreed() and bool(client.end))
    assert client.end == "complete"

    def owners() -> set[int]:
        active = story.cluster.living()[0].worker.active
        return set(active.plan.stages[0].head_owners) if active else set()

    assert story.until(lambda: owners() == {0, 1, 2})


# With seed 2 the end of the leaver's links is seen before its LEAVE is heard.
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("victim", [1, 2])
def test_a_drained_member_hands_over_and_leaves(seed: int, victim: int) -> None:
    """A member, the leader too, is drained under load: it leaves, and the reply is whole."""
    story = formed(3, seed)
    client = story.submit(3, 60)
    story.run(0.3)
    process = story.cluster.machines[2].process
    assert process is not None
    drain = Drain(request_id=99, name=f"node{victim}")
    process.take(e.Received(message=drain, route=b"cdrain"))
    assert story.until(lambda: story.cluster.machines[victim - 1].gone)
    assert story.until(lambda: bool(client.end) and story.cluster.agreed())
    assert client.end == "complete"
    assert story.world.counters["a drain was done"] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_client_that_moves_gets_one_whole_reply(seed: int) -> None:
    """A client goes on through another node with the tokens it has, and gets the rest."""
    story = formed(3, seed)
    client = story.submit(2, 40)
    assert story.until(lambda: len(client.shown) > 3)
    story.cluster.clients.vanish(client, for_good=False)
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"
    assert client.attempts == 2


def test_a_wrong_token_is_a_conflict() -> None:
    """Who resumes a running request with a token it never had is told so; the client is not."""
    story = formed(3)
    client = story.submit(2, 40)
    assert story.until(lambda: len(client.shown) > 3)
    story.cluster.clients.lie(client)
    assert story.until(lambda: story.world.counters["a wrong token was refused"] == 1)
    assert story.until(lambda: bool(client.end))
    assert client.end == "complete"


@pytest.mark.parametrize("pair", [(2, 3), (1, 2)])
def test_a_cut_between_two_members_heals(pair: tuple[int, int]) -> None:
    """Two members do not reach each other for a while: a reply goes on, and all meet again."""
    story = formed(3)
    client = story.submit(3, 60)
    story.run(0.2)
    for way in (pair, pair[::-1]):
        for plane in (Plane.CONTROL, Plane.STEPS):
            story.cluster.network.cut(*way, plane)
    story.run(5)
    for way in (pair, pair[::-1]):
        for plane in (Plane.CONTROL, Plane.STEPS):
            story.cluster.network.heal(*way, plane, reset=True)
    assert story.until(lambda: bool(client.end) and story.cluster.agreed(), 20)
    assert client.end == "complete"


def test_a_leader_that_was_stopped_gives_way() -> None:
    """A leader stopped for seconds finds another one when it goes on, and follows it."""
    story = formed(3)
    client = story.submit(2, 60)
    story.run(0.2)
    first = story.cluster.machines[0].process
    assert first is not None
    first.stall(frozen=True)
    story.run(4)
    assert story.cluster.leader() is not story.cluster.machines[0]
    first.go_on()
    assert story.until(lambda: bool(client.end) and story.cluster.agreed(), 20)
    assert client.end == "complete"


@pytest.mark.parametrize("kind", ["Hello", "Welcome", "Propose", "Ack", "Activate"])
def test_a_lost_message_delays_agreement_but_does_not_prevent_it(kind: str) -> None:
    """The first three messages of a kind are lost: the nodes agree all the same."""
    story = Story(3, min_nodes=3)
    story.cluster.losing[kind] = 3
    story.start(1)
    story.start(2, 1)
    story.start(3, 1)
    assert story.until(story.cluster.agreed, 15)
    assert story.cluster.losing[kind] == 0


@pytest.mark.parametrize("kind", ["Forward", "Drawn", "Ended"])
def test_a_lost_message_cuts_no_reply_short(kind: str) -> None:
    """A message about a reply is lost, at its start and later: the reply is whole in the end."""
    story = formed(2)
    story.cluster.losing[kind] = 1
    client = story.submit(2, 40)
    story.run(0.3)
    story.cluster.losing[kind] = 1
    assert story.until(lambda: bool(client.end), 15)
    assert client.end == "complete"


def test_an_idle_cluster_does_little() -> None:
    """Nothing but heartbeats and counters while nothing happens."""
    story = formed(3)
    story.run(1)
    before = story.world.trace.entries
    story.run(1)
    assert story.world.trace.entries - before < 200
    assert story.cluster.living()[0].node.deadline < inf
