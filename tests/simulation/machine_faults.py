"""Faults of machines: processes that die, stand still or are slow; clocks and disks."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.faults import Faults
    from tests.simulation.machine import Machine


def crash(faults: Faults, rng: Random) -> None:
    """Processes are killed and come back with their state."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        faults.sometime(rng, lambda machine: faults.kill(machine, _down(rng)))


def power(faults: Faults, rng: Random) -> None:
    """Machines lose their power: nobody is told, and nothing refuses."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, lambda machine: faults.kill(machine, _down(rng), silent=True))


def amnesia(faults: Faults, rng: Random) -> None:
    """Processes are killed and come back without their state."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, partial(_amnesia, faults, rng))


def _amnesia(faults: Faults, rng: Random, machine: Machine) -> None:
    faults.kill(machine, _down(rng), wipe=faults.may_forget(machine))


def blackout(faults: Faults, rng: Random) -> None:
    """All machines lose their power at once."""
    faults.sometime(rng, partial(_blackout, faults, rng))


def _blackout(faults: Faults, rng: Random, _machine: Machine) -> None:
    faults.world.count("power cut")
    if faults.cluster.changing() or faults.cluster.activating():
        faults.world.count("power cut during an epoch change")
    for machine in faults.cluster.machines:
        if machine.running:
            faults.kill(machine, rng.uniform(0.1, 2.5), silent=True)


def succession(faults: Faults, rng: Random) -> None:
    """The leader is lost, and those who elect another are killed while they do."""
    for _ in range(rng.choice((1, 2))):
        faults.sometime(rng, partial(_succession, faults, rng))


def _succession(faults: Faults, rng: Random, machine: Machine) -> None:
    leader = faults.cluster.leader() or machine
    if not leader.running:
        return
    moment = rng.choice(("VoteRequest", "VoteReply", "LeaderElected", "LeaderElected", "Persist"))
    left, delay = [rng.choice((1, 1, 2))], rng.choice((0.0, rng.uniform(0, 0.005)))
    everybody = rng.random() < 0.6

    def again(target: Machine) -> None:
        struck = faults.cluster.machines if everybody else [target]
        for each in struck:
            if each.running and not faults.cluster.calm:
                faults.kill(each, rng.uniform(0.0, 0.2))

    def watcher(number: int) -> None:
        if faults.world.now > faults.end or left[0] <= 0:
            return
        left[0] -= 1
        if left[0] == 0:
            faults.world.count("electors killed during an election")
            faults.world.later(delay, again, faults.cluster.machines[number - 1])

    faults.kill(leader, _down(rng), silent=rng.random() < 0.3)
    faults.world.watch(moment, watcher)


