"""When the rest of a cluster noticed a fault, elected, and went on: read from their logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from p2pinfer.cluster import LocalNode
from tests.faults.clusters import Nodes
from tests.faults.watching import Diary, Fact

TIMES = ("noticed_s", "suspected_s", "dead_s", "elected_s", "adopted_s")


@dataclass
class Timeline:
    """What all nodes log from now on; `victims` are struck at `at` (wall clock).

    A node that is started again writes on into the same log.
    """

    cluster: Nodes
    victims: list[LocalNode] = field(default_factory=list)
    at: float = 0.0
    diaries: dict[str, Diary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin to read the logs."""
        self.diaries = {node.name: Diary(node) for node in self.cluster.nodes}

    @property
    def names(self) -> set[str]:
        """The names of those struck."""
        return {victim.name for victim in self.victims}

    @property
    def rest(self) -> list[str]:
        """The names of the others."""
        return [name for name in self.diaries if name not in self.names]

    def said(self, among: Sequence[str], *events: str) -> list[Fact]:
        """What some nodes said since the fault."""
        return [
            fact
            for name in among
            for fact in self.diaries[name].facts(*events)
            if fact["at"] >= self.at
        ]

    def _after(self, facts: Sequence[Fact]) -> float | None:
        """Seconds from the fault to the first of some facts."""
        return min((fact["at"] - self.at for fact in facts), default=None)

    def _doubted(self, name: str, *events: str) -> float | None:
        """When a node doubted the first victim, or lost it."""
        first = self.victims[0].name
        return self._after([fact for fact in self.said([name], *events) if fact["name"] == first])

    def noticed(self) -> float | None:
        """When the first node noticed; of a worker's hang that may be the victim itself."""
        times = [self._doubted(name, "peer_suspected", "peer_dead") for name in self.rest]
        hung = [fact for fact in self.said([self.victims[0].name], "worker_hung") if fact["hung"]]
        times.append(self._after(hung))
        return min((time for time in times if time is not None), default=None)

    def adopted(self) -> float | None:
        """When the last of the others had a plan in force in which no victim owns anything."""
        return self._last(
            [
                self._after(
                    [
                        fact
                        for fact in self.said([name], "plan_adopted")
                        if self.names.isdisjoint(fact["owners"])
                    ]
                )
                for name in self.rest
            ]
        )

    @staticmethod
    def _last(times: Sequence[float | None]) -> float | None:
        known = [time for time in times if time is not None]
        return max(known) if len(known) == len(times) else None

    def rungs(self) -> set[str]:
        """The ways in which replies went on, as any leader said since the fault."""
        found = self.said(list(self.diaries), "request_restored")
        return {str(fact["rung"]) for fact in found}

    def times(self) -> dict[str, float | None]:
        """All times in seconds since the fault; None: it did not happen. What all others have to
        see counts from the last of them."""
        doubts = ("peer_suspected", "peer_dead")
        found = {
            "noticed_s": self.noticed(),
            "suspected_s": self._last([self._doubted(name, *doubts) for name in self.rest]),
            "dead_s": self._last([self._doubted(name, "peer_dead") for name in self.rest]),
            "elected_s": self._after(self.said(self.rest, "leader_elected")),
            "adopted_s": self.adopted(),
        }
        return {name: None if at is None else round(at, 4) for name, at in found.items()}
