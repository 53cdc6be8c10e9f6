"""What goes wrong in a simulation: classes of faults, drawn from the seed, that may come together.

Each class has random numbers of its own, so that a seed with one class left out keeps the others as
they were. Half of the faults come at a random time; the others wait for a moment (a plan proposed,
a vote asked for) and strike then, which is how two of them meet. `ledger.py` counts what met.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from p2pinfer.core import events as e
from p2pinfer.wire.messages import Drain, Plane
from tests.simulation.judge import electorates
from tests.simulation.ledger import Ledger

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.machine import Machine

Strike = Callable[["Machine"], None]

MOMENTS = (
    "Propose",
    "Ack",
    "Activate",
    "LogEntry",
    "PreVoteRequest",
    "VoteRequest",
    "VoteReply",
    "Persist",
    "LoadPlan",
    "PlanLoaded",
    "ActivatePlan",
    "LeaderElected",
    "PeerDead",
    "Forward",
    "TokensCommitted",
    "FenceSettled",
    "Shown",
)
"""What triggered faults wait for; the first ones open the narrow windows."""

BOTH = (Plane.CONTROL, Plane.STEPS)
MAX_MACHINES = 6


class Faults:
    """Draws and injects faults between `begin` and `end` (seconds)."""

    def __init__(self, cluster: Cluster, chosen: tuple[str, ...], begin: float, end: float) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.network = cluster.network
        self.ledger = Ledger(cluster)
        self.begin = begin
        self.end = end
        self._undo: list[Callable[[], None]] = []
        self._cuts: list[tuple[int, int, Plane]] = []
        for name in chosen:
            CLASSES[name](self, self.world.stream(f"fault/{name}"))

    # --- when -------------------------------------------------------------------------------------

    def sometime(self, rng: Random, strike: Strike) -> None:
        """Strike at a random time, or right after a random moment."""
        at = rng.uniform(self.begin, self.end)
        moment, nth = rng.choice(MOMENTS), rng.choice((1, 1, 2, 3, 5))
        delay = rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.1)))
        aim = rng.random()
        if rng.random() < 0.45:
            self.world.at(at, self._strike_at_random, rng, strike, aim)
            return
        left = [nth]

        def watcher(number: int) -> None:
            if self.world.now < at * 0.6 or self.world.now > self.end or left[0] < 0:
                return
            left[0] -= 1
            if left[0] == 0:
                left[0] = -1
                target = self.cluster.machines[number - 1]
                self.world.later(delay, self._strike, rng, strike, aim, target)

        self.world.watch(moment, watcher)

    def _strike_at_random(self, rng: Random, strike: Strike, aim: float) -> None:
        running = [m for m in self.cluster.machines if m.running]
        if running:
            self._strike(rng, strike, aim, rng.choice(running))

    def _strike(self, rng: Random, strike: Strike, aim: float, target: Machine) -> None:
        """At the leader, at whom the moment is about, or at anybody."""
        running = [m for m in self.cluster.machines if m.running]
        leader = self.cluster.leader()
        if aim < 0.4 and leader is not None:
            target = leader
        elif aim < 0.6 and running:
            target = rng.choice(running)
        if target.running and not self.cluster.calm:
            strike(target)

    def until(self, seconds: float, undo: Callable[[], None]) -> None:
        """Undo something after a while, and at the latest when all is calm."""
        done = [False]

        def once() -> None:
            if not done[0]:
                done[0] = True
                undo()

        self._undo.append(once)
        self.world.later(seconds, once)

    def stop(self) -> None:
        """No more faults: whatever is wrong still is put right."""
        undo, self._undo = self._undo, []
        for each in undo:
            each()

    # --- strikes that several classes share -------------------------------------------------------

    def kill(
        self, machine: Machine, down_s: float, *, silent: bool = False, wipe: bool = False
    ) -> None:
        """Kill a machine's process; it comes back after a while."""
        self.ledger.death(machine, wipe=wipe)
        if wipe:
            self.world.count("a node lost its state")
        self.world.count("a machine lost its power" if silent else "a process was killed")
        self.cluster.crash(machine, silent=silent, wipe=wipe)
        self.until(down_s, partial(self.cluster.boot, machine))

    def may_forget(self, machine: Machine) -> bool:
        """Whether the voters that keep their state are enough without this one, by any plan that a
        node has accepted."""
        keep = {
            m.node_id
            for m in self.cluster.machines
            if m is not machine and not m.gone and m.disk.state is not None
        }
        sets = [voters for plan in self.cluster.judge.accepted() for voters in electorates(plan)]
        return bool(sets) and all(2 * len(voters & keep) > len(voters) for voters in sets)

    def cut(self, pairs: list[tuple[int, int]], planes: tuple[Plane, ...], rng: Random) -> None:
        """Cut directed pairs of machines for a while."""
        self.ledger.cut()
        self.world.count("the network was cut")
        keys = [(one, other, plane) for one, other in pairs for plane in planes]
        self.world.tell(pairs[0][0], f"cut: {' '.join(f'{a}>{b}' for a, b in pairs)} {planes}")
        for key in keys:
            self.network.cut(*key)
        reset = rng.random() < 0.5
        seconds = rng.choice((rng.uniform(0.1, 1.0), rng.uniform(0.5, 4.0), rng.uniform(2.0, 7.0)))

        def heal() -> None:
            self.world.tell(pairs[0][0], "the cut is healed")
            for key in keys:
                self.network.heal(*key, reset=reset)

        self.until(seconds, heal)


