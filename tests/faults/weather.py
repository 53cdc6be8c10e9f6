"""Faults by chance: what befalls a cluster next is drawn by a seed, done, and undone in time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2pinfer.client import Client
from p2pinfer.cluster import LocalNode
from p2pinfer.errors import ClusterError
from tests.faults.blows import Undo, restart, strike
from tests.faults.cases import Fault
from tests.faults.clusters import Nodes
from tests.faults.watching import leader, until

HOLDS: dict[str, tuple[float, float]] = {
    "kill": (0.0, 10.0),
    "move": (0.0, 10.0),
    "drain": (0.0, 5.0),
    "stop": (0.5, 10.0),
    "hang": (0.5, 10.0),
    "freeze": (0.5, 10.0),
    "nap": (0.05, 0.5),
    "disk-full": (5.0, 20.0),
    "cut": (0.5, 8.0),
    "one-way": (0.5, 8.0),
    "delay": (2.0, 10.0),
    "loss": (2.0, 10.0),
    "reset": (0.0, 0.0),
}
"""For how long each holds, in seconds from and to; `nap` is a stop that nobody is to mind."""

ON_THE_WAY = ("cut", "one-way", "delay", "loss", "reset")
"""Faults of the network, of which there is one at a time: all are mended together."""

DRAIN_S = 90.0


@dataclass
class Blow:
    """A fault that holds until `until` (monotonic), and until it is `done`."""

    fault: str
    victim: LocalNode
    until: float
    undo: Undo
    done: Callable[[], bool] = lambda: True


@dataclass
class Weather:
    """Draws from `faults`; at most `together` nodes are struck at a time."""

    cluster: Nodes
    faults: Sequence[str]
    draw: random.Random
    per_minute: float
    together: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    story: list[str] = field(default_factory=list)
    under: list[Blow] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The first one comes by chance too."""
        self._next = time.monotonic() + self._interval()

    def turn(self) -> None:
        """Undo what is due, and do what comes next, if it is time."""
        now = time.monotonic()
        for blow in [blow for blow in self.under if blow.until <= now and blow.done()]:
            self._end(blow)
        if now >= self._next:
            self._next = now + self._interval()
            self._begin(now)

    def clear(self) -> None:
        """Undo everything; raises `AssertionError` where something does not come to its end."""
        for blow in list(self.under):
            until(blow.done, DRAIN_S, f"the end of {blow.fault} {blow.victim.name}")
        for blow in list(self.under):
            self._end(blow)

    def excused(self, node: LocalNode) -> bool:
        """Whether a node may have ended: somebody ended it, or filled its disk, or drains it."""
        ends = ("kill", "move", "drain", "disk-full")
        return any(blow.victim is node and blow.fault in ends for blow in self.under)

    def on(self, name: str) -> str:
        """What holds a node just now; empty if nothing does."""
        return " ".join(blow.fault for blow in self.under if blow.victim.name == name)

    def _interval(self) -> float:
        return self.draw.expovariate(self.per_minute / 60)

    def _begin(self, now: float) -> None:
        struck = {blow.victim.name for blow in self.under}
        free = [node for node in self.cluster.nodes if node.name not in struck and not node.ending]
        busy = any(blow.fault in ON_THE_WAY for blow in self.under)
        faults = [f for f in self.faults if not (busy and f in ON_THE_WAY)]
        # All is drawn first, so that one seed gives the same faults whatever is under way.
        fault = self.draw.choice(faults or ["none"])
        held = self.draw.uniform(*HOLDS.get(fault, (0.0, 0.0)))
        part, share = self.draw.random(), self.draw.uniform(0.2, 2.0)
        victim = self.draw.choice(free or [self.cluster.nodes[0]])
        if not faults or len(free) < 2 or len(struck) >= self.together:
            return
        other = self.draw.choice([node for node in free if node is not victim])
        leads = " (leader)" if leader(self.cluster) == victim.name else ""
        self._say(f"{fault} {victim.name}{leads}, {held:.1f} s")
        self.counts[fault] += 1
        blow = Blow(fault, victim, now + held, lambda: None)
        self.under.append(blow)
        if fault == "drain":
            self._drain(blow, other)
        elif fault == "nap":
            parts: tuple[Fault, ...] = ("stop", "hang", "freeze")
            blow.undo = strike(parts[int(len(parts) * part)], self.cluster, victim, other)
        else:
            known: Fault = fault  # type: ignore[assignment]  # one of HOLDS
            blow.undo = strike(known, self.cluster, victim, other, share)

    def _drain(self, blow: Blow, other: LocalNode) -> None:
        """Have a node leave; when it has, it is started again. It may also refuse, and stay."""
        victim, refused = blow.victim, threading.Event()

        def ask() -> None:
            try:
                Client([other.address]).drain(victim.name)
            except ClusterError as error:
                refused.set()
                self._say(f"drain of {victim.name}: {error.code}: {error.message}")

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        blow.done = lambda: bool(victim.ending or (refused.is_set() and not asking.is_alive()))
        blow.undo = lambda: restart(self.cluster, victim) if victim.ending else None

    def _end(self, blow: Blow) -> None:
        self.under.remove(blow)
        blow.undo()
        if blow.fault not in ("reset", "nap"):
            self._say(f"{blow.fault} {blow.victim.name} is over")

    def _say(self, text: str) -> None:
        self.story.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {text}")
