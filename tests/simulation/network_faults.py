"""Faults of the network: frames late, lost or twice, connections reset, ways cut."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

from p2pinfer.wire.codec import decode
from p2pinfer.wire.messages import Credit, KvDelta, Plane, Step

if TYPE_CHECKING:
    from tests.simulation.faults import Faults
    from tests.simulation.machine import Machine

ALL = (Plane.CONTROL, Plane.STEPS, Plane.BULK)


def delay(faults: Faults, rng: Random) -> None:
    """Some ways take long for a while."""
    for _ in range(rng.randint(1, 4)):
        faults.sometime(rng, partial(_delay, faults, rng))


def _delay(faults: Faults, rng: Random, machine: Machine) -> None:
    extra = rng.choice((0.02, 0.1, 0.3, 0.6))
    numbers = [m.number for m in faults.cluster.machines if m is not machine]
    chosen = [n for n in numbers if rng.random() < 0.7]
    slow = faults.network.slow
    keys = [
        key
        for number in chosen
        for plane in ALL
        for key in ((machine.number, number, plane), (number, machine.number, plane))
        if rng.random() < 0.8
    ]
    faults.world.count("frames were delayed")
    faults.world.tell(machine.number, f"frames take {extra} s longer")
    for key in keys:
        slow[key] = extra

    def undo() -> None:
        for key in keys:
            slow.pop(key, None)

    faults.until(rng.uniform(0.2, 3.0), undo)


def reset(faults: Faults, rng: Random) -> None:
    """Connections break and lose what they hold."""
    for _ in range(rng.randint(2, 6)):
        faults.sometime(rng, partial(_reset, faults, rng, False))


def reorder(faults: Faults, rng: Random) -> None:
    """Connections break; their last frames come late, and some twice, over two connections."""
    for _ in range(rng.randint(2, 6)):
        faults.sometime(rng, partial(_reset, faults, rng, True))


def _reset(faults: Faults, rng: Random, late: bool, machine: Machine) -> None:
    connections = faults.network.connections(machine.number)
    if late:  # Only what is on its way can be late.
        busy = [c for c in connections if c.forth.queue or c.back.queue]
        steps = [c for c in busy if c.plane is Plane.STEPS]
        connections = (steps if rng.random() < 0.5 else busy) or connections
    for connection in rng.sample(connections, min(len(connections), rng.choice((1, 1, 2, 8)))):
        faults.ledger.reset()
        faults.world.count("a connection was reset")
        pair = (connection.dial.process.number, connection.dial.address)
        faults.world.tell(pair[0], f"its {connection.plane} link to {pair[1]} is reset")
        late_s = rng.choice((0.1, 0.4, 0.8, 1.5)) * rng.random() if late else 0.0
        faults.network.break_connection(connection, late_s=late_s, twice=late)


def queues(faults: Faults, rng: Random) -> None:
    """Queues take only a few frames for a while."""
    for _ in range(rng.randint(1, 3)):
        faults.sometime(rng, partial(_queues, faults, rng))


def _queues(faults: Faults, rng: Random, machine: Machine) -> None:
    number = machine.number
    faults.network.hwm[number] = rng.choice((0, 1, 2, 4))
    faults.world.count("queues were full")
    faults.world.tell(number, f"its queues take {faults.network.hwm[number]} frames")
    faults.until(rng.uniform(0.1, 2.0), partial(_normal_queues, faults, number))


def _normal_queues(faults: Faults, number: int) -> None:
    faults.network.hwm.pop(number, None)


def loss(faults: Faults, rng: Random) -> None:
    """Single frames of step links vanish, and nothing else tells of it."""
    for _ in range(rng.randint(2, 6)):
        faults.sometime(rng, partial(_loss, faults, rng))


def _loss(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    pair = (machine.number, other.number)
    source, target = pair if rng.random() < 0.7 else pair[::-1]
    lost = rng.choice((any_frame, any_frame, step_frame, last_tokens, last_tokens))
    faults.world.tell(source, f"its next {lost.__name__} to node{target} is lost")
    faults.network.losing[source, target, Plane.STEPS] = lost


def any_frame(_frame: bytes) -> bool:
    """Whatever comes first."""
    return True


def step_frame(frame: bytes) -> bool:
    """The leader's word on a step."""
    return isinstance(decode(frame, Plane.STEPS), Step)


