"""Does a busy cluster take a living node for dead? Full load, and pauses of up to half a second.

    bin/measure-pauses --minutes 60

Clients keep all nodes computing. Every second or two one node (its control process, its worker, or
both) is stopped for up to 500 ms and continued. No node may be declared dead meanwhile, and every
reply must be the one of an undisturbed cluster. Prints a line a minute and a summary.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import click
import psutil

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from p2pinfer.types import SamplingParams
from tests.faults.watching import facts

PROMPTS = ("Once upon a time", "A brave dog", "The old house", "One day a girl named Clara")
PARAMS = SamplingParams(max_tokens=160, ignore_eos=True)
FALSE = ("peer_dead", "leader_lost", "worker_hung", "pair_broken", "member_slow")
COUNTED = (*FALSE, "peer_suspected", "plan_adopted", "request_finished")


class Load(threading.Thread):
    """One client after another through one node, each reply compared with the right one."""

    def __init__(self, node: LocalNode, right: dict[str, list[int]], until: float) -> None:
        super().__init__(daemon=True)
        self._client = Client([node.address], timeout=20.0)
        self._right = right
        self._until = until
        self.replies = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        """Submit until time is up."""
        while time.monotonic() < self._until:
            prompt = PROMPTS[self.replies % len(PROMPTS)]
            reply = self._client.submit_json_object(prompt, PARAMS)
            self.replies += 1
            if reply["token_ids"] != self._right[prompt]:
                self.wrong.append(f"{prompt}: {reply['error']}")


def pause(node: LocalNode, draw: random.Random) -> tuple[str, float]:
    """Stop a part of a node for a while; returns which, and for how many seconds."""
    control = psutil.Process(node.pid)
    workers = control.children()
    part, processes = draw.choice(
        (("control", [control]), ("worker", workers), ("node", [control, *workers]))
    )
    seconds = draw.uniform(0.05, 0.5)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        threading.Event().wait(seconds)  # the pause itself
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
    return part, seconds


@click.command()
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--nodes", default=3, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(minutes: float, nodes: int, seed: int) -> None:
    """Pause nodes of a busy cluster, and count what was taken for a death."""
    draw, pauses = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        base = free_base_port(nodes)
        with LocalCluster(nodes, threads=1, base_port=base, folder=Path(folder)) as cluster:
            client = Client([cluster.nodes[0].address], timeout=60.0)
            right = {p: client.submit_json_object(p, PARAMS)["token_ids"] for p in PROMPTS}
            began, since = time.monotonic(), time.time()
            end = began + 60 * minutes
            loads = [Load(node, right, end) for node in cluster.nodes]
            for load in loads:
                load.start()
            told = began
            while time.monotonic() < end:
                part, _ = pause(draw.choice(cluster.nodes), draw)
                pauses[part] += 1
                threading.Event().wait(draw.uniform(0.5, 1.5))  # until the next pause
                if time.monotonic() - told >= 60:
                    told = time.monotonic()
                    print(_line(cluster, loads, pauses, since, told - began), file=sys.stderr)
            for load in loads:
                load.join(120)
            found = _counts(cluster, since)
            result = {
                "minutes": round((time.monotonic() - began) / 60, 1),
                "nodes": nodes,
                "pauses": dict(pauses),
                "replies": sum(load.replies for load in loads),
                "wrong": [line for load in loads for line in load.wrong],
                "false_deaths": found["peer_dead"],
                "facts": {name: found[name] for name in COUNTED},
            }
    print(json.dumps(result, indent=2))
    sys.exit(bool(result["false_deaths"] or result["wrong"]))


def _counts(cluster: LocalCluster, since: float) -> Counter[str]:
    return Counter(
        fact["event"] for node in cluster.nodes for fact in facts(node, *COUNTED, since=since)
    )


def _line(
    cluster: LocalCluster, loads: list[Load], pauses: Counter[str], since: float, seconds: float
) -> str:
    found = _counts(cluster, since)
    replies, wrong = sum(load.replies for load in loads), sum(len(load.wrong) for load in loads)
    news = {name: found[name] for name in COUNTED if found[name]}
    return (
        f"{seconds / 60:5.1f} min  {sum(pauses.values())} pauses  {replies} replies  {wrong} wrong "
        f"{json.dumps(news)}"
    )


if __name__ == "__main__":
    main()
