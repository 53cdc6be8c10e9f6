"""What a test sees of a cluster of true nodes: their logs, and a reply that must go on."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from p2pinfer.client import Client, new_request_id
from p2pinfer.cluster import LocalCluster, LocalNode
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Chunk, Finished

DEADLINE_S = 60.0
Fact = dict[str, Any]


def until(holds: Callable[[], object], within: float = DEADLINE_S, what: str = "it") -> float:
    """Wait for a condition; returns the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within, f"{what} did not come about in {within:g} s"
        select.select((), (), (), 0.01)
    return time.monotonic() - began


def facts(node: LocalNode, *events: str, since: float = 0.0) -> list[Fact]:
    """The facts of these kinds that a node logged after `since` (wall clock, seconds); each gets
    its moment as `at`."""
    found = []
    for line in node.log.read_text().splitlines():
        if line.startswith("{"):
            fact = json.loads(line)
            at = datetime.fromisoformat(fact["timestamp"]).timestamp()
            if fact["event"] in events and at >= since:
                found.append(fact | {"at": at})
    return found


def all_vote(cluster: LocalCluster, nodes: int) -> bool:
    """Whether every running node says that the cluster is ready and has that many voters."""
    for node in cluster.nodes:
        if node.ending:
            continue
        try:
            status = Client([node.address], timeout=2.0).status()
        except ClusterError:
            return False
        if not status["ready"] or len(status["voters"]) != nodes:
            return False
    return True


def leader(cluster: LocalCluster) -> str:
    """The name of who leads, as the first running node that knows one says."""
    for node in cluster.nodes:
        if not node.ending:
            try:
                name = Client([node.address], timeout=2.0).status()["leader"]
            except ClusterError:
                continue
            if name:
                return str(name)
    return ""


@dataclass
class Reading:
    """A client in a thread of its own, which reads one long reply and resumes it where it broke.

    `times` are when tokens came; `resumed` counts how often it had to go to another node.
    """

    addresses: list[str]
    prompt: str
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    failovers: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str = ""
    errors: list[str] = field(default_factory=list)
    resumed: int = 0

    def start(self) -> Reading:
        """Begin; returns itself."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def join(self, within: float = DEADLINE_S) -> None:
        """Wait for the end of the reply."""
        self._thread.join(within)
        assert not self._thread.is_alive(), f"no end after {within:g} s, {len(self.tokens)} tokens"

    def _read(self) -> None:
        request_id, deadline = new_request_id(), time.monotonic() + DEADLINE_S
        while not self.finish_reason and time.monotonic() < deadline:
            order = self.addresses[self.resumed % len(self.addresses) :] + self.addresses
            try:
                events = Client(order, timeout=5.0).submit(
                    self.prompt, self.params, request_id=request_id, received=self.tokens
                )
                for event in events:
                    if isinstance(event, Chunk) and event.tokens:
                        assert event.start == len(self.tokens), "a gap or a repetition"
                        self.tokens += event.tokens
                        self.times += [time.time()] * len(event.tokens)
                    elif isinstance(event, Finished):
                        self.failovers = [{"lost": f.lost, "rung": f.rung} for f in event.failovers]
                        self.finish_reason = event.reason
            except ClusterError as error:
                self.errors.append(f"{error.code}: {error.message}")
                if not error.retryable:
                    return
                self.resumed += 1
