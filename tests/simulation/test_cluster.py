"""Several nodes together: founding, joining, losses and requests in many orders."""

from __future__ import annotations

import os

import pytest

from p2pinfer.core import events as e
from p2pinfer.wire.messages import (
    Ack,
    Activate,
    ControlMessage,
    Drawn,
    Ended,
    Forward,
    Hello,
    Propose,
    Welcome,
)
from tests.simulation.cluster import MODEL, Client, Cluster, Host, toy_reply

SEEDS = range(int(os.environ.get("SIMULATION_SEEDS", "4")))


def cluster_of(count: int, seed: int = 1) -> tuple[Cluster, list[Host]]:
    """That many nodes, ready."""
    cluster = Cluster(seed)
    hosts = [
        cluster.start(number, join=() if number == 1 else (1,), min_nodes=count)
        for number in range(1, count + 1)
    ]
    assert cluster.run_until(cluster.agreed, 15)
    return cluster, hosts


def complete(client: Client) -> bool:
    """The client has the whole right reply, ended once."""
    if len(client.ends) != 1:
        return False
    [end] = client.ends
    whole = toy_reply(client.prompt_ids, client.params.max_tokens)
    return isinstance(end, e.Conclude) and not end.code and tuple(client.tokens) == whole


def codes(*clients: Client) -> list[str]:
    """The error codes of clients that ended once each."""
    assert all(len(client.ends) == 1 for client in clients)
    return [client.ends[0].code for client in clients]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_nodes_started_together_agree(count: int) -> None:
    """Nodes started at once adopt one plan of all of them, and say so in their status."""
    cluster, hosts = cluster_of(count)
    statuses = [host.node.status(cluster.now) for host in hosts]
    assert {status["leader"] for status in statuses} == {"node1"}
    assert all(status["ready"] and status["waiting"] is None for status in statuses)
    heads = [unit for member in statuses[-1]["members"] for unit in member["head_units"]]
    assert sorted(heads) == list(range(MODEL.num_key_value_heads))
    cluster.run(3)
    assert cluster.agreed()
    assert all(len(host.told(e.PlanAdopted)) == 1 for host in hosts)


def test_a_node_may_join_through_any_other() -> None:
    """The third node asks the second only, before any of them runs, and all know each other."""
    cluster = Cluster(3)
    cluster.start(3, join=(2,))
    cluster.run(0.5)
    cluster.start(2, join=(1,))
    cluster.run(0.5)
    cluster.start(1, min_nodes=3)
    assert cluster.run_until(cluster.agreed, 10)


def test_joining_nobody_gives_up() -> None:
    """A node that nobody answers says so every five seconds and gives up after join_timeout."""
    cluster = Cluster(4)
    host = cluster.start(2, join=(1,), join_timeout=12.0)
    cluster.run(20)
    assert host.exit is not None
    assert host.exit.exit_code == 1
    assert "tcp://10.0.0.1:7720" in host.exit.error
    assert len(host.told(e.JoinWaiting)) == 2


def test_any_node_takes_a_prompt() -> None:
    """Requests through every node, all at once, each give the tokens of the prompt."""
    cluster, hosts = cluster_of(3)
    clients = [
        cluster.submit(hosts[number % 3], number, (number, 5), max_tokens=20)
        for number in range(20)
    ]
    assert cluster.run_until(lambda: all(client.ends for client in clients), 5)
    assert all(map(complete, clients))


def test_a_request_before_the_cluster_is_ready_waits() -> None:
    """A prompt to a node that still looks for its cluster is served when the cluster is ready."""
    cluster = Cluster(5)
    second = cluster.start(2, join=(1,))
    client = cluster.submit(second, 7)
    cluster.run(2)
    assert client.accepted
    assert not client.ends
    cluster.start(1, min_nodes=2)
    assert cluster.run_until(lambda: bool(client.ends), 10)
    assert complete(client)


