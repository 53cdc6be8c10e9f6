"""How fast a cluster notices and mends: kills, hangs, pulled cables and resets, many times, timed.

    bin/measure-faults --kind follower --runs 100

One cluster of true nodes serves a reply all the while. Each run strikes one node, waits until the
rest have a new plan, reads from their logs when they noticed, elected, and adopted, and brings the
node back. Prints one line per run and a summary; `--json` prints an object.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import Any

import click
import psutil
from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from tests.faults.namespaces import NamespacedCluster, enter, why_not
from tests.faults.proxy import ProxiedCluster
from tests.faults.watching import (
    GO_ON_S,
    Diary,
    Fact,
    Reading,
    all_own,
    all_vote,
    kill,
    leader,
    others,
    until,
)

TARGETS: dict[str, dict[str, float]] = {
    "follower": {"suspected_s": 0.1, "adopted_s": 0.3},
    "leader": {"suspected_s": 0.1, "adopted_s": 0.8},
    "hang": {"noticed_s": 1.0, "stall_s": GO_ON_S},
    "compute-hang": {"noticed_s": 1.0, "stall_s": GO_ON_S},
    "cut": {"noticed_s": 1.0, "stall_s": GO_ON_S},
    "reset": {"stall_s": GO_ON_S},
}
"""By kind of fault, what 99 of 100 runs are to keep to, in seconds."""

TIMES = ("noticed_s", "suspected_s", "dead_s", "elected_s", "adopted_s", "stall_s", "longest_gap_s")
PROMPT = "Once upon a time"
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
PATIENCE_S = 180.0
CGROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 100_000

Nodes = LocalCluster | NamespacedCluster


# --- the cluster ----------------------------------------------------------------------------------


@contextmanager
def cluster_for(kind: str, nodes: int, folder: Path) -> Iterator[Nodes]:
    """A cluster in which faults of this kind can be made."""
    if kind == "cut":
        if reason := why_not():
            raise click.UsageError(f"--kind cut: {reason}")
        with NamespacedCluster(nodes, folder=folder) as spaced:
            # This thread, and all threads that it starts, speak to the nodes from the bridge.
            enter(spaced.switch)
            yield spaced
    elif kind == "reset":
        with ProxiedCluster(nodes, folder=folder, threads=1) as proxied:
            yield proxied
    else:
        base = free_base_port(nodes)
        with LocalCluster(nodes, threads=1, base_port=base, folder=folder) as cluster:
            yield cluster


class Quota:
    """Gives each node at most `cores` of CPU time, by a control group (version 1) of its own."""

    def __init__(self, cores: float | None) -> None:
        self._cores = cores
        self._groups: set[Path] = set()
        if cores is not None and not (CGROUPS / "cgroup.procs").exists():
            raise click.UsageError(f"--cpu-quota: there are no control groups at {CGROUPS}")

    def hold(self, nodes: list[LocalNode]) -> None:
        """Put all processes of these nodes into their groups."""
        if self._cores is None:
            return
        for node in nodes:
            group = CGROUPS / f"p2pinfer-{os.getpid()}-{node.name}"
            if group not in self._groups:
                group.mkdir()
                self._groups.add(group)
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(int(self._cores * PERIOD_US)))
            process = psutil.Process(node.pid)
            for each in (process, *process.children()):
                (group / "cgroup.procs").write_text(str(each.pid))

    def close(self) -> None:
        """Remove the groups, once the nodes are gone."""
        for group in self._groups:
            procs = group / "cgroup.procs"
            until(lambda procs=procs: not procs.read_text())  # type: ignore[misc]
            group.rmdir()


# --- one run --------------------------------------------------------------------------------------


def strike(kind: str, cluster: Nodes, victim: LocalNode, other: LocalNode) -> Callable[[], None]:
    """Do it; returns how to undo it."""
    if kind in ("follower", "leader"):
        kill(victim)

        def restart() -> None:
            index = int(victim.name.removeprefix("node")) - 1
            cluster.nodes[cluster.nodes.index(victim)] = cluster.start_node(index)

        return restart
    if isinstance(cluster, NamespacedCluster):
        cluster.pull(victim)
        return lambda: cluster.plug(victim)
    if isinstance(cluster, ProxiedCluster):
        cluster.proxy.reset(victim.name, other.name)
        return lambda: None
    process = psutil.Process(victim.pid)
    workers = process.children()
    stopped = workers if kind == "compute-hang" else [process, *workers]
    for each in stopped:
        os.kill(each.pid, signal.SIGSTOP)

    def go_on() -> None:
        for each in stopped:
            os.kill(each.pid, signal.SIGCONT)

    return go_on


@dataclass
class Round:
    """One run: a victim struck at `at` (wall clock), and what all log from then on."""

    kind: str
    cluster: Nodes
    victim: LocalNode
    at: float = 0.0
    diaries: dict[str, Diary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin to read the logs."""
        self.diaries = {node.name: Diary(node) for node in self.cluster.nodes}
        self.rest = [node.name for node in others(self.cluster, self.victim)]

    def _said(self, name: str, *events: str) -> list[Fact]:
        """What a node said since the strike."""
        return [fact for fact in self.diaries[name].facts(*events) if fact["at"] >= self.at]

    def _after(self, facts: list[Fact]) -> float | None:
        """Seconds from the strike to the first of some facts."""
        return min((fact["at"] - self.at for fact in facts), default=None)

    def doubted(self, name: str, *events: str) -> float | None:
        """When a node doubted the victim, or lost it."""
        return self._after([f for f in self._said(name, *events) if f["name"] == self.victim.name])

    def noticed(self) -> float | None:
        """When the first node noticed; of a worker's hang that may be the victim itself."""
        times = [self.doubted(name, "peer_suspected", "peer_dead") for name in self.rest]
        own = self._said(self.victim.name, "worker_hung")
        times.append(self._after([fact for fact in own if fact["hung"]]))
        return min((time for time in times if time is not None), default=None)

    def elected(self) -> float | None:
        """When somebody new led."""
        return self._after([f for name in self.rest for f in self._said(name, "leader_elected")])

    def adopted(self) -> float | None:
        """When the last of the others had a plan in force in which the victim owns nothing; after a
        reset, when the last of all had a plan in force in which all own units."""
        if self.kind == "reset":
            names = [node.name for node in self.cluster.nodes]
            return self._last(
                [
                    self._after(
                        [f for f in self._said(n, "plan_adopted") if set(f["owners"]) == set(names)]
                    )
                    for n in names
                ]
            )
        return self._last(
            [
                self._after(
                    [
                        fact
                        for fact in self._said(name, "plan_adopted")
                        if self.victim.name not in fact["owners"]
                    ]
                )
                for name in self.rest
            ]
        )

    @staticmethod
    def _last(times: list[float | None]) -> float | None:
        known = [time for time in times if time is not None]
        return max(known) if len(known) == len(times) else None

    def times(self) -> dict[str, float | None]:
        """All times in seconds since the strike; None: it did not happen. What all others have to
        see counts from the last of them."""
        doubts = ("peer_suspected", "peer_dead")
        return {
            "noticed_s": self.noticed(),
            "suspected_s": self._last([self.doubted(name, *doubts) for name in self.rest]),
            "dead_s": self._last([self.doubted(name, "peer_dead") for name in self.rest]),
            "elected_s": self.elected(),
            "adopted_s": self.adopted(),
        }


