"""One seed: a cluster, its clients and its faults, then calm, and what must have come of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import process_time

from msgspec.structs import replace

from p2pinfer.core.node import Node
from tests.simulation import toy_model as toy
from tests.simulation.cluster import Cluster, Setting
from tests.simulation.faults import Faults, choose
from tests.simulation.machine import MakeNode
from tests.simulation.toy_bulk import narrow
from tests.simulation.world import Violation, World

FORMED_S = 12.0
"""By then a cluster without faults is there."""

CALM_S = 40.0
"""Liveness: so long after the last fault all living nodes agree, and every request has ended."""

_REFERENCE = toy.Reference()


@dataclass
class Outcome:
    """What became of a seed. `violation` is empty when nothing was wrong."""

    seed: int
    classes: tuple[str, ...]
    digest: str = ""
    violation: str = ""
    detail: str = ""
    counters: dict[str, int] = field(default_factory=dict)
    simulated_s: float = 0.0
    cpu_s: float = 0.0
    entries: int = 0


def setting(rng: Random) -> Setting:
    """What the cluster of a seed is like."""
    nodes = rng.choice((2, 3, 3, 3, 4, 5))
    layout = "heads"
    draw = rng.random()
    if draw < 0.1:
        layout = "layers"
    elif draw < 0.2 and nodes >= 4:
        layout = "2x2"
    kinds = (0,) if rng.random() < 0.67 else tuple(rng.choice((1, 2)) for _ in range(6))
    drifts = rng.random() < 0.3
    return Setting(
        nodes=nodes,
        layout=layout,
        quorum="majority",
        replicas=rng.choice((0, 1, 1, 2)),
        window=rng.choice((0, 0, 8, 24)),
        kinds=kinds,
        rates=tuple(rng.uniform(0.95, 1.05) if drifts else 1.0 for _ in range(6)),
        weights=tuple(rng.choice((1.0, 1.0, 1.0, 2.0)) for _ in range(6)),
        witness=nodes >= 3 and layout != "2x2" and rng.random() < 0.1,
    )


def keep_inputs(rng: Random) -> tuple[bool, ...]:
    """Which machines keep inputs: none, all, or some."""
    share = rng.choice((0.0, 0.0, 1.0, 0.7))
    return tuple(rng.random() < share for _ in range(6))


class Simulation:
    """One run of one seed."""

    def __init__(
        self,
        seed: int,
        without: tuple[str, ...],
        tell: Callable[[str], None] | None,
        make_node: MakeNode,
    ) -> None:
        self.world = World(seed, tell)
        rng = self.world.stream("setting")
        self.setting = replace(setting(rng), keep_inputs=keep_inputs(self.world.stream("inputs")))
        drawn = choose(self.world.stream("classes"))
        self.classes = tuple(name for name in drawn if name not in without)
        self.cluster = Cluster(self.world, self.setting, _REFERENCE, make_node)
        self.early = rng.random() < 0.15
        """Faults from the very beginning, while the cluster is founded."""
        self.length = rng.uniform(4.0, 7.0)
        self._rng = rng

    def run(self) -> None:
        """Raises `Violation`."""
        cluster, world = self.cluster, self.world
        self._found()
        if not self.early:
            formed = world.run_until(FORMED_S, cluster.agreed)
            if not formed:
                raise Violation(f"no cluster after {FORMED_S:g} s without a fault")
        begin = world.now
        end = begin + self.length
        self._load(begin, end)
        faults = Faults(cluster, self.classes, begin, end)
        world.run_until(end)
        cluster.calm = True
        world.tell(0, "calm")
        faults.stop()
        for machine in cluster.machines:
            cluster.boot(machine)
        if not world.run_until(world.now + CALM_S, self._quiet):
            if world.counters["a node lost its state"] and cluster.judge.hopeless():
                world.count("too many voters lost their state")
                return
            raise Violation(self._unquiet())
        world.run_until(world.now + 0.3)

    def _found(self) -> None:
        """The first machine founds the cluster, the others join it, all at about the same time."""
        cluster = self.cluster
        first = cluster.add_machine()
        cluster.boot(first)
        for _ in range(self.setting.nodes - 1):
            machine = cluster.add_machine((first,))
            self.world.later(self._rng.uniform(0.0, 0.4), cluster.boot, machine)

    def _load(self, begin: float, end: float) -> None:
        """Clients that come while faults do."""
        rng = self.world.stream("load")
        clients = self.cluster.clients
        for _ in range(rng.randint(3, 6)):
            prompt = tuple(rng.randrange(1, 128) for _ in range(rng.randint(1, 14)))
            length = rng.choice((1, 6, 16, 30, 60))
            client = clients.add(prompt, length, rng.choice((1, 6, 6)))
            self.world.at(rng.uniform(begin, end - 0.5), clients.submit, client)

    def _quiet(self) -> bool:
        cluster = self.cluster
        if cluster.clients.waiting or not cluster.agreed():
            return False
        return all(machine.running or machine.gone for machine in cluster.machines)

    def _unquiet(self) -> str:
        cluster = self.cluster
        waiting = ", ".join(f"{c.request_id} ({len(c.shown)})" for c in cluster.clients.waiting)
        states = []
        for machine in cluster.machines:
            process = machine.process
            mine = process.worker.active if process is not None and process.alive else None
            state = "gone" if machine.gone else "dead" if not machine.running else "no plan"
            states.append(f"{machine.name}: {mine.plan.fence if mine else state}")
        return (
            f"not at rest {CALM_S:g} s after the last fault: requests {waiting or 'none'} wait; "
            f"{'; '.join(states)}"
        )


def simulate(
    seed: int,
    without: tuple[str, ...] = (),
    tell: Callable[[str], None] | None = None,
    make_node: MakeNode = Node,
) -> Outcome:
    """Run one seed, without some of its classes of faults; `tell` gets the lines of its story."""
    began = process_time()
    simulation = Simulation(seed, without, tell, make_node)
    outcome = Outcome(seed, simulation.classes)
    try:
        with narrow(simulation.setting.window):
            simulation.run()
    except Violation as violation:
        outcome.violation = str(violation)
        outcome.detail = _chain(violation)
    except Exception as error:  # an uncaught exception anywhere is a violation like others
        outcome.violation = f"{type(error).__name__}: {error}"
        outcome.detail = _chain(error)
    world = simulation.world
    outcome.digest = world.trace.digest()
    outcome.entries = world.trace.entries
    outcome.counters = dict(world.counters)
    outcome.simulated_s = world.now
    outcome.cpu_s = process_time() - began
    return outcome


def _chain(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def shrink(seed: int, classes: tuple[str, ...], violation: str) -> tuple[str, ...]:
    """Classes of faults that the seed fails without as well: leave out one after the other."""
    without: list[str] = []
    kind = _kind(violation)
    for name in classes:
        found = simulate(seed, (*without, name)).violation
        if found and _kind(found) == kind:
            without.append(name)
    return tuple(without)


def _kind(violation: str) -> str:
    """What a violation is about, without its numbers."""
    return "".join(c for c in violation if not c.isdigit())[:40]