def last_tokens(frame: bytes) -> bool:
    """A step that computes nothing, so that nobody misses it."""
    message = decode(frame, Plane.STEPS)
    return isinstance(message, Step) and not message.slots


def bulk(faults: Faults, rng: Random) -> None:
    """Replicas have it hard: their frames are lost or late, their links break or are cut."""
    for _ in range(rng.randint(2, 6)):
        strike = rng.choice((_bulk_loss, _bulk_loss, _bulk_reset, _bulk_delay, _bulk_cut))
        faults.sometime(rng, partial(strike, faults, rng))


def _bulk_loss(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    pair = (machine.number, other.number)
    source, target = pair if rng.random() < 0.5 else pair[::-1]
    lost = rng.choice((any_frame, delta, delta, credit))
    faults.world.tell(source, f"its next {lost.__name__} in bulk to node{target} is lost")
    faults.network.losing[source, target, Plane.BULK] = lost


def delta(frame: bytes) -> bool:
    """KV for a standby."""
    return isinstance(decode(frame, Plane.BULK), KvDelta)


def credit(frame: bytes) -> bool:
    """A standby's credit."""
    return isinstance(decode(frame, Plane.BULK), Credit)


def _bulk_reset(faults: Faults, rng: Random, machine: Machine) -> None:
    found = faults.network.connections(machine.number)
    found = [connection for connection in found if connection.plane is Plane.BULK]
    for connection in rng.sample(found, min(len(found), rng.choice((1, 1, 2)))):
        faults.world.count("a bulk link was reset")
        faults.world.tell(machine.number, f"its bulk link to {connection.dial.address} is reset")
        faults.network.break_connection(connection, late_s=rng.choice((0.0, 0.2)))


def _bulk_delay(faults: Faults, rng: Random, machine: Machine) -> None:
    numbers = [m.number for m in faults.cluster.machines if m is not machine]
    keys = [(machine.number, n, Plane.BULK) for n in numbers if rng.random() < 0.6]
    keys += [(n, machine.number, Plane.BULK) for n in numbers if rng.random() < 0.6]
    extra = rng.choice((0.05, 0.3, 1.5))
    faults.world.tell(machine.number, f"bulk frames take {extra} s longer")
    for key in keys:
        faults.network.slow[key] = extra

    def undo() -> None:
        for key in keys:
            faults.network.slow.pop(key, None)

    faults.until(rng.uniform(0.2, 3.0), undo)


def _bulk_cut(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    ways = [(machine.number, other.number), (other.number, machine.number)]
    faults.cut(rng.choice((ways, ways[:1], ways[1:])), (Plane.BULK,), rng)


def oneway(faults: Faults, rng: Random) -> None:
    """One machine does not reach another, which reaches it."""
    for _ in range(rng.randint(1, 3)):
        faults.sometime(rng, partial(_oneway, faults, rng))


def _oneway(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    pair = (machine.number, other.number)
    planes = rng.choice((ALL, ALL, (Plane.CONTROL,), (Plane.STEPS,), (Plane.BULK,)))
    faults.cut([pair if rng.random() < 0.5 else pair[::-1]], planes, rng)


def pairs(faults: Faults, rng: Random) -> None:
    """Two machines do not reach each other."""
    for _ in range(rng.randint(1, 3)):
        faults.sometime(rng, partial(_pairs, faults, rng))


def _pairs(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    one, two = machine.number, other.number
    planes = rng.choice((ALL, ALL, (Plane.CONTROL,), (Plane.STEPS,), (Plane.BULK,)))
    faults.cut([(one, two), (two, one)], planes, rng)


def halves(faults: Faults, rng: Random) -> None:
    """The machines fall into two parts."""
    for _ in range(rng.randint(1, 2)):
        faults.sometime(rng, partial(_halves, faults, rng))


def _halves(faults: Faults, rng: Random, machine: Machine) -> None:
    numbers = [m.number for m in faults.cluster.machines]
    ours = {machine.number, *(n for n in numbers if rng.random() < 0.4)}
    ways = [(a, b) for a in numbers for b in numbers if (a in ours) != (b in ours)]
    if ways:
        faults.cut(ways, ALL, rng)
