"""A cluster under load and under faults for as long as wanted: nothing may go wrong, hang or leak.

    bin/soak --minutes 60 --seed 7

Clients, good and bad ones, ask all nodes at once while faults drawn by the seed come and go. Every
reply is compared with the one of a node that nobody strikes; processes are watched for memory, open
files and logs that grow. Shows what goes on, and ends with a report, and exit code 1 on any wrong
reply, error, hang, leak, orphan, or node that ended by itself.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from p2pinfer.cluster import LocalNode
from p2pinfer.errors import ClusterError
from tests.faults.blows import restart
from tests.faults.cases import Network
from tests.faults.clusters import Nodes, cluster_for
from tests.faults.kills import ROOT
from tests.faults.load import Customer, Ledger, wishes
from tests.faults.playing import GONE_S, whole
from tests.faults.records import commit
from tests.faults.soak_report import FALSE_DEATHS, live_view, report, table
from tests.faults.truth import Truth
from tests.faults.vitals import Census, Vitals, kv_bytes, vitals
from tests.faults.watching import Diary, until
from tests.faults.weather import HOLDS, ON_THE_WAY, Weather

CALM_S = 240.0
"""When nothing is done to it any more, a cluster is whole again within this."""

SAMPLE_S = 5.0
TURN_S = 0.05
COUNTED = (*FALSE_DEATHS, "peer_suspected", "plan_adopted", "request_finished", "request_restored")


@dataclass(frozen=True)
class Wanted:
    """What the command was told. Times in seconds, rates per minute."""

    minutes: float
    seed: int
    nodes: int
    dtype: str
    replicas: int
    clients: int
    prompts: int
    rate: float
    together: int
    faults: tuple[str, ...]
    network: Network
    hang_after: float


@dataclass
class Life:
    """One process of a node, from its start to its end: when it was looked at, and what it took."""

    name: str
    pid: int
    seen: list[tuple[float, Vitals]] = field(default_factory=list)


class Soak:
    """One run. `failures` are what no run may have."""

    def __init__(self, wanted: Wanted, cluster: Nodes, truth: Truth) -> None:
        self.wanted = wanted
        self.cluster = cluster
        self.began = time.monotonic()
        self.ledger = Ledger()
        self.census = Census()
        self.lives: dict[int, Life] = {}
        self.ended: list[str] = []
        self.stuck: list[str] = []
        self._left: set[int] = set()
        self._sampled = 0.0
        self.diaries = {node.name: Diary(node) for node in cluster.nodes}
        draw = random.Random(f"{wanted.seed}/faults")
        self.weather = Weather(cluster, wanted.faults, draw, wanted.rate, wanted.together)
        pool = wishes(random.Random(f"{wanted.seed}/prompts"), wanted.prompts)
        self._addresses = {node.name: node.address for node in cluster.nodes}
        self._customers = [
            Customer(
                number,
                addresses=self._addresses,
                pool=pool,
                truth=truth,
                ledger=self.ledger,
                seed=wanted.seed,
                retry_for=wanted.hang_after,
            )
            for number in range(wanted.clients)
        ]

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def run(self, live: Live | None) -> None:
        """Load and faults until time is up or something hangs; then calm, and the last checks."""
        self._sample()
        for customer in self._customers:
            customer.start()
        wait, told = threading.Event(), 0.0
        while self.seconds < 60 * self.wanted.minutes and not self.stuck:
            self._turn()
            if live and self.seconds - told > 0.5:
                told = self.seconds
                live.update(live_view(self))
            elif not live and self.seconds - told > 60:
                told = self.seconds
                print(self._line(), file=sys.stderr, flush=True)
            wait.wait(TURN_S)
        self._calm()

    def _turn(self) -> None:
        self.weather.turn()
        for node in self.cluster.nodes:
            self._addresses[node.name] = node.address
            if node.ending and not self.weather.excused(node):
                self.ended.append(f"{node.name} {node.ending}")
                restart(self.cluster, node)
        self.stuck += self.ledger.hanging(self.wanted.hang_after)
        if self.seconds - self._sampled > SAMPLE_S:
            self._sample()

    def _sample(self) -> None:
        """Look at all processes."""
        self._sampled = self.seconds
        self.census.take(self.cluster)
        for node in self.cluster.nodes:
            if found := vitals(node):
                life = self.lives.setdefault(node.pid, Life(node.name, node.pid))
                life.seen.append((self.seconds, found))

    def _calm(self) -> None:
        """No more faults, no more requests: all must come to rest."""
        for customer in self._customers:
            customer.end()
        try:
            self.weather.clear()
            for customer in self._customers:
                customer.join(self.wanted.hang_after)
            self.stuck += self.ledger.hanging(0.0)
            replicas = self.wanted.replicas
            until(lambda: whole(self.cluster, replicas), CALM_S, "a whole cluster")
            until(lambda: kv_bytes(self.cluster) == 0, CALM_S, "an empty KV cache")
            until(lambda: not self.census.left_over(self.cluster), CALM_S, "the end of all orphans")
        except AssertionError as error:
            self.stuck.append(f"in the calm: {error}")
        self._sample()

    def facts(self) -> dict[str, int]:
        """How often the nodes said what."""
        found = dict.fromkeys(COUNTED, 0)
        for diary in self.diaries.values():
            for fact in diary.facts(*COUNTED):
                found[fact["event"]] += 1
        return found

    def _line(self) -> str:
        ledger = self.ledger
        return (
            f"{self.seconds / 60:6.1f} min  {sum(self.weather.counts.values())} faults  "
            f"{dict(ledger.counts)}  {len(ledger.wrong)} wrong  {len(ledger.errors)} errors"
        )


def _run(wanted: Wanted, folder: Path, *, view: bool) -> dict[str, Any]:
    """Run it; returns the report."""
    with ExitStack() as stack:
        truth = stack.enter_context(Truth(folder, dtype=wanted.dtype))
        options = {"dtype": wanted.dtype, "replicas": wanted.replicas}
        cluster = stack.enter_context(
            cluster_for(wanted.network, wanted.nodes, folder / "nodes", options)
        )
        soak = Soak(wanted, cluster, truth)
        console = Console(stderr=True)
        live = stack.enter_context(Live(console=console, transient=True)) if view else None
        soak.run(live)
        found = report(soak)
    try:
        until(lambda: not soak.census.left_over(_Nobody()), GONE_S, "the end of all processes")
    except AssertionError as error:
        found["failures"].append(f"orphan: {error}: {soak.census.left_over(_Nobody())}")
    return {"commit": commit(ROOT), **asdict(wanted), **found}


@dataclass
class _Nobody:
    """A cluster that was stopped."""

    nodes: list[LocalNode] = field(default_factory=list)


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Decides prompts and faults.")
@click.option("--nodes", default=4, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--replicas", default=1, show_default=True)
@click.option("--clients", default=4, show_default=True)
@click.option("--prompts", default=24, show_default=True, help="Different ones.")
@click.option("--rate", default=4.0, show_default=True, help="Faults per minute.")
@click.option("--together", default=1, show_default=True, help="Nodes that are struck at a time.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(HOLDS)), metavar="FAULT")
@click.option("--network", type=click.Choice(["proxy", "direct"]), default="proxy")
@click.option("--hang-after", default=120.0, show_default=True, help="Seconds without a word.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The report as JSON.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the nodes' logs here.")
@click.option("--view/--no-view", default=None, help="A live table; default: in a terminal.")
def main(
    *,
    out: Path | None,
    logs: Path | None,
    view: bool | None,
    faults: tuple[str, ...],
    **options: Any,
) -> None:
    """Keep a cluster under load and under faults, and look whether anything goes wrong."""
    if options["network"] == "direct":
        faults = tuple(f for f in faults or HOLDS if f not in ON_THE_WAY)
    wanted = Wanted(faults=faults or tuple(HOLDS), **options)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        place = logs or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        try:
            found = _run(wanted, place, view=sys.stderr.isatty() if view is None else view)
        except ClusterError as error:
            raise click.ClickException(f"the cluster: {error}") from error
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")
    Console(width=None if sys.stdout.isatty() else 140).print(table(found))
    for failure in found["failures"]:
        print(failure)
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main(prog_name="bin/soak")
