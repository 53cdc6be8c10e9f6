"""`p2pinfer bench failover`: one kill in the middle of a reply, by each rung in turn.

Each run starts a cluster of its own, so that all begin with the same owners: it asks for a reply
twice, first undisturbed, and kills one node in the middle of the second. What the client saw is
measured here, what the nodes did is read from their logs (`request_resumed`) and their counters.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from p2pinfer.bench.following import Following, greedy, longest_gap
from p2pinfer.bench.inputs import (
    Inputs,
    Tell,
    check_positions,
    local_cluster,
    open_model,
    prompt_of,
    spread,
)
from p2pinfer.bench.settling import (
    LOOK_S,
    PATIENCE_S,
    await_protection,
    counters,
    settled_counters,
)
from p2pinfer.cluster import LocalCluster, LocalNode
from p2pinfer.config import NodeSettings
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.logs import request_label
from p2pinfer.types import ModelSpec

RUNGS: dict[str, dict[str, Any]] = {
    "replay": {"replicas": 0},
    "recompute": {"replicas": 0, "keep_inputs": True},
    "replica": {"replicas": 1},
}
"""By rung, the settings of nodes with which a lost unit's KV comes back by it, the costliest first.
"""

VICTIMS = ("second", "leader", "follower", "serving")
"""Who may be killed, beside a node's name: the owner of the second run of head units, the leader,
the last node that does not lead, the node that the client speaks to."""

GAPS_KEPT = 64
"""Times between tokens that are kept before the kill, and as many after it."""

BYTES_PER_TOKEN = 4
PHASES = ("detect_s", "agree_s", "restore_s")
FIGURES = (*PHASES, "propose_s", "stall_s", "step_s")
SUMS = ("moved_bytes", "delta_bytes", "step_bytes", "memory_bytes", "recomputed_positions")


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """What to measure. The kill comes after `kill_after` of `max_tokens` tokens, the prompt has
    `context`. `pairs` are those with and without replication; 0 leaves that out."""

    nodes: int = 4
    context: int = 1024
    max_tokens: int = 64
    kill_after: int = 24
    runs: int = 3
    rungs: tuple[str, ...] = ()
    victim: str = "second"
    pairs: int = 20

    def check(self) -> None:
        """Raise `UsageError` for what cannot be measured, too."""
        if self.nodes < 2:
            raise UsageError("--nodes 1: of one node none can be killed; give 2 or more")
        if not 1 < self.kill_after < self.max_tokens:
            raise UsageError(
                f"--kill-after {self.kill_after}: allowed is 2 to {self.max_tokens - 1}, less "
                "than --max-tokens"
            )
        names = [f"node{index + 1}" for index in range(self.nodes)]
        if self.victim not in (*VICTIMS, *names):
            raise UsageError(f"--victim {self.victim}: allowed are {', '.join((*VICTIMS, *names))}")
        super().check()


@dataclass(frozen=True)
class Run:
    """One kill. `figures` has `FIGURES` (seconds) and `SUMS`; `gaps` the time before each token
    (seconds), with when it came since the kill."""

    victim: str
    figures: Mapping[str, float]
    tokens: tuple[int, ...]
    tokens_equal: bool
    gaps: tuple[tuple[float, float], ...]


def available_rungs() -> tuple[str, ...]:
    """Those that nodes of this version have the settings for."""
    known = {each.name for each in fields(NodeSettings)}
    return tuple(rung for rung, options in RUNGS.items() if options.keys() <= known)


def parse_rungs(text: str) -> tuple[str, ...]:
    """Rungs from a list like `replay,replica`; raises `UsageError` for one that cannot be run."""
    rungs = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for rung in rungs:
        if rung not in RUNGS:
            raise UsageError(f"--rungs {text}: allowed are {', '.join(RUNGS)}")
        if rung not in available_rungs():
            raise UsageError(f"--rungs {text}: this version of the nodes has no rung {rung}")
    return rungs


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Everything that `bench failover --json` prints.

    Raises `ClusterError` where a reply fails, or came back by another rung than was asked for.
    """
    folder, spec = open_model(settings, tell)
    check_positions(spec, settings.context + settings.max_tokens, "--context and --max-tokens")
    runs: dict[str, list[Run]] = {rung: [] for rung in settings.rungs}
    for number in range(1, settings.runs + 1):
        for rung in settings.rungs:  # in turn: the machine's speed drifts
            tell_run = _prefixed(tell, f"{rung}, run {number} of {settings.runs}")
            runs[rung].append(one_run(settings, rung, spec, folder, tell_run))
    result: dict[str, Any] = {
        **settings.fields(),
        "dtype": str(spec.dtype),
        "quant": spec.quant,
        "context": settings.context,
        "max_tokens": settings.max_tokens,
        "runs": settings.runs,
        "victim": settings.victim,
        "rungs": {rung: summary(some) for rung, some in runs.items()},
        "same_tokens_by_all": len({run.tokens for some in runs.values() for run in some}) == 1,
    }
    if settings.pairs:
        from p2pinfer.bench.protection import measure_protection

        result["protection"] = measure_protection(settings, spec, folder, tell)
    return result


