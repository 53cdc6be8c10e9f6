"""How fast a cluster notices and mends: kills, hangs and cut processes, many times, timed.

    bin/measure-faults --kind follower --runs 100

One cluster of true nodes serves a reply all the while. Each run strikes one node, waits until the
rest have a new plan, reads from their logs when they suspected it, elected, and adopted, and
brings it back. Prints one line per run and a summary; `--json` prints an object.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from tests.faults.watching import Reading, all_vote, facts, leader, until

KINDS = ("follower", "leader", "hang", "compute-hang")
PROMPT = "Once upon a time"
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
STRUCK_FACTS = ("peer_suspected", "peer_dead", "leader_elected", "plan_adopted", "worker_hung")


def strike(kind: str, victim: LocalNode) -> list[int]:
    """Do it; returns the process ids that were stopped and must go on later."""
    if kind in ("follower", "leader"):
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
        return []
    process = psutil.Process(victim.pid)
    workers = process.children()
    stopped = workers if kind == "compute-hang" else [process, *workers]
    for each in stopped:
        os.kill(each.pid, signal.SIGSTOP)
    return [each.pid for each in stopped]


class Round:
    """One run: a victim struck at `at`, and what the others logged since."""

    def __init__(self, cluster: LocalCluster, victim: LocalNode, at: float) -> None:
        self.at = at
        self.others = [n for n in cluster.nodes if n is not victim and not n.ending]
        self.victim = victim

    def first(self, event: str, **fields: object) -> float | None:
        """Seconds until the first of the others logged this."""
        times = [
            fact["at"] - self.at
            for node in self.others
            for fact in facts(node, event, since=self.at)
            if fields.items() <= fact.items()
        ]
        return min(times, default=None)

    def adopted(self) -> float | None:
        """Seconds until all others had a plan in force in which the victim owns nothing."""
        times = []
        for node in self.others:
            found = [
                fact["at"] - self.at
                for fact in facts(node, "plan_adopted", since=self.at)
                if self.victim.name not in fact["owners"]
            ]
            if not found:
                return None
            times.append(min(found))
        return max(times)


def one_run(cluster: LocalCluster, kind: str, number: int, nodes: int) -> dict[str, Any]:
    """Strike once, measure, and bring the cluster back to where it was."""
    leads = leader(cluster)
    choices = [n for n in cluster.nodes if (n.name == leads) == (kind == "leader")]
    victim = choices[number % len(choices)]
    reader = next(n for n in cluster.nodes if n is not victim)
    reading = Reading([reader.address], PROMPT, LONG).start()
    until(lambda: len(reading.tokens) > 8, what="the reply")
    at = time.time()
    stopped = strike(kind, victim)
    this = Round(cluster, victim, at)
    until(lambda: this.adopted() is not None, what="a plan without the victim")
    mended = time.time()
    until(lambda: reading.times[-1] > mended, what="the next token")
    gap = max(b - a for a, b in zip(reading.times, reading.times[1:], strict=False))
    result = {
        "suspected_s": this.first("peer_suspected", name=victim.name),
        "dead_s": this.first("peer_dead", name=victim.name),
        "elected_s": this.first("leader_elected") if kind == "leader" else None,
        "adopted_s": this.adopted(),
        "longest_gap_s": gap,
    }
    if stopped:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    else:
        index = int(victim.name.removeprefix("node")) - 1
        cluster.nodes[cluster.nodes.index(victim)] = cluster.start_node(index)
    until(lambda: all_vote(cluster, nodes), what="the cluster with all its nodes")
    reading.join()
    if reading.errors:
        result["errors"] = reading.errors
    result["tokens"] = reading.tokens
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, 99th of 100 and worst of every time."""
    found: dict[str, Any] = {}
    for key in ("suspected_s", "dead_s", "elected_s", "adopted_s", "longest_gap_s"):
        values = sorted(run[key] for run in runs if run[key] is not None)
        if values:
            found[key] = {
                "median": round(statistics.median(values), 3),
                "p99": round(values[max(0, -(-99 * len(values) // 100) - 1)], 3),
                "worst": round(values[-1], 3),
                "runs": len(values),
            }
    return found


@click.command()
@click.option("--kind", type=click.Choice(KINDS), default="follower", show_default=True)
@click.option("--runs", default=100, show_default=True)
@click.option("--nodes", default=3, show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the nodes' logs here.")
@click.option("--json", "as_json", is_flag=True)
def main(kind: str, runs: int, nodes: int, logs: Path | None, as_json: bool) -> None:
    """Strike a cluster's nodes again and again, and time what the others do."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = free_base_port(nodes)
        keep = logs or Path(folder)
        with LocalCluster(nodes, threads=1, base_port=base, folder=keep) as cluster:
            whole = Client([cluster.nodes[0].address]).submit_json_object(PROMPT, LONG)["token_ids"]
            for number in range(runs):
                try:
                    result = one_run(cluster, kind, number, nodes)
                except (AssertionError, ClusterError) as error:
                    result = dict.fromkeys(("suspected_s", "dead_s", "elected_s", "adopted_s"))
                    result |= {"longest_gap_s": None, "errors": [str(error)], "tokens": whole}
                result["same"] = result.pop("tokens") == whole
                results.append(result)
                print(f"{number + 1:4} {json.dumps(result)}", file=sys.stderr, flush=True)
                if any("did not come" in e for e in result.get("errors", ())):
                    break
    found = {
        "kind": kind,
        "nodes": nodes,
        "runs": len(results),
        "tokens_equal": sum(result["same"] for result in results),
        "failed": sum("errors" in result for result in results),
        "times": summary(results),
    }
    print(json.dumps(found, indent=None if as_json else 2))


if __name__ == "__main__":
    main()
