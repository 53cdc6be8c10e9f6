"""Many faults, one after the other, on clusters that live through them.

    bin/kills --kills 100 --case leader --out kills.jsonl

Each time one or two nodes are struck while replies are under way; every reply must be the one of a
node that nobody strikes. Then the nodes come back, and once all units have replicas again it is the
next one's turn. A line of JSON is added to the file for each; a run that was stopped goes on where
it was, and runs of one commit add up. Ends with a table, and exit code 1 if anything failed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace
from rich.console import Console

from p2pinfer.bench.inputs import MODEL_SEED, model_folder, prompt_of
from p2pinfer.errors import ClusterError
from p2pinfer.model.config import load_config, resolve_model
from p2pinfer.model.shapes import make_model
from tests.faults import records
from tests.faults.cases import BY_NAME, CASES, Case
from tests.faults.clusters import Nodes, Quota, Unavailable, cluster_for
from tests.faults.playing import GONE_S, GREEDY, PATIENCE_S, Play, whole
from tests.faults.truth import Ask, Truth
from tests.faults.vitals import Census
from tests.faults.watching import until

ROOT = Path(__file__).resolve().parents[2]
FRESH_STARTS = 3
"""So many clusters of one case may get into a state that nobody expects."""


@dataclass(frozen=True)
class Wanted:
    """What to run: `kills` of each case, on nodes with these settings."""

    cases: tuple[Case, ...]
    kills: int
    nodes: int | None
    shape: str
    context: int
    dtype: str
    replicas: int
    keep_inputs: bool
    seed: int
    cpu_quota: float | None
    out: Path
    logs: Path | None
    commit: str = field(default_factory=lambda: records.commit(ROOT))

    @property
    def model(self) -> str:
        """What the nodes are given."""
        return "demo" if self.shape == "demo" else str(model_folder(self.shape))

    @property
    def asks(self) -> tuple[Ask, ...]:
        """The replies during which nodes are struck, if not those of the case: a greedy one."""
        if not self.context:
            return ()
        vocabulary = load_config(resolve_model(self.model)).vocab_size
        return ((tuple(prompt_of(vocabulary, self.context, 1)), replace(GREEDY, max_tokens=512)),)

    def identity(self, case: Case) -> dict[str, Any]:
        """What a record of a case says of how it was made."""
        return {
            "commit": self.commit,
            "case": case.name,
            "shape": self.shape,
            "context": self.context,
            "dtype": self.dtype,
            "nodes": self.nodes or case.nodes,
            "replicas": self.replicas,
            "cpu_quota": self.cpu_quota,
            "keep_inputs": self.keep_inputs,
        }


class Suite:
    """Runs what is wanted; `log` gets a line per kill."""

    def __init__(self, wanted: Wanted, truth: Truth, folder: Path) -> None:
        self._wanted = wanted
        self._truth = truth
        self._folder = folder

    def run(self) -> int:
        """Run what is not done yet; returns how many runs failed."""
        failed = 0
        for case in self._wanted.cases:
            for _ in range(FRESH_STARTS):
                identity = self._wanted.identity(case)
                begun = records.done(records.read(self._wanted.out), identity)
                if begun >= self._wanted.kills:
                    break
                try:
                    failed += self._on_one_cluster(case, identity, begun)
                except Unavailable as error:
                    print(f"{case.name}: left out: this machine has no {error}", file=sys.stderr)
                    break
                except (AssertionError, ClusterError) as error:
                    failed += 1
                    self._write({"number": begun, "failures": [f"the cluster: {error}"]}, identity)
        return failed

    def _on_one_cluster(self, case: Case, identity: dict[str, Any], begun: int) -> int:
        """Run a case on one cluster until it is done, or the cluster is in no known state."""
        failed, quota = 0, Quota(self._wanted.cpu_quota)
        options = {
            "dtype": self._wanted.dtype,
            "replicas": self._wanted.replicas,
            "keep_inputs": self._wanted.keep_inputs,
        }
        model = self._wanted.model
        place = Path(tempfile.mkdtemp(prefix=f"{case.name}-", dir=self._folder))
        census = Census()
        try:
            with cluster_for(case.network, identity["nodes"], place, options, model) as cluster:
                until(lambda: whole(cluster, self._wanted.replicas), PATIENCE_S, "the cluster")
                for number in range(begun, self._wanted.kills):
                    quota.hold(cluster.nodes)
                    record, known = self._one(case, cluster, number, census)
                    self._write({"number": number} | record, identity)
                    if record["failures"]:
                        failed += 1
                        self._keep(place, f"{case.name}-{number}")
                    if not known:
                        break
            until(lambda: not census.left_over(cluster), GONE_S, "the end of all processes")
        finally:
            quota.close()
        return failed

    def _write(self, record: dict[str, Any], identity: dict[str, Any]) -> None:
        record = identity | {"seed": self._wanted.seed} | record
        records.append(self._wanted.out, record)
        print(json.dumps(record), file=sys.stderr, flush=True)

    def _one(
        self, case: Case, cluster: Nodes, number: int, census: Census
    ) -> tuple[dict[str, Any], bool]:
        """One run's record, and whether the cluster is as it was."""
        draw = random.Random(f"{self._wanted.seed}/{case.name}/{number}")
        play = Play(
            *(case, cluster, self._truth, draw, census, self._wanted.replicas),
            keep_inputs=self._wanted.keep_inputs,
            asks=self._wanted.asks,
        )
        began = time.monotonic()
        try:
            found, known = play.run(), True
        except (AssertionError, ClusterError) as error:
            victims = [node.name for node in play.struck]
            found = {"victims": victims, "failures": [*play.failures, f"stuck: {error}"]}
            known = False
        return found | {"took_s": round(time.monotonic() - began, 1)}, known

    def _keep(self, place: Path, name: str) -> None:
        """Keep the nodes' logs up to a failure, and say where."""
        if self._wanted.logs is None:
            return
        kept = self._wanted.logs / name
        kept.mkdir(parents=True, exist_ok=True)
        for log in place.glob("*.log"):
            shutil.copy(log, kept)
        print(f"logs: {kept}", file=sys.stderr)


