"""What keeping replicas costs while nothing fails: decode speed with and without, pair by pair.

In one cluster, in the middle of one reply, replication is held and let go in turn. Held, a node
neither sends, reads, asks nor answers delta KV, as with `--replicas 0`. Let go, standbys first
catch up, in tokens that are not counted; so neither half has the other's traffic. The halves of a
pair follow each other, and every other pair begins with the other half: what drifts falls out.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from p2pinfer.bench.failover import RUNGS, Settings
from p2pinfer.bench.following import Following, greedy
from p2pinfer.bench.inputs import Tell, local_cluster, prompt_of, spread
from p2pinfer.bench.intervals import median_interval
from p2pinfer.bench.settling import LOOK_S, PATIENCE_S, await_protection, counters, is_protected
from p2pinfer.cluster import LocalCluster
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.types import ModelSpec
from p2pinfer.worker_process import WORKER_MODULE

HALF_TOKENS = 64
"""Tokens that are timed with replication as it is, and as many without."""

SETTLE_TOKENS = 4
"""At least so many between two halves are not counted."""

PAIR_TOKENS = 8 * HALF_TOKENS
"""Room in a reply for a pair, and for what passes while nodes are asked how far they are."""

REPLY_TOKENS = 2048
"""A reply begins anew when so many are drawn: the context shall not grow without end."""


class Switch:
    """Holds the replication of all nodes, and lets it go."""

    def __init__(self, cluster: LocalCluster) -> None:
        if not hasattr(signal, "SIGUSR1"):
            raise UsageError("--pairs: this system has no SIGUSR1, so replication cannot be held")
        self._cluster = cluster
        self._workers = [
            child
            for node in cluster.nodes
            for child in psutil.Process(node.pid).children()
            if WORKER_MODULE in child.cmdline()
        ]

    def hold(self, held: bool) -> None:
        """Return when all nodes say so, and have caught up where it goes on."""
        for worker in self._workers:
            worker.send_signal(signal.SIGUSR1 if held else signal.SIGUSR2)
        deadline = time.monotonic() + PATIENCE_S
        while not self._is(held):
            self._cluster.check_alive()
            if time.monotonic() > deadline:
                raise ClusterError("internal", "the nodes' replication cannot be held or let go")
            time.sleep(LOOK_S)

    def _is(self, held: bool) -> bool:
        rows = counters(self._cluster.nodes)
        return all(row["replicas_held"] for row in rows.values()) if held else is_protected(rows)


Half = Sequence[float]
"""What each of a half's tokens took, in seconds."""


@dataclass
class Pairs:
    """One half after another."""

    with_it: list[Half] = field(default_factory=list)
    without: list[Half] = field(default_factory=list)

    def __len__(self) -> int:
        """Whole pairs."""
        return min(len(self.with_it), len(self.without))


def measure_protection(
    settings: Settings, spec: ModelSpec, folder: Path, tell: Tell
) -> dict[str, Any]:
    """The `protection` part of `bench failover --json`."""
    prompt = prompt_of(spec.vocab_size, settings.context, 2)
    room = min(REPLY_TOKENS, spec.max_positions - settings.context)
    if room < PAIR_TOKENS:
        raise UsageError(
            f"--context {settings.context}: {settings.shape} has no room for the {PAIR_TOKENS} "
            "tokens after it that protection is measured with; shorten it, or give --pairs 0"
        )
    pairs = Pairs()
    with local_cluster(settings, folder, tell, **RUNGS["replica"]) as cluster:
        await_protection(cluster)
        switch = Switch(cluster)
        addresses = [node.address for node in cluster.nodes]
        while len(pairs) < settings.pairs:
            switch.hold(False)
            reply = Following(addresses, prompt, greedy(room))
            try:
                for held in halves(len(pairs), settings.pairs):
                    if room - len(reply.tokens) < PAIR_TOKENS // 2:
                        break
                    into = pairs.without if held else pairs.with_it
                    into.append(half(switch, reply, held))
                    tell(f"protection: {len(pairs)} of {settings.pairs} pairs")
            finally:
                reply.stop()
            del pairs.with_it[len(pairs) :], pairs.without[len(pairs) :]
    return cost(pairs.with_it, pairs.without)


def halves(done: int, wanted: int) -> Iterator[bool]:
    """Whether replication is held in each half of the pairs that lack."""
    for number in range(done, wanted):
        first = number % 2 == 1
        yield from (first, not first)


def half(switch: Switch, reply: Following, held: bool) -> Half:
    """One half, which begins when replication is as it shall be."""
    reply.await_tokens(1)  # its prompt's KV is on its way to the standbys
    switch.hold(held)
    first = len(reply.tokens) + SETTLE_TOKENS
    reply.await_tokens(first + HALF_TOKENS)
    times = reply.times[first - 1 : first + HALF_TOKENS]
    taken = [later - earlier for earlier, later in pairwise(times)]
    if not statistics.median(taken):
        raise ClusterError("internal", "most tokens came together with others: no time of one")
    return taken


def cost(with_it: Sequence[Half], without: Sequence[Half]) -> dict[str, Any]:
    """How much less the one speed is, pair by pair, as a part of the other.

    A half's speed is that of its median token, which no other program on the machine moves much;
    `cost_whole` goes by the whole half, with all that held it up.
    """
    typical = [[1 / statistics.median(each) for each in some] for some in (with_it, without)]
    whole = [[len(each) / sum(each) for each in some] for some in (with_it, without)]
    return {
        "pairs": len(with_it),
        **spread("decode_tokens_per_s_with", typical[0], 3),
        **spread("decode_tokens_per_s_without", typical[1], 3),
        **_lost("cost", *typical),
        **_lost("cost_whole", *whole),
        "difference_tokens_per_s": round(
            statistics.median(a - b for a, b in zip(*typical, strict=True)), 4
        ),
    }


def _lost(name: str, with_it: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    """The median of the pairs with its 95 % interval, which is null with less than 6 pairs."""
    lost = [(b - a) / b for a, b in zip(with_it, without, strict=True)]
    interval = median_interval(lost)
    return {
        name: round(statistics.median(lost), 5),
        f"{name}_95": [round(edge, 5) for edge in interval] if interval else None,
    }
