"""What a test sees of a cluster of true nodes: their logs, and a reply that must go on."""

from __future__ import annotations

import json
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any, Protocol

import pytest

from p2pinfer.client import Client, Moved
from p2pinfer.cluster import LocalCluster, LocalNode
from p2pinfer.errors import ClusterError
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import Chunk, Finished

DEADLINE_S = 60.0
GO_ON_S = 3.0
"""Within this a reply has to go on, whatever one node or one path does."""

LOOK_S = 0.01
ASK_S = 0.25
"""How often nodes are asked while times between tokens count: answering takes them milliseconds."""

USUAL_TOKENS = 8
"""From so many it is known what a token usually takes at the moment."""

Fact = dict[str, Any]

LEADER_FIRST = ["leader", pytest.param("follower", marks=pytest.mark.long)]
"""Whom something happens to: to a leader more is at stake, and a follower has its turn where there
is time (`bin/test -m long`, `bin/kills`)."""


def until(
    holds: Callable[[], object],
    within: float = DEADLINE_S,
    what: str = "it",
    every_s: float = LOOK_S,
) -> float:
    """Wait for a condition; returns the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within, f"{what} did not come about in {within:g} s"
        select.select((), (), (), every_s)
    return time.monotonic() - began


class Diary:
    """What a node logs from now on, or with `whole` also what it has logged before."""

    def __init__(self, node: LocalNode, *, whole: bool = False) -> None:
        self._log = node.log
        self._read = 0 if whole else node.log.stat().st_size
        self._facts: list[Fact] = []

    def facts(self, *events: str) -> list[Fact]:
        """The facts of these kinds so far; each has its moment as `at` (wall clock, seconds)."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            lines, end, _ = log.read().rpartition(b"\n")
        self._read += len(lines) + len(end)
        for line in lines.splitlines():
            if line.startswith(b"{"):
                fact = json.loads(line)
                at = datetime.fromisoformat(fact["timestamp"]).timestamp()
                self._facts.append(fact | {"at": at})
        return [fact for fact in self._facts if fact["event"] in events]


def facts(node: LocalNode, *events: str, since: float = 0.0, **fields: object) -> list[Fact]:
    """The facts of these kinds that a node logged after `since` (wall clock), with these fields."""
    return [
        fact
        for fact in Diary(node, whole=True).facts(*events)
        if fact["at"] >= since and fields.items() <= fact.items()
    ]


def status(node: LocalNode) -> dict[str, Any]:
    """The cluster as a node sees it; empty when it does not answer."""
    try:
        return Client([node.address], timeout=2.0).status()
    except ClusterError:
        return {}


def member(node: LocalNode, name: str) -> dict[str, Any]:
    """What a node says of a member; empty when it does not know it, or does not answer."""
    found = (m for m in status(node).get("members", ()) if m["name"] == name)
    return next(found, {})


def whole(nodes: Iterable[LocalNode], count: int) -> bool:
    """Whether every one of these nodes says that the cluster is ready and has so many voters."""
    for node in nodes:
        seen = status(node)
        if not seen or not seen["ready"] or len(seen["voters"]) != count:
            return False
    return True


class Cluster(Protocol):
    """Nodes that run as processes of ours."""

    nodes: list[LocalNode]


def all_vote(cluster: Cluster, nodes: int) -> bool:
    """Whether every running node says that the cluster is ready and has that many voters."""
    return whole([node for node in cluster.nodes if not node.ending], nodes)


def all_own(cluster: Cluster) -> bool:
    """Whether every running node says that all of them own units."""
    running = [node for node in cluster.nodes if not node.ending]
    return all(owners(node) == {each.name for each in running} for node in running)


def await_whole(cluster: LocalCluster) -> LocalCluster:
    """Start again what has ended of it, and wait until all have a vote and units, and all of these
    a standby. Returns it."""
    for index, node in enumerate(cluster.nodes):
        if node.ending:
            cluster.nodes[index] = cluster.start_node(index)
    count = len(cluster.nodes)
    until(lambda: all_vote(cluster, count) and all_own(cluster), what="the cluster with all nodes")
    until(lambda: all_protected(cluster), what="a standby for every unit")
    return cluster


def all_protected(cluster: Cluster, behind: int = 0) -> bool:
    """Whether every unit has a standby, and every running node the weights of all units that it
    keeps for others, and lacks at most `behind` positions of each of their KV."""
    for node in cluster.nodes:
        if node.ending:
            continue
        seen = status(node)
        if not seen or not _parts(seen, "owned") <= _parts(seen, "standby"):
            return False
        counters = seen["counters"]
        wanted = counters["standby_units_wanted"]
        if counters["standby_units_ready"] != wanted:
            return False
        if counters["standby_lacks"] > behind * wanted:
            return False
    return True


def none_kept(cluster: Cluster) -> bool:
    """Whether nobody is a standby of anything any more."""
    seen = [status(node) for node in cluster.nodes if not node.ending]
    return all(each and not _parts(each, "standby") for each in seen)


def _parts(seen: dict[str, Any], which: str) -> set[tuple[int, str, int]]:
    """(first layer, kind, unit) of all that is `owned`, or kept as a `standby`, by anybody."""
    return {
        (part["span"][0], kind, unit)
        for each in seen["members"]
        for part in each[which]
        for kind in ("head_units", "mlp_units", "vocab_units")
        for unit in part[kind]
    }


def owners(node: LocalNode) -> set[str]:
    """The names of the members that own units, as a node sees it."""
    return {m["name"] for m in status(node).get("members", ()) if m["owned"]}