def _cases(names: Sequence[str]) -> tuple[Case, ...]:
    return tuple(BY_NAME[name] for name in names) or CASES


@click.command()
@click.option("--kills", default=10, show_default=True, help="Of each case, with those done.")
@click.option("--case", "names", multiple=True, type=click.Choice(list(BY_NAME)), metavar="CASE")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl")
@click.option("--nodes", type=click.IntRange(2, 16), help="Default: what the case needs.")
@click.option("--shape", default="demo", show_default=True, help="Of the model; see model make.")
@click.option("--context", default=0, help="Tokens of the prompt; by default the case's prompts.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--replicas", type=click.IntRange(0, 3), default=1, show_default=True)
@click.option("--keep-inputs", is_flag=True, help="Of all nodes: what KV is made of.")
@click.option("--seed", default=1, show_default=True, help="Decides who is struck, and when.")
@click.option("--cpu-quota", type=float, help="Cores that each node may use, e.g. 0.5.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep logs of failed runs here.")
@click.option("--list", "as_list", is_flag=True, help="Only list the cases.")
@click.option("--table", "only_table", is_flag=True, help="Only print what the file says.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def main(
    *, names: tuple[str, ...], only_table: bool, as_json: bool, as_list: bool, **options: Any
) -> None:
    """Strike nodes of true clusters again and again, and check what their clients see.

    Without --case: all cases.
    """
    if as_list:
        for case in CASES:
            print(f"{case.name:22} {case.fault} {', '.join(case.struck)} {case.moment}")
        return
    if options["out"] is None:
        raise click.UsageError("--out FILE.jsonl is missing: where the records are, or go")
    wanted = Wanted(cases=_cases(names), **options)
    failed = 0
    if not only_table:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
            if wanted.shape != "demo":
                make_model(wanted.shape, Path(wanted.model), seed=MODEL_SEED)
            truth = stack.enter_context(Truth(folder, wanted.model, dtype=wanted.dtype))
            failed = Suite(wanted, truth, folder).run()
    found = [
        record
        for record in records.read(wanted.out)
        if record["case"] in {case.name for case in wanted.cases}
    ]
    if as_json:
        print(json.dumps([records.summary(runs) for runs in records.groups(found).values()]))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(records.table(found))
    if only_table:
        failed = sum(bool(record["failures"]) for record in found)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(prog_name="bin/kills")
