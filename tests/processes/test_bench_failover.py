"""`bench failover` with true nodes: all rungs, and the cost of protection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.bench.failover import available_rungs
from p2pinfer.cluster import free_base_port

pytestmark = pytest.mark.xdist_group("clusters")

DEADLINE_S = 400.0


def bench(folder: Path, *flags: str) -> dict[str, Any]:
    """What one call prints; models lie in `folder`."""
    command = [sys.executable, "-m", "p2pinfer", "bench", "failover", "--shape", "tiny"]
    command += ["--base-port", str(free_base_port(4)), "--context", "64", "--runs", "1", "--json"]
    command += ["--max-tokens", "160"]  # the nodes are asked some things before the kill
    done = subprocess.run(
        [*command, *flags],
        env={**os.environ, "XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(DEADLINE_S)
@pytest.mark.parametrize(
    ("rungs", "pairs"),
    [(("replay", "replica"), 0), pytest.param(available_rungs(), 1, marks=pytest.mark.long)],
    ids=["two", "all"],
)
def test_each_rung_is_run_and_measured(rungs: tuple[str, ...], pairs: int, tmp_path: Path) -> None:
    """The same kill by each: tokens as without it, phases within the pause, and what it cost."""
    report = tmp_path / "report"
    asked = ["--nodes", "3", "--rungs", ",".join(rungs), "--pairs", str(pairs)]
    found = bench(tmp_path, *asked, "--report", str(report))
    assert tuple(found["rungs"]) == rungs
    assert found["same_tokens_by_all"]
    for rung, row in found["rungs"].items():
        assert row["tokens_equal"], rung
        assert row["victims"] == ["node2"]
        phases = row["detect_s"] + row["agree_s"] + row["restore_s"]
        assert 0 < phases < row["stall_s"] + 1.0
    replay, replica = found["rungs"]["replay"], found["rungs"]["replica"]
    assert replay["recomputed_positions"] >= 64 > replica["recomputed_positions"]
    assert replay["delta_bytes"] == replay["memory_bytes"] == 0
    assert replica["delta_bytes"] > 0 < replica["memory_bytes"]
    if pairs:
        assert found["protection"]["pairs"] == pairs
        assert found["protection"]["decode_tokens_per_s_with"] > 0
    assert (report / "failover.md").exists()


@pytest.mark.long
@pytest.mark.timeout(DEADLINE_S)
def test_the_node_that_the_client_speaks_to_can_be_killed(tmp_path: Path) -> None:
    """The client goes to another."""
    flags = ["--victim", "serving", "--rungs", "replica", "--pairs", "0", "--nodes", "3"]
    row = bench(tmp_path, *flags)["rungs"]["replica"]
    assert row["tokens_equal"]