def _prefixed(tell: Tell, prefix: str) -> Tell:
    return lambda line: tell(f"{prefix}: {line}")


# --- one run --------------------------------------------------------------------------------------


def one_run(settings: Settings, rung: str, spec: ModelSpec, folder: Path, tell: Tell) -> Run:
    """Kill one node in the middle of a reply. Raises `ClusterError` if it came back otherwise than
    by `rung`."""
    prompt = prompt_of(spec.vocab_size, settings.context, 1)
    with local_cluster(settings, folder, tell, **RUNGS[rung]) as cluster:
        victim, through = chosen(cluster, settings.victim)
        rest = [node for node in cluster.nodes if node is not victim]
        if RUNGS[rung]["replicas"]:
            await_protection(cluster)
        tell("the reply undisturbed")
        truth = Following(through, prompt, greedy(settings.max_tokens)).whole()
        tell(f"the reply, and {victim.name} is killed in the middle of it")
        start = counters(cluster.nodes)
        reply = Following(through, prompt, greedy(settings.max_tokens))
        reply.await_tokens(settings.kill_after)
        if RUNGS[rung]["replicas"]:
            await_protection(cluster)
        before = counters(cluster.nodes)
        if len(reply.tokens) >= settings.max_tokens:
            raise ClusterError(
                "internal", "the reply was over before the kill; give more --max-tokens"
            )
        killed_at = time.time()
        victim.process.kill()
        victim.process.wait()
        reply.whole()
        resumed = await_resumed(rest, victim, reply, killed_at)
        after = settled_counters(rest)
    check_rung(rung, resumed, reply)
    gone_again = resumed["position"] - resumed["restart"]
    figures = times_of(resumed, killed_at, reply) | {
        **moved(start, before, after),
        "memory_bytes": sum(map(protection_bytes, before.values())),
        "recomputed_positions": gone_again,
    }
    # The tokens that are computed again go with their steps to all others that take part.
    figures["moved_bytes"] = figures["delta_bytes"] + BYTES_PER_TOKEN * gone_again * (len(rest) - 1)
    return Run(
        victim=victim.name,
        figures=figures,
        tokens=tuple(reply.tokens),
        tokens_equal=reply.tokens == truth.tokens,
        gaps=tuple((b - killed_at, b - a) for a, b in pairwise(reply.times)),
    )


def chosen(cluster: LocalCluster, victim: str) -> tuple[LocalNode, list[str]]:
    """The node to kill, and the addresses that the client is given, in order.

    It speaks to the leader where that is not the victim; only for `serving` to the victim. Raises
    `ClusterError` for a victim without any head units.
    """
    status = cluster.status()
    nodes = {node.name: node for node in cluster.nodes}
    units = {row["name"]: row["head_units"] for row in status["members"]}
    leads = nodes[status["leader"]]
    others = [node for node in cluster.nodes if node is not leads]
    owners = sorted((min(mine), name) for name, mine in units.items() if mine)
    if victim == "leader":
        found = leads
    elif victim in ("follower", "serving"):
        found = others[-1]
    elif victim == "second":
        found = nodes[owners[min(1, len(owners) - 1)][1]]
    else:
        found = nodes[victim]
    if not units[found.name]:
        raise ClusterError("internal", f"{found.name} owns no head units: nothing would be lost")
    order = sorted(cluster.nodes, key=lambda node: (node is found, node is not leads))
    if victim == "serving":
        order = [found, *(node for node in order if node is not found)]
    return found, [node.address for node in order]


