"""What goes wrong in a simulation: classes of faults, drawn from the seed, that may come together.

Each class has random numbers of its own, so that a seed with one class left out keeps the others as
they were. Half of the faults come at a random time; the others wait for a moment (a plan proposed,
a vote asked for) and strike then, which is how two of them meet. `ledger.py` counts what met. The
classes themselves are in `network_faults.py`, `machine_faults.py` and `people_faults.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from p2pinfer.wire.messages import Plane
from tests.simulation import machine_faults, network_faults, people_faults
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
    "KvRequest",
    "Promotion",
)
"""What triggered faults wait for; the first ones open the narrow windows."""


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
            self.cluster.struck += 1
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
        self.network.losing.clear()
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


CLASSES: dict[str, Callable[[Faults, Random], None]] = {
    each.__name__: each
    for each in (
        network_faults.delay,
        network_faults.reset,
        network_faults.reorder,
        network_faults.queues,
        network_faults.loss,
        network_faults.bulk,
        network_faults.oneway,
        network_faults.pairs,
        network_faults.halves,
        machine_faults.crash,
        machine_faults.power,
        machine_faults.amnesia,
        machine_faults.blackout,
        machine_faults.succession,
        machine_faults.takeover,
        machine_faults.pause,
        machine_faults.stall,
        machine_faults.hang,
        machine_faults.slow,
        machine_faults.clock,
        machine_faults.disk,
        people_faults.clients,
        people_faults.liars,
        people_faults.join,
        people_faults.drain,
        people_faults.rest,
        people_faults.leave,
    )
}
"""By the name that `--without` takes."""

WEIGHTS = {
    "clients": 4,
    "crash": 4,
    "halves": 2,
    "hang": 2,
    "loss": 4,
    "reorder": 5,
    "delay": 2,
    "pause": 2,
    "power": 2,
    "reset": 2,
    "succession": 2,
    "bulk": 2,
    "takeover": 4,
}
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