# --- the network ----------------------------------------------------------------------------------


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
        for plane in BOTH
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
    for connection in rng.sample(connections, min(len(connections), rng.choice((1, 1, 2, 8)))):
        faults.ledger.reset()
        faults.world.count("a connection was reset")
        pair = (connection.dial.process.number, connection.dial.address)
        faults.world.tell(pair[0], f"its {connection.plane} link to {pair[1]} is reset")
        late_s = rng.uniform(0.05, 0.4) if late else 0.0
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


def oneway(faults: Faults, rng: Random) -> None:
    """One machine does not reach another, which reaches it."""
    for _ in range(rng.randint(1, 3)):
        faults.sometime(rng, partial(_oneway, faults, rng))


def _oneway(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    pair = (machine.number, other.number)
    planes = rng.choice((BOTH, BOTH, (Plane.CONTROL,), (Plane.STEPS,)))
    faults.cut([pair if rng.random() < 0.5 else pair[::-1]], planes, rng)


def pairs(faults: Faults, rng: Random) -> None:
    """Two machines do not reach each other."""
    for _ in range(rng.randint(1, 3)):
        faults.sometime(rng, partial(_pairs, faults, rng))


def _pairs(faults: Faults, rng: Random, machine: Machine) -> None:
    other = rng.choice([m for m in faults.cluster.machines if m is not machine])
    one, two = machine.number, other.number
    planes = rng.choice((BOTH, BOTH, (Plane.CONTROL,), (Plane.STEPS,)))
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
        faults.cut(ways, BOTH, rng)


# --- machines -------------------------------------------------------------------------------------


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


# --- people ---------------------------------------------------------------------------------------


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


CLASSES: dict[str, Callable[[Faults, Random], None]] = {
    each.__name__: each
    for each in (
        delay,
        reset,
        reorder,
        queues,
        oneway,
        pairs,
        halves,
        crash,
        power,
        amnesia,
        blackout,
        pause,
        stall,
        hang,
        slow,
        clock,
        disk,
        clients,
        liars,
        join,
        drain,
        leave,
    )
}
"""By the name that `--without` takes."""

WEIGHTS = {"crash": 4, "power": 2, "reset": 2, "pause": 2, "clients": 4, "halves": 2, "hang": 2}
"""How often a class is drawn; 1 where nothing is said."""


def choose(rng: Random) -> tuple[str, ...]:
    """The classes of a seed: one to five."""
    names = list(CLASSES)
    weights = [WEIGHTS.get(name, 1) for name in names]
    count = rng.choice((1, 2, 2, 3, 3, 4, 5))
    chosen: list[str] = []
    while len(chosen) < count:
        [name] = rng.choices(names, weights)
        if name not in chosen:
            chosen.append(name)
    return tuple(chosen)
