"""What people do at a bad time: clients come and go, machines join, are drained and restarted."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

from p2pinfer.core import events as e
from p2pinfer.wire.messages import Drain, Pause

if TYPE_CHECKING:
    from tests.simulation.faults import Faults
    from tests.simulation.machine import Machine

MAX_MACHINES = 6


def clients(faults: Faults, rng: Random) -> None:
    """Clients go away; most come back through another node with the tokens they have."""
    for _ in range(rng.randint(1, 4)):
        faults.sometime(rng, partial(_client, faults, rng))


def _client(faults: Faults, rng: Random, _machine: Machine) -> None:
    waiting = [client for client in faults.cluster.clients.waiting if client.attempt is not None]
    if waiting:
        client = rng.choice(waiting)
        if faults.cluster.changing():
            faults.world.count("a client vanished during an epoch change")
        faults.cluster.clients.vanish(client, for_good=rng.random() < 0.25)


def liars(faults: Faults, rng: Random) -> None:
    """Somebody resumes a client's request with a token that it never had."""
    for _ in range(rng.randint(1, 2)):
        faults.sometime(rng, partial(_liar, faults, rng))


def _liar(faults: Faults, rng: Random, _machine: Machine) -> None:
    waiting = [client for client in faults.cluster.clients.waiting if client.shown]
    if waiting:
        faults.cluster.clients.lie(rng.choice(waiting))


def join(faults: Faults, rng: Random) -> None:
    """Machines join under load."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, partial(_join, faults, rng))


def _join(faults: Faults, rng: Random, _machine: Machine) -> None:
    cluster = faults.cluster
    if len(cluster.machines) >= MAX_MACHINES:
        return
    known = [m for m in cluster.machines if not m.gone]
    asked = rng.sample(known, min(len(known), 3))
    faults.ledger.change("join")
    faults.world.count("a machine joined")
    cluster.boot(cluster.add_machine(tuple(asked)))


def drain(faults: Faults, rng: Random) -> None:
    """Members are drained: they hand over what they hold, and leave for good."""
    faults.sometime(rng, partial(_drain, faults, rng))


def _drain(faults: Faults, rng: Random, machine: Machine) -> None:
    running = [m for m in faults.cluster.machines if m.running]
    asked = rng.choice(running).process
    if len(running) < 3 or asked is None:
        return
    faults.ledger.change("drain")
    faults.world.count("a member was to be drained")
    message = Drain(request_id=9_000_000 + machine.number, name=machine.name)
    asked.take(e.Received(message=message, route=b"cdrain%d" % machine.number))


def rest(faults: Faults, rng: Random) -> None:
    """Members are paused, and most of them resumed after a while."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, partial(_rest, faults, rng))


def _rest(faults: Faults, rng: Random, machine: Machine) -> None:
    faults.ledger.change("pause")
    faults.world.count("a member was to be paused")
    _ask(faults, rng, machine, resume=False)
    if rng.random() < 0.8:
        again = partial(_ask, faults, rng, machine, resume=True)
        faults.world.later(rng.uniform(0.1, 4.0), again)


def _ask(faults: Faults, rng: Random, machine: Machine, *, resume: bool) -> None:
    """Somebody asks a node that runs to pause a member, or to resume it."""
    running = [m for m in faults.cluster.machines if m.running]
    asked = rng.choice(running).process if running else None
    if asked is not None:
        message = Pause(request_id=8_000_000 + machine.number, name=machine.name, resume=resume)
        asked.take(e.Received(message=message, route=b"cpause%d" % machine.number))


def leave(faults: Faults, rng: Random) -> None:
    """Nodes are told to end, and are started again."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, partial(_leave, faults, rng))


def _leave(faults: Faults, rng: Random, machine: Machine) -> None:
    process = machine.process
    assert process is not None
    faults.ledger.change("leave")
    faults.world.count("a node was told to end")
    machine.returns = True
    process.take(e.ShutdownAsked())