def check_rung(rung: str, resumed: Mapping[str, Any], reply: Following) -> None:
    """Raise `ClusterError` if a reply came back otherwise than by this rung.

    That is the leader's word; what the client was told must not be another. (A client that went to
    another node more than once is told only of what came since.)
    """
    lost = set(resumed["lost"])
    told = {failover.rung for failover in reply.failovers if lost & {*failover.lost}}
    if {resumed["rung"], *told} != {rung}:
        raise ClusterError(
            "internal",
            f"the reply came back by {resumed['rung']}, not by {rung}; its client was told: "
            f"{', '.join(sorted(told)) or 'nothing'}",
        )


def times_of(resumed: Mapping[str, Any], killed_at: float, reply: Following) -> dict[str, float]:
    """`FIGURES` of one kill, from what the leader logged and the client saw."""
    noticed_at = resumed["at"] - resumed["restore_s"] - resumed["agree_s"]
    steps = [b - a for a, b in pairwise(reply.times) if b <= killed_at]
    return {
        "detect_s": max(0.0, noticed_at - killed_at),
        "propose_s": resumed["propose_s"],
        "agree_s": resumed["agree_s"],
        "restore_s": resumed["restore_s"],
        "stall_s": longest_gap(reply.times, killed_at, resumed["at"]),
        "step_s": statistics.median(steps),
    }


# --- what nodes say -------------------------------------------------------------------------------


def logged(node: LocalNode, event: str) -> Iterator[dict[str, Any]]:
    """The facts of a kind that a node has logged, each with its moment as `at` (wall clock)."""
    for line in node.log.read_bytes().split(b"\n")[:-1]:
        if line.startswith(b"{"):
            fact = json.loads(line)
            if fact["event"] == event:
                yield fact | {"at": datetime.fromisoformat(fact["timestamp"]).timestamp()}


def await_resumed(
    nodes: Sequence[LocalNode], victim: LocalNode, reply: Following, since: float
) -> dict[str, Any]:
    """What the leader says of the reply that goes on without the victim."""
    label, deadline = request_label(reply.request_id), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for node in nodes:
            for fact in logged(node, "request_resumed"):
                mine = fact["request_id"] == label and fact["at"] > since
                if mine and victim.name in fact["lost"]:
                    return fact
        time.sleep(LOOK_S)
    raise ClusterError("internal", f"no node says that the reply went on without {victim.name}")


def protection_bytes(row: Mapping[str, Any]) -> int:
    """Bytes of memory that a node spends on protection: others' weights and KV, and kept inputs."""
    names = ("standby_weight_bytes", "kv_standby_bytes", "inputs_bytes")
    return sum(int(row[name]) for name in names)


def moved(
    start: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:
    """Bytes sent by all nodes during the reply: delta KV, and what steps exchange.

    The three are counters by name when the reply began, at the kill, and afterwards without the
    victim.
    """

    def sent(name: str) -> int:
        last = {**before, **after}
        return sum(int(row[name]) - int(start[node][name]) for node, row in last.items())

    return {"delta_bytes": sent("delta_bytes_sent"), "step_bytes": sent("bytes_sent")}


# --- what it comes to -----------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """One rung's figures: medians with their spread, and the inter-token times of the run whose
    stall is the median."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        found |= spread(name, [run.figures[name] for run in runs], 6)
    for name in SUMS:
        counts = spread(name, [run.figures[name] for run in runs], 0)
        found |= {key: int(value) for key, value in counts.items()}
    middle = sorted(runs, key=lambda run: run.figures["stall_s"])[(len(runs) - 1) // 2]
    earlier = [pair for pair in middle.gaps if pair[0] <= 0][-GAPS_KEPT:]
    later = [pair for pair in middle.gaps if pair[0] > 0][:GAPS_KEPT]
    return found | {
        "tokens_equal": all(run.tokens_equal for run in runs),
        "victims": sorted({run.victim for run in runs}),
        "gaps": [[round(at, 4), round(gap, 4)] for at, gap in earlier + later],
    }