def one_run(kind: str, cluster: Nodes, number: int, quota: Quota) -> tuple[dict[str, Any], Reading]:
    """Strike once, measure, and bring the cluster back to where it was."""
    until(lambda: all_own(cluster), PATIENCE_S, "a part for every node")
    quota.hold(cluster.nodes)
    leads = leader(cluster)
    choices = list(cluster.nodes)
    if kind in ("follower", "leader"):
        choices = [n for n in cluster.nodes if (n.name == leads) == (kind == "leader")]
    victim = choices[number % len(choices)]
    rest = others(cluster, victim)
    addresses = [node.address for node in rest]
    reading = Reading(addresses, PROMPT, LONG, deadline=10 * PATIENCE_S).start().begun()
    this = Round(kind, cluster, victim)
    this.at = time.time()
    undo = strike(kind, cluster, victim, rest[number % len(rest)])
    try:
        until(lambda: this.adopted() is not None, PATIENCE_S, "a plan in force")
        reading.goes_on(mended := time.time(), PATIENCE_S)
    finally:
        undo()
    until(lambda: all_vote(cluster, len(cluster.nodes)), PATIENCE_S, "all voters")
    reading.stop()
    result: dict[str, Any] = {
        name: seconds if seconds is None else round(seconds, 4)
        for name, seconds in this.times().items()
    }
    result["stall_s"] = round(reading.longest_gap(this.at, mended), 4)
    result["longest_gap_s"] = round(reading.longest_gap(), 4)
    result["victim"] = victim.name + (" (leader)" if victim.name == leads else "")
    if reading.errors:
        result["errors"] = reading.errors
    return result, reading