def mend(cluster: LocalCluster) -> None:
    """Start again all nodes that have ended; it does not wait for them."""
    for index, node in enumerate(cluster.nodes):
        if node.ending:
            cluster.nodes[index] = cluster.start_node(index)


def leader(cluster: Cluster) -> str:
    """The name of who leads, as the first running node that knows one says."""
    for node in cluster.nodes:
        if not node.ending and (name := status(node).get("leader")):
            return str(name)
    return ""


def pick(cluster: Cluster, kind: str) -> LocalNode:
    """The node that leads (`leader`), or the last one that does not."""
    name = leader(cluster)
    return [node for node in cluster.nodes if (node.name == name) == (kind == "leader")][-1]


def others(cluster: Cluster, victim: LocalNode) -> list[LocalNode]:
    """All nodes but one."""
    return [node for node in cluster.nodes if node is not victim]


def kill(*victims: LocalNode) -> None:
    """End nodes without a word."""
    for victim in victims:
        victim.process.send_signal(signal.SIGKILL)
    for victim in victims:
        victim.process.wait()


@dataclass
class Reading:
    """A client in a thread of its own, which reads one long reply.

    `times` are when tokens came; `errors` say why it ended, or why it went to another node. That it
    tries for `deadline` seconds; `broken` is the error with which it gave up. `enter` is called
    first in the thread: it may move it to another network.
    """

    addresses: list[str]
    prompt: str | tuple[int, ...]
    params: SamplingParams
    deadline: float = DEADLINE_S
    enter: Callable[[], None] | None = None
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    failovers: tuple[Failover, ...] = ()
    finish_reason: str = ""
    errors: list[str] = field(default_factory=list)
    stopped: bool = False
    broken: str = ""

    def start(self) -> Reading:
        """Begin; returns itself."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def join(self, within: float = DEADLINE_S) -> None:
        """Wait for the end of the reply."""
        self._thread.join(within)
        assert not self._thread.is_alive(), f"no end after {within:g} s, {len(self.tokens)} tokens"

    def stop(self) -> None:
        """Break the reply off with its next token."""
        self.stopped = True
        self.join()

    def begun(self, tokens: int = 8) -> Reading:
        """Wait until so many tokens are there; returns itself."""
        until(lambda: len(self.tokens) >= tokens or self.errors, what="the reply")
        assert not self.errors, self.errors
        return self

    @property
    def ended(self) -> bool:
        """Whether no more will come."""
        return not self._thread.is_alive()

    def goes_on(self, since: float, within: float = DEADLINE_S) -> None:
        """Wait for a token that came later than `since` (wall clock), or the reply's end."""
        until(lambda: self.times[-1] > since or self.finish_reason, within, "another token")

    def longest_gap(self, since: float = 0.0, until: float = inf) -> float:
        """The longest time in seconds between two tokens; or only of those between which some of
        the time from `since` to `until` (wall clock) lies."""
        return max(
            (
                later - earlier
                for earlier, later in pairwise(self.times)
                if later > since and earlier < until
            ),
            default=0.0,
        )

    def pause(self, at: float, mended: float) -> float:
        """The longest time in seconds without a token from `at` to the first one after `mended`
        (wall clock); without any token at `at` it counts from there."""
        before = [time for time in self.times if time <= at][-1:] or [at]
        after = [time for time in self.times if time > at]
        enough = next((n for n, time in enumerate(after, 1) if time > mended), len(after))
        points = before + after[:enough]
        return max((later - earlier for earlier, later in pairwise(points)), default=0.0)

    def excess(self, at: float, mended: float) -> float:
        """How much longer the longest time between two tokens was from `at` to the first token
        after `mended` (wall clock) than it had been before, undisturbed, in seconds."""
        calm = [later - earlier for earlier, later in pairwise(self.times) if later <= at]
        return self.pause(at, mended) - max(calm, default=0.0)

    def added(self, moments: Sequence[float]) -> float:
        """What new plans added to a time between two tokens, in seconds: the longest less those
        before it. `moments` are when they were proposed, which may be just before the last token
        of the plan before has arrived; 0 where nothing was proposed meanwhile."""
        gaps = list(pairwise(self.times))
        found = [0.0]
        for place, (earlier, later) in enumerate(gaps):
            before = [b - a for a, b in gaps[max(0, place - USUAL_TOKENS) : place]]
            if before and any(earlier <= moment < later for moment in moments):
                longest = max(b - a for a, b in gaps[place : place + 2])
                found.append(longest - median(before))
        return max(found)

    def lost(self) -> set[str]:
        """The names of the nodes that interrupted the reply, as its end says."""
        return {name for failover in self.failovers for name in failover.lost}

    def _read(self) -> None:
        if self.enter:
            self.enter()
        client = Client(self.addresses, retry_for=self.deadline)
        try:
            for event in client.submit(self.prompt, self.params):
                if self.stopped:
                    return
                if isinstance(event, Moved) and event.through:
                    self._failed(event.error)
                elif isinstance(event, Chunk):
                    assert event.start == len(self.tokens), "a gap or a repetition"
                    self.times += [time.time()] * len(event.tokens)
                    self.tokens += event.tokens
                elif isinstance(event, Finished):
                    self.failovers = event.failovers
                    self.finish_reason = event.reason
        except ClusterError as error:
            self._failed(error)
            self.broken = self.errors[-1]

    def _failed(self, error: ClusterError) -> None:
        self.errors.append(f"{error.code}: {error.message}")