def test_waiting_for_nodes_has_an_end() -> None:
    """A request that waits longer than wait_for_nodes ends as not_ready, naming what lacks."""
    cluster = Cluster(6)
    host = cluster.start(1, min_nodes=3, wait_for_nodes=5.0)
    client = cluster.submit(host, 7)
    cluster.run(6)
    [end] = client.ends
    assert (end.code, end.retryable) == ("not_ready", True)
    assert "1 of 3 nodes" in end.message


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dead_owner_ends_replies_and_the_rest_goes_on(seed: int) -> None:
    """Replies end as node_lost well within 2 s of an owner's death; then two nodes serve."""
    cluster, hosts = cluster_of(3, seed)
    cluster.run(1)
    clients = [
        cluster.submit(host, host.config.member.pid + n, (n, 1), max_tokens=500)
        for n, host in enumerate(hosts[:2])
    ]
    cluster.run(0.1)
    cluster.kill(hosts[2])
    killed = cluster.now
    assert cluster.run_until(lambda: all(client.ends for client in clients), 2)
    assert cluster.now - killed < 1.6
    for client in clients:
        assert complete(client) or codes(client) == ["node_lost"]
    late = cluster.submit(hosts[0], 99)
    assert cluster.run_until(lambda: bool(late.ends), 10)
    assert complete(late)
    assert cluster.agreed()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dead_leader_ends_replies_and_a_new_founder_gathers_the_rest(seed: int) -> None:
    """Followers end their replies as leader_lost within 2 s, and join the restarted founder."""
    cluster, hosts = cluster_of(3, seed)
    cluster.run(1)
    client = cluster.submit(hosts[1], 8, (2, 1), max_tokens=500)
    cluster.run(0.1)
    cluster.kill(hosts[0])
    assert cluster.run_until(lambda: bool(client.ends), 2)
    assert complete(client) or codes(client) == ["leader_lost"]
    cluster.run(cluster.random.uniform(0, 10))
    cluster.start(1, boot=1, min_nodes=3)
    assert cluster.run_until(cluster.agreed, 15)
    again = cluster.submit(hosts[1], 8, (2, 1))
    assert cluster.run_until(lambda: bool(again.ends), 5)
    assert complete(again)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_founder_that_restarts_at_once_gathers_its_followers(seed: int) -> None:
    """A founder killed and started again before anybody looks founds another cluster for all."""
    cluster, hosts = cluster_of(3, seed)
    cluster.kill(hosts[0])
    cluster.start(1, boot=1, min_nodes=3)
    assert cluster.run_until(cluster.agreed, 20)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_follower_that_restarts_at_once_is_a_new_member(seed: int) -> None:
    """A follower killed and started again at once joins as another life of the same node."""
    cluster, hosts = cluster_of(3, seed)
    client = cluster.submit(hosts[0], 8, (2, 1), max_tokens=500)
    cluster.kill(hosts[1])
    cluster.start(2, boot=1, join=(1,))
    assert cluster.run_until(cluster.agreed, 20)
    assert cluster.run_until(lambda: bool(client.ends), 2)
    assert complete(client) or codes(client) == ["node_lost"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_join_interrupts_no_reply(seed: int) -> None:
    """A node joins while replies run: they pause, and go on under the new plan."""
    cluster, hosts = cluster_of(2, seed)
    client = cluster.submit(hosts[1], 8, (2, 9), max_tokens=60)
    cluster.run(0.2)
    cluster.start(3, join=(2,))
    assert cluster.run_until(cluster.agreed, 10)
    assert cluster.run_until(lambda: bool(client.ends), 5)
    assert complete(client)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leave_ends_only_the_leaving_nodes_own_replies(seed: int) -> None:
    """A node that leaves tells its clients; the replies of others go on without it."""
    cluster, hosts = cluster_of(3, seed)
    prompt = (3, 3)
    stays, goes = (cluster.submit(hosts[n], n, prompt, max_tokens=100) for n in (1, 2))
    cluster.run(0.1)
    hosts[2].take(e.ShutdownAsked())
    assert hosts[2].exit == e.Exit(error="", exit_code=0)
    assert cluster.run_until(lambda: bool(stays.ends), 10)
    assert complete(stays)
    assert complete(goes) or codes(goes) == ["leaving"]
    assert cluster.run_until(cluster.agreed, 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_client_that_moves_gets_one_whole_reply(seed: int) -> None:
    """A client goes on through another node with the tokens it has, and gets the rest."""
    cluster, hosts = cluster_of(3, seed)
    prompt = (1, 1, 8)
    first = cluster.submit(hosts[1], 8, prompt, max_tokens=60)
    cluster.run(cluster.random.uniform(0, 0.5))
    second = cluster.submit(hosts[2], 8, prompt, max_tokens=60, received=tuple(first.tokens))
    assert cluster.run_until(lambda: bool(first.ends and second.ends), 5)
    assert complete(second)
    assert complete(first) or codes(first) == ["cancelled"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_silent_network_between_followers_heals(seed: int) -> None:
    """Two followers lose each other, then meet again; the leader's plan stands meanwhile."""
    cluster, hosts = cluster_of(3, seed)
    cluster.part(hosts[1], hosts[2])
    cluster.run(3)
    assert hosts[1].told(e.PeerDead)
    cluster.heal(hosts[1], hosts[2])
    assert cluster.run_until(cluster.agreed, 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_silent_network_between_leader_and_follower_heals(seed: int) -> None:
    """A follower cut off from the leader is dropped, ends its replies, and comes back."""
    cluster, hosts = cluster_of(3, seed)
    cluster.run(1)
    client = cluster.submit(hosts[2], 8, (2, 1), max_tokens=500)
    cluster.run(0.1)
    cluster.part(hosts[0], hosts[2])
    cluster.run(cluster.random.uniform(0.2, 4))
    cluster.heal(hosts[0], hosts[2])
    assert cluster.run_until(cluster.agreed, 20)
    cluster.run(3)
    assert complete(client) or codes(client)[0] in ("node_lost", "leader_lost")


@pytest.mark.parametrize("kind", [Hello, Welcome, Propose, Ack, Activate])
def test_a_lost_message_delays_agreement_but_does_not_prevent_it(
    kind: type[ControlMessage],
) -> None:
    """The first three messages of a kind are lost: the nodes agree all the same."""
    cluster = Cluster(1)
    cluster.losing[kind] = 3
    for number in (1, 2, 3):
        cluster.start(number, join=() if number == 1 else (1,), min_nodes=3)
    assert cluster.run_until(cluster.agreed, 10)
    assert cluster.losing[kind] == 0


@pytest.mark.parametrize("kind", [Forward, Drawn, Ended])
def test_a_lost_message_cuts_no_reply_short(kind: type[ControlMessage]) -> None:
    """A message about a reply is lost, at its start and later: the reply is whole in the end."""
    cluster, hosts = cluster_of(2)
    cluster.losing[kind] = 1
    client = cluster.submit(hosts[1], 1, (6, 6), max_tokens=60)
    cluster.run(0.3)
    cluster.losing[kind] = 1
    assert cluster.run_until(lambda: bool(client.ends), 10)
    assert complete(client)


@pytest.mark.parametrize("seed", range(4 * len(SEEDS)))
def test_whatever_happens_requests_end_once_and_nodes_agree(seed: int) -> None:
    """Random starts, joins, kills, leaves and submissions: each request ends once, all agree."""
    cluster = Cluster(seed, delay=0.004)
    choose = cluster.random
    waiting = [2, 3, 4, 5]
    boots = dict.fromkeys(waiting, 0)
    clients: list[Client] = []
    cluster.start(1)
    for number in range(40):
        cluster.run(choose.uniform(0, 0.7))
        hosts = cluster.living()
        what = choose.choice(["start", "submit", "submit", "flap", "flap", "kill", "leave"])
        followers = [host for host in hosts if host.name != "node1"]
        if what == "start" and waiting:
            new = waiting.pop(choose.randrange(len(waiting)))
            boots[new] += 1
            cluster.start(new, join=(choose.choice((1, 1, 2, 3)), 1), boot=boots[new])
        elif what == "submit":
            prompt = (number, choose.randrange(9))
            clients.append(
                cluster.submit(
                    choose.choice(hosts), number, prompt, max_tokens=choose.choice((1, 8, 90))
                )
            )
        elif what == "flap":
            cluster.flap(choose.choice(hosts))
        elif what in ("kill", "leave") and followers and choose.random() < 0.5:
            victim = choose.choice(followers)
            if what == "kill":
                cluster.kill(victim)
            else:
                victim.take(e.ShutdownAsked())
            waiting.append(int(victim.name[4:]))
    assert cluster.run_until(cluster.agreed, 30)
    cluster.run(10)
    for client in clients:
        if client.host.alive or client.ends:
            assert complete(client) or codes(client)[0] in ("node_lost", "leaving", "not_ready")
    assert sum(map(complete, clients)) >= len(clients) / 3