class Truth:
    """The reply as it is when nothing happens, as far as it was needed."""

    def __init__(self, cluster: Nodes) -> None:
        self._cluster = cluster
        self._tokens: list[int] = []

    def begins_with(self, tokens: list[int]) -> bool:
        """Whether the undisturbed reply begins so."""
        if len(self._tokens) < len(tokens):
            params = replace(LONG, max_tokens=min(LONG.max_tokens, 2 * len(tokens)))
            client = Client([self._cluster.nodes[0].address])
            self._tokens = client.submit_json_object(PROMPT, params)["token_ids"]
        return self._tokens[: len(tokens)] == tokens


# --- what it comes to -----------------------------------------------------------------------------


def summary(kind: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, 99th of 100 and worst of every time.

    Where there is a target, a run in which that did not happen counts as the slowest, and is shown
    as null.
    """
    found: dict[str, Any] = {}
    for key in TIMES:
        target = TARGETS[kind].get(key)
        values = [run.get(key) for run in runs]
        known = sorted(v for v in values if v is not None)
        if target is not None:
            known += [inf] * (len(values) - len(known))
        if not known:
            continue
        found[key] = {
            "median": _shown(statistics.median(known)),
            "p99": _shown(known[ceil(0.99 * len(known)) - 1]),
            "worst": _shown(known[-1]),
            "runs": len(known),
        }
        if target is not None:
            within = sum(value <= target for value in known)
            found[key] |= {"target": target, "within": within, "kept": within >= 0.99 * len(known)}
    return found


def _shown(seconds: float) -> float | None:
    return None if seconds == inf else round(seconds, 3)


@click.command()
@click.option("--kind", type=click.Choice(list(TARGETS)), default="follower", show_default=True)
@click.option("--runs", default=100, show_default=True)
@click.option("--nodes", default=3, show_default=True)
@click.option("--cpu-quota", type=float, help="Cores that each node may use, e.g. 0.5.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the nodes' logs here.")
@click.option("--json", "as_json", is_flag=True)
def main(
    *, kind: str, runs: int, nodes: int, cpu_quota: float | None, logs: Path | None, as_json: bool
) -> None:
    """Strike a cluster's nodes again and again, and time what the others do."""
    results: list[dict[str, Any]] = []
    quota = Quota(cpu_quota)
    with tempfile.TemporaryDirectory() as folder:
        place = logs or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        try:
            with cluster_for(kind, nodes, place) as cluster:
                truth = Truth(cluster)
                for number in range(runs):
                    try:
                        result, reading = one_run(kind, cluster, number, quota)
                        result["same"] = truth.begins_with(reading.tokens)
                    except (AssertionError, ClusterError) as error:
                        result = {"errors": [str(error)], "same": None}
                    results.append(result)
                    print(f"{number + 1:4} {json.dumps(result)}", file=sys.stderr, flush=True)
                    if result["same"] is None:
                        break  # the cluster is not as it was
        finally:
            quota.close()
    found = {
        "kind": kind,
        "nodes": nodes,
        "cpu_quota": cpu_quota,
        "runs": len(results),
        "tokens_equal": sum(bool(result["same"]) for result in results),
        "failed": sum("errors" in result for result in results),
        "times": summary(kind, results),
    }
    print(json.dumps(found, indent=None if as_json else 2))


if __name__ == "__main__":
    main()