def takeover(faults: Faults, rng: Random) -> None:
    """An owner is killed while requests run, and then somebody while its standbys take over."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, partial(_takeover, faults, rng))


def _takeover(faults: Faults, rng: Random, machine: Machine) -> None:
    process = machine.process
    assert process is not None
    running = [p for p in faults.cluster.living() if len(p.worker.logs)]
    owners = [p for p in running if p.worker.logs.coverage.computed] or [process]
    moment = rng.choice(("Promotion", "Promotion", "KvRequest", "PlanLoaded", "ActivatePlan"))
    left, delay = [rng.choice((0, 1, 1, 2))], rng.choice((0.0, 0.0, rng.uniform(0, 0.2)))

    def again(target: Machine) -> None:
        if target.running and not faults.cluster.calm:
            faults.kill(target, _down(rng), silent=rng.random() < 0.2)

    def watcher(number: int) -> None:
        if faults.world.now > faults.end or left[0] <= 0:
            return
        left[0] -= 1
        if left[0] == 0:
            faults.world.later(delay, again, faults.cluster.machines[number - 1])

    faults.kill(rng.choice(owners).machine, _down(rng) + rng.choice((0.0, 2.0)))
    faults.world.watch(moment, watcher)


def _down(rng: Random) -> float:
    return rng.choice((rng.uniform(0.0, 0.1), rng.uniform(0.1, 1.0), rng.uniform(0.5, 4.0)))


def pause(faults: Faults, rng: Random) -> None:
    """Whole processes stand still, and go on as if nothing had been."""
    for _ in range(rng.choice((1, 2, 3))):
        faults.sometime(rng, partial(_pause, faults, rng, True))


def stall(faults: Faults, rng: Random) -> None:
    """A control plane does not get to run, while its worker goes on."""
    for _ in range(rng.choice((1, 2, 3))):
        faults.sometime(rng, partial(_pause, faults, rng, False))


def _pause(faults: Faults, rng: Random, frozen: bool, machine: Machine) -> None:
    process = machine.process
    assert process is not None
    if process.stalled or process.worker.hung:
        return
    faults.ledger.standstill(machine)
    faults.world.count("a process stood still" if frozen else "a control plane stood still")
    faults.world.tell(
        machine.number, "stands still" if frozen else "its control plane stands still"
    )
    term = process.leads_in
    process.stall(frozen=frozen)

    def undo() -> None:
        if process.alive:
            faults.world.tell(machine.number, "goes on")
            if term:
                faults.ledger.zombie(machine, term)
            process.go_on()

    faults.until(rng.choice((rng.uniform(0.1, 1.0), rng.uniform(1.0, 5.0))), undo)


def hang(faults: Faults, rng: Random) -> None:
    """Workers stand still while their control planes go on."""
    for _ in range(rng.choice((1, 1, 2))):
        faults.sometime(rng, partial(_hang, faults, rng))


def _hang(faults: Faults, rng: Random, machine: Machine) -> None:
    process = machine.process
    assert process is not None
    worker = process.worker
    if worker.hung or process.stalled:
        return
    faults.ledger.standstill(machine)
    faults.world.count("a worker hung")
    faults.world.tell(machine.number, "its worker hangs")
    worker.hang()

    def undo() -> None:
        if not process.frozen:
            faults.world.tell(machine.number, "its worker moves again")
            worker.move()

    faults.until(rng.choice((rng.uniform(0.1, 1.0), rng.uniform(1.0, 5.0))), undo)


def slow(faults: Faults, rng: Random) -> None:
    """A machine computes much slower for a while."""
    faults.sometime(rng, partial(_slow, faults, rng))


def _slow(faults: Faults, rng: Random, machine: Machine) -> None:
    machine.pace = rng.choice((3.0, 8.0, 20.0))
    faults.world.count("a machine was slow")
    faults.world.tell(machine.number, f"computes {machine.pace:g} times slower")
    faults.until(rng.uniform(0.5, 6.0), lambda: setattr(machine, "pace", 1.0))


def clock(faults: Faults, rng: Random) -> None:
    """Clocks jump ahead, as that of a machine that slept does."""
    for _ in range(rng.choice((1, 2, 3))):
        faults.sometime(rng, partial(_clock, faults, rng))


def _clock(faults: Faults, rng: Random, machine: Machine) -> None:
    seconds = rng.choice((0.3, 1.0, 3.0, 20.0))
    machine.jumped += seconds
    faults.world.count("a clock jumped")
    faults.world.tell(machine.number, f"its clock jumps by {seconds} s")


def disk(faults: Faults, rng: Random) -> None:
    """Disks are slow, or fail."""
    for _ in range(rng.choice((1, 2, 3))):
        faults.sometime(rng, partial(_disk, faults, rng))


def _disk(faults: Faults, rng: Random, machine: Machine) -> None:
    faults.ledger.disk()
    if rng.random() < 0.25:
        machine.disk.failures += 1
        faults.until(rng.uniform(0.2, 3.0), lambda: setattr(machine.disk, "failures", 0))
        return
    machine.disk.slow_s = rng.choice((0.05, 0.3, 1.0))
    faults.world.count("a disk was slow")
    faults.world.tell(machine.number, f"its disk takes {machine.disk.slow_s} s longer")
    faults.until(rng.uniform(0.2, 3.0), lambda: setattr(machine.disk, "slow_s", 0.0))
