"""The five deaths of a member, told apart: killed, hung, hung in compute, cut off, slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.health import LocalHealth, WorkerWatch
from p2pinfer.core.hearing import Hearing
from p2pinfer.core.neighbours import PROBE_AGAIN_PERIODS
from p2pinfer.core.timing import LAN
from tests.neighbours_bench import ME, PERIOD, THREE, TWO, Bench, word


def test_death_1_killed() -> None:
    """Its connection breaks and its port is closed: dead at once, long before any silence."""
    bench = Bench()
    bench.near.link_down(TWO.address)
    bench.take()
    assert [fact.reason for fact in bench.of(e.PeerSuspected)] == ["its connection broke"]
    bench.now += 0.01
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=True), bench.now)
    assert bench.losses == [("node2", "dead", "it refuses connections")]


def test_death_1_killed_while_its_port_still_answers() -> None:
    """A suspect that stays silent is probed again: a dying process closes its port last."""
    bench = Bench()
    bench.near.link_down(TWO.address)
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=False), bench.now)
    assert bench.losses == []
    bench.take()
    again = bench.run((PROBE_AGAIN_PERIODS + 1) * PERIOD, THREE)
    assert [output.address for output in again if isinstance(output, e.Probe)] == [TWO.address]
    bench.near.probe_answered(e.ProbeAnswered(address=TWO.address, refused=True), bench.now)
    assert bench.losses == [("node2", "dead", "it refuses connections")]


def test_death_2_hung_whole() -> None:
    """Its process stands still, connections and port stay: dead by silence of dead_after."""
    bench = Bench()
    bench.run(LAN.dead_after - PERIOD, THREE)
    assert bench.losses == []
    bench.run(2 * PERIOD, THREE)
    assert bench.losses == [("node2", "dead", "it fell silent")]
    dead = bench.of(e.PeerDead)
    assert [fact.silence_s for fact in dead] == [pytest.approx(LAN.dead_after, abs=PERIOD)]


def test_death_2_is_found_later_by_a_node_in_doubt_of_itself() -> None:
    """Local health stretches dead_after."""
    bench = Bench()
    for _ in range(12):
        bench.now += PERIOD
        bench.hear(THREE)
        bench.look(stretch=2.0)
    assert bench.losses == []
    assert bench.near.deadline <= 100.0 + 2 * LAN.dead_after
    bench.run(PERIOD, THREE)
    assert bench.losses == [("node2", "dead", "it fell silent")]


def test_death_3_hung_in_compute() -> None:
    """Its worker reports no more, its control plane speaks on: it says so, and nobody is lost."""
    bench = Bench()
    watch = WorkerWatch(LAN)
    watch.said(bench.now)
    bench.run(1.0, TWO, THREE)
    assert bench.own(hung=watch.hung(bench.now)).hung
    bench.hear(TWO, hung=True)
    bench.look()
    heartbeat = bench.near.table[TWO.node_id].heartbeat
    assert heartbeat is not None
    assert heartbeat.hung
    assert bench.losses == []


def cut_off(hears: Callable[[str, str], bool]) -> tuple[Bench, frozenset[str]]:
    """Node 1 leads for two seconds while only some hear some; who is to own nothing then?"""
    bench, hearing, out = Bench(), Hearing(LAN), frozenset[str]()
    names = {who.node_id: who.name for who in (ME, TWO, THREE)}
    for turn in range(20):
        bench.now += PERIOD
        for who in (TWO, THREE):
            others = [i for i in names if i != who.node_id]
            heard = [i for i in others if turn < 5 or hears(who.name, names[i])]
            living = bench.near.table.is_living(who)
            if living and (turn < 5 or hears("node1", who.name)):
                heartbeat = word(
                    who, hears_control=tuple(heard), sent_at_ms=round(bench.now * 1000)
                )
                bench.near.heard(heartbeat, bench.now)
                hearing.heard(heartbeat)
        bench.look()
        members = bench.near.table.members()
        pairs = hearing.broken(members, bench.own(), bench.now)
        out = hearing.outcasts(pairs, [m.node_id for m in members], ME.node_id)
    return bench, out


def test_death_4_cut_off_from_all() -> None:
    """Nothing comes from it: dead by silence, and no pair is to blame."""
    bench, out = cut_off(lambda ear, mouth: "node2" not in (ear, mouth))
    assert bench.losses == [("node2", "dead", "it fell silent")]
    assert out == frozenset()


def test_death_4_cut_off_in_one_direction() -> None:
    """It speaks but hears nobody: it stays a member, but its pairs are broken."""
    bench, out = cut_off(lambda ear, mouth: ear != "node2")
    assert bench.losses == []
    assert out == {TWO.node_id}


def test_death_4_cut_off_from_one_peer() -> None:
    """Two members do not hear each other: both live, and one of them gives way."""
    bench, out = cut_off(lambda ear, mouth: {ear, mouth} != {"node2", "node3"})
    assert bench.losses == []
    assert out == {THREE.node_id}


def test_death_5_slow() -> None:
    """A slow member speaks as all do: only its computing tells, and nobody is lost."""
    bench = Bench()
    bench.run(2.0, TWO, THREE, compute_ms=500.0)
    assert bench.losses == []
    heartbeat = bench.near.table[TWO.node_id].heartbeat
    assert heartbeat is not None
    assert heartbeat.compute_ms == 500.0


def test_this_nodes_own_standstill_kills_nobody() -> None:
    """Stopped for ten seconds it reads its queues first; by awake time no peer is overdue."""
    bench, health = Bench(), LocalHealth(LAN)
    bench.look()
    health.look(float("inf"), bench.now)
    bench.now = health.look(bench.near.deadline, bench.now + 10.0)
    bench.look(stretch=health.stretch)
    assert bench.losses == []
    assert health.score == LAN.max_health
    bench.run(1.0, TWO, THREE)
    assert bench.losses == []
